"""What a start that follows another one does not read again, and that it sees every change all the same."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folders import PNG, jsonl, row, write

from sdxl_trainer import base as bases
from sdxl_trainer import files
from sdxl_trainer.config import Data, Model
from sdxl_trainer.data import sources
from sdxl_trainer.data.memo import open_memo
from sdxl_trainer.data.records import Record
from sdxl_trainer.data.sources import dataset
from sdxl_trainer.errors import UserError

FILES = {
    "a.png": None,
    "b.png": None,
    "deep/c.png": None,
    "metadata.jsonl": jsonl(row("a.png", "one"), row("b.png", ["two", "zwei"]), row("link.png", "linked")),
    "deep/metadata.jsonl": jsonl(row("c.png", "three")),
    "notes.md": "four",
}
Said = list[tuple[Any, ...]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of pictures beside a cache, of files that count as old."""
    monkeypatch.setattr(files, "COARSE", -(10**18))
    (write(tmp_path / "set", FILES) / "link.png").symlink_to("a.png")
    return tmp_path / "set"


def found(folder: Path, keep: bool = True, **options: Any) -> Said:
    """All that records say, read with what is kept from earlier times or without."""
    index = folder.parent / "cache" / "shards" if keep else None
    data = Data(path=str(folder), **options)
    records = sources.records(data, seed=0, where="data.0.path", index_dir=index)
    return [told(record) for record in records]


def told(record: Record) -> tuple[Any, ...]:
    mask = record.mask and (record.mask.name, record.mask.stamp, record.mask.read())
    return record.name, record.captions, record.read(), record.stamp, mask, record.focus, record.repeats, record.seconds


def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on folders must not be scanned."""

    def refused(*_: Any) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(sources, "scan", refused)


@pytest.mark.parametrize("options", [{}, {"mask": "alpha"}, {"caption": "x", "caption_only": True}, {"max_samples": 2}])
def test_a_known_folder_is_not_read_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    first = found(folder, **options)
    assert first == found(folder, keep=False, **options)
    unread(monkeypatch)
    assert found(folder, **options) == first


def test_what_is_left_out_is_said_at_each_start(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        caplog.clear()
        found(folder)
        assert f"data.0.path = '{folder}': 4 pictures, 4 captioned by metadata; skipped: .md 1" in caplog.text


def same_size_and_date(path: Path, content: str) -> None:
    """An edit that a look at size and date does not show."""
    status = path.stat()
    assert len(content.encode()) == status.st_size
    path.write_text(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replaced(path: Path) -> None:
    """Another file of the same size and date in the place of one."""
    status = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[::-1])
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.rename(path)


def relinked(folder: Path) -> None:
    (folder / "link.png").unlink()
    (folder / "link.png").symlink_to("b.png")


CHANGES: dict[str, Callable[[Path], object]] = {
    "captions": lambda f: (f / "deep" / "metadata.jsonl").write_text(jsonl(row("c.png", "another"))),
    "captions of one size and date": lambda f: same_size_and_date(
        f / "deep" / "metadata.jsonl", jsonl(row("c.png", "there"))
    ),
    "a picture of one size and date": lambda f: replaced(f / "a.png"),
    "a new folder": lambda f: write(f, {"d/e.jpg": PNG, "d/metadata.jsonl": jsonl(row("e.jpg", "four"))}),
    "a picture fewer": lambda f: [
        (f / "deep" / "c.png").unlink(),
        (f / "deep" / "metadata.jsonl").unlink(),
        (f / "deep").rmdir(),
    ],
    "another name": lambda f: [
        (f / "deep" / "c.png").rename(f / "deep" / "x.png"),
        (f / "deep" / "metadata.jsonl").write_text(jsonl(row("x.png", "three"))),
    ],
    "a link": relinked,
    "where a link leads": lambda f: (f / "a.png").write_bytes(PNG + b"more"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_of_a_known_folder_is_seen(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = found(folder)
    CHANGES[name](folder)
    second = found(folder)
    assert second == found(folder, keep=False)
    assert second != first
    assert len(list((folder.parent / "cache" / "records").iterdir())) == 2  # what was known before is gone
    unread(monkeypatch)
    assert found(folder) == second


def test_what_makes_a_folder_refused_is_told_again(folder: Path) -> None:
    found(folder)
    (folder / "new.png").write_bytes(PNG)
    for _ in range(2):
        with pytest.raises(UserError, match=r"named by no metadata row: new\.png"):
            found(folder)
    (folder / "new.png").unlink()
    with pytest.raises(UserError, match="no column 'prompt'"):
        found(folder, caption_column="prompt")


def test_other_options_are_other_records(folder: Path) -> None:
    assert [len(found(folder)), len(found(folder, max_samples=1)), len(found(folder))] == [4, 1, 4]
    assert {said[1] for said in found(folder, caption="x", caption_only=True)} == {("x",)}
    assert ("one",) in {said[1] for said in found(folder)}


def test_files_of_a_moment_ago_are_looked_at_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may change once more without another time."""
    monkeypatch.setattr(files, "COARSE", 10**12)
    first = found(folder)
    assert len(first) == 4
    unread(monkeypatch)
    with pytest.raises(AssertionError, match="read again"):
        found(folder)


