"""Datasets saved on disk, in parquet files, and on the hub: rows become records, whatever the columns are called."""

import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from folders import PNG, captions, records, write
from handmade import encoded
from PIL import Image

from sdxl_trainer.errors import UserError

PICTURES = [encoded(Image.new("RGB", (4 + index, 4))) for index in range(10)]


def made(count: int = 10, image: str = "image", text: str = "text", **columns: Any) -> datasets.Dataset:
    rows = {image: [{"bytes": content, "path": None} for content in PICTURES[:count]]}
    rows |= {text: [f" caption {index}\n" for index in range(count)]} | columns
    return datasets.Dataset.from_dict(rows).cast_column(image, datasets.Image())


def as_saved(root: Path, dataset: datasets.Dataset) -> None:
    dataset.save_to_disk(root)


def as_dict(root: Path, dataset: datasets.Dataset) -> None:
    datasets.DatasetDict({"train": dataset, "validation": dataset.select(range(2))}).save_to_disk(root)


def as_parquet(root: Path, dataset: datasets.Dataset) -> None:
    write(root, {"README.md": "# A dataset\n"})
    dataset.select(range(6)).to_parquet(root / "data" / "train-00000-of-00002.parquet")
    dataset.select(range(6, len(dataset))).to_parquet(root / "data" / "train-00001-of-00002.parquet")


def as_shards(root: Path, dataset: datasets.Dataset) -> None:
    dataset.save_to_disk(root, num_shards=3)


LAYOUTS: dict[str, Callable[[Path, datasets.Dataset], None]] = {
    "saved": as_saved,
    "dict": as_dict,
    "parquet": as_parquet,
    "shards": as_shards,
}


@pytest.fixture(autouse=True)
def no_bars() -> Any:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(params=LAYOUTS)
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    (tmp_path / "set" / "data").mkdir(parents=True)
    LAYOUTS[request.param](tmp_path / "set", made())
    return tmp_path / "set"


def test_rows_become_records(folder: Path) -> None:
    found = records(folder)
    assert [record.read() for record in found] == PICTURES
    assert [record.captions for record in found] == [(f"caption {index}",) for index in range(10)]
    assert [record.name for record in found] == [f"{folder}[train] row {index}" for index in range(10)]
    assert len({record.stamp for record in found}) == 10
    assert all(record.stamp.endswith(f":{index}") for index, record in enumerate(found))
    assert [record.stamp for record in records(folder)] == [record.stamp for record in found]


def test_slices_of_splits(folder: Path) -> None:
    assert [record.read() for record in records(folder, split="train[50%:]")] == PICTURES[5:]
    found = records(folder, split="train[7:9]+train[:1]")
    assert [record.read() for record in found] == [PICTURES[7], PICTURES[8], PICTURES[0]]
    assert [record.name.split()[-1] for record in found] == ["7", "8", "0"]


def test_subsets_keep_the_order(folder: Path) -> None:
    names = [record.name for record in records(folder)]
    chosen = [record.name for record in records(folder, max_samples=4)]
    assert len(chosen) == 4
    assert chosen == [name for name in names if name in chosen]


def read_all(found: list[Any]) -> list[bytes]:
    return [record.read() for record in found]


def test_records_are_read_in_another_process(tmp_path: Path) -> None:
    as_shards(tmp_path / "set", made())
    found = records(tmp_path / "set")
    assert len(pickle.dumps(found[0])) < 2000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(read_all, (found,)) == PICTURES


def test_the_validation_split(tmp_path: Path) -> None:
    as_dict(tmp_path / "set", made())
    assert len(records(tmp_path / "set", split="validation")) == 2
    assert len(records(tmp_path / "set", split="train+validation")) == 12


def test_any_column_names_and_lists_of_captions(tmp_path: Path) -> None:
    dataset = made(2, image="photo", text="other", words=[["one", " eins"], ["two"]])
    dataset.save_to_disk(tmp_path / "set")
    found = records(tmp_path / "set", image_column="photo", caption_column="words")
    assert [record.captions for record in found] == [("one", "eins"), ("two",)]


def test_a_sub_folder_of_a_dataset(tmp_path: Path) -> None:
    for name, count in (("small", 2), ("large", 5)):
        (tmp_path / "set" / name).mkdir(parents=True)
        made(count).to_parquet(tmp_path / "set" / name / "train.parquet")
    assert len(records(tmp_path / "set", folder="small")) == 2


