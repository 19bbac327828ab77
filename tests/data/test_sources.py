"""Folders of pictures: which pictures and captions are found, in which order, and what is refused."""

import io
import logging
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from folders import PNG, captions, jsonl, records, row, write
from hypothesis import given
from hypothesis import strategies as st

from sdxl_trainer.data import sources
from sdxl_trainer.data.sources.tree import natural
from sdxl_trainer.errors import UserError


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


# Captions

METADATA = {
    "metadata.jsonl": jsonl(row("a.png", " one "), row("sub/b.png", ["two", "zwei\n"])),
    "metadata.csv": 'file_name,text\na.png," one "\nsub/b.png,"two, or\nmore"\n',
    "metadata.parquet": parquet([row("a.png", ["one"]), row("sub/b.png", ["two", "zwei"])]),
    "METADATA.JSONL": "\ufeff" + jsonl(row("./a.png", "one"), row("sub\\b.png", "two")) + "\n",
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata(tmp_path: Path, name: str) -> None:
    found = captions(records(write(tmp_path, {"a.png": None, "sub/b.png": None, name: METADATA[name]})))
    assert list(found) == ["a.png", "sub/b.png"]
    assert found["a.png"] == ("one",)
    expected = {"metadata.jsonl": ("two", "zwei"), "metadata.csv": ("two, or\nmore",), "METADATA.JSONL": ("two",)}
    assert found["sub/b.png"] == expected.get(name, ("two", "zwei"))


def test_metadata_in_sub_folders_and_text_files_elsewhere(tmp_path: Path) -> None:
    files = {
        "x/metadata.jsonl": jsonl(row("1.png"), row("deep/2.png"), row("../y/3.png", "a dog")),
        "x/1.png": None,
        "x/deep/2.png": None,
        "y/3.png": None,
        "y/3.txt": "not used: metadata names the picture",
        "z/4.png": None,
        "z/4.txt": "\ufeff  a bird\non a tree \n",
    }
    found = captions(records(write(tmp_path, files)))
    assert found == {
        "x/1.png": ("a cat",),
        "x/deep/2.png": ("a cat",),
        "y/3.png": ("a dog",),
        "z/4.png": ("a bird\non a tree",),
    }


def test_captions_with_unusual_line_separators(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": None, "metadata.jsonl": '{"file_name": "a.png", "text": "one\u2028two\x85three"}\r\n'})
    assert captions(records(tmp_path)) == {"a.png": ("one\u2028two\x85three",)}


def test_another_caption_column(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": None, "metadata.jsonl": jsonl({"file_name": "a.png", "prompt": "x", "text": "y"})})
    assert captions(records(tmp_path, caption_column="prompt")) == {"a.png": ("x",)}


def test_text_files_beside_pictures(tmp_path: Path) -> None:
    files = {
        "a.png": None,
        "a.caption": "second",
        "a.txt": "first",
        "b.JPG": None,
        "b.caption": "bild",
        "c.c.png": None,
    }
    found = captions(records(write(tmp_path, files | {"c.c.txt": "dots"})))
    assert found == {"a.png": ("first",), "b.JPG": ("bild",), "c.c.png": ("dots",)}


def test_one_caption_for_all_that_have_none(tmp_path: Path) -> None:
    listed = jsonl(row("m/1.png", "own"), row("m/2.png", None), row("m/3.png", " "))
    pictures = dict.fromkeys(["m/1.png", "m/2.png", "m/3.png", "m/4.png", "n/5.png", "n/6.png"])
    write(tmp_path, pictures | {"metadata.jsonl": listed, "n/5.txt": "own", "n/6.txt": "\n"})
    found = captions(records(tmp_path, caption=" a sks dog "))
    shared = ("a sks dog",)
    assert list(found.values()) == [("own",), shared, shared, shared, ("own",), shared]


def test_metadata_without_captions_and_one_for_all(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": None, "metadata.jsonl": jsonl({"file_name": "a.png"})})
    assert captions(records(tmp_path, caption="")) == {"a.png": ("",)}


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "Png", "webp", "BMP", "gif", "tif", "TIFF", "avif"])
def test_extensions_in_any_case(tmp_path: Path, suffix: str) -> None:
    assert len(records(write(tmp_path, {f"a.{suffix}": None}), caption="x")) == 1


# Order, names, stamps


def test_order_is_natural_and_does_not_depend_on_the_file_system(tmp_path: Path) -> None:
    names = ["img10.png", "img2.png", "Img1.png", "a/10/x.png", "a/9/x.png", "b2.png", "B10.png", "img02.png"]
    write(tmp_path, dict.fromkeys(names))
    found = [record.name for record in records(tmp_path, caption="x")]
    expected = ["a/9/x.png", "a/10/x.png", "b2.png", "B10.png", "Img1.png", "img02.png", "img2.png", "img10.png"]
    assert found == expected


@given(st.permutations(["a", "A", "a1", "a01", "a10", "a2", "1", "01", "1a", "", "é2", "é10", "²", "a/b", "a/B1"]))
def test_natural_order_is_total(names: list[str]) -> None:
    assert sorted(names, key=natural) == sorted(sorted(names), key=natural)


def test_records_can_be_sent_and_read_elsewhere(tmp_path: Path) -> None:
    record = records(write(tmp_path, {"a.png": None}), caption="x")[0]
    assert pickle.loads(pickle.dumps(record)).read() == PNG
    assert len(pickle.dumps(record)) < 2000


def test_stamp_follows_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, {"a.png": None}) / "a.png"
    status = path.stat()
    first = records(tmp_path, caption="x")[0].stamp
    assert first == f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"
    assert records(tmp_path, caption="y")[0].stamp == first
    os.utime(path, ns=(0, 12345))
    assert records(tmp_path, caption="x")[0].stamp == f"{path.resolve()}:{status.st_size}:12345"


def test_a_picture_that_disappears_is_named(tmp_path: Path) -> None:
    record = records(write(tmp_path, {"a.png": None}), caption="x")[0]
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match="cannot be read") as caught:
        record.read()
    assert caught.value.where == "a.png"


