"""A checkpoint can be drawn with as it is, while the run goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdxl_trainer import sample
from sdxl_trainer.errors import UserError
from sdxl_trainer.sampling import models
from sdxl_trainer.sampling.order import made
from sdxl_trainer.train import train

HOW: dict[str, Any] = {"steps": 2, "height": 64, "width": 64, "seed": 5}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "CACHE", tmp_path / "models")


def drawn(model: Path, out: Path) -> bytes:
    (path,) = sample.run(made(str(model), HOW, ["a red circle"]), out)
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


@pytest.mark.parametrize("averaged", [False, True], ids=["raw", "ema"])
def test_it_draws_what_the_result_draws(config: Callable[..., Any], tmp_path: Path, averaged: bool) -> None:
    made = config(
        train={"steps": 2, "checkpoint_every": 1, "learning_rate": 1e-2},
        ema={"enabled": averaged},
        objective={"prediction": "v_prediction", "zero_terminal_snr": True},
    )
    output = train(made)
    last = drawn(output / "checkpoint-2", tmp_path / "last")
    assert last == drawn(output, tmp_path / "result")
    assert last != drawn(output / "checkpoint-1", tmp_path / "first")


def test_a_checkpoint_of_an_adapter_says_how(config: Callable[..., Any], tmp_path: Path) -> None:
    output = train(config(train={"steps": 1, "checkpoint_every": 1}, adapter={"rank": 2}))
    with pytest.raises(UserError) as caught:
        drawn(output / "checkpoint-1", tmp_path / "out")
    assert caught.value.fix.endswith(f"--lora {output / 'checkpoint-1'}")
