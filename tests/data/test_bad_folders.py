"""What is wrong with a folder of pictures is told at once, with names and a fix."""

import os
from pathlib import Path
from typing import Any

import pytest
from folders import jsonl, records, row, write

from sdxl_trainer.data import sources
from sdxl_trainer.errors import UserError


@pytest.mark.parametrize(
    ("link", "target", "what"),
    [
        ("a.png", "../outside/a.png", "1 link leads out of the folder: a.png"),
        ("a.txt", "../outside/a.png", "1 link leads out of the folder: a.txt"),
        ("metadata.csv", "../outside/a.png", "1 link leads out of the folder: metadata.csv"),
        ("sub", "../outside", "1 link leads out of the folder: sub"),
        ("sub", ".", "1 link leads in a circle: sub"),
        ("x/sub", "..", "1 link leads in a circle: x/sub"),
        ("a.png", "a.png", "1 link leads in a circle: a.png"),
        ("a.png", "nothing.png", "1 link leads nowhere: a.png"),
    ],
)
def test_links_that_are_refused(tmp_path: Path, link: str, target: str, what: str) -> None:
    write(tmp_path, {"data/x/b.png": None, "data/x/b.txt": "x", "outside/a.png": None})
    (tmp_path / "data" / link).symlink_to(target)
    with pytest.raises(UserError) as caught:
        records(tmp_path / "data")
    assert what in caught.value.what


def test_names_that_leave_through_a_hidden_link(tmp_path: Path) -> None:
    write(
        tmp_path, {"data/a.png": None, "data/metadata.jsonl": jsonl(row("a.png"), row(".x/b.png")), "out/b.png": None}
    )
    (tmp_path / "data" / ".x").symlink_to("../out")
    with pytest.raises(UserError, match=r"outside of the folder: \.x/b\.png"):
        records(tmp_path / "data")


# Bad input: files, options, what is said, how to fix it

