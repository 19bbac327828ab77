"""The validation loss: of pictures that are never trained, moved by nothing but the weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdxl_trainer import checkpoint
from sdxl_trainer.log import read_metrics
from sdxl_trainer.train import train
from tests.conftest import draw_folder

SETS = {"held_out": 0.4, "buckets": "area", "bucket_step": 16, "bucket_min": 32, "flip": True, "caption_dropout": 0.5}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "ten"
    path.mkdir()
    return draw_folder(path, [(64 + 7 * index, 100) for index in range(10)])


def measures(output: Path) -> dict[int, float]:
    rows = read_metrics(output / "metrics.jsonl")
    return {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}


def test_the_loss_of_held_out_pictures_depends_on_weights_alone(
    config: Callable[..., Any], tmp_path: Path, folder: Path
) -> None:
    def run(name: str, rate: float, **more: Any) -> Path:
        options = {"learning_rate": rate, "checkpoint_every": 0, "batch_size": 3}
        sections = {"validation": {"loss_every": 2, "loss_timesteps": 3}, "train": options, **more}
        return train(config(data=[{"path": str(folder), **SETS}], output_dir=str(tmp_path / name), **sections))

    still = measures(run("still", 1e-30))
    assert list(still) == [2, 4]
    assert still[2] == still[4]
    seed = measures(run("seed", 1e-30, seed=5))
    assert seed == still, "another seed, another order of training, the same pictures, timesteps and noise"
    moved = measures(run("moved", 1e-3))
    assert moved[2] != moved[4]
    assert 0.3 < still[2] < 3


def test_measuring_changes_neither_training_nor_what_is_trained(
    config: Callable[..., Any], tmp_path: Path, folder: Path
) -> None:
    outputs = []
    for name, validation in (("with", {"loss_every": 1}), ("without", {})):
        data = [{"path": str(folder), **SETS}]
        outputs.append(train(config(data=data, validation=validation, output_dir=str(tmp_path / name))))
    rows = [read_metrics(output / "metrics.jsonl") for output in outputs]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    one, two = (checkpoint.read_weights(output / "unet") for output in outputs)
    assert all(bool((one[name] == two[name]).all()) for name in one)
    manifest = json.loads((outputs[0] / "manifest.json").read_text())
    assert manifest["data"]["pictures"] < 10
