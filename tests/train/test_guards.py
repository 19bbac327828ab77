"""What a long run meets: values that are not finite, spikes, too little memory, processes that hang."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdxl_trainer import distributed, files, guards
from sdxl_trainer import train as training
from sdxl_trainer.errors import UserError
from sdxl_trainer.log import read_metrics
from sdxl_trainer.train import train


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """The noise of these steps is not finite."""
    step = training.train_step

    def spoiled(run: Any, state: Any, batches: list[Any], images: int) -> Any:
        if state.step in steps:
            batches[0].noise[0] = float("nan")
        return step(run, state, batches, images)

    monkeypatch.setattr(training, "train_step", spoiled)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_steps_that_are_not_finite_are_skipped_and_named(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any, optimizer: str
) -> None:
    """With and without a pause in between: the count of skipped steps is part of a checkpoint."""
    options = {"optimizer": {"name": optimizer}}
    spoil(monkeypatch, {1, 3})
    train(config(**options, train={"steps": 6, "skip_nonfinite": 2}, output_dir=str(tmp_path / "whole")))
    said = capfd.readouterr().err
    assert said.count("is skipped, its loss or gradient is not finite: ") == 2
    assert "step 2 is skipped" in said
    assert ".png" in next(line for line in said.splitlines() if "step 2 is skipped" in line)
    rows = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert [row["step"] for row in rows if row.get("skipped")] == [2, 4]
    assert all((row["loss"] is None) == bool(row.get("skipped")) for row in rows)
    train(config(**options, train={"steps": 2, "skip_nonfinite": 2}))
    train(config(**options, train={"steps": 6, "skip_nonfinite": 2}))
    for folder in ("unet", "checkpoint-6"):
        one, other = (files.tree_hashes(tmp_path / run / folder) for run in ("run", "whole"))
        assert {n: h for n, h in one.items() if n.endswith("tensors")} == {
            n: h for n, h in other.items() if n.endswith("tensors")
        }


def test_one_more_than_allowed_stops_the_run(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spoil(monkeypatch, {0, 3})
    with pytest.raises(UserError, match="step 4 is not finite"):
        train(config(train={"steps": 6, "skip_nonfinite": 1}))
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]


def test_spikes_stand_out_and_slow_changes_do_not() -> None:
    spikes = guards.Spikes()
    noise = torch.rand(300, generator=torch.Generator().manual_seed(0)).tolist()
    usual = [1.0 - 0.002 * step + 0.1 * noise[step] for step in range(300)]
    assert all(spikes.height(loss) is None for loss in usual)
    assert spikes.height(3.0) == pytest.approx(3.0 / 0.55, rel=0.2)
    assert spikes.height(0.5) is None


def test_a_spike_is_told_with_its_pictures(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any
) -> None:
    monkeypatch.setattr(guards, "ENOUGH", 3)
    step = training.train_step

    def jumping(run: Any, state: Any, batches: list[Any], images: int) -> Any:
        loss, norm = step(run, state, batches, images)
        return (loss * 1000 if state.step == 5 else loss), norm

    monkeypatch.setattr(training, "train_step", jumping)
    train(config(train={"steps": 6}))
    line = next(line for line in capfd.readouterr().err.splitlines() if "times the usual" in line)
    assert line.startswith("step 5: loss ")
    assert ".png" in line
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "spike" in row] == [5]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_too_little_memory_names_three_settings_and_what_they_cost(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def failing(*arguments: Any) -> Any:
        raise error

    monkeypatch.setattr(training, "train_step", failing)
    with pytest.raises(UserError, match="the memory is not enough") as caught:
        train(config(train={"batch_size": 4}))
    settings = caught.value.fix.split("; ")[:3]
    assert [text.partition(" = ")[0] for text in settings] == [
        "train.micro_batch",
        "train.gradient_checkpointing",
        "train.fused_backward",
    ]
    assert all(text.endswith(")") for text in settings)


def test_what_is_on_already_is_not_advised(config: Callable[..., Any]) -> None:
    lora = config(
        adapter={"kind": "lora"}, train={"gradient_checkpointing": True, "batch_size": 1}, ema={"enabled": True}
    )
    assert [text.partition(" = ")[0] for text in guards.remedies(lora)[:3]] == [
        "train.frozen",
        "ema.enabled",
        "train.shard",
    ]


def test_what_would_be_refused_is_not_advised(config: Callable[..., Any]) -> None:
    freed = config(train={"fused_backward": True, "batch_size": 4})
    ending = config(learn=[{"match": r"unet\..*mid.*", "until": 0.5}, {"match": r"unet\..*"}])
    assert not any("micro_batch" in text for text in guards.remedies(freed))
    assert not any("fused_backward" in text for text in guards.remedies(ending))


def test_other_errors_stay_what_they_are(config: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match="shapes"), guards.memory_explained(config()):
        raise RuntimeError("shapes do not fit")


def test_the_clock_may_jump(config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now, jumps = time.time, iter(range(0, 10**9, 10**6))
    monkeypatch.setattr(time, "time", lambda: now() - next(jumps))
    train(config())
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert 0 < manifest["seconds"] < 600
    assert all(row["samples_per_second"] > 0 for row in read_metrics(tmp_path / "run" / "metrics.jsonl"))


class Ended(Exception):
    pass


def test_a_process_that_hangs_is_named_by_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    store, said, exits = torch.distributed.HashStore(), list[str](), list[int]()
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)

    def leave(code: int) -> None:
        exits.append(code)
        raise Ended

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    pulses = [
        guards.Pulse(SimpleNamespace(process_index=rank, num_processes=3), patience, said.append, tick=0.01)
        for rank, patience in enumerate([0.5, 60.0, 60.0])
    ]
    for pulse, step in zip(pulses, (41, 40, 41), strict=True):
        pulse.beat(step)
        pulse.begin()
    limit = time.monotonic() + 30
    while not exits and time.monotonic() < limit:
        time.sleep(0.01)
    for pulse in pulses:
        pulse.close()
    assert exits == [75]
    assert said == ["error: process 0 waited for 0.5 s: process 1 (in step 41) did not begin step 42"]


def test_who_hangs() -> None:
    assert guards.told([7, 7], 1, 60).endswith("all are in step 8")
    assert "process 0 (in step 1), process 2 (in step 0) did not begin step 9" in guards.told([0, 8, -1], 1, 60)


@pytest.mark.parametrize(("system", "most"), [("linux", 2_000_000), ("darwin", 2_048_000_000)])
def test_memory_is_told_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch, system: str, most: int) -> None:
    """Then it is the most so far, in kilobytes, and on macOS in bytes."""

    def absent(*_: Any) -> bytes:
        raise FileNotFoundError

    monkeypatch.setattr(os, "pread", absent)
    monkeypatch.setattr(distributed.sys, "platform", system)
    monkeypatch.setattr(distributed.resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=most))
    assert distributed.memory_gb(torch.device("cpu")) == pytest.approx(2.048)


def test_a_run_that_continues_knows_the_losses_before(
    config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the first twenty steps after an interruption would have no usual loss, and no spikes."""
    known: list[list[float]] = []
    height = guards.Spikes.height

    def noted(spikes: guards.Spikes, loss: float) -> float | None:
        known.append([*spikes.recent])
        return height(spikes, loss)

    monkeypatch.setattr(guards.Spikes, "height", noted)
    train(config(train={"steps": 6, "checkpoint_every": 3}, output_dir=str(tmp_path / "whole")))
    whole, known[:] = known[3:], []
    train(config(train={"steps": 3, "checkpoint_every": 3}))
    known.clear()
    train(config(train={"steps": 6, "checkpoint_every": 3}))
    assert known == whole
    assert [len(losses) for losses in known] == [3, 4, 5]