TWO = {"a.png": None, "b.png": None}
BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "no caption": (TWO, {}, "2 pictures have no caption: a.png, b.png", ".txt file"),
    "empty caption file": ({"a.png": None, "a.txt": " \n"}, {}, "1 caption is empty: a.txt", "caption"),
    "caption file not UTF-8": ({"a.png": None, "a.txt": b"\xc4\xe3"}, {}, "not UTF-8 text: a.txt", "UTF-8"),
    "picture of zero bytes": ({"a.png": b"", "a.txt": "x"}, {}, "1 picture is empty (zero bytes): a.png", "restore"),
    "missing picture": (
        TWO | {"metadata.jsonl": jsonl(row("a.png"), row("b.png"), row("aa.png"))},
        {},
        "1 metadata row names pictures that do not exist: aa.png (metadata.jsonl:3; there is a.png)",
        "file_name",
    ),
    "zero byte in a name": (
        TWO | {"metadata.jsonl": jsonl(row("a.png"), row("b.png"), row("\0"))},
        {},
        "1 metadata row names pictures that do not exist",
        "file_name",
    ),
    "name longer than any path": (
        {"a.png": None, "metadata.jsonl": jsonl(row("a.png"), row("long" * 5000))},
        {},
        "do not exist",
        "file_name",
    ),
    "picture that no row names": (
        TWO | {"metadata.jsonl": jsonl(row("b.png"))},
        {},
        "1 picture is named by no metadata row: a.png",
        "add a row",
    ),
    "two rows for a picture": (
        {"a.png": None, "metadata.jsonl": jsonl(row("a.png"), row("./a.png"))},
        {},
        "named by more than one metadata row: a.png (metadata.jsonl:1 and metadata.jsonl:2)",
        "keep one row",
    ),
    "rows in two files for a picture": (
        {"x/a.png": None, "metadata.jsonl": jsonl(row("x/a.png")), "x/metadata.csv": "file_name,text\na.png,x\n"},
        {},
        "x/a.png (metadata.jsonl:1 and x/metadata.csv:2)",
        "keep one row",
    ),
    "empty caption in metadata": (
        TWO | {"metadata.jsonl": jsonl(row("a.png", ""), row("b.png", None))},
        {},
        "2 captions are empty: a.png (metadata.jsonl:1), b.png (metadata.jsonl:2)",
        "write them",
    ),
    "empty list of captions": (
        {"a.png": None, "metadata.jsonl": jsonl(row("a.png", []))},
        {},
        "1 caption is empty",
        "write",
    ),
    "empty caption in a list": (
        {"a.png": None, "metadata.jsonl": jsonl(row("a.png", ["x", ""]))},
        {},
        "1 caption is empty: a.png",
        "write them",
    ),
    "caption is a number": ({"a.png": None, "metadata.jsonl": jsonl(row("a.png", 7))}, {}, "not text: a.png", "string"),
    "caption is an object": (
        {"a.png": None, "metadata.jsonl": jsonl(row("a.png", [{"x": 1}]))},
        {"caption": "x"},
        "1 caption is not text",
        "string",
    ),
    "row without file name": (
        {"a.png": None, "metadata.jsonl": jsonl(row("a.png"), {"text": "x"}, row(""))},
        {},
        "2 metadata rows have no file_name: metadata.jsonl:2, metadata.jsonl:3",
        "relative to the metadata file",
    ),
    "name leads out of the folder": (
        {"a.png": None, "metadata.jsonl": jsonl(row("a.png"), row("../b.png"))},
        {},
        "names files outside of the folder: ../b.png (metadata.jsonl:2)",
        "move the pictures",
    ),
    "name leads out and back": (
        {"s/a.png": None, "s/metadata.jsonl": jsonl(row("a.png"), row("../../../etc/passwd"))},
        {},
        "outside of the folder: ../../../etc/passwd",
        "move",
    ),
    "absolute name": (
        {"a.png": None, "metadata.jsonl": jsonl(row("a.png"), row("/etc/passwd"))},
        {},
        "outside of the folder: /etc/passwd",
        "move",
    ),
    "absolute name on Windows": (
        {"a.png": None, "metadata.jsonl": jsonl(row("a.png"), row("C:\\b.png"))},
        {},
        "outside of the folder: C:\\b.png",
        "move",
    ),
    "row names another kind of file": (
        {"a.png": None, "b.dng": b"x", "metadata.jsonl": jsonl(row("a.png"), row("b.dng"))},
        {},
        "not pictures of a known kind: b.dng",
        "convert",
    ),
    "caption column wrong": (
        {"a.png": None, "metadata.jsonl": jsonl({"file_name": "a.png", "txt": "x"})},
        {},
        "no column 'text'; columns: file_name, txt",
        "set caption_column; did you mean 'txt'?",
    ),
    "no file_name column": (
        {"a.png": None, "metadata.csv": "image,text\na.png,x\n"},
        {},
        "metadata.csv has no column 'file_name'; columns: image, text",
        "file_name",
    ),
    "metadata empty": ({"a.png": None, "metadata.jsonl": ""}, {}, "columns: none, the file is empty", "file_name"),
    "metadata not JSON": (
        {"a.png": None, "metadata.jsonl": jsonl(row("a.png")) + "{broken"},
        {},
        "metadata.jsonl cannot be read: line 2 is not JSON",
        "correct",
    ),
    "metadata row not an object": (
        {"a.png": None, "metadata.jsonl": "[1]\n"},
        {},
        "line 1 is not a JSON object",
        "cor",
    ),
    "metadata not UTF-8": (
        {"a.png": None, "metadata.csv": b"file_name,text\na.png,\xff"},
        {},
        "cannot be read",
        "UTF-8",
    ),
    "comma in a caption without quotes": (
        {"a.png": None, "metadata.csv": "file_name,text\na.png,a cat, sitting\n"},
        {},
        "line 2 does not have 2 values",
        "correct",
    ),
    "row too short": (
        {"a.png": None, "metadata.csv": "file_name,text\na.png\n"},
        {},
        "line 2 does not have",
        "correct",
    ),
    "quote never closed": ({"a.png": None, "metadata.csv": 'file_name,text\na.png,"x\n'}, {}, "cannot be read", "corr"),
    "metadata.parquet damaged": ({"a.png": None, "metadata.parquet": b"PAR1xxPAR1"}, {}, "cannot be read", "correct"),
    "two metadata files": (
        {"a.png": None, "metadata.csv": "file_name,text\na.png,x\n", "metadata.jsonl": jsonl(row("a.png"))},
        {},
        "two metadata files in one folder: metadata.csv and metadata.jsonl",
        "remove one",
    ),
    "empty folder": ({"x/.keep": b""}, {}, "no pictures in the folder or below", "give a folder"),
    "other files only": ({"a.svg": b"", "b.svg": b"", "c.txt": "x"}, {}, "2 .svg", "hub dataset"),
    "archives only": ({"all.zip": b"", "more.tar": b""}, {}, "archives: all.zip, more.tar", "unpack"),
    "split that is not there": ({"train/a.png": None}, {"split": "validation"}, "no split 'validation'", "train"),
    "split without pictures": (
        {"a.png": None, "train/a.txt": "x"},
        {},
        "no pictures in sub-folder 'train'",
        "put the pictures",
    ),
    "split or subject": (
        {"train/a.png": None, "plane/b.png": None},
        {},
        "sub-folder 'train' may be a split or a subject: there are pictures beside it, in plane",
        "rename 'train'",
    ),
    "split and pictures beside it": ({"train/a.png": None, "b.png": None}, {}, "in the folder itself", "move all"),
    "name without effect": (TWO, {"name": "x"}, "'name' has no effect: this is a folder of pictures", "remove 'name'"),
    "sub-folder missing": (TWO | {"x/c.png": None}, {"folder": "y"}, "there is no sub-folder 'y'", "allowed: x"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders(tmp_path: Path, case: str) -> None:
    files, options, what, fix = BAD[case]
    with pytest.raises(UserError) as caught:
        records(write(tmp_path / "data", files), **options)
    assert what in caught.value.what
    assert fix in caught.value.fix
    assert caught.value.where == f"data.0.path = '{tmp_path / 'data'}'"


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    files: dict[str, Any] = {f"{index}.png": None for index in range(25)}
    files |= {"m/a.png": None, "m/metadata.jsonl": jsonl(row("a.png", 1), row("b.png"))}
    with pytest.raises(UserError) as caught:
        records(write(tmp_path, files))
    assert "25 pictures have no caption: 0.png, 1.png, 2.png" in caught.value.what
    assert "9.png and 15 more" in caught.value.what
    assert "do not exist: b.png" in caught.value.what
    assert "not text: m/a.png" in caught.value.what


@pytest.mark.skipif(os.getuid() == 0, reason="root reads everything")
def test_unreadable_folder(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": None, "x/b.png": None})
    (tmp_path / "x").chmod(0)
    with pytest.raises(UserError, match="cannot be read"):
        records(tmp_path, caption="x")
    (tmp_path / "x").chmod(0o700)


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("no-such-folder", "there is no such folder"),
        ("./owner/name", "there is no such folder"),
        ("a/b/c", "there is no such folder"),
        ("/dev/null", "is a file, not a folder"),
        ("x" * 5000, "cannot be opened"),
    ],
)
def test_paths_that_are_no_folder(path: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        sources.records(sources.Data(path=path), seed=0, where="data.0.path")
