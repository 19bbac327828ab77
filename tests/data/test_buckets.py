"""Buckets: which sizes there are, and which one a picture gets."""

from fractions import Fraction
from math import log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_trainer.config import Data
from sdxl_trainer.data import buckets
from sdxl_trainer.data.geometry import covering, variants
from sdxl_trainer.errors import UserError

SIDES = st.integers(80, 6000)


def options(**more: object) -> Data:
    return Data(path="x", **{"buckets": "area", **more})


def published() -> dict[int, tuple[int, ...]]:
    """Short side -> long sides of the list of 41 that kohya's generator makes for 1024 pixels and sides up to 2048."""
    return {
        **dict.fromkeys((256, 320, 384, 448), (2048,)),
        512: (1856, 1920, 1984, 2048),
        576: (1664, 1728, 1792),
        640: (1536, 1600),
        704: (1408, 1472),
        768: (1280, 1344),
        832: (1216,),
        896: (1152,),
        960: (1088,),
        1024: (1024,),
    }


def test_the_list_for_1024_is_the_published_one() -> None:
    wide = {(short, long) for short, longs in published().items() for long in longs}
    assert set(buckets.sizes(options(), 1024)) == wide | {(long, short) for short, long in wide}


@pytest.mark.parametrize(("step", "longest", "count"), [(64, 1024, 25), (64, 1536, 29), (64, 2048, 41), (32, 2048, 81)])
def test_lists_of_other_limits_are_as_long_as_kohya_s(step: int, longest: int, count: int) -> None:
    assert len(buckets.sizes(options(bucket_step=step, bucket_max=longest), 1024)) == count