@pytest.mark.parametrize("kind", [pyarrow.binary(), pyarrow.large_binary()])
def test_plain_bytes_without_the_librarys_features(tmp_path: Path, kind: pyarrow.DataType) -> None:
    table = pyarrow.table({"image": pyarrow.array(PICTURES[:2], kind), "text": ["a", "b"]})
    (tmp_path / "set").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "set" / "train.parquet")
    assert [record.read() for record in records(tmp_path / "set")] == PICTURES[:2]


@pytest.mark.parametrize("form", ["string", "struct"])
def test_pictures_as_files_of_the_dataset(tmp_path: Path, form: str) -> None:
    root = write(tmp_path / "set", {"files/a.png": None, "files/b.png": None})
    paths: list[Any] = ["files/a.png", "files/b.png"]
    if form == "struct":
        paths = [{"bytes": None, "path": path} for path in paths]
    pyarrow.parquet.write_table(pyarrow.table({"image": paths, "text": ["a", "b"]}), root / "train.parquet")
    found = records(root)
    assert found[0].read() == PNG
    assert found[1].name == f"{root}[train] row 1"
    assert found[1].stamp.startswith(str(root.resolve() / "files/b.png:"))
    assert pickle.loads(pickle.dumps(found[1])).read() == PNG


def test_illustrations_beside_parquet_files_are_not_the_data(tmp_path: Path) -> None:
    as_parquet(tmp_path / "set", made())
    write(tmp_path / "set", {"assets/example.png": None})
    assert len(records(tmp_path / "set")) == 10


def test_parquet_files_beside_pictures_are_not_the_data(tmp_path: Path) -> None:
    root = write(tmp_path / "set", {"a.png": None, "a.txt": "x", "broken.parquet": b"?"})
    assert captions(records(root)) == {"a.png": ("x",)}
    (root / "broken.parquet").unlink()
    pyarrow.parquet.write_table(pyarrow.table({"tag": ["x"]}), root / "tags.parquet")
    assert captions(records(root)) == {"a.png": ("x",)}


def test_one_caption_for_all(tmp_path: Path) -> None:
    made(3, text="label").remove_columns("label").save_to_disk(tmp_path / "set")
    assert {record.captions for record in records(tmp_path / "set", caption=" a dog")} == {("a dog",)}


# Bad input


def table(root: Path, **columns: Any) -> None:
    """A parquet dataset of these columns."""
    root.mkdir()
    pyarrow.parquet.write_table(pyarrow.table(columns), root / "train.parquet")


def saved(root: Path, **columns: Any) -> None:
    made(2, **columns).save_to_disk(root)


def damaged(root: Path) -> None:
    saved(root)
    next(root.glob("*.arrow")).write_bytes(b"nothing")


def without_state(root: Path) -> None:
    saved(root)
    (root / "state.json").write_text("{")


def not_parquet(root: Path) -> None:
    write(root, {"train.parquet": "version https://git-lfs.github.com/spec/v1\n"})


