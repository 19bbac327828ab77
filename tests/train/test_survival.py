"""Whole runs on several processes to which something happens: each ends as the one to which nothing happened."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sdxl_trainer import checkpoint, files
from sdxl_trainer import train as training
from sdxl_trainer.data import encode, images
from sdxl_trainer.errors import UserError
from sdxl_trainer.log import read_metrics
from sdxl_trainer.train import train
from tests.train import processes
from tests.train.processes import finished, launch, said, start, until, written

STEPS = 12
OPTIONS = {
    "data": [{"crop": "random", "flip": True, "caption_dropout": 0.3}],
    "ema": {"enabled": True},
    "train": {"steps": STEPS, "batch_size": 4, "checkpoint_every": 5, "learning_rate": 1e-4},
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the run that nothing happened to left, once it is known."""
    return {}


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    """No process outlives its test."""
    yield
    for process in multiprocessing.active_children():
        children = psutil.Process(process.pid).children(recursive=True)
        for each in [process, *children]:
            each.kill()


@pytest.fixture
def alone(config: Callable[..., Any], tmp_path: Path, kept: dict[str, Any]) -> dict[str, Any]:
    if not kept:
        path = written(config(**OPTIONS, output_dir=str(tmp_path / "alone")))
        assert launch(path, 2) == [0, 0], said(path, 0) + said(path, 1)
        kept.update(left(tmp_path / "alone"))
    return kept


def left(output: Path) -> dict[str, Any]:
    """Everything that must not differ."""
    rows = read_metrics(output / "metrics.jsonl")
    found: dict[str, Any] = {"losses": [(row["step"], row["loss"], row["grad_norm"]) for row in rows]}
    for name in ("unet", "unet_raw", "checkpoint-5", "checkpoint-10"):
        found |= {f"{name}/{file}": digest for file, digest in files.tree_hashes(output / name).items()}
    return {name: value for name, value in found.items() if name == "losses" or name.endswith("tensors")}


def steps(output: Path, count: int) -> Callable[[], bool]:
    return lambda: len(read_metrics(output / "metrics.jsonl")) >= count


def test_a_launcher_restarts_after_a_crash_and_may_be_stopped(
    config: Callable[..., Any], tmp_path: Path, alone: dict[str, Any]
) -> None:
    """torchrun: one process is killed and all begin anew from the last checkpoint; the launcher is told to stop, and
    the same command continues."""
    output = tmp_path / "run"
    path = written(config(**OPTIONS, output_dir=str(output)))
    agent = processes.agent(path, 2, restarts=1)
    until(steps(output, 7), agent)
    os.kill(int(path.with_suffix(".1.pid").read_text()), signal.SIGKILL)
    until(lambda: "continuing after step 5" in said(path, 0), agent)
    until(steps(output, 8), agent)
    os.kill(agent.pid, signal.SIGTERM)
    agent.join()
    assert agent.exitcode != 0
    newest = checkpoint.verify(checkpoint.found(output)[-1])
    assert newest.step >= 8
    assert launch(path, 2) == [0, 0]
    assert f"continuing after step {newest.step}" in said(path, 0)
    assert left(output) == alone
    assert not list(output.glob(".*"))


@pytest.mark.parametrize("told", [(0, 1), (1,)])
def test_a_signal_ends_all_processes_after_the_same_step(
    config: Callable[..., Any], tmp_path: Path, alone: dict[str, Any], told: tuple[int, ...]
) -> None:
    output = tmp_path / "run"
    path = written(config(**OPTIONS, output_dir=str(output)))
    running = start(path, 2)
    until(steps(output, 6), running[0])
    for number in told:
        os.kill(running[number].pid, signal.SIGTERM)
    assert finished(running) == [143, 143]
    last = read_metrics(output / "metrics.jsonl")[-1]["step"]
    assert 6 <= last < STEPS
    assert [checkpoint.verify(c).step for c in checkpoint.found(output)] == sorted({5, min(last, 10), last})
    assert said(path, 0).endswith("interrupted; the same command continues\n")
    assert launch(path, 2) == [0, 0]
    assert left(output) == alone


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_process_that_stands_still_is_named(
    config: Callable[..., Any], tmp_path: Path, alone: dict[str, Any], stopped: int
) -> None:
    """The first process keeps what the processes know of each other; it too may be the one."""
    output, other = tmp_path / "run", 1 - stopped
    watched = {**OPTIONS, "train": {**OPTIONS["train"], "hang_timeout": 8}}
    path = written(config(**watched, output_dir=str(output)))
    running = start(path, 2)
    until(steps(output, 6), running[0])
    os.kill(running[stopped].pid, signal.SIGSTOP)
    running[other].join()
    os.kill(running[stopped].pid, signal.SIGKILL)
    assert finished(running)[other] == 75
    assert f"process {other} waited for 8 s: process {stopped} does not answer" in said(path, other)
    written(config(**OPTIONS, output_dir=str(output)))
    assert launch(path, 2) == [0, 0]
    assert left(output) == alone


