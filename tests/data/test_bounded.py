"""Hub datasets and files at addresses with a bound on the disk: the same pictures, and few copies at a time."""

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import datasets
import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from handmade import encoded
from PIL import Image
from served import serving
from test_shards import ONE, TWO

from sdxl_trainer.config import Data
from sdxl_trainer.data.sources import records, tables
from sdxl_trainer.errors import UserError
from sdxl_trainer.log import read_metrics
from sdxl_trainer.train import train

FILES, ROWS = 4, 6
HUB = "hf://datasets/owner/name@0123abc/data"


class Hub(MemoryFileSystem):
    """Stands for the hub's file system."""

    protocol = "hf"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]


def noisy(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels))


PICTURES = [noisy(number) for number in range(FILES * ROWS)]


def parquet(number: int) -> bytes:
    numbers = range(number * ROWS, (number + 1) * ROWS)
    images = [{"bytes": PICTURES[n], "path": None} for n in numbers]
    sink = pyarrow.BufferOutputStream()
    captions = ["a red circle" if n % 2 else "a blue square" for n in numbers]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "text": captions}), sink)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryFileSystem]:
    """A dataset of parquet files, `owner/name`, that cannot be downloaded."""
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "hf", Hub)
    system = Hub(skip_instance_cache=True)
    for number in range(FILES):
        system.pipe_file(f"{HUB}/train-{number}.parquet", parquet(number))
    system.pipe_file(f"{HUB}/test-0.parquet", parquet(0))
    splits = {"train": [f"{HUB}/train-{n}.parquet" for n in range(FILES)], "test": [f"{HUB}/test-0.parquet"]}

    def builder(path: str, **_: Any) -> Any:
        assert path == "owner/name"
        return SimpleNamespace(config=SimpleNamespace(data_files={datasets.Split(k): v for k, v in splits.items()}))

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    tables._passing.cache_clear()
    yield system
    tables._passing.cache_clear()
    Hub.store.clear()


def read(place: Path, path: str, **options: Any) -> list[bytes]:
    found = records(Data(path=path, **options), seed=0, where="data.0.path", datasets_dir=str(place))
    return [record.read() for record in found]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    copied: list[str] = []
    copy = tables._copy
    monkeypatch.setattr(tables, "_copy", lambda address, *more: (copied.append(address), copy(address, *more)))
    return copied