def test_what_is_left_out_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {
        "a.png": None,
        "a.txt": "x",
        "lonely.txt": "x",
        "__MACOSX/b.png": None,
        "Thumbs.db": b"",
        ".hidden/c.png": None,
        "._a.png": None,
        "raw.psd": b"",
        "notes.md": "",
        "README": "",
        "a-masklabel.png": None,
    }
    # Warnings reach the terminal although nothing sets logging up; lines below them do not.
    with caplog.at_level(logging.WARNING, "sdxl_trainer"):
        assert len(records(write(tmp_path, files))) == 1
    assert "1 picture" in caplog.text
    for part in ["hidden 4", ".psd 1", ".md 1", "no extension 1", "masks 1", "caption files not used 1"]:
        assert part in caplog.text


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_the_first_of_several_processes_says_it(tmp_path: Path, rank: str, lines: int) -> None:
    write(tmp_path, {"a.png": None, "a.txt": "x", "b.psd": b"x"})
    code = f"from folders import records; from pathlib import Path; records(Path({str(tmp_path)!r}))"
    environment = {**os.environ, "RANK": rank, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stderr.count("1 picture, 0 captioned by metadata; skipped: .psd 1") == lines


def test_photographs_that_cannot_be_read_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(records(write(tmp_path, {"a.png": None, "a.txt": "x", "IMG_1.DNG": b"x"}))) == 1
    assert "convert .dng to JPEG or PNG" in caplog.text
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match=re.escape("1 .dng")) as caught:
        records(tmp_path)
    assert "convert .dng to JPEG or PNG" in caught.value.fix


def test_endings_of_captions_may_be_upper_case(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (found,) = records(write(tmp_path, {"a.JPG": None, "a.TXT": "x"}))
    assert found.captions == ("x",)
    assert "not used" not in caplog.text


# Splits and subsets


def test_sub_folders_named_like_splits(tmp_path: Path) -> None:
    write(tmp_path, {"train/a.png": None, "train/x/b.png": None, "validation/c.png": None, "test/d.png": None})
    assert [r.name for r in records(tmp_path, caption="x")] == ["train/a.png", "train/x/b.png"]
    assert [r.name for r in records(tmp_path, caption="x", split="validation")] == ["validation/c.png"]
    assert len(records(tmp_path, caption="x", folder="train")) == 2


def test_metadata_above_the_splits(tmp_path: Path) -> None:
    listed = jsonl(row("train/a.png", "one"), row("validation/b.png", "two"))
    write(tmp_path, {"train/a.png": None, "validation/b.png": None, "metadata.jsonl": listed})
    assert captions(records(tmp_path)) == {"train/a.png": ("one",)}
    assert captions(records(tmp_path, split="validation")) == {"validation/b.png": ("two",)}


def test_without_split_folders_all_is_the_train_split(tmp_path: Path) -> None:
    assert len(records(write(tmp_path, {"dogs/a.png": None, "validation/b.png": None}), caption="x")) == 2


def test_subset_is_drawn_by_the_seed_in_the_original_order(tmp_path: Path) -> None:
    write(tmp_path, {f"{index}.png": None for index in range(30)})
    every = [record.name for record in records(tmp_path, caption="x")]
    chosen = [record.name for record in records(tmp_path, caption="x", max_samples=10)]
    assert [name for name in every if name in chosen] == chosen
    assert len(chosen) == 10
    assert chosen != [record.name for record in records(tmp_path, caption="x", max_samples=10, seed=1)]
    assert chosen == [record.name for record in records(tmp_path, caption="x", max_samples=10)]


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 200), st.integers(0, 1 << 62))
def test_subsets_are_nested(count: int, small: int, large: int, seed: int) -> None:
    small, large = sorted((small, large))
    chosen = sources.subset(count, large, seed)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(count, large)
    assert set(sources.subset(count, small, seed)) <= set(chosen) <= set(range(count))


def test_more_samples_wanted_than_there_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sdxl_trainer"):
        assert len(records(write(tmp_path, {"a.png": None}), caption="x", max_samples=5)) == 1
    assert "max_samples is 5, there are 1 pictures" in caplog.text


# Links


def test_links_inside_of_the_folder(tmp_path: Path) -> None:
    root = write(tmp_path / "data", {"x/a.png": None, "x/a.txt": "one", "b.txt": "two"})
    (root / "b.png").symlink_to("x/a.png")
    (root / "y").symlink_to("x")
    (root / "notes").symlink_to("../nowhere")
    found = records(root)
    assert captions(found) == {"b.png": ("two",), "x/a.png": ("one",)}
    assert found[0].stamp == found[1].stamp


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    write(tmp_path / "real", {"a.png": None})
    (tmp_path / "link").symlink_to("real")
    assert records(tmp_path / "link", caption="x")[0].stamp.startswith(str((tmp_path / "real").resolve()))


def test_metadata_through_a_linked_folder(tmp_path: Path) -> None:
    write(tmp_path, {"x/a.png": None, "metadata.jsonl": jsonl(row("y/a.png"))})
    (tmp_path / "y").symlink_to("x")
    assert captions(records(tmp_path)) == {"x/a.png": ("a cat",)}
