"""What becomes of objects when pictures are trained in random crops, with true coordinates and without."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import toyworld
from sdxl_trainer import demo
from sdxl_trainer.data.geometry import Geometry
from tests.learning.beginner import drawn, frame, over_seeds, pictures, trained
from toyworld import score

pytestmark = [pytest.mark.learning, pytest.mark.timeout(3600)]

SIZE = HEIGHT, WIDTH = 128, 192  # of the pictures; crops are squares of their height
ASKED = [pair for pair in toyworld.prompts(600, 502) if pair[0].things[0].place == "left"][:32]
TRAINING = {
    "train": {"steps": 80, "batch_size": 16, "learning_rate": 1e-3},
    "schedule": {"name": "linear", "warmup_steps": 5},
    "ema": {"enabled": True, "decay": 0.95},
}

true = Geometry.time_ids


def absent(crop: Geometry) -> tuple[int, ...]:
    """As if nothing had been cut off at the top and on the left."""
    return (*true(crop)[:2], 0, 0, *true(crop)[4:])


def test_true_crop_coordinates_keep_objects_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """micro-SDXL learns from random crops, which cut objects. If it was told where each crop lay, it draws at (0, 0)
    the left part of a picture, where an object that is asked for on the left is whole (Podell et al. 2023, 2.2)."""
    data = {"path": str(pictures(tmp_path, "wide", 200, SIZE)), "resolution": HEIGHT, "crop": "random"}
    data |= {"crops_per_image": 4, "caption_dropout": 0.1}

    def whole(name: str, told: Callable[[Geometry], tuple[int, ...]], seed: int) -> float:
        with monkeypatch.context() as patch:
            patch.setattr(Geometry, "time_ids", told)
            model = trained(tmp_path / f"{name}-{seed}", {"path": str(demo.BASE)}, data, seed, TRAINING)
        shown = drawn(model, ASKED, 3.0, HEIGHT, original_size=SIZE)
        return float(np.mean([clear_of_the_sides(picture) for picture in shown]))

    told = over_seeds("whole objects, true coordinates", lambda seed: whole("true", true, seed))
    untold = over_seeds("whole objects, no coordinates", lambda seed: whole("absent", absent, seed))
    assert told > untold + 0.2


def clear_of_the_sides(picture: np.ndarray) -> bool:
    """Whether there is an object that touches neither side."""
    sides = np.abs(picture[:, [0, 1, 2, -3, -2, -1]].astype(np.float32) - frame(picture)).max(axis=2)
    return len(score.read(picture).things) > 0 and float((sides > 60).mean()) < 0.02
