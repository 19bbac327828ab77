"""Captions as other programs keep them: under other names, in JSON, in kohya's metadata; and none overlooked unsaid."""

import json
import logging
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from folders import captions, jsonl, records, write

from sdxl_trainer import from_folder
from sdxl_trainer.config import Data
from sdxl_trainer.data import sources
from sdxl_trainer.data.problems import Notes
from sdxl_trainer.errors import UserError

TWO: dict[str, Any] = {"a.png": None, "s/b.png": None}
CAT = json.dumps({"caption": "a cat", "url": "https://x"})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.png.txt", "a cat\n"),
        ("a.caption", "a cat"),
        ("a.png.caption", "a cat"),
        ("a.png.TXT", "a cat"),
        ("a.json", CAT),
        ("a.png.json", '\ufeff{"text": " a cat "}'),
        ("a.JSON", '{"caption": ["a cat"]}'),
    ],
)
def test_names_of_caption_files(tmp_path: Path, name: str, content: str) -> None:
    assert captions(records(write(tmp_path, {"a.png": None, name: content}))) == {"a.png": ("a cat",)}


def test_the_nearer_name_and_the_plainer_file_win(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """a.png and a.jpg have captions of their own; text comes before JSON, .txt before .caption."""
    files = {"a.png": None, "a.jpg": None, "a.png.txt": "whole", "a.txt": "stem", "a.json": CAT, "a.caption": "no"}
    assert captions(records(write(tmp_path, files))) == {"a.jpg": ("stem",), "a.png": ("whole",)}
    assert "caption files not used 1" in caplog.text
    assert ".json 1" in caplog.text


def test_another_key_of_json_files(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": None, "a.json": json.dumps({"prompt": ["x", "y"], "caption": "z"})})
    assert captions(records(tmp_path, caption_column="prompt")) == {"a.png": ("x", "y")}


def test_json_of_other_things_needs_a_caption_for_all(tmp_path: Path) -> None:
    write(tmp_path, TWO | {"a.json": '{"shapes": [], "version": 1}', "s/b.json": "[1]"})
    with pytest.raises(UserError, match=r"hold no caption: a\.json \(keys: shapes, version\), s/b\.json \(no keys\)"):
        records(tmp_path)
    assert set(captions(records(tmp_path, caption="x")).values()) == {("x",)}


@pytest.mark.parametrize("given", [".tags", "tags"])
def test_an_ending_takes_the_place_of_the_others(tmp_path: Path, given: str, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, TWO | {"a.txt": "no", "a.tags": "1girl, solo", "s/b.png.tags": "1boy"})
    found = captions(records(tmp_path, caption_extension=given))
    assert found == {"a.png": ("1girl, solo",), "s/b.png": ("1boy",)}
    assert "skipped: caption files not used 1\n" in caplog.text, "the .tags files are no longer counted as left out"
    lines = records(write(tmp_path, {"a.tags": "x\ny"}), caption_extension=given, caption_per_line=True)
    assert captions(lines)["a.png"] == ("x", "y")


# Kohya's metadata

KOHYA = {"a": {"caption": "a cat", "tags": "1girl, solo", "train_resolution": [8, 8]}, "s/b.png": {"tags": "1boy"}}
JOINED = {"a.png": ("a cat, 1girl, solo",), "s/b.png": ("1boy",)}


@pytest.mark.parametrize("at", ["photos/meta_cap.json", "meta_lat.json"])
def test_kohya_s_metadata(tmp_path: Path, at: str) -> None:
    """By names without endings, in the folder or elsewhere: named from the folder of pictures either way."""
    write(tmp_path / "photos", TWO | {"metadata.jsonl": "not read", "a.txt": "not read"})
    write(tmp_path, {at: json.dumps(KOHYA)})
    name = "meta_cap.json" if "cap" in at else str(tmp_path / at)
    assert captions(records(tmp_path / "photos", metadata=name)) == JOINED


def test_kohya_s_metadata_with_whole_paths_and_of_rows(tmp_path: Path) -> None:
    write(tmp_path, TWO)
    whole = {str(tmp_path / name): value for name, value in zip(TWO, KOHYA.values(), strict=True)}
    rows = [{"image_path": name, "image_size": [8, 8], **value} for name, value in whole.items()]
    for name, content in {"x.json": json.dumps(whole), "x.jsonl": jsonl(*rows), "y.json": json.dumps(rows)}.items():
        assert captions(records(write(tmp_path, {name: content}), metadata=name)) == JOINED


def test_json_of_names_and_captions(tmp_path: Path) -> None:
    write(tmp_path, TWO | {"captions.json": '{"a.png": "a cat", "s/b.png": "a dog"}'})
    assert captions(records(tmp_path, metadata="captions.json")) == {"a.png": ("a cat",), "s/b.png": ("a dog",)}


def test_each_line_of_kohya_s_captions_with_the_tags(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": None, "m.json": json.dumps({"a": {"caption": "one\n\ntwo ", "tags": "x"}})})
    assert captions(records(tmp_path, metadata="m.json", caption_per_line=True)) == {"a.png": ("one, x", "two, x")}


def test_a_changed_metadata_file_elsewhere_is_seen(tmp_path: Path) -> None:
    """What is known of a folder is kept, and the file lies outside of it."""
    write(tmp_path, {"photos/a.png": None, "m.json": '{"a": "old"}', "index/x": ""})
    for folder in (tmp_path / "photos", tmp_path / "photos" / "a.png"):
        os.utime(folder, (1, 1))
    data = Data(path=str(tmp_path / "photos"), metadata=str(tmp_path / "m.json"))

    def now() -> list[tuple[str, ...]]:
        found = sources.records(data, seed=0, where="data.0.path", index_dir=tmp_path / "index" / "shards")
        return [record.captions for record in found]

    assert now() == [("old",)]
    write(tmp_path, {"m.json": '{"a": "young"}'})
    assert now() == [("young",)]


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "no such metadata": ({}, {"metadata": "m.json"}, "metadata = 'm.json': there is no such file", "or its path"),
    "metadata of no kind": ({"m.yaml": "x"}, {"metadata": "m.yaml"}, "is no file of captions", ".json"),
    "metadata is no JSON": ({"m.json": "{"}, {"metadata": "m.json"}, "m.json cannot be read", "correct"),
    "metadata of numbers": ({"m.json": '{"a": 1}'}, {"metadata": "m.json"}, "neither a caption nor an object", "corr"),
    "metadata is a list": ({"m.json": "[1]"}, {"metadata": "m.json"}, "neither an object of pictures", "correct"),
    "tags are a list": (
        {"m.json": '{"a": {"tags": ["x"]}, "s/b": "y"}'},
        {"metadata": "m.json"},
        "1 caption is not text: a.png (m.json:a)",
        "string",
    ),
    "neither caption nor tags": (
        {"m.json": '{"a": {"train_resolution": [8, 8]}}'},
        {"metadata": "m.json"},
        "m.json has no column 'text'; columns: image_path, train_resolution",
        "set caption_column",
    ),
    "both empty": (
        {"m.json": '{"a": {"caption": " ", "tags": ""}, "s/b": "y"}'},
        {"metadata": "m.json"},
        "1 caption is empty: a.png (m.json:a)",
        "write them",
    ),
    "picture that is not named": (
        {"m.json": '{"a": "x"}'},
        {"metadata": "m.json"},
        "named by no metadata row: s/b.png",
        "add a row",
    ),
    "name of two pictures": (
        {"a.jpg": None, "m.json": '{"a": "x", "s/b": "y"}'},
        {"metadata": "m.json"},
        "names more than one picture: a (m.json:a)",
        "endings",
    ),
    "name of no picture": (
        {"m.json": '{"a": "x", "s/b": "y", "c": "z"}'},
        {"metadata": "m.json"},
        "do not exist: c (m.json:c",
        "file_name",
    ),
    "JSON beside is broken": ({"a.json": "{", "s/b.txt": "x"}, {}, "cannot be read: a.json", "correct them"),
    "JSON caption is a number": ({"a.json": '{"text": 1}', "s/b.txt": "x"}, {}, "not text: a.json", "string"),
    "no file of that ending": ({}, {"caption_extension": ".tags"}, "no file ends so", "remove it"),
    "ending with a slash": ({}, {"caption_extension": "a/b"}, "caption_extension", ""),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_captions_of_other_programs(name: str, tmp_path: Path) -> None:
    files, options, what, fix = BAD[name]
    write(tmp_path, TWO | files)
    with pytest.raises((UserError, ValueError)) as caught:
        records(tmp_path, **options)
    assert what in str(caught.value)
    assert fix in getattr(caught.value, "fix", "")


@pytest.mark.parametrize("option", [{"metadata": "m.json"}, {"caption_extension": ".tags"}])
def test_they_are_of_folders_of_pictures(option: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path, {"in/a.png": None, "in/a.txt": "x"})
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as tar:
        tar.add(tmp_path / "in", ".")
    with pytest.raises(UserError, match=f"'{next(iter(option))}' has no effect: these are shards"):
        records(tmp_path / "shards", **option)


# What looks like captions and is not read

UNREAD: dict[str, tuple[dict[str, Any], str]] = {
    "another ending": ({"a.tags": "1girl", "s/b.png.tags": "1boy"}, 'caption_extension = ".tags", which reads the 2'),
    "kohya's metadata": ({"meta_cap.json": json.dumps(KOHYA, indent=1)}, 'metadata = "meta_cap.json", which reads'),
    "a table": ({"captions.csv": "file_name,text\na.png,x\ns/b.png,y\n"}, 'metadata = "captions.csv"'),
    "rows": ({"x/train.jsonl": jsonl({"file_name": "../a.png", "text": "x"})}, 'metadata = "x/train.jsonl"'),
}


@pytest.mark.parametrize("kind", UNREAD)
def test_captions_that_are_not_read_are_named(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where there are none in the error, where one caption does for all in a line, in both as what to do."""
    files, fix = UNREAD[kind]
    write(tmp_path, TWO | files)
    with pytest.raises(UserError, match="2 pictures have no caption") as caught:
        records(tmp_path)
    assert caught.value.fix.startswith(f"set {fix}")
    notes = Notes()
    sources.records(Data(path=str(tmp_path), caption="sks"), seed=0, where="data.0.path", notes=notes)
    assert f"captions that are not read: set {fix}" in caplog.text
    (harmful,) = notes.harmful
    assert harmful.fix.startswith(f"set {fix}")
    assert set(harmful.where) <= {"a.tags", "s/b.png.tags", "a.png", "s/b.png"}
    caplog.clear()
    assert records(tmp_path, caption="sks", caption_only=True), "asked for: no captions of their own"
    assert "not read" not in caplog.text


def test_files_of_other_things_are_not_taken_for_captions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {"a.xmp": "<x:xmpmeta/>", "s/b.AAE": '<?xml version="1.0"?>', "a.npz": b"PK\0\0", "a.mov": b"\0\0ftyp"}
    write(tmp_path, TWO | files | {"config.json": '{"lr": 1}', "a.empty": ""})
    assert records(tmp_path, caption="sks")
    assert "not read" not in caplog.text
    with pytest.raises(UserError) as caught:
        records(tmp_path)
    assert caught.value.fix.startswith("write a .txt file")


@pytest.mark.parametrize("kind", ["another ending", "kohya's metadata"])
def test_a_run_from_a_folder_reads_them(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    write(tmp_path / "photos", TWO | UNREAD[kind][0])
    monkeypatch.chdir(tmp_path)
    config = from_folder.load(Path("photos"), from_folder.Wish(trigger="sks", model="micro"), [])
    data = config.data[0]
    assert (data.caption_extension or data.metadata) in (".tags", "meta_cap.json")
    assert "not read" not in caplog.text
    found = sources.records(data, seed=0, where="data.0.path")
    assert len({record.captions for record in found}) == 2


def test_a_run_from_a_folder_leaves_a_table_that_it_cannot_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Other columns are for its user to name; the trigger is what the pictures have until then, and that is said."""
    write(tmp_path / "photos", TWO | {"list.csv": "image,words\na.png,x\ns/b.png,y\n"})
    monkeypatch.chdir(tmp_path)
    config = from_folder.load(Path("photos"), from_folder.Wish(trigger="sks", model="micro"), [])
    assert config.data[0].metadata is None
    assert 'set metadata = "list.csv"' in caplog.text
