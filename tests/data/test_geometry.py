"""Geometry: what the time_ids say is what the pixels show."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdxl_trainer.config import Data
from sdxl_trainer.data import buckets, images
from sdxl_trainer.data.geometry import Geometry, covering, variants
from sdxl_trainer.errors import UserError

SIDES = st.integers(64, 400)
CROPS = ["random", "center"]


def options(**more: object) -> Data:
    return Data(path="x", **{"resolution": 64, **more})


def painted(height: int, width: int) -> Image.Image:
    """Red and green count rows and columns by halves of the picture's size; resizing keeps them linear."""
    rows = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    columns = np.linspace(0, 255, width)[None].repeat(height, 0)
    return Image.fromarray(np.stack([rows, columns, np.full((height, width), 7.0)], -1).round().astype(np.uint8))


@pytest.mark.parametrize("block", range(20))
def test_painted_coordinates_are_the_time_ids(block: int) -> None:
    """1,000 random pictures, crops and flips: the crop read back from the pixels is the one the time_ids name."""
    for case in range(50):
        _check_painted(np.random.default_rng([block, case]))


def _check_painted(random: np.random.Generator) -> None:
    height, width = (int(side) for side in random.integers(70, 400, 2))
    data = options(
        crop=str(random.choice(["random", "center"])),
        flip=True,
        interpolation="bilinear",
        resolution=int(random.choice([64, 72, 96])),
        buckets=str(random.choice(["none", "area"])),
        bucket_step=int(random.choice([8, 16, 32])),
    )
    focus = (float(random.random()), float(random.random())) if random.random() < 0.5 else None
    choices = variants(data, (height, width), int(random.integers(1 << 60)), "picture", focus=focus)
    geometry = choices[random.integers(len(choices))]
    pixels = images.pixels(painted(height, width), geometry, data.interpolation).astype(float)
    original_h, original_w, top, left, target_h, target_w = geometry.time_ids()
    assert (original_h, original_w) == (height, width)
    assert pixels.shape == (target_h, target_w, 3)
    assert (target_h, target_w) in buckets.sizes(data, data.resolution)
    resized_h, resized_w = geometry.resized
    assert read_offset(pixels[:, target_w // 2, 0], height, resized_h) == top
    columns = pixels[target_h // 2, :, 1]
    assert read_offset(255 - columns if geometry.flip else columns, width, resized_w) == left


FOCI = st.floats(0, 1)


@given(height=SIDES, width=SIDES, x=FOCI, y=FOCI, content=st.integers(0, 2**64 - 1), crop=st.sampled_from(CROPS))
@settings(max_examples=500, deadline=None)
def test_every_crop_holds_the_focus(height: int, width: int, x: float, y: float, content: int, crop: str) -> None:
    """Also mirrored; and a centre crop has it in its middle unless an edge of the picture is nearer."""
    data = options(crop=crop, flip=True, buckets="area", bucket_step=8)
    for geometry in variants(data, (height, width), content, "p", focus=(x, y)):
        shares = (y, 1 - x if geometry.flip else x)
        for share, whole, side, corner in zip(shares, geometry.resized, geometry.target, geometry.crop, strict=True):
            assert 0 <= corner <= whole - side
            point = min(share * whole, whole - 1e-9)
            assert corner - 1e-6 <= point <= corner + side + 1e-6
            if crop == "center" and 0 < corner < whole - side:
                assert abs(point - corner - side / 2) <= 1


def test_random_crops_with_a_focus_use_all_the_room_there_is() -> None:
    data = options(crop="random", crops_per_image=1)
    lefts = [variants(data, (64, 264), c, "p", focus=(0.25, 0.5))[0].crop[1] for c in range(3000)]
    assert set(lefts) == set(range(3, 67)), "pixel 66 of 264 is the first or the last of the crop, or between"


def read_offset(ramp: np.ndarray, original: int, resized: int) -> int:
    """Where in the resized picture this piece begins, read from values that run from 0 to 255 over the original."""
    inner = (ramp > 3) & (ramp < 252)  # resampling flattens the ramp at its ends
    source = ramp[inner] / 255 * (original - 1)
    # The centre of pixel p of the original lies at (p + 1/2) / original of the picture's length.
    positions = (source + 0.5) * resized / original - 0.5
    return round(float(np.mean(positions - np.arange(len(ramp))[inner])))


def test_exact_pixels_when_nothing_is_resized() -> None:
    """Without resizing every pixel can be named: the crop is exactly the part that the record names."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 200, 3), dtype=np.uint8)
    for geometry in variants(options(crop="random", flip=True, crops_per_image=8), (64, 200), 3, "p"):
        top, left = geometry.crop
        source = pixels[:, ::-1] if geometry.flip else pixels
        expected = source[top : top + 64, left : left + 64]
        assert np.array_equal(images.pixels(Image.fromarray(pixels), geometry, "lanczos"), expected)


@given(height=SIDES, width=SIDES, content=st.integers(0, 2**64 - 1), flip=st.booleans(), crops=st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_every_crop_lies_inside(height: int, width: int, content: int, flip: bool, crops: int) -> None:
    for crop in ("random", "center"):
        more = {"crops_per_image": crops} if crop == "random" else {}
        made = variants(options(crop=crop, flip=flip, **more), (height, width), content, "p")
        assert len(made) == len(set(made)) <= max(1, crops) * (1 + flip)
        for geometry in made:
            for free, corner in zip(np.subtract(geometry.resized, geometry.target), geometry.crop, strict=True):
                assert 0 <= corner <= free
            assert min(geometry.resized) == 64
            assert max(geometry.resized) == max(height, width) * 64 // min(height, width)


@given(height=SIDES, width=SIDES, rows=st.integers(8, 200), columns=st.integers(8, 200))
def test_covering_covers_and_touches(height: int, width: int, rows: int, columns: int) -> None:
    got = covering((height, width), (rows, columns))
    assert got[0] >= rows
    assert got[1] >= columns
    assert got[0] == rows or got[1] == columns


def test_centre_crop_is_the_reference_one() -> None:
    """(h - res) / 2 rounded half to even, as Python's round does in the reference script."""
    corners = [variants(options(), (64, width), 0, "p")[0].crop for width in (64, 65, 66, 67, 71, 101)]
    assert corners == [(0, 0), (0, 0), (0, 1), (0, 2), (0, 4), (0, 18)]


def test_crops_are_a_property_of_the_picture() -> None:
    data = options(crop="random")
    assert variants(data, (64, 300), 5, "a") == variants(data, (64, 300), 5, "b")
    assert variants(data, (64, 300), 5, "a") != variants(data, (64, 300), 6, "a")


def test_random_crops_are_spread_over_the_room() -> None:
    lefts = [variants(options(crop="random", crops_per_image=1), (64, 164), c, "p")[0].crop[1] for c in range(3000)]
    assert set(lefts) == set(range(101))
    assert np.mean(lefts) == pytest.approx(50, abs=3)


def test_a_square_picture_has_one_random_crop() -> None:
    assert len(variants(options(crop="random", crops_per_image=8), (300, 300), 1, "p")) == 1


@pytest.mark.parametrize(
    ("size", "what"), [((1, 1), "enlarged 64 times"), ((64, 30_000), "16 times as long"), ((7, 9), "enlarged 9.14")]
)
def test_unfit_pictures_are_refused_by_name(size: tuple[int, int], what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        variants(options(), size, 0, "cats/tom.jpg")
    assert caught.value.where == "cats/tom.jpg"


def test_time_ids_are_those_of_the_pipeline(base) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    geometry = Geometry((1365, 2731), (1024, 2048), (0, 511), (1024, 1024), False)
    import torch

    width = pipeline.text_encoder_2.config.projection_dim
    expected = pipeline._get_add_time_ids(
        geometry.original, geometry.crop, geometry.target, dtype=torch.float32, text_encoder_projection_dim=width
    )
    assert expected.tolist() == [[float(i) for i in geometry.time_ids()]]


def test_decoding_keeps_what_the_record_says(tmp_path) -> None:
    """EXIF rotation comes before everything: the original size is that of the picture as people see it."""
    picture, exif = painted(100, 300), Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    picture.save(file, "JPEG", exif=exif)
    assert images.probe(file.getvalue(), "p") == (300, 100)
    assert images.decode(file.getvalue(), "p").size == (100, 300)
