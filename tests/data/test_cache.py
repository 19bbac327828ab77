"""The cache: content keys, damage found, garbage collected, writers side by side."""

import json
import os
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_trainer import files
from sdxl_trainer.data import cache, places, upkeep
from sdxl_trainer.errors import UserError


def filled(folder: Path, names: list[str]) -> cache.Store:
    store = cache.open_store(folder)
    writer = cache.Writer(store)
    for index, name in enumerate(names):
        writer.add(name, torch.full((8, 4, 4), float(index)).half(), [index])
    writer.flush()
    return store


def test_rows_come_back_bitwise_with_their_notes(tmp_path: Path) -> None:
    filled(tmp_path, ["a", "b"])
    again = cache.open_store(tmp_path)
    assert torch.equal(again.get("b"), torch.full((8, 4, 4), 1.0).half())
    assert "a" in again
    assert "c" not in again
    header = next(tmp_path.glob("*.safetensors")).read_bytes()
    length = int.from_bytes(header[:8], "little")
    notes = json.loads(json.loads(header[8 : 8 + length])["__metadata__"]["notes"])
    assert notes.pop(cache.SUMS).keys() == {"a", "b"}
    assert notes == {"a": [0], "b": [1]}


def test_where_rows_lie_is_remembered_of_the_last_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "REMEMBERED", 3)
    asked: list[int] = []

    def names(number: int) -> list[str]:
        asked.append(number)
        return [f"{number}", f"{number} again"]

    store = filled(tmp_path, [name for number in range(6) for name in names(number)])
    asked.clear()
    lying = places.Places(store, names)
    for wanted, new in (
        ([0, 1, 0], [0, 1]),
        ([1, 2], [2]),
        ([2, 0], []),
        ([2, 3], [2, 3]),
        ([0, 3, 5, 4], [0, 3, 5, 4]),
    ):
        rows = [cache.stacked(found) for found in lying.of(wanted)]
        assert [row[:, 0, 0, 0].tolist() for row in rows] == [[2 * number, 2 * number + 1] for number in wanted]
        assert asked == new
        asked.clear()
    with pytest.raises(KeyError):
        lying.of([0, 6])
    assert lying.of([0])


def test_a_shard_is_named_after_its_bytes(tmp_path: Path) -> None:
    filled(tmp_path / "one", ["a", "b"])
    filled(tmp_path / "two", ["a", "b"])
    names = [[p.name for p in (tmp_path / f).iterdir()] for f in ("one", "two")]
    assert names[0] == names[1]
    assert len(names[0]) == 1


def test_every_damaged_byte_is_found(tmp_path: Path) -> None:
    filled(tmp_path, ["a", "b"])
    path = next(tmp_path.glob("*.safetensors"))
    assert upkeep.damaged(tmp_path) == []
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert upkeep.damaged(tmp_path) == [path]


@pytest.mark.parametrize("keep", [0, 5, 8, 60, -1])
def test_a_shard_cut_short_is_named(tmp_path: Path, keep: int) -> None:
    filled(tmp_path, ["a", "b"])
    path = next(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="cut short") as caught:
        cache.open_store(tmp_path)
    assert str(path) in caught.value.where


def test_garbage_goes_and_the_rest_stays(tmp_path: Path) -> None:
    filled(tmp_path, ["a", "b", "c"])
    filled(tmp_path, ["d"])
    freed = upkeep.collect_garbage(tmp_path, {"a", "c"})
    store = cache.open_store(tmp_path)
    assert [name for name in "abcd" if name in store] == ["a", "c"]
    assert torch.equal(store.get("c"), torch.full((8, 4, 4), 2.0).half())
    assert freed > 0
    assert upkeep.damaged(tmp_path) == []
    assert upkeep.collect_garbage(tmp_path, {"a", "c"}) == 0


def test_garbage_goes_from_shards_that_were_written_without_notes(tmp_path: Path) -> None:
    filled(tmp_path, ["a", "b"])
    (path,) = tmp_path.glob("*.safetensors")
    save_file(load_file(path), path)
    path.rename(path.with_stem(files.sha256(path)[: len(path.stem)]))
    assert upkeep.collect_garbage(tmp_path, {"a"}) > 0
    store = cache.open_store(tmp_path)
    assert [name for name in "ab" if name in store] == ["a"]
    assert upkeep.damaged(tmp_path) == []


def test_values_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"cat\.jpg"):
        cache.finite([("dog.jpg", torch.ones(2)), ("cat.jpg", torch.tensor([1.0, float("inf")]))])


def _write(folder: str, first: int) -> None:
    filled(Path(folder), [f"row{first + i}" for i in range(20)])


def test_processes_write_side_by_side(tmp_path: Path) -> None:
    context = get_context("spawn")
    workers = [context.Process(target=_write, args=(str(tmp_path), 10 * n)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [w.exitcode for w in workers] == [0, 0, 0]
    assert len(cache.open_store(tmp_path)) == 40
    assert not list(tmp_path.glob(".*"))


def test_the_table_is_what_the_shards_say(tmp_path: Path) -> None:
    """However the shards came: one after the other, rows twice, one deleted again."""
    folder = tmp_path / "latents"
    store = filled(folder, [f"a{i}" for i in range(30)])
    filled(folder, ["a3", "b", "c"])
    filled(folder, ["c", "a29", "d"])
    store.refresh().save()
    assert [upkeep.damaged(folder), len(store), len(cache.open_store(folder))] == [[], 33, 33]
    extra = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    kept = extra.read_bytes()
    extra.unlink()
    again = cache.open_store(folder)
    assert sorted(name for name in ("a0", "a3", "a29", "b", "c", "d") if name in again) == ["a29", "a3", "b", "c", "d"]
    assert [float(again.get(name)[0, 0, 0]) for name in ("a3", "b", "a29", "d")] == [0, 1, 1, 2]
    extra.write_bytes(kept)
    assert len(cache.open_store(folder)) == 33
    assert upkeep.damaged(folder) == []


def test_damage_of_the_table_is_found_and_costs_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "latents"
    filled(folder, ["a", "b"]).save()
    index = tmp_path / "latents.index"
    whole = index.read_bytes()
    for position in range(0, len(whole), 5):
        index.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert upkeep.damaged(folder) == [index], position
    store = cache.open_store(folder)
    assert float(store.get("b")[0, 0, 0]) == 1
    assert index.read_bytes() == whole


def test_more_shards_than_are_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "OPEN", 3)
    for i in range(8):
        filled(tmp_path / "latents", [f"row{i}{j}" for j in range(i + 1)])
    store = cache.open_store(tmp_path / "latents")
    for _ in range(2):
        for i in range(8):
            assert [float(store.get(f"row{i}{j}")[0, 0, 0]) for j in range(i + 1)] == list(range(i + 1))
    assert len(store._opened) == 3
    fresh = cache.open_store(tmp_path / "latents")
    for name in store.shards:
        (tmp_path / "latents" / name).unlink()
    with pytest.raises(UserError, match="cannot be read"):
        fresh.get("row00")


def test_drafts_of_killed_writers_go_and_those_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "latents").mkdir()
    killed, writing = tmp_path / "latents" / ".0.tmp", tmp_path / "latents" / ".1.tmp"
    index, shard = tmp_path / ".latents.index.77.tmp", tmp_path / "latents" / "a.safetensors"
    for path in (killed, writing, index, shard):
        path.write_bytes(b"12345")
    for path in (killed, index, shard):
        os.utime(path, (0, 0))
    assert upkeep.remove_drafts(tmp_path) == 10
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [".1.tmp", "a.safetensors"]
