"""Killed, interrupted, resumed: the result is bitwise that of a run that nothing happened to."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sdxl_trainer import checkpoint, files
from sdxl_trainer.configfile import dumps
from sdxl_trainer.errors import UserError
from sdxl_trainer.log import read_metrics
from sdxl_trainer.run import Start
from sdxl_trainer.train import train

# Everything that is drawn at random is on. Buckets leave steps of several sizes; an epoch has four steps, so that
# checkpoints and interruptions fall into the middle of epochs, and ends in the middle of a pass over the pictures.
DATA = {"crop": "random", "flip": True, "caption_dropout": 0.3, "crops_per_image": 3, "repeats": 2.5}
EVERYTHING = {
    "data": [{**DATA, "buckets": "area", "bucket_step": 8, "bucket_min": 32}],
    "objective": {"noise_offset": 0.05, "snr_gamma": 5.0},
    "timesteps": {"bias": "later", "multiplier": 2.0},
    "ema": {"enabled": True},
    "schedule": {"name": "cosine", "warmup_steps": 3},
    "train": {"steps": 12, "batch_size": 4, "micro_batch": 3, "checkpoint_every": 3, "learning_rate": 1e-3},
}
MODULES = ["sdxl_trainer.train", "sdxl_trainer.configfile", "diffusers.models.unets.unet_2d_condition", "accelerate"]


def run(path: str) -> None:
    """Child process: sdxl train."""
    torch.set_num_threads(1)
    from sdxl_trainer.cli import guarded
    from sdxl_trainer.configfile import load
    from sdxl_trainer.train import train

    sys.exit(guarded(lambda: train(load(Path(path)))))


@pytest.fixture(scope="module")
def spawn() -> Callable[[Path], Any]:
    """Starts a training process from a server that has imported everything already."""
    context = get_context("forkserver")
    context.set_forkserver_preload(MODULES)

    def start(path: Path) -> Any:
        process = context.Process(target=run, args=(str(path),))
        process.start()
        return process

    return start


def write(config: Any, path: Path) -> Path:
    path.write_text(dumps(config), encoding="utf-8")
    return path


def until(condition: Callable[[], Any], process: Any, seconds: float = 120.0) -> None:
    limit = time.monotonic() + seconds
    while process.is_alive() and not condition():
        assert time.monotonic() < limit, "the run did not get there"
        time.sleep(0.002)


def result(output: Path) -> dict[str, str]:
    """Hashes of everything that must not differ."""
    hashes = {}
    for name in ("unet", "unet_raw", "checkpoint-12"):
        hashes |= {f"{name}/{file}": digest for file, digest in files.tree_hashes(output / name).items()}
    return {name: digest for name, digest in hashes.items() if name.endswith(".safetensors")}


def losses(output: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(output / "metrics.jsonl")]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adafactor"])
def test_interrupted_runs_end_bitwise_alike(
    config: Callable[..., Any], tmp_path: Path, spawn: Callable[[Path], Any], optimizer: str
) -> None:
    options = {**EVERYTHING, "optimizer": {"name": optimizer}}
    whole = tmp_path / "whole"
    process = spawn(write(config(**options, output_dir=str(whole)), tmp_path / "whole.toml"))
    process.join()
    assert process.exitcode == 0

    broken = tmp_path / "broken"
    path = write(config(**options, output_dir=str(broken)), tmp_path / "broken.toml")

    def lines(count: int) -> Callable[[], bool]:
        return lambda: len(read_metrics(broken / "metrics.jsonl")) >= count

    stops = [
        (lines(1), signal.SIGKILL),
        (lambda: list(broken.glob(".checkpoint-*.tmp")), signal.SIGKILL),  # in the middle of a checkpoint
        (lines(5), signal.SIGTERM),
        (lines(7), signal.SIGKILL),
        (lines(10), signal.SIGINT),
    ]
    exits = []
    for reached, number in stops:
        process = spawn(path)
        until(reached, process)
        os.kill(process.pid, number)
        process.join()
        exits.append(process.exitcode)
        checkpoints = checkpoint.found(broken)
        assert all(checkpoint.verify(c) for c in checkpoints)
    assert exits == [-9, -9, 143, -9, 130]
    process = spawn(path)
    process.join()
    assert process.exitcode == 0
    assert losses(broken) == losses(whole)
    assert [step for step, _, _ in losses(broken)] == list(range(1, 13))
    assert result(broken) == result(whole)
    assert not list(broken.glob(".*"))


def test_pictures_that_an_interruption_prevented_are_drawn(
    config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint comes before the pictures of its step, and drawing takes minutes where models are large."""
    small = {"validation": {"prompts": ["a red circle"], "images": 1, "steps": 1, "at_end": False}}
    small |= {"train": {"steps": 6, "checkpoint_every": 2, "validate_every": 2}}
    undisturbed = train(config(output_dir=str(tmp_path / "undisturbed"), **small))

    class Killed(BaseException):
        pass

    def killed(job: Any) -> None:
        raise Killed

    made = config(output_dir=str(tmp_path / "killed"), **small)
    with monkeypatch.context() as change:
        change.setattr("sdxl_trainer.finish.draw_validation", killed)
        with pytest.raises(Killed):
            train(made)
    output = train(made)
    for step in (2, 4):
        file = f"samples/step-{step:06}/0-0.png"
        assert (output / file).is_file(), f"the picture of step {step} is missing"
        assert Image.open(output / file).tobytes() == Image.open(undisturbed / file).tobytes()
    rows = [json.loads(line) for line in (output / "samples/samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]


def test_two_processes_take_the_same_steps(config: Callable[..., Any], tmp_path: Path) -> None:
    """Same samples, noise and timesteps on one process and two, with batches that do not divide evenly."""
    options = {**EVERYTHING, "train": {**EVERYTHING["train"], "learning_rate": 1e-5, "steps": 6}}
    outputs = []
    for processes in (1, 2):
        output = tmp_path / f"processes{processes}"
        path = write(config(**options, output_dir=str(output)), tmp_path / f"{processes}.toml")
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        command = [*launch, "-m", "sdxl_trainer", "train", str(path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads((output / "manifest.json").read_text())["hardware"]["processes"] == processes
        outputs.append(output)
    one, two = (losses(output) for output in outputs)
    assert [step for step, _, _ in two] == [step for step, _, _ in one]
    for (_, loss, norm), (_, other_loss, other_norm) in zip(one, two, strict=True):
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert other_norm == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"optimizer": {"name": "adafactor"}}, "optimizer.name"),
        ({"train": {"steps": 2, "weights": "bf16", "checkpoint_every": 1}}, "train.weights"),
    ],
)
def test_a_named_checkpoint_is_refused_to_another_optimizer(
    config: Callable[..., Any], changes: dict[str, Any], key: str
) -> None:
    """The learning rate may change from it on, and the run says so; another optimizer has no use for its state."""
    sizes = {"steps": 1, "checkpoint_every": 1}
    output = train(config(train=sizes))
    other = config(**{"train": {**sizes, "steps": 2}, **changes})
    with pytest.raises(UserError, match=f"a run with {key}"):
        train(other, Start("checkpoint", "checkpoint-1"))
    train(config(train={**sizes, "steps": 2, "learning_rate": 2e-6}), Start("checkpoint", "checkpoint-1"))
    assert [row["step"] for row in read_metrics(output / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize(
    "beside", [{"adapter": {"rank": 2}}, {"data": [{}, {"prior_prediction": True}]}], ids=["adapter", "prior"]
)
def test_what_learns_beside_a_unet_does_not_go_on_beside_another(
    config: Callable[..., Any], base: Path, tmp_path: Path, beside: dict[str, Any]
) -> None:
    """Its checkpoints do not hold the base, which may move but not change: fine-tuned ones often share all else."""
    first, moved, other = (tmp_path / name for name in ("first", "moved", "other"))
    for place in (first, moved, other):
        shutil.copytree(base, place)
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(weights).items()}, weights)

    def run(place: Path, steps: int) -> Any:
        return config(model={"path": str(place)}, train={"steps": steps, "checkpoint_every": 1}, **beside)

    train(run(first, 1))
    with pytest.raises(UserError, match="UNet is not the one that this run began with"):
        train(run(other, 2))
    assert read_metrics(train(run(moved, 2)) / "metrics.jsonl")[-1]["step"] == 2