def test_a_hub_dataset_passes_through_little_disk(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied, size = counted(monkeypatch), len(parquet(0))
    found = records(
        Data(path="owner/name", disk=f"{2.5 * size / 1e6}MB"), seed=0, where="data.0.path", datasets_dir=str(tmp_path)
    )
    for _ in range(2):
        copied.clear()
        assert [record.read() for record in found] == PICTURES
        assert len(copied) == FILES, "in their order each once"
        there = list(tmp_path.rglob("*.arrow"))
        assert len(there) == 2
        assert sum(path.stat().st_size for path in there) <= 2.5 * size
    copied.clear()
    assert [found[n].read() for n in (3, 20, 9)] == [PICTURES[n] for n in (3, 20, 9)]
    assert read(tmp_path, "owner/name", split="test", disk="1GB") == PICTURES[:ROWS]


def test_a_copy_larger_than_the_bound_is_kept_while_it_is_read(hub: Any, tmp_path: Path) -> None:
    assert read(tmp_path, "owner/name", disk="0.001MB") == PICTURES
    assert len(list(tmp_path.rglob("*.arrow"))) == 1


def test_a_run_on_it_is_that_on_the_files_here(
    hub: Any, config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = counted(monkeypatch)
    (tmp_path / "set").mkdir()
    for number in range(FILES):
        (tmp_path / "set" / f"{number}.parquet").write_bytes(parquet(number))
    losses = []
    disk = f"{1.5 * len(parquet(0)) / 1e6}MB"
    for name, data in (("hub", {"path": "owner/name", "disk": disk}), ("address", {"path": f"{tmp_path}/set/*"})):
        data |= {"path": f"file://{data['path']}"} if name == "address" else {}
        places = {"path": str(tmp_path / f"cache {name}"), "datasets_dir": str(tmp_path / name)}
        made = config(data=[data], cache=places, train={"steps": 3}, output_dir=str(tmp_path / f"run {name}"))
        losses.append([row["loss"] for row in read_metrics(train(made) / "metrics.jsonl")])
        if name == "hub":
            assert set(copied) == {f"{HUB}/train-{n}.parquet" for n in range(FILES)}
            copied.clear()
            shutil.rmtree(tmp_path / f"run {name}")
            assert [row["loss"] for row in read_metrics(train(made) / "metrics.jsonl")] == losses[0]
            assert copied == [], "what is cached is not fetched again"
    assert losses[0] == losses[1]


def test_a_hub_dataset_of_shards_is_read_picture_by_picture(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in (("0", ONE), ("1", TWO)):
        hub.pipe_file(f"{HUB}/{name}.tar", content)
    made = SimpleNamespace(config=SimpleNamespace(data_files={"train": [f"{HUB}/0.tar", f"{HUB}/1.tar"]}))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: made)
    assert len(read(tmp_path, "owner/name", disk="1GB")) == 3
    assert not list(tmp_path.rglob("*.arrow"))


def test_what_the_library_says_of_files(tmp_path: Path) -> None:
    """The stub's shape is that of the library: which files a split has is known before any is read."""
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        (tmp_path / f"{name}.parquet").write_bytes(parquet(0))
    builder = datasets.load_dataset_builder(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    found = {str(name): [Path(file).name for file in files] for name, files in builder.config.data_files.items()}
    assert found == {
        "train": ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        "test": ["test-00000-of-00001.parquet"],
    }


@pytest.mark.parametrize(
    ("path", "options", "what", "fix"),
    [
        ("owner/name", {"split": "valid"}, "no files of a split 'valid'", "set 'split'; "),
        ("owner/name", {"split": "train[:10%]"}, "no files of a split", "max_samples"),
        ("owner/name", {"image_column": "photo"}, "no column 'photo'; columns: image, text", "image"),
        ("memory://shards", {}, "'disk' has no effect: these are shards", "remove 'disk'"),
        (".", {}, "'disk' has no effect: this is a folder here", "remove 'disk'"),
    ],
)
def test_what_does_not_go_with_a_bound(
    hub: Any, tmp_path: Path, path: str, options: dict[str, Any], what: str, fix: str
) -> None:
    fsspec.filesystem("memory").pipe("/shards/s.tar", ONE)
    with pytest.raises(UserError, match=what.replace("[", r"\[")) as caught:
        read(tmp_path, path, disk="1GB", **options)
    assert fix in caught.value.fix
    fsspec.filesystem("memory").rm("/shards", recursive=True)


def test_pictures_alone_cannot_be_bounded(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = SimpleNamespace(config=SimpleNamespace(data_files={"train": [f"{HUB}/0.jpg", f"{HUB}/metadata.csv"]}))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: made)
    with pytest.raises(UserError, match=r"read from parquet files or from \.tar shards, and this one has hf://"):
        read(tmp_path, "owner/name", disk="1GB")


def test_parquet_and_shards_of_a_web_server(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.parquet").write_bytes(parquet(1))
    (tmp_path / "served" / "s.tar").write_bytes(ONE)
    with serving(tmp_path / "served") as address:
        assert read(tmp_path, f"{address}/a.parquet") == PICTURES[ROWS : 2 * ROWS]
        assert read(tmp_path, f"{address}/a.parquet", disk="1GB") == PICTURES[ROWS : 2 * ROWS]
        assert len(read(tmp_path, f"{address}/s.tar")) == 2
        with pytest.raises(UserError, match="nothing is there"):
            read(tmp_path, f"{address}/none.tar")
    with serving(tmp_path / "served", ranges=False) as address:
        with pytest.raises(UserError, match="sends the whole file where a part"):
            read(tmp_path, f"{address}/s.tar")