STORED = [{"bytes": PNG, "path": None}] * 2
BAD: dict[str, tuple[Callable[[Path], None], dict[str, Any], str, str]] = {
    "image column wrong": (
        lambda root: saved(root, image="photo"),
        {},
        "no column 'image'; columns: photo, text",
        "set image_column = 'photo'",
    ),
    "caption column wrong": (
        lambda root: saved(root, text="caption"),
        {},
        "no column 'text'; columns: image, caption",
        "set caption_column = 'caption'",
    ),
    "caption column misspelt among many": (
        lambda root: saved(root, text="prompt", title=["a", "b"]),
        {"caption_column": "promt"},
        "no column 'promt'; columns: image, prompt, title",
        "did you mean 'prompt'?",
    ),
    "column is no picture": (
        lambda root: table(root, image=[1, 2], text=["a", "b"]),
        {},
        "column 'image' holds int64, not pictures",
        "set image_column",
    ),
    "captions are numbers": (
        lambda root: table(root, image=STORED, text=[1, 2]),
        {},
        "captions are not text",
        "strings",
    ),
    "caption missing": (
        lambda root: table(root, image=STORED, text=["a", None]),
        {},
        "1 caption is empty: ",
        "give 'caption'",
    ),
    "caption empty": (lambda root: table(root, image=STORED, text=["a", "  "]), {}, "1 caption is empty", "write them"),
    "no picture in a row": (
        lambda root: table(root, image=[STORED[0], {"bytes": None, "path": None}], text=["a", "b"]),
        {},
        "1 row has no picture: ",
        "remove the rows",
    ),
    "picture of zero bytes": (
        lambda root: table(root, image=[STORED[0], {"bytes": b"", "path": None}], text=["a", "b"]),
        {},
        "1 row has no picture: ",
        "remove the rows",
    ),
    "file outside of the dataset": (
        lambda root: table(root, image=["/etc/passwd"], text=["a"]),
        {},
        "outside of the dataset: /etc/passwd",
        "put the pictures",
    ),
    "file above the dataset": (
        lambda root: table(root, image=["../../x.png"], text=["a"]),
        {},
        "outside of the dataset: ../../x.png",
        "put the pictures",
    ),
    "file missing": (lambda root: table(root, image=["x.png"], text=["a"]), {}, "do not exist: x.png", "restore"),
    "split of a dataset": (saved, {"split": "test"}, "no split 'test'", "allowed: train"),
    "split not understood": (saved, {"split": "train[:"}, "no split 'train[:'", "did you mean 'train'?"),
    "split without rows": (saved, {"split": "train[5:]"}, "has no rows", "another split"),
    "folder without effect": (saved, {"folder": "x"}, "'folder' has no effect", "remove 'folder'"),
    "configuration unknown": (
        lambda root: table(root, image=STORED, text=["a", "b"]),
        {"name": "x"},
        "'x' not found",
        "set 'name'",
    ),
    "saved dataset damaged": (damaged, {}, "cannot be opened", "once more"),
    "state damaged": (without_state, {}, "cannot be opened", "once more"),
    "not a parquet file": (not_parquet, {}, "cannot be opened as a dataset", "download"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_datasets(tmp_path: Path, case: str) -> None:
    make, options, what, fix = BAD[case]
    make(tmp_path / "set")
    with pytest.raises(UserError) as caught:
        records(tmp_path / "set", **options)
    assert what in caught.value.what
    assert fix in caught.value.fix
    assert caught.value.where == f"data.0.path = '{tmp_path / 'set'}'"


def test_a_dataset_that_disappears_is_named(tmp_path: Path) -> None:
    saved(tmp_path / "set")
    record = records(tmp_path / "set")[0]
    args = (str(tmp_path / "gone.arrow"), *record.read.args[1:])  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="row 0"):
        record.read.func(*args)  # type: ignore[attr-defined]


# The hub


def test_hub_offline(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        records("owner/no-such-dataset", caption="x")
    assert "cannot be fetched from the hub" in caught.value.what
    assert "HF_HUB_OFFLINE" in caught.value.fix


HUB: dict[str, tuple[Exception, str, str]] = {
    "not found": (
        datasets.exceptions.DatasetNotFoundError(
            "Dataset 'owner/name' doesn't exist on the Hub or cannot be accessed."
        ),
        "no such dataset on the hub",
        "check the spelling",
    ),
    "gated": (
        datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' is a gated dataset on the Hub."),
        "gated",
        "ask for access",
    ),
    "no network": (ConnectionError("Couldn't reach 'owner/name' on the Hub"), "cannot be fetched", "network"),
    "configurations": (
        ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']"),
        "pick one among the available configs: ['a', 'b']",
        "set 'name'",
    ),
    "script": (RuntimeError("Dataset scripts are no longer supported, but found x.py"), "scripts", "parquet"),
    "folder": (
        datasets.exceptions.DataFilesNotFoundError("No (supported) data files found in owner/name"),
        "data files",
        "set 'folder'",
    ),
    "damaged": (datasets.exceptions.DatasetGenerationError("An error occurred"), "cannot be opened", "once more"),
    "disk full": (OSError(28, "No space left on device"), "No space left on device", "space"),
}


@pytest.mark.parametrize("case", HUB)
def test_hub_errors_in_our_words(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, what, fix = HUB[case]

    def load_dataset_builder(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    with pytest.raises(UserError) as caught:
        records("owner/name")
    assert what in caught.value.what
    assert fix in caught.value.fix


def test_options_reach_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_dict(tmp_path / "set", made())
    seen: dict[str, Any] = {}

    class Builder:
        cache_dir = str(tmp_path / "set")

        def download_and_prepare(self) -> None:
            seen["prepared"] = True

        def as_dataset(self) -> Any:
            assert seen["prepared"]
            return datasets.load_from_disk(tmp_path / "set")

    def load_dataset_builder(path: str, **options: Any) -> Builder:
        seen.update(options, path=path)
        return Builder()

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    found = records("owner/name", name="config", folder="sub", split="validation")
    assert [record.name for record in found] == ["owner/name[validation] row 0", "owner/name[validation] row 1"]
    assert {key: seen[key] for key in ("path", "name", "data_dir")} == {
        "path": "owner/name",
        "name": "config",
        "data_dir": "sub",
    }
