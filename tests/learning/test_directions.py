"""Which way the options move what is learned. Each holds for the mean of three seeds, with the margin that stands
beside it; the figures that it was set by are in docs/micro.md."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toyworld
from sdxl_trainer.data.geometry import Geometry
from tests.learning.beginner import SEEDS, SIDE, Asked, drawn, pictures, trained
from toyworld import score

pytestmark = pytest.mark.learning

ASKED = toyworld.prompts(64, 500)
V = {"prediction": "v_prediction", "zero_terminal_snr": True}
EPSILON = {"prediction": "epsilon"}
ARMS: dict[str, dict[str, Any]] = {
    "v": {"objective": V},
    "v without dropout": {"objective": V, "data": {"caption_dropout": 0.0}},
    "v without zero SNR": {"objective": V | {"zero_terminal_snr": False}},
    "epsilon": {"objective": EPSILON},
    "epsilon with Min-SNR": {"objective": EPSILON | {"snr_gamma": 5.0}},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("learning")


@pytest.fixture(scope="module")
def arm(place: Path) -> Callable[[str, int], Path]:
    """A trained arm by name and seed; each is trained once."""
    made: dict[tuple[str, int], Path] = {}

    def get(name: str, seed: int) -> Path:
        if (name, seed) not in made:
            settings = dict(ARMS[name])
            data = {"path": str(pictures(place))} | settings.pop("data", {})
            made[name, seed] = trained(place, name.replace(" ", "-"), seed, data, **settings)
        return made[name, seed]

    return get


def right(model: Path, attribute: str, guidance: float = 3.0, asked: Asked = ASKED) -> float:
    """Share of the pictures in which an attribute is as asked."""
    return score.accuracy(drawn(model, asked, guidance), [scene for scene, _ in asked])[attribute].rate


def mean(values: list[float]) -> float:
    print([round(value, 3) for value in values])
    return float(np.mean(values))


def test_v_with_zero_terminal_snr_learns_backgrounds_that_epsilon_does_not(arm: Callable[[str, int], Path]) -> None:
    """Without signal at the last timestep, v is the picture itself; epsilon tells nothing of it (Lin et al. 2024)."""
    v, epsilon = (mean([right(arm(name, seed), "background") for seed in SEEDS]) for name in ("v", "epsilon"))
    assert v > epsilon + 0.3


def test_min_snr_learns_from_noisy_pictures_sooner(arm: Callable[[str, int], Path]) -> None:
    """It takes weight from almost clean pictures, which say nothing of what a caption asks for (Hang et al. 2023)."""
    names = ("epsilon with Min-SNR", "epsilon")
    weighted, plain = (mean([right(arm(name, seed), "background") for seed in SEEDS]) for name in names)
    assert weighted > plain + 0.05


def test_zero_terminal_snr_makes_backgrounds_black_and_white(arm: Callable[[str, int], Path]) -> None:
    """Otherwise the last step's noise keeps the brightness of what is drawn near grey (Lin et al. 2024, 3.1)."""
    asked = [pair for pair in toyworld.prompts(400, 501) if pair[0].background in {"black", "white"}][:32]
    wanted = np.array([toyworld.COLOURS[scene.background] for scene, _ in asked], np.float32)

    def error(model: Path) -> float:
        corners = np.stack([image[[0, 0, -1, -1], [0, -1, 0, -1]] for image in drawn(model, asked)]).astype(np.float32)
        return float(np.abs(np.median(corners, axis=1) - wanted).mean())

    names = ("v", "v without zero SNR")
    zero, plain = (mean([error(arm(name, seed)) for seed in SEEDS]) for name in names)
    assert zero < plain - 5


def test_guidance_needs_dropped_captions(arm: Callable[[str, int], Path]) -> None:
    """What guidance leads away from has to be known (Ho and Salimans 2022)."""

    def gain(name: str) -> float:
        return mean([right(arm(name, seed), "place", 3.0) - right(arm(name, seed), "place", 1.0) for seed in SEEDS])

    assert gain("v") > gain("v without dropout") + 0.05


CROPS: dict[str, Callable[[Geometry], tuple[int, ...]]] = {
    "right": Geometry.time_ids,
    "absent": lambda g: (*Geometry.time_ids(g)[:2], 0, 0, *Geometry.time_ids(g)[4:]),
    "wrong": lambda g: (*Geometry.time_ids(g)[:3], SIDE - Geometry.time_ids(g)[3], *Geometry.time_ids(g)[4:]),
}


def test_true_crop_coordinates_keep_objects_whole(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures twice as wide as high are seen in random square crops, which cut many objects. A model that was told
    where each crop lay draws, at (0, 0), the left half: objects on the left, whole (Podell et al. 2023, 2.2)."""
    everything = toyworld.prompts(400, 502)
    asked = [pair for pair in everything if pair[0].things[0].place in {"left", "top left", "bottom left"}][:64]
    wide = (SIDE, 2 * SIDE)
    data = {"path": str(pictures(place, "wide", wide)), "crop": "random", "crops_per_image": 4}

    def whole(kind: str) -> float:
        monkeypatch.setattr(Geometry, "time_ids", CROPS[kind])
        models = [trained(place, f"crops-{kind}", seed, data, objective=V) for seed in SEEDS]
        monkeypatch.undo()
        return mean([np.mean([_one_whole_object(i) for i in drawn(model, asked, original=wide)]) for model in models])

    true, absent, wrong = whole("right"), whole("absent"), whole("wrong")
    assert true > absent + 0.1
    assert absent > wrong - 0.05
    assert true > wrong + 0.1


def _one_whole_object(image: np.ndarray) -> bool:
    """Whether there is an object and it stays clear of the picture's sides."""
    reading = score.read(image)
    ground = np.array(toyworld.COLOURS[reading.background], np.float32)
    sides = np.abs(image[:, [0, 1, -2, -1]].astype(np.float32) - ground).max(axis=2)
    return len(reading.things) >= 1 and float((sides > 60).mean()) < 0.02
