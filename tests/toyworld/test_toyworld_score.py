"""The reader of pictures, on worlds (seeds) that it was not tuned on."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

import toyworld as tw
from toyworld import score

SEED = 90_001
N = 100


@pytest.fixture(scope="module")
def scenes() -> list[tw.Scene]:
    mixed = [tw.scene(SEED, i) for i in range(N)]
    return mixed + [tw.scene(SEED, i, shapes=tuple(tw.NEW_SHAPES)) for i in range(20)]


@pytest.fixture(scope="module")
def pictures(scenes: list[tw.Scene]) -> list[np.ndarray]:
    return [tw.draw(made) for made in scenes]


def worst(rates: dict[str, score.Rate]) -> float:
    return min(rate.rate for rate in rates.values())


def test_drawn_scenes_are_read_right(pictures: list[np.ndarray], scenes: list[tw.Scene]) -> None:
    rates = score.accuracy(pictures, scenes)
    assert set(rates) == set(score.CHANCE)
    assert worst(rates) >= 0.99, score.table(rates)


def test_noise_and_stray_pixels_do_not_matter(pictures: list[np.ndarray], scenes: list[tw.Scene]) -> None:
    rng = np.random.default_rng(0)
    spoiled = []
    for picture in pictures:
        noisy = np.clip(picture + rng.normal(0, 8, picture.shape), 0, 255).astype(np.uint8)
        noisy[rng.random(picture.shape[:2]) < 0.003] = (255, 0, 255)
        spoiled.append(noisy)
    rates = score.accuracy(spoiled, scenes)
    assert rates["all"].rate >= 0.98, score.table(rates)


def test_blur_does_not_matter(pictures: list[np.ndarray], scenes: list[tw.Scene]) -> None:
    blurred = [np.asarray(Image.fromarray(p).filter(ImageFilter.GaussianBlur(1.5))) for p in pictures]
    rates = score.accuracy(blurred, scenes)
    assert rates["all"].rate >= 0.98, score.table(rates)


def test_pictures_of_other_scenes_score_at_chance(pictures: list[np.ndarray], scenes: list[tw.Scene]) -> None:
    """A scorer that sees what it hopes for would fail here."""
    rates = score.accuracy(pictures[1:N] + pictures[:1], scenes[:N])
    for name in ("shape", "colour", "background", "place"):
        assert rates[name].low < score.CHANCE[name] * 1.6, (name, rates[name])
        assert rates[name].rate < score.CHANCE[name] * 2, (name, rates[name])
    assert rates["all"].right <= 1


def test_an_empty_picture_and_a_shapeless_one_are_wrong() -> None:
    made = tw.scene(SEED, 0, count=1)
    empty = np.full((128, 128, 3), tw.COLOURS[made.background], np.uint8)
    assert score.read(empty) == score.Reading((), made.background)
    assert dict(score.judge(empty, made))["background"]
    assert not dict(score.judge(empty, made))["all"]
    ys, xs = np.mgrid[:128, :128]
    snake = empty.copy()
    snake[(abs(ys - 64 - 20 * np.sin(xs / 9)) < 5) & (abs(xs - 64) < 40)] = tw.COLOURS[made.things[0].colour]
    (seen,) = score.read(snake).things
    assert seen.shape is None


def test_each_attribute_is_judged_on_its_own() -> None:
    asked = tw.Scene((tw.Thing("ring", "red", "plain", "large", "left", (0.25, 0.5)),), "white", None, (128, 128))
    for change in ({"shape": "star"}, {"colour": "blue"}, {"place": "top", "at": (0.5, 0.25)}, {"size": "small"}):
        thing = tw.Thing(**{**vars(asked.things[0]), **change})
        verdict = dict(score.judge(tw.draw(tw.Scene((thing,), "white", None, (128, 128))), asked))
        wrong = {name for name, right in verdict.items() if not right}
        expected = {next(iter(change))} | ({"all"} if "size" not in change else set())
        assert wrong - {"shape and colour"} == expected


def test_a_swapped_pair_is_a_wrong_relation_and_nothing_else() -> None:
    made = tw.scene(SEED, 1, count=2)
    first, second = made.things
    swapped = tuple(
        tw.Thing(**{**vars(a), "place": b.place, "at": b.at}) for a, b in ((first, second), (second, first))
    )
    verdict = score.judge(tw.draw(tw.Scene(swapped, made.background, None, made.size)), made)
    assert {name for name, right in verdict if not right} == {"relation", "all"}


@given(st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_labels_agree_with_flood_fill(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((12, 14)) < rng.uniform(0.03, 0.6)  # with empty rows, and nearly without gaps
    labels = score._label(mask)
    assert ((labels > 0) == mask).all()
    todo, parts = set(zip(*np.nonzero(mask), strict=True)), 0
    while todo:
        front, part = [todo.pop()], set()
        while front:
            y, x = front.pop()
            part.add((y, x))
            near = {(y + dy, x + dx) for dy, dx in itertools.product((-1, 0, 1), repeat=2)} & todo
            todo -= near
            front += near
        assert len({labels[p] for p in part}) == 1
        parts += 1
    assert len(set(labels[mask].tolist())) == parts


def test_wilson_interval() -> None:
    assert score.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)  # Newcombe 1998, table I
    assert score.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert score.wilson(0, 0) == (0.0, 1.0)