def test_the_paper_s_list() -> None:
    made = buckets.sizes(options(buckets="sdxl"), 1024)
    assert len(made) == 41
    assert {(512, 2048), (704, 1344), (1024, 1024), (1024, 960), (1344, 768), (2048, 512)} <= set(made)
    assert all(height % 64 == width % 64 == 0 for height, width in made)
    assert all(0.88 < height * width / 1024**2 <= 1.04 for height, width in made)
    halves = buckets.sizes(options(buckets="sdxl"), 512)
    assert set(halves) == {(height // 2, width // 2) for height, width in made}


@given(step=st.sampled_from([8, 16, 24, 64]), resolution=st.integers(16, 180))
@settings(max_examples=200, deadline=None)
def test_every_bucket_is_within_area_and_as_large_as_it_allows(step: int, resolution: int) -> None:
    side = resolution * 8
    made = buckets.sizes(options(bucket_step=step), side)
    for height, width in made:
        assert height % step == width % step == 0
        assert height * width <= side * side
        assert side // 4 <= min(height, width)
        assert max(height, width) <= 2 * side
        assert (width, height) in made
        enlarged = [(height + step, width), (height, width + step)]
        full = any(h * w > side * side or max(h, w) > 2 * side for h, w in enlarged)
        assert full or height == width, "and there is always a square"


@given(height=SIDES, width=SIDES, kind=st.sampled_from(["area", "sdxl"]))
@settings(max_examples=1500, deadline=None)
def test_the_crop_is_the_smallest_possible(height: int, width: int, kind: str) -> None:
    """No bucket of the list keeps more of the picture; what is cut off is on one axis, as little as its shape needs."""
    data = options(buckets=kind, max_upscale=100.0)
    chosen = buckets.choose(data, 1024, (height, width), "p")
    kept = {size: kept_share((height, width), size) for size in buckets.sizes(data, 1024)}
    assert kept[chosen] == max(kept.values())
    ratio = log(width / height)
    assert abs(ratio - log(chosen[1] / chosen[0])) <= min(abs(ratio - log(w / h)) for h, w in kept) + 1e-12
    if max(height, width) > 16 * min(height, width):
        return
    made = variants(data, (height, width), 1, "p")[0]
    assert made.target == chosen
    assert made.resized == covering((height, width), chosen)
    over = [r - t for r, t in zip(made.resized, chosen, strict=True)]
    assert min(over) == 0
    exact = max(Fraction(chosen[0], height), Fraction(chosen[1], width))
    for side, cut, target in zip((height, width), over, chosen, strict=True):
        assert cut <= side * exact - target


def kept_share(original: tuple[int, int], size: tuple[int, int]) -> Fraction:
    """Share of the picture inside of a crop of the bucket's shape, exactly."""
    one, two = original[1] * size[0], original[0] * size[1]
    return Fraction(min(one, two), max(one, two))


@given(height=SIDES, width=SIDES, step=st.sampled_from([8, 32, 64]))
@settings(max_examples=1000, deadline=None)
def test_without_upscaling_nothing_is_enlarged_and_little_is_lost(height: int, width: int, step: int) -> None:
    data = options(no_upscale=True, bucket_step=step, bucket_min=step)
    if max(height, width) > 16 * min(height, width):
        return
    target = buckets.choose(data, 1024, (height, width), "p")
    assert target[0] <= height
    assert target[1] <= width
    assert target[0] % step == target[1] % step == 0
    assert target[0] * target[1] <= 1024 * 1024
    resized = covering((height, width), target)
    assert resized[0] <= height
    assert resized[1] <= width
    plain = buckets.choose(options(bucket_step=step, bucket_min=step), 1024, (height, width), "p")
    if plain[0] <= height and plain[1] <= width:
        assert target == plain
    elif height * width < 1024 * 1024 and max(height, width) <= 2048:
        assert height - target[0] < step or width - target[1] < step, "on one axis within a step of its own size"
    assert max(target) <= 2048


def test_small_pictures_without_upscaling() -> None:
    data = options(no_upscale=True)
    assert buckets.choose(data, 1024, (700, 1000), "p") == (640, 896)
    assert buckets.choose(data, 1024, (1024, 1024), "p") == (1024, 1024)
    assert buckets.choose(data, 1024, (1023, 1023), "p") == (960, 960)
    with pytest.raises(UserError, match="no bucket with sides of 256 or more") as caught:
        buckets.choose(data, 1024, (200, 900), "small.png")
    assert caught.value.where == "small.png"
    assert buckets.choose(options(no_upscale=True, bucket_min=128), 1024, (200, 900), "p") == (192, 896)


def test_given_sizes() -> None:
    """[width, height] in the config; of equal shapes the larger, or the largest that needs no enlarging."""
    data = options(buckets="sizes", bucket_sizes=((512, 512), (1024, 1024), (768, 512)))
    assert buckets.sizes(data, 1024) == ((512, 512), (512, 768), (1024, 1024))
    assert buckets.choose(data, 1024, (600, 600), "p") == (1024, 1024)
    assert buckets.choose(data, 1024, (400, 600), "p") == (512, 768)
    careful = data.model_copy(update={"no_upscale": True})
    assert buckets.choose(careful, 1024, (600, 600), "p") == (512, 512)
    with pytest.raises(UserError, match="smaller than every bucket"):
        buckets.choose(careful, 1024, (500, 900), "p")


def test_ties_are_broken_by_size_and_not_by_order() -> None:
    """A square lies as far from 2:1 as from 1:2; landscape and portrait are treated alike."""
    assert buckets.nearest((100, 100), ((64, 128), (128, 64))) == buckets.nearest((100, 100), ((128, 64), (64, 128)))
    for height, width in np.random.default_rng(0).integers(100, 4000, (500, 2)).tolist():
        tall, wide = (buckets.choose(options(), 1024, size, "p") for size in ((height, width), (width, height)))
        assert tall == wide[::-1] or kept_share((height, width), tall) == kept_share((width, height), wide[::-1])


@pytest.mark.parametrize(
    ("more", "size"),
    [
        ({"buckets": "none", "resolution": 512}, (512, 512)),
        ({"resolution": 768}, (768, 768)),
        ({"buckets": "sizes", "bucket_sizes": ((640, 1536), (1216, 832))}, (832, 1216)),
    ],
    ids=str,
)
def test_validation_pictures_are_of_the_squarest_size_trained(more: dict[str, object], size: tuple[int, int]) -> None:
    from sdxl_trainer.config import Config, Model, Train
    from sdxl_trainer.validate import Validator

    config = Config(output_dir="x", model=Model(path="x"), data=(options(**more),), train=Train(steps=1))
    settings = Validator(config, *[None] * 7)._settings()  # type: ignore[arg-type]
    assert (settings["height"], settings["width"]) == size


def test_sides_that_no_model_has_are_refused() -> None:
    """The list of buckets of such a resolution would take minutes."""
    with pytest.raises(ValueError, match="less than or equal to 16384"):
        Data(path="x", resolution=1_000_000, buckets="area", bucket_step=8)
    assert len(buckets.sizes(Data(path="x", resolution=16_384, buckets="area", bucket_step=8), 16_384)) < 10_000
