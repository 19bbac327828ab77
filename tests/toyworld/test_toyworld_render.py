"""Pictures: deterministic, antialiased, whole, and of the right size and colour."""

import dataclasses
import itertools

import numpy as np
import pytest

import toyworld as tw
from toyworld.grammar import PICTURE_SIZES, Scene, Thing
from toyworld.shapes import SHAPES


def one(shape: str = "circle", texture: str = "plain", size: str = "large", place: str = "center") -> Scene:
    thing = Thing(shape, "white", texture, size, place, tw.PLACES[place])
    return Scene((thing,), "black", None, (128, 128))


def test_drawing_is_deterministic_and_obeys_the_size() -> None:
    for index in range(40):
        made = tw.scene(9, index)
        picture = tw.draw(made)
        assert picture.shape == (*made.size, 3)
        assert picture.dtype == np.uint8
        assert np.array_equal(picture, tw.draw(made))
    assert tw.draw(made, (88, 184)).shape == (88, 184, 3)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_clean_whole_and_several_latent_cells_wide(shape: str) -> None:
    picture = tw.draw(one(shape))[..., 0].astype(int)
    ys, xs = np.nonzero(picture > 127)
    assert abs((ys.min() + ys.max() + 1) / 2 - 64) <= 1  # the middle of its box is its place
    assert abs((xs.min() + xs.max() + 1) / 2 - 64) <= 1
    assert max(np.ptp(xs), np.ptp(ys)) >= 36
    blended = (picture > 0) & (picture < 255)
    assert 0 < blended.mean() < 0.04  # a rim of one pixel, and nothing else, is neither object nor background
    smaller = tw.draw(one(shape, size="small"))[..., 0]
    assert 0.45 < (smaller > 127).sum() / (picture > 127).sum() < 0.65


@pytest.mark.parametrize("shape", SHAPES)
def test_antialiasing_keeps_the_area(shape: str) -> None:
    """The sum of coverage equals the area counted at eight times the resolution."""
    coarse = tw.draw(one(shape)).astype(float)[..., 0].sum() / 255
    fine = (tw.draw(one(shape), (1024, 1024))[..., 0] > 127).sum() / 64
    assert coarse == pytest.approx(fine, rel=0.01)


def test_shapes_differ_in_area_from_one_another_at_most_threefold() -> None:
    areas = {shape: (tw.draw(one(shape))[..., 0] > 127).mean() for shape in SHAPES}
    assert max(areas.values()) < 3 * min(areas.values()), areas


@pytest.mark.parametrize("texture", ["striped", "dotted", "checked"])
def test_a_texture_shows_two_tones_of_which_none_is_rare(texture: str) -> None:
    inside = tw.draw(one("square", texture))[46:82, 46:82, 0]
    plain, second = (inside == 255).mean(), (inside == 178).mean()
    assert plain > 0.25
    assert second > 0.15
    assert (tw.draw(one("square"))[46:82, 46:82] == 255).all()


def test_no_object_is_cut_and_two_never_touch() -> None:
    for size, place, shape in itertools.product(set(PICTURE_SIZES), tw.PLACES, ("star", "square", "triangle")):
        made = one(shape, place=place)
        stray = tuple(np.clip(a + (0.025 if a > 0.5 else -0.025), 0, 1) for a in made.things[0].at)
        moved = dataclasses.replace(made, things=(dataclasses.replace(made.things[0], at=stray),))
        picture = tw.draw(moved, size)
        frame = np.ones(size, bool)
        frame[1:-1, 1:-1] = False
        assert not picture[frame].any(), (size, place, shape)
    for index in range(100):
        made = tw.scene(12, index, count=2)
        apart = [tw.draw(dataclasses.replace(made, things=(thing,))) for thing in made.things]
        ground = np.array(tw.COLOURS[made.background], np.uint8)
        assert not ((apart[0] != ground).any(-1) & (apart[1] != ground).any(-1)).any()