@pytest.mark.parametrize("killed", [0, 1])
def test_that_another_process_ended_is_said_in_words(
    config: Callable[..., Any], tmp_path: Path, alone: dict[str, Any], killed: int
) -> None:
    output, other = tmp_path / "run", 1 - killed
    path = written(config(**OPTIONS, output_dir=str(output)))
    running = start(path, 2)
    until(steps(output, 6), running[0])
    os.kill(running[killed].pid, signal.SIGKILL)
    assert finished(running)[other] == 75
    last = said(path, other)
    assert "Traceback" not in last
    assert "error: another process of this run has ended" in last
    assert launch(path, 2) == [0, 0]
    assert left(output) == alone


def test_one_measures_the_validation_loss_as_two_do(config: Callable[..., Any], tmp_path: Path) -> None:
    """Bitwise: each picture is measured by itself, with weights that do not move."""
    validation = {"loss_every": 1, "loss_timesteps": 3, "trained_pictures": 2}
    found = []
    for count in (1, 2):
        options = {
            "data": [{"held_out": 0.5}],
            "validation": validation,
            "train": {"steps": 1, "batch_size": 2, "learning_rate": 1e-30, "checkpoint_every": 0},
        }
        path = written(config(**options, output_dir=str(tmp_path / str(count))))
        assert launch(path, count) == [0] * count, said(path, 0)
        found.append(read_metrics(tmp_path / str(count) / "validation.jsonl"))
    assert found[0] == found[1]
    assert next(len(row["pictures"]) for row in found[0] if row["set"] == "held_out") >= 2


def test_the_best_model_is_the_result_of_shards(config: Callable[..., Any], tmp_path: Path) -> None:
    """A rate far too high, and rising: the last model is not the best. All processes go back to the same checkpoint, of
    which only the first one knows when it is written."""
    output = tmp_path / "run"
    options = {
        "data": [{"held_out": 0.5}],
        "ema": {"enabled": True, "decay": 0.5},
        "validation": {"loss_every": 1, "trained_pictures": 0, "keep_best": True},
        "train": {"steps": 6, "batch_size": 2, "learning_rate": 0.3, "checkpoint_every": 0, "shard": True},
        "schedule": {"name": "constant_with_warmup", "warmup_steps": 6},
    }
    path = written(config(**options, output_dir=str(output)))
    assert launch(path, 2) == [0, 0], said(path, 0) + said(path, 1)
    measures = {row["step"]: row["validation_loss"] for row in read_metrics(output / "metrics.jsonl")}
    best = min(measures, key=lambda step: measures[step])
    assert best < 6
    assert f"the result is the model after step {best}" in said(path, 0)
    for result, kept in (("unet", "unet_ema"), ("unet_raw", "unet")):
        one, other = (
            checkpoint.read_weights(folder) for folder in (output / result, output / f"checkpoint-{best}" / kept)
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("pivotal", [False, True])
def test_new_words_learn_alike_on_one_process_and_two(
    config: Callable[..., Any], pictures: Path, tmp_path: Path, pivotal: bool
) -> None:
    """Steps of three pictures: one process has two of them, the other one; and dropped captions hold no new word."""
    folder = tmp_path / "named"
    shutil.copytree(pictures, folder)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]
    said_of = [f"<x> {row['text']}" if number % 2 else f"{row['text']}, <y>" for number, row in enumerate(rows)]
    lines = [json.dumps({**row, "text": text}) for row, text in zip(rows, said_of, strict=True)]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    options: dict[str, Any] = {
        "data": [{"path": str(folder), "caption_dropout": 0.4}],
        "token": [{"name": "<x>", "vectors": 2}, {"name": "<y>"}],
        "train": {"steps": 5, "batch_size": 3, "learning_rate": 1e-3, "checkpoint_every": 5},
    }
    if pivotal:
        options["adapter"] = {"rank": 4, "parts": ["unet", "text_encoder", "text_encoder_2"]}
    found, moved = [], []
    for count in (1, 2):
        output = tmp_path / str(count)
        path = written(config(**options, output_dir=str(output)))
        assert launch(path, count) == [0] * count, said(path, 0)
        found.append([(row["loss"], row["grad_norm"]) for row in read_metrics(output / "metrics.jsonl")])
        moved.append(load_file(output / "checkpoint-5" / "added.safetensors"))
    for (loss, norm), (other_loss, other_norm) in zip(*found, strict=True):
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert other_norm == pytest.approx(norm, rel=1e-3)
    apart = torch.cat([(moved[0][name] - moved[1][name]).abs().flatten() for name in moved[0]])
    # AdamW's step is the rate whatever the gradient's size: rounding decides the sign where that is near zero.
    assert float(apart.max()) <= 2 * 1e-3 * 5
    assert float(apart.mean()) < 1e-5