def test_damage_of_what_is_kept_costs_nothing(folder: Path, tmp_path: Path) -> None:
    first = found(folder)
    for path in sorted((tmp_path / "cache" / "records").iterdir()):
        content = path.read_bytes()
        for broken in (b"", content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
            path.write_bytes(broken)
            assert found(folder) == first
            assert path.read_bytes() == content
        path.unlink()
        assert found(folder) == first


def test_a_folder_becomes_a_dataset(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of its pictures does not hide that there is another kind of data now."""
    found(folder)
    monkeypatch.setattr(dataset, "is_saved", lambda root: True)
    with pytest.raises(UserError, match="saved dataset cannot be opened"):
        found(folder)


# The base


def test_a_base_that_was_checked_is_not_opened_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "COARSE", -(10**18))
    copy = copied(base, tmp_path / "base")

    def resolved(**options: Any) -> bases.Base:
        memo = open_memo(tmp_path)
        made = bases.resolve(Model(path=str(copy), **options), tmp_path, memo)
        memo.save()
        return made

    first = resolved()
    with monkeypatch.context() as patch:
        patch.setattr(bases, "_check_part", None)
        patch.setattr(bases, "_read", None)
        again = resolved()
        assert [again.config(p) for p in ("unet", "vae")] == [first.config(p) for p in ("unet", "vae")]
        with pytest.raises(TypeError):
            resolved(init="random")
    config = copy / "text_encoder" / "config.json"
    same_size_and_date(config, config.read_text().replace("hidden_size", "hidden_sire"))
    with pytest.raises(UserError, match="hidden_size = null is not that of a text encoder"):
        resolved()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder_2"])
def test_a_base_that_changed_is_checked_again(
    base: Path, tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "COARSE", -(10**18))
    copy, memo = copied(base, tmp_path / "base"), open_memo(tmp_path)
    found = bases.resolve(Model(path=str(copy)), tmp_path, memo)
    (weights,) = (copy / part).glob("*.safetensors")
    before = found.hash(part, memo)
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match="cut short"):
        bases.resolve(Model(path=str(copy)), tmp_path, memo)
    content = (base / part / weights.name).read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert bases.resolve(Model(path=str(copy)), tmp_path, memo).hash(part, memo) != before
    weights.write_bytes(content)
    assert bases.resolve(Model(path=str(copy)), tmp_path, memo).hash(part, memo) == before


def copied(base: Path, to: Path) -> Path:
    for path in base.rglob("*"):
        if path.is_file():
            (to / path.relative_to(base)).parent.mkdir(parents=True, exist_ok=True)
            (to / path.relative_to(base)).write_bytes(path.read_bytes())
    return to
