"""Any byte of a checkpoint or of a cache shard, changed, and any length that is left of it: never a wrong value."""

from pathlib import Path

import pytest
import torch

from sdxl_trainer import checkpoint, files
from sdxl_trainer.checkpoint import Checkpoint, Contents, Damaged
from sdxl_trainer.data import cache
from sdxl_trainer.errors import UserError

ROWS = {"a" * 64: torch.arange(24, dtype=torch.float16).reshape(2, 3, 4), "b.states": torch.ones(3)}


def trusted(folder: Path) -> dict[str, torch.Tensor]:
    """What a run would train on; rows that are missing are encoded anew."""
    store = cache.open_store(folder)
    return {row: store.get(row) for row in ROWS if row in store}


@pytest.mark.parametrize("bit", [1, 128])
def test_any_changed_byte_of_a_shard_is_noticed(tmp_path: Path, bit: int) -> None:
    path = cache.write_shard(tmp_path, ROWS, {"b.states": [1, 2]})
    whole, noticed, name = path.read_bytes(), 0, path.name
    for at in range(len(whole)):
        path = tmp_path / str(at) / name  # a folder of its own: shards never change, and are known by size and time
        path.parent.mkdir()
        path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
        try:
            found = trusted(path.parent)
        except UserError as error:
            noticed += error.where == str(path)
        else:
            assert all(torch.equal(tensor, ROWS[row]) for row, tensor in found.items()), at
            assert all(tensor.dtype == ROWS[row].dtype for row, tensor in found.items()), at
            noticed += len(found) < len(ROWS)
    assert noticed >= 24 * 2 + 3 * 4, "every byte of the rows is covered"


def test_any_length_of_a_shard_is_noticed(tmp_path: Path) -> None:
    path = cache.write_shard(tmp_path, ROWS, {})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut short|damaged"):
            trusted(tmp_path)


def test_a_damaged_row_is_set_aside_for_the_next_run(tmp_path: Path) -> None:
    path = cache.write_shard(tmp_path, ROWS, {})
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="a row of the cache is damaged") as caught:
        trusted(tmp_path)
    assert "run the same command" in caught.value.fix
    assert [p.name for p in tmp_path.iterdir()] == [f"{path.name}.damaged"]
    assert trusted(tmp_path) == {}


def test_shards_of_older_versions_are_read(tmp_path: Path) -> None:
    files.save_tensors(tmp_path / "old.safetensors", ROWS, {"notes": "{}"})
    assert all(torch.equal(tensor, ROWS[row]) for row, tensor in trusted(tmp_path).items())


def made(folder: Path) -> Checkpoint:
    tensors = {"added.safetensors": {"w": torch.arange(3.0)}, "optimizer.safetensors": {"m": torch.zeros(2)}}
    return checkpoint.save(folder, Contents(7, {"state.json": '{"step": 7}'}, tensors))


def test_any_changed_byte_of_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    found = made(tmp_path)
    for path in sorted(p for p in found.path.rglob("*") if p.is_file()):
        whole = path.read_bytes()
        for at in range(len(whole)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(Damaged):
                checkpoint.verify(found)
        path.write_bytes(whole)
    assert checkpoint.verify(found)


def test_any_length_of_a_checkpoint_s_files_is_noticed(tmp_path: Path) -> None:
    found = made(tmp_path)
    for path in sorted(p for p in found.path.rglob("*") if p.is_file()):
        whole = path.read_bytes()
        for length in range(len(whole) - (path.name == "manifest.json")):  # its last byte ends the line
            path.write_bytes(whole[:length])
            with pytest.raises(Damaged):
                checkpoint.verify(found)
        path.write_bytes(whole)