def encoded(folder: Path) -> int:
    """How many pictures lie in a cache."""
    count = 0
    for path in (folder / "latents").glob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            count += len(shard.keys())
    return count


@pytest.fixture
def own(pictures: Path, tmp_path: Path) -> dict[str, Any]:
    """Six pictures that may go away, and a cache without them."""
    shutil.copytree(pictures, tmp_path / "own")
    cache = {"path": str(tmp_path / "cache"), "workers": 0, "batch_size": 1}
    return {"data": [{"path": str(tmp_path / "own")}], "cache": cache, "train": {"steps": 2}}


@pytest.fixture
def whole(config: Callable[..., Any], own: dict[str, Any], tmp_path: Path) -> list[float]:
    """The losses of the run to which nothing happens."""
    apart = {"cache": {**own["cache"], "path": str(tmp_path / "other")}, "output_dir": str(tmp_path / "whole")}
    return losses(train(config(**{**own, **apart})))


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(output / "metrics.jsonl")]


def failed(run: Any, words: str, decode: Callable[..., Any]) -> UserError:
    """The error of a run whose pictures are decoded by something else."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(images, "decode", decode)
        with pytest.raises(UserError, match=words) as caught:
            train(run)
    return caught.value


def test_a_decoding_process_that_is_killed_costs_nothing(
    config: Callable[..., Any],
    own: dict[str, Any],
    whole: list[float],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Told in words; what was encoded before is there, and the same command encodes the rest."""
    decode, encode_pictures, count = images.decode, encode._encode_pictures, list[int]()

    def dying(content: bytes, name: str) -> Any:
        if name.endswith("4.png"):
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(content, name)

    def counting(vae: Any, writer: Any, keys: Any, batch: list[Any], *more: Any) -> None:
        count.append(len(batch))
        encode_pictures(vae, writer, keys, batch, *more)

    own["cache"]["workers"] = 1
    error = failed(config(**own), "a process that decodes pictures ended", dying)
    assert error.where == "cache.workers"
    kept = encoded(tmp_path / "cache")
    assert 1 <= kept < 6
    monkeypatch.setattr(encode, "_encode_pictures", counting)
    output = train(config(**own))
    assert sum(count) == 6 - kept
    assert losses(output) == whole


def test_pictures_that_vanish_while_they_are_encoded_are_named(
    config: Callable[..., Any], own: dict[str, Any], whole: list[float], tmp_path: Path
) -> None:
    decode = images.decode

    def vanishing(content: bytes, name: str) -> Any:
        if name.endswith("1.png"):
            (tmp_path / "own").rename(tmp_path / "aside")
        return decode(content, name)

    error = failed(config(**own), "4 pictures cannot be used", vanishing)
    assert all(f"{number}.png" in error.where for number in (2, 3, 4, 5))
    assert encoded(tmp_path / "cache") == 2
    (tmp_path / "aside").rename(tmp_path / "own")
    output = train(config(**own))
    assert losses(output) == whole


def test_pictures_that_vanish_while_it_trains_are_missed_when_it_continues(
    config: Callable[..., Any],
    own: dict[str, Any],
    whole: list[float],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Steps read the cache. A run that continues looks at the pictures' names first, and wants them back."""
    step = training.train_step

    def vanishing(run: Any, state: Any, *rest: Any) -> Any:
        if state.step == 0:
            (tmp_path / "own").rename(tmp_path / "aside")
        return step(run, state, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(training, "train_step", vanishing)
        output = train(config(**{**own, "train": {"steps": 1}}))
    assert losses(output) == whole[:1]
    before = files.tree_hashes(output)
    with pytest.raises(UserError, match="own"):
        train(config(**own))
    assert files.tree_hashes(output) == before
    (tmp_path / "aside").rename(tmp_path / "own")
    assert losses(train(config(**own))) == whole
