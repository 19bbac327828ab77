"""WebDataset shards: in a folder and at an address, read picture by picture."""

import io
import json
import pickle
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from folders import records
from handmade import corners, encoded

from sdxl_trainer.config import Data
from sdxl_trainer.data import sources
from sdxl_trainer.data.records import Record
from sdxl_trainer.data.sources import shards
from sdxl_trainer.errors import UserError
from sdxl_trainer.log import read_metrics
from sdxl_trainer.train import train

PICTURES = [encoded(corners(60 + index, 70)) for index in range(6)]


def tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


ONE = tar(
    {
        "000.jpg": PICTURES[0],
        "000.txt": b"a cat\n",
        "x/001.png": PICTURES[1],
        "x/001.json": json.dumps({"caption": "a dog", "url": "-", "focus": [0.25, 0.5]}).encode(),
        "lonely.txt": b"no picture",
    }
)
TWO = tar({"000.webp": PICTURES[2], "000.json": b'{"text": ["one", "two"]}', "notes.md": b"-"})


@pytest.fixture
def memory() -> Iterator[str]:
    system = fsspec.filesystem("memory")
    system.pipe({"/bucket/set/s-10.tar": TWO, "/bucket/set/s-2.tar": ONE, "/bucket/set/readme.md": b"-"})
    yield "memory://bucket/set"
    system.rm("/bucket", recursive=True)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "s-10.tar").write_bytes(TWO)
    (tmp_path / "set" / "s-2.tar").write_bytes(ONE)
    return str(tmp_path / "set")


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_samples_of_shards(kind: str, request: pytest.FixtureRequest) -> None:
    found = records(request.getfixturevalue(kind), focus="column")
    assert [r.name for r in found] == ["s-2.tar/000", "s-2.tar/x/001", "s-10.tar/000"], "in natural order"
    assert [r.captions for r in found] == [("a cat",), ("a dog",), ("one", "two")]
    assert [r.focus for r in found] == [None, (0.25, 0.5), None]
    assert [pickle.loads(pickle.dumps(r)).read() for r in found] == PICTURES[:3]
    assert len({r.stamp for r in found}) == 3


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_tables_beside_their_shards_are_no_data_set(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """As img2dataset leaves them; a table without a shard of its name is one that was not asked for."""
    place = request.getfixturevalue(kind)
    system = fsspec.filesystem("memory" if kind == "memory" else "file")
    folder = place.removeprefix("memory:/")
    for name in ("s-10.parquet", "s-2.parquet", "s-2_stats.json"):
        system.pipe({f"{folder}/{name}": b"-"})
    assert len(records(place)) == 3
    system.pipe({f"{folder}/other.parquet": b"-"})
    with pytest.raises(UserError):
        records(place)


def test_captions_by_line_and_for_the_second_encoder() -> None:
    system = fsspec.filesystem("memory")
    files = {"a.jpg": PICTURES[0], "a.txt": b"one\n\ntwo\n", "a.json": b'{"b": ["eins", "zwei"]}'}
    system.pipe({"/words/s.tar": tar(files), "/json/s.tar": TWO})
    found = records("memory://words", caption_per_line=True, caption_column_2="b")
    assert [(r.captions, r.seconds) for r in found] == [(("one", "two"), ("eins", "zwei"))]
    with pytest.raises(UserError, match="not one caption in caption_column_2 for each"):
        records("memory://words", caption_column_2="b")
    with pytest.raises(UserError, match="caption_per_line has no effect"):
        records("memory://json", caption_per_line=True)
    system.rm("/words", recursive=True)
    system.rm("/json", recursive=True)


def test_one_shard_by_its_address(memory: str) -> None:
    assert [r.captions for r in records(f"{memory}/s-10.tar")] == [("one", "two")]


def test_a_shard_is_walked_once(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def take() -> list[Record]:
        return sources.records(Data(path=memory), seed=0, where="data.0.path", index_dir=tmp_path / "index")

    walks: list[int] = []
    walk = shards._walk
    monkeypatch.setattr(shards, "_walk", lambda file: walks.append(1) or walk(file))
    first = take()
    assert len(walks) == 2
    assert [(r.name, r.captions, r.stamp) for r in take()] == [(r.name, r.captions, r.stamp) for r in first]
    assert len(walks) == 2
    fsspec.filesystem("memory").pipe("/bucket/set/s-10.tar", tar({"7.jpg": PICTURES[3], "7.txt": b"new"}))
    assert [r.captions for r in take()][2:] == [("new",)]
    assert len(walks) == 3, "only the shard that changed"
    for path in (tmp_path / "index").iterdir():
        path.write_text("{")
    assert len(take()) == 3


def test_only_the_picture_s_bytes_are_read(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = records(memory)
    system, asked = fsspec.filesystem("memory"), []
    cat = type(system).cat_file
    monkeypatch.setattr(
        type(system),
        "cat_file",
        lambda self, path, start=None, end=None, **more: asked.append(end - start) or cat(self, path, start, end),
    )
    assert [r.read() for r in found] == PICTURES[:3]
    assert asked == [len(picture) for picture in PICTURES[:3]]


@pytest.mark.parametrize(
    ("content", "options", "what"),
    [
        (tar({"a.jpg": PICTURES[0]}), {}, "1 sample has no caption: s.tar/a"),
        (tar({"a.jpg": PICTURES[0], "a.png": PICTURES[1], "a.txt": b"x"}), {}, "more than one picture: s.tar/a"),
        (tar({"a.jpg": PICTURES[0], "a.txt": b"caf\xe9"}), {}, "not UTF-8, or not JSON: s.tar/a"),
        (tar({"a.jpg": PICTURES[0], "a.json": b"{"}), {}, "not UTF-8, or not JSON: s.tar/a"),
        (tar({"a.jpg": PICTURES[0], "a.json": b'{"text": 3}'}), {}, "1 caption is not text: s.tar/a"),
        (tar({"a.txt": b"x"}), {}, "hold no pictures"),
        (ONE[:700], {}, "cannot be read"),
        (b"not a tar file at all", {}, "cannot be read"),
        (ONE, {"mask": "file"}, "'mask' has no effect: these are shards"),
        (ONE, {"kohya_folders": True}, "'kohya_folders' has no effect"),
        (ONE, {"split": "test"}, "no split 'test' in shards"),
        (ONE, {"folder": "x"}, "'folder' has no effect"),
    ],
)
def test_bad_shards(content: bytes, options: dict[str, Any], what: str) -> None:
    system = fsspec.filesystem("memory")
    system.pipe("/bad/s.tar", content)
    try:
        with pytest.raises(UserError, match=what):
            records("memory://bad", **options)
    finally:
        system.rm("/bad", recursive=True)


@pytest.mark.parametrize(
    ("address", "what"),
    [
        ("memory://nothing/here", "cannot be opened|no .tar shards"),
        ("nosuch://bucket/x", "cannot be opened: Protocol not known"),
        ("abfs://container/x", "Install|install"),
    ],
)
def test_bad_addresses(address: str, what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        records(address)
    assert address in caught.value.where


def test_a_run_on_shards_is_that_on_the_unpacked_folder(config: Callable[..., Any], tmp_path: Path) -> None:
    members, folder = {}, tmp_path / "unpacked"
    folder.mkdir()
    for index, content in enumerate(PICTURES):
        members |= {f"{index}.png": content, f"{index}.txt": b"a red circle"}
        (folder / f"{index}.png").write_bytes(content)
        (folder / f"{index}.txt").write_bytes(b"a red circle")
    system = fsspec.filesystem("memory")
    system.pipe("/run/s.tar", tar(members))
    losses = []
    for name, path in (("shards", "memory://run"), ("folder", str(folder))):
        made = config(data=[{"path": path, "resolution": 64}], train={"steps": 2}, output_dir=str(tmp_path / name))
        losses.append([row["loss"] for row in read_metrics(train(made) / "metrics.jsonl")])
    system.rm("/run", recursive=True)
    assert losses[0] == losses[1]
