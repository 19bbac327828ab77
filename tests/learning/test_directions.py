"""Which way the options move what is learned. Each holds for the mean of three seeds, with the margin that stands
beside it; docs/micro.md has the figures that it was set by."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toyworld
from tests.learning.beginner import (
    ANEW,
    SEEDS,
    SIDE,
    UNET,
    Asked,
    base,
    drawn,
    frame,
    over_seeds,
    pictures,
    trained,
    validation_losses,
)
from toyworld import score

pytestmark = [pytest.mark.learning, pytest.mark.timeout(3600)]

ASKED = toyworld.prompts(96, 500)
EPSILON = {"prediction": "epsilon"}
V = {"prediction": "v_prediction", "zero_terminal_snr": True}
Arm = Callable[..., Path]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("learning")


@pytest.fixture(scope="module")
def arm(place: Path) -> Arm:
    """A UNet from random weights, trained with an objective and caption dropout; each is trained once."""

    @cache
    def get(name: str, seed: int, dropout: float = 0.1) -> Path:
        objective = {"v": V, "epsilon": EPSILON}[name]
        model = {"path": str(base(place)), "init": "random", "unet": UNET}
        data = {"path": str(pictures(place, "squares", 2000, (SIDE, SIDE)))}
        data |= {"resolution": SIDE, "caption_dropout": dropout}
        return trained(place / f"{name}-{dropout}-{seed}", model, data, seed, ANEW, {"objective": objective})

    return get


def right(model: Path, guidance: float, *attributes: str, asked: Asked = ASKED) -> float:
    """The share of pictures in which an attribute is as asked; of several the mean."""
    found = score.accuracy(drawn(model, asked, guidance), [scene for scene, _ in asked])
    return float(np.mean([found[name].rate for name in attributes]))


def test_v_with_zero_terminal_snr_learns_backgrounds_that_epsilon_does_not(arm: Arm) -> None:
    """Without signal at the last timestep, v is the picture itself; epsilon tells nothing of it (Lin et al. 2024)."""
    v = over_seeds("backgrounds, v", lambda seed: right(arm("v", seed), 1.0, "background"))
    epsilon = over_seeds("backgrounds, epsilon", lambda seed: right(arm("epsilon", seed), 1.0, "background"))
    assert v > epsilon + 0.25


def test_min_snr_learns_noisy_pictures_better_and_almost_clean_ones_worse(place: Path) -> None:
    """It takes weight from almost clean pictures, which say little of what a caption asks for (Hang et al. 2023). What
    is compared is the plain error of epsilon of pictures kept out of training, in the halves of the schedule."""
    data = {"path": str(pictures(place, "squares", 2000, (SIDE, SIDE)))}
    data |= {"resolution": SIDE, "caption_dropout": 0.1, "held_out": 0.1}
    uniform = {"timesteps": {"bias": "none"}, "validation": {"loss_every": 120}}

    def losses(name: str, seed: int, **objective: Any) -> np.ndarray:
        model = {"path": str(base(place)), "init": "random", "unet": UNET}
        sections = (ANEW | uniform, {"objective": EPSILON | objective})
        return np.array(validation_losses(trained(place / f"{name}-{seed}", model, data, seed, *sections)))

    pairs = [(losses("plain", seed), losses("min-snr", seed, snr_gamma=5.0)) for seed in SEEDS]
    changes = [weighted / plain - 1 for plain, weighted in pairs]  # [seeds, quarters of the schedule]
    noisy = over_seeds("Min-SNR, change of the error at timesteps 500 to 999", lambda seed: changes[seed][2:].mean())
    clean = over_seeds("Min-SNR, change of the error at timesteps 0 to 249", lambda seed: changes[seed][0])
    assert noisy < -0.04
    assert clean > 0.01


def test_zero_terminal_snr_makes_backgrounds_black_and_white(place: Path) -> None:
    """A schedule that keeps some signal at its end shows training how bright a picture is, and a model believes that
    more than a caption, which seldom says it; pictures then begin with pure noise and come out grey (Lin et al. 2024).

    The schedule ends with an SNR of 0.08, which tells as much over the 256 numbers of these latents as SDXL's 0.0048
    tells over those of a picture of 260 pixels.
    """
    asked = [pair for pair in toyworld.prompts(600, 501) if pair[0].background in {"black", "white"}][:48]
    wanted = np.array([toyworld.COLOURS[scene.background] for scene, _ in asked], np.float32)
    data = {"path": str(pictures(place, "terse", 2000, (SIDE, SIDE), terse=1.0))}
    data |= {"resolution": SIDE, "caption_dropout": 0.1}

    def error(seed: int, zero: bool) -> float:
        model = {"path": str(base(place, beta_end=0.0049)), "init": "random", "unet": UNET}
        sections = (ANEW, {"objective": V | {"zero_terminal_snr": zero}})
        shown = drawn(trained(place / f"zero-{zero}-{seed}", model, data, seed, *sections), asked, 1.0)
        return float(np.abs(np.stack([frame(picture) for picture in shown]) - wanted).mean())

    zero = over_seeds("error of black and white backgrounds (0 to 255), zero SNR", lambda seed: error(seed, True))
    kept = over_seeds("error of black and white backgrounds (0 to 255), SNR 0.08", lambda seed: error(seed, False))
    assert zero < kept - 20


def test_guidance_needs_dropped_captions(arm: Arm) -> None:
    """What guidance leads away from has to be known (Ho and Salimans 2022)."""

    def gain(model: Path) -> float:
        return right(model, 3.0, "place", "number") - right(model, 1.0, "place", "number")

    dropped = over_seeds("gain by guidance, captions dropped", lambda seed: gain(arm("v", seed)))
    kept = over_seeds("gain by guidance, captions kept", lambda seed: gain(arm("v", seed, 0.0)))
    assert dropped > kept + 0.05
