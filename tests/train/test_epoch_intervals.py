"""Intervals that are given in epochs: checkpoints, pictures and measures at the very ends of passes over the data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdxl_trainer import check, files
from sdxl_trainer.log import read_metrics
from sdxl_trainer.train import train
from tests.conftest import draw_folder
from tests.train.test_disk import predicted

# Five pictures in steps of two: the third step of each epoch has one.
TRAIN = {"epochs": 5, "steps": None, "batch_size": 2, "checkpoint_every": "2 epochs", "validate_every": "1 epoch"}
VALIDATION = {"prompts": ["a red circle"], "images": 1, "steps": 1, "loss_every": "2 epochs", "trained_pictures": 2}


@pytest.fixture
def made(config: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    (tmp_path / "five").mkdir()
    data = {"path": str(draw_folder(tmp_path / "five", [(64, 64)] * 5))}
    return lambda **train: config(data=[data], train={**TRAIN, **train}, validation=VALIDATION)


def test_things_happen_at_the_ends_of_epochs_also_when_a_run_continues(
    made: Callable[..., Any], tmp_path: Path
) -> None:
    need = predicted(made(), tmp_path / "run")
    output = train(made(epochs=3))
    assert [p.name for p in output.glob("checkpoint-*")] == ["checkpoint-6"]
    assert train(made()) == output
    assert {p.name for p in output.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-12"}
    assert need.most == 2
    shown = sorted(int(p.name.removeprefix("step-")) for p in (output / "samples").glob("step-*"))
    assert shown == [3, 6, 9, 12, 15]
    measured = [row["step"] for row in read_metrics(output / "metrics.jsonl") if "trained_loss" in row]
    assert measured == [6, 12, 15]
    whole = train(made().model_copy(update={"output_dir": str(tmp_path / "whole")}))
    assert files.tree_hashes(whole / "unet") == files.tree_hashes(output / "unet")


def test_the_check_says_how_many_steps_that_are(made: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    check.run(made(validate_every=4))
    said = " ".join(capsys.readouterr().out.split())
    assert "checkpoints every 2 epochs: 6 steps" in said
    assert "validation loss every 2 epochs: 6 steps" in said
    assert "validation pictures" not in said, "what is given in steps needs no words"
