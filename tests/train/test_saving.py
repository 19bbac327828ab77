"""Checkpoints beside the training, the lock of an output folder, and copies on a mirror."""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdxl_trainer import checkpoint, files, lock, saver
from sdxl_trainer.checkpoint import Contents
from sdxl_trainer.errors import UserError
from sdxl_trainer.log import read_metrics
from sdxl_trainer.saver import Saver
from sdxl_trainer.train import train

HOLD = """
import sys, time
from pathlib import Path
from sdxl_trainer import lock
with lock.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def holding(folder: Path) -> Any:
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    with holding(tmp_path / "run") as other:
        with pytest.raises(UserError, match=f"another run is at work in this folder: process {other.pid} on"):
            lock.held(tmp_path / "run").__enter__()
        with lock.held(tmp_path / "run", main=False):
            pass  # further ranks of one run hold nothing
        other.kill()
        other.wait()
        with lock.held(tmp_path / "run"):
            assert (tmp_path / "run" / lock.NAME).exists()
    assert list((tmp_path / "run").iterdir()) == []


def test_training_is_refused_in_a_folder_at_work(config: Callable[..., Any], tmp_path: Path) -> None:
    with holding(tmp_path / "run"), pytest.raises(UserError, match="another run is at work"):
        train(config())
    assert [p.name for p in (tmp_path / "run").iterdir()] == [lock.NAME]


def assert_(fact: bool) -> None:
    assert fact


def options(mirror: str | None = None, limit: int | None = None) -> Any:
    return SimpleNamespace(train=SimpleNamespace(checkpoint_mirror=mirror, checkpoints_limit=limit))


def some(step: int, size: int = 1000) -> Contents:
    weights = {"weight": torch.full((size,), float(step))}
    files_of = {"added.safetensors": weights, "optimizer.safetensors": {"m": torch.arange(size)}}
    return Contents(step, {"state.json": "{}"}, files_of)


def test_what_is_written_is_the_moment_of_the_save(tmp_path: Path) -> None:
    made, go = Saver(options(), tmp_path, print), threading.Event()
    contents = some(3)
    made.save(contents, before=lambda: assert_(go.wait(30)))
    contents.tensors["added.safetensors"]["weight"].zero_()  # the next step changes what the copy was made of
    go.set()
    made.close()
    [found] = checkpoint.found(tmp_path)
    assert checkpoint.verify(found).step == 3
    assert checkpoint._tensors(found.path / "added.safetensors")["weight"].unique().tolist() == [3.0]


def test_never_two_half_written_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, at_work, most = checkpoint.save, [0], [0]

    def counted(output: Path, contents: Contents) -> Any:
        at_work[0] += 1
        most[0] = max(most[0], at_work[0])
        try:
            return write(output, contents)
        finally:
            at_work[0] -= 1

    monkeypatch.setattr(checkpoint, "save", counted)
    made = Saver(options(limit=1), tmp_path, print)
    for step in range(1, 8):
        go = threading.Event()
        made.save(some(step, 100_000), before=lambda go=go: assert_(go.wait(30)))
        whole = [checkpoint.verify(c).step for c in checkpoint.found(tmp_path)]
        assert whole == ([step - 1] if step > 1 else []), "the last good one stays until the next is verified"
        go.set()
    made.close()
    assert most == [1]
    assert [c.step for c in checkpoint.found(tmp_path)] == [7]


def test_the_older_one_stays_if_the_next_cannot_be_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Saver(options(limit=1), tmp_path, print)
    made.save(some(1))
    made.wait()
    forget = files.forget

    def torn(path: Path) -> None:
        forget(path)
        if path.name == "optimizer.safetensors":
            path.write_bytes(path.read_bytes()[:-1] + b"\xff")

    monkeypatch.setattr(files, "forget", torn)
    made.save(some(2))
    with pytest.raises(UserError, match=r"optimizer\.safetensors is damaged"):
        made.close()
    assert checkpoint.verify(checkpoint.found(tmp_path)[0]).step == 1


def test_checkpoints_are_verified_where_the_system_cannot_drop_its_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """macOS has no posix_fadvise."""
    monkeypatch.delattr(os, "posix_fadvise")
    made = Saver(options(limit=1), tmp_path, print)
    made.save(some(1))
    made.close()
    assert [checkpoint.verify(c).step for c in checkpoint.found(tmp_path)] == [1]


def test_a_failure_beside_the_training_ends_it(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write = checkpoint.save

    def failing(output: Path, contents: Contents) -> Any:
        if contents.step == 4:
            raise UserError("the disk failed", "disk", "another disk")
        return write(output, contents)

    monkeypatch.setattr(checkpoint, "save", failing)
    with pytest.raises(UserError, match="the disk failed"):
        train(config(train={"steps": 40}))
    found = checkpoint.found(tmp_path / "run")
    assert [c.step for c in found] == [2]
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) >= 4


def test_a_disk_without_room_is_told_before_anything_is_written(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sdxl_trainer.disk.free", lambda path: 1e12)  # there was room when the run began
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"a checkpoint takes 0\.\d\d GB and the disk has 0\.00 GB free"):
        train(config())
    assert not list((tmp_path / "run").glob("*checkpoint*"))


def test_without_memory_for_a_copy_it_is_written_from_where_it_lies(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any
) -> None:
    train(config(output_dir=str(tmp_path / "with")))
    monkeypatch.setattr(saver, "MEMORY_SHARE", 0.0)
    train(config(output_dir=str(tmp_path / "without")))
    assert capfd.readouterr().err.count("checkpoints are written without one") == 1
    hashes = [files.tree_hashes(tmp_path / name / "checkpoint-4") for name in ("with", "without")]
    assert {n: h for n, h in hashes[0].items() if n.endswith(".safetensors")} == {
        n: h for n, h in hashes[1].items() if n.endswith(".safetensors")
    }


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    config: Callable[..., Any], tmp_path: Path, capfd: Any
) -> None:
    train(config(output_dir=str(tmp_path / "whole"), train={"steps": 6, "checkpoints_limit": 2}))
    train(config(train={"steps": 4}))
    weights = tmp_path / "run/checkpoint-4/unet/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    capfd.readouterr()
    train(config(train={"steps": 6, "checkpoints_limit": 2}))
    said = capfd.readouterr().err
    assert "checkpoint-4 is not used (unet/diffusion_pytorch_model.safetensors is damaged" in said
    assert "continuing after step 2" in said
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == [
        "checkpoint-4",
        "checkpoint-4.damaged",
        "checkpoint-6",
    ]
    for name in ("unet", "checkpoint-4/unet", "checkpoint-6"):
        one, other = (files.tree_hashes(tmp_path / run / name) for run in ("run", "whole"))
        assert {n: h for n, h in one.items() if n.endswith("tensors")} == {
            n: h for n, h in other.items() if n.endswith("tensors")
        }


def test_what_was_set_aside_for_a_replacement_comes_back(tmp_path: Path) -> None:
    made = Saver(options(), tmp_path, print)
    made.save(some(1))
    made.close()
    (tmp_path / "checkpoint-1").rename(tmp_path / ".checkpoint-1.77.old")
    (tmp_path / ".checkpoint-1.77.tmp").mkdir()
    (tmp_path / ".unet.78.tmp").mkdir()
    (tmp_path / ".unet.78.tmp" / "model.safetensors").touch()
    (tmp_path / ".model_index.json.78.tmp").touch()
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / ".checkpoint-2.77.old").mkdir()
    foreign = [".git.old", ".hidden.tmp", ".lock"]
    for name in foreign:
        (tmp_path / name).touch()
    files.sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [*foreign, "checkpoint-1", "checkpoint-2"]
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert checkpoint.verify(checkpoint.found(tmp_path)[0])


def test_a_run_goes_on_from_its_mirror(config: Callable[..., Any], tmp_path: Path, capfd: Any) -> None:
    """The machine is gone, with all of its disk."""
    train(config(output_dir=str(tmp_path / "whole")))
    far = {"checkpoint_mirror": f"file://{tmp_path / 'far'}", "checkpoints_limit": 2}
    train(config(train={**far, "steps": 2}))
    shutil.rmtree(tmp_path / "run")
    train(config(train=far))
    assert "checkpoint-2 was brought back from file://" in capfd.readouterr().err
    assert sorted(p.name for p in (tmp_path / "far").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    for folder in ("unet", "checkpoint-4"):
        one, other = (files.tree_hashes(tmp_path / run / folder) for run in ("run", "whole"))
        assert {n: h for n, h in one.items() if n.endswith("tensors")} == {
            n: h for n, h in other.items() if n.endswith("tensors")
        }


def test_copies_that_are_not_whole_do_not_count(tmp_path: Path) -> None:
    from sdxl_trainer import mirror

    made = Saver(options(str(tmp_path / "far")), tmp_path / "near", print)
    (tmp_path / "near").mkdir()
    for step in (1, 2, 3):
        made.save(some(step))
        made.wait()
        while not all(upload.done() for upload in made._uploads.values()):
            pass
    made.close()
    (tmp_path / "far/checkpoint-3/manifest.json").unlink()
    damaged = tmp_path / "far/checkpoint-2/added.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    said: list[str] = []
    (tmp_path / "new").mkdir()
    found = mirror.newest(str(tmp_path / "far"), tmp_path / "new", said.append)
    assert found
    assert found.step == 1
    assert "checkpoint-2 is not used: added.safetensors is damaged" in said[0]
    (tmp_path / "far/checkpoint-1/manifest.json").write_text('{"files": {"../../up.json": ""}}')
    assert mirror.newest(str(tmp_path / "far"), tmp_path / "new2", said.append) is None
    assert "outside of its folder" in said[-1]


def test_a_mirror_that_is_lost_stops_nothing(config: Callable[..., Any], tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "checkpoint-2").write_text("in the way")
    (tmp_path / "far" / "checkpoint-4").symlink_to("/proc/nowhere")
    train(config(train={"checkpoint_mirror": str(tmp_path / "far")}))
    assert "checkpoint-4 is not in" in capfd.readouterr().err
    assert (tmp_path / "run" / "model_index.json").exists()


def test_a_mirror_that_cannot_be_opened_is_refused(config: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="'nowhere://x' cannot be opened"):
        train(config(train={"checkpoint_mirror": "nowhere://x"}))
