"""Masks: they follow the crop and the flip to the latent cell, and weigh as much as they should."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from handmade import encoded, exif
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdxl_trainer import base as bases
from sdxl_trainer.config import Data
from sdxl_trainer.config import Objective as Options
from sdxl_trainer.data import images, loader, masks, prepare
from sdxl_trainer.data.geometry import variants
from sdxl_trainer.data.prepare import Stock
from sdxl_trainer.errors import UserError
from sdxl_trainer.objective import Objective
from sdxl_trainer.schedule import from_scheduler_config


def options(**more: Any) -> Data:
    return Data(path="x", **{"resolution": 64, "buckets": "area", "bucket_step": 16, **more})


def blob(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """A white rectangle anywhere, uint8 [height, width]."""
    made = np.zeros((height, width), np.uint8)
    top, left = random.integers(0, height - 20), random.integers(0, width - 20)
    made[top : top + random.integers(20, height), left : left + random.integers(20, width)] = 255
    return made


@pytest.mark.parametrize("block", range(10))
def test_a_painted_mask_lies_where_it_is_seen_in_the_picture(block: int) -> None:
    """500 random pictures that are their own masks: each latent cell of the mask is the mean of the 8 x 8 pixels that
    the VAE sees there."""
    for case in range(50):
        random = np.random.default_rng([block, case])
        height, width = (int(side) for side in random.integers(70, 300, 2))
        painted = blob(height, width, random)
        data = options(crop=str(random.choice(["random", "center"])), flip=True, interpolation="box")
        focus = (float(random.random()), float(random.random())) if case % 2 else None
        for geometry in variants(data, (height, width), int(random.integers(1 << 60)), "p", focus=focus):
            seen = images.pixels(Image.fromarray(painted).convert("RGB"), geometry, "box")[:, :, 0].astype(float)
            rows, columns = (side // 8 for side in geometry.target)
            expected = seen.reshape(rows, 8, columns, 8).mean((1, 3)) / 255
            row = masks.cells(Image.fromarray(painted), geometry)
            assert row.dtype == torch.float16
            assert row.shape == (rows, columns)
            assert np.abs(row.numpy() - expected).max() < 1e-3


def test_one_cell_is_one_cell() -> None:
    """Without resizing: the 8 x 8 pixels of one cell, at the place that the crop and the mirror put it."""
    painted = np.zeros((64, 128), np.uint8)
    painted[16:24, 80:88] = 255
    data = options(buckets="none", bucket_step=64, crop="random", crops_per_image=30, flip=True)
    found = 0
    for geometry in variants(data, (64, 128), 7, "p"):
        row = masks.cells(Image.fromarray(painted), geometry).float()
        left = 128 - 88 if geometry.flip else 80
        first = left - geometry.crop[1]
        if -8 < first < 64:
            found += 1
            inside = max(0, min(first + 8, 64) - max(first, 0))
            assert row.sum() == pytest.approx(inside / 8)
            assert row[2].sum() == row.sum(), "in the third row of cells"
            if first % 8 == 0:
                assert row[2, first // 8] == 1
    assert found > 10


@given(
    values=st.lists(st.floats(0, 1, width=16), min_size=4, max_size=16).filter(lambda v: sum(v) > 0.1),
    rest=st.floats(0, 0.9),
)
@settings(max_examples=200, deadline=None)
def test_the_factor_has_mean_one_and_its_weights_in_proportion(values: list[float], rest: float) -> None:
    row = torch.tensor([values]).half()
    factor = masks.factor(options(mask="file", unmasked_weight=rest), row)
    plain = masks.factor(options(mask="file", unmasked_weight=rest, mask_normalised=False), row)
    assert factor.shape == (1, *row.shape)
    assert factor.mean().item() == pytest.approx(1, abs=1e-5)
    assert torch.equal(plain[0], row.float().clamp(min=rest))
    torch.testing.assert_close(factor * plain.mean(), plain)


def test_the_loss_is_the_mean_over_what_is_white() -> None:
    """Closed form: normalised, the loss of a sample is the mean squared error over the white cells alone."""
    schedule = from_scheduler_config({"beta_schedule": "scaled_linear", "beta_start": 1e-3, "beta_end": 1e-2}, None)
    objective = Objective(schedule, "epsilon", Options())
    random = torch.Generator().manual_seed(0)
    prediction, latents, noise = (torch.randn(2, 4, 8, 8, generator=random) for _ in range(3))
    row = torch.zeros(8, 8).half()
    row[2:4, 1:7] = 1
    mask = torch.stack([masks.factor(options(mask="file"), row), torch.ones(1, 8, 8)])
    loss = objective.loss(prediction, latents, noise, torch.tensor([10, 500]), mask)
    white = (prediction - noise)[0, :, 2:4, 1:7].square().mean()
    whole = objective.loss(prediction, latents, noise, torch.tensor([10, 500]))
    assert loss.shape == (2,)
    assert loss[0].item() == pytest.approx(white.item(), rel=1e-6)
    assert loss[1] == whole[1], "white all over: the plain loss, to the bit"


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_opacity_is_upright_and_of_the_whole_picture(orientation: int) -> None:
    alpha = np.zeros((20, 30), np.uint8)
    alpha[:5, :10] = 255
    image = Image.merge("RGBA", [*Image.new("RGB", (30, 20), "red").split(), Image.fromarray(alpha)])
    content = encoded(image, exif=exif(orientation))
    got = images.opacity(content, "p")
    assert (got.height, got.width) == images.probe(content, "p")
    turned = {1: alpha, 3: alpha[::-1, ::-1], 6: np.rot90(alpha, 3), 8: np.rot90(alpha)}[orientation]
    assert np.array_equal(np.asarray(got), turned)
    assert np.asarray(images.opacity(encoded(Image.new("RGB", (4, 4))), "p")).min() == 255


def test_masks_of_another_size_are_scaled_and_of_another_shape_refused() -> None:
    for mask in ((500, 375), (1000, 750), (333, 250), (2000, 1500)):
        masks.refuse_shape(mask, (1000, 750), "m")
    for mask in ((375, 500), (500, 380), (64, 64)):
        with pytest.raises(UserError, match="another shape") as caught:
            masks.refuse_shape(mask, (1000, 750), "m.png")
        assert caught.value.where == "m.png"


def test_centroid() -> None:
    painted = np.zeros((100, 200), np.uint8)
    painted[10:30, 40:80] = 255
    assert masks.centroid(Image.fromarray(painted), "m") == (0.3, 0.2)
    with pytest.raises(UserError, match="black all over"):
        masks.centroid(Image.new("L", (8, 8)), "m")


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    """Three pictures with a mask beside each, the second's at half size, and the same as transparency in alpha/."""
    folder, clear = tmp_path / "masked", tmp_path / "alpha"
    folder.mkdir()
    clear.mkdir()
    for index, (height, width) in enumerate([(80, 120), (120, 80), (90, 90)]):
        random = np.random.default_rng(index)
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        mask = np.zeros((height, width), np.uint8)
        mask[height // 4 : height // 2, width // 2 : width * 3 // 4] = 255
        image.save(folder / f"{index}.jpg")
        shown = Image.fromarray(mask)
        (shown.resize((width // 2, height // 2)) if index == 1 else shown).save(folder / f"{index}-masklabel.png")
        image.putalpha(shown)
        image.save(clear / f"{index}.png")
        for place in (folder, clear):
            (place / f"{index}.txt").write_text("a red circle")
    return folder


@pytest.fixture
def stock(config: Callable[..., Any], masked: Path, tmp_path: Path) -> Callable[..., tuple[Any, Stock]]:
    def take(fill: bool = True, **data: Any) -> tuple[Any, Stock]:
        entry = {"path": str(masked), "buckets": "area", "bucket_step": 16, "bucket_min": 16, **data}
        made = config(data=[entry], cache={"path": str(tmp_path / "cache")})
        found = bases.resolve(made.model, tmp_path)
        taken = prepare.take_stock(made, found, "fp32")
        if fill:
            prepare.fill(made, found, taken, torch.device("cpu"), lambda *_: None, print)
        return made, taken

    return take


def counts(stock: Stock) -> tuple[int, int]:
    return len(stock.missing_latents()), len(stock.missing_masks())


def test_masks_are_made_once_and_beside_the_moments(stock: Callable[..., Any], masked: Path, tmp_path: Path) -> None:
    assert counts(stock(fill=False, mask="file")[1]) == (3, 3)
    stock(mask="file")
    assert counts(stock(fill=False, mask="file")[1]) == (0, 0)
    assert counts(stock(fill=False, mask="file", unmasked_weight=0.2, mask_normalised=False)[1]) == (0, 0)
    assert counts(stock(fill=False)[1]) == (0, 0), "a mask changes no latent"
    other = Image.open(masked / "0-masklabel.png").point(lambda value: 255 - value)
    other.save(masked / "0-masklabel.png")
    assert counts(stock(fill=False, mask="file")[1]) == (0, 1), "an edited mask is one row"
    assert counts(stock(fill=False, mask="alpha", path=str(tmp_path / "alpha"))[1]) == (3, 3)


@pytest.mark.parametrize("kind", ["file", "alpha"])
def test_batches_carry_the_mask_of_their_crop(stock: Callable[..., Any], tmp_path: Path, base: Path, kind: str) -> None:
    more = {"path": str(tmp_path / "alpha")} if kind == "alpha" else {}
    made, taken = stock(mask=kind, flip=True, unmasked_weight=0.1, **more)
    samples = prepare.samples(made, bases.resolve(made.model, tmp_path), taken, 1000)
    seen = set()
    for epoch in range(8):
        for sample, picture in enumerate(taken.pictures):
            batch = loader.batch(samples, epoch, [(sample, True)])
            geometry = next(g for g in picture.geometries if g.time_ids() == tuple(batch.time_ids[0].tolist()))
            flipped = [masks.factor(picture.data, taken.latents.get(masks.key(picture, g))) for g in picture.geometries]
            which = [index for index, factor in enumerate(flipped) if torch.equal(factor, batch.mask[0])]
            assert which
            assert geometry in picture.geometries
            row = taken.latents.get(samples.keys.latent(picture, picture.geometries[which[0]]))
            assert torch.equal(row[:4], batch.mean[0]), "mask and latents are of one geometry"
            assert batch.mask.shape == (1, 1, *batch.mean.shape[2:])
            seen.add((sample, which[0]))
    assert len(seen) == 6


def test_a_batch_has_a_mask_where_a_picture_has_one(
    config: Callable[..., Any], pictures: Path, masked: Path, tmp_path: Path
) -> None:
    """A picture without one beside others counts whole; where none has one there is no tensor of ones."""
    sets = [{"path": str(masked), "mask": "file"}, {"path": str(pictures)}]
    made = config(data=sets, cache={"path": str(tmp_path / "cache")})
    found = bases.resolve(made.model, tmp_path)
    taken = prepare.take_stock(made, found, "fp32")
    prepare.fill(made, found, taken, torch.device("cpu"), lambda *_: None, print)
    samples = prepare.samples(made, found, taken, 1000)
    both = loader.batch(samples, 0, [(0, True), (3, True)]).mask
    assert both is not None
    assert torch.equal(both[1], torch.ones(1, *both.shape[2:]))
    assert not torch.equal(both[0], both[1])
    assert loader.batch(samples, 0, [(3, True), (4, True)]).mask is None


def test_focus_on_the_mask_centres_the_crop_on_it(stock: Callable[..., Any]) -> None:
    _, taken = stock(fill=False, mask="file", focus="mask", buckets="none", bucket_step=64, bucket_min=None)
    # White from 1/2 to 3/4 of the width: the centre is 5/8 of 96 (the resized width), the crop 64 wide.
    assert taken.pictures[0].geometries[0].crop == (0, round(0.625 * 96 - 32))
    assert taken.pictures[1].geometries[0].crop == (round(0.375 * 96 - 32), 0)


def test_a_crop_without_any_of_the_mask_is_refused_by_name(stock: Callable[..., Any], masked: Path) -> None:
    painted = np.zeros((80, 120), np.uint8)
    painted[:, :4] = 255
    Image.fromarray(painted).save(masked / "0-masklabel.png")
    plain = {"mask": "file", "buckets": "none", "bucket_step": 64, "bucket_min": None}
    with pytest.raises(UserError, match="less than one latent cell") as caught:
        stock(**plain)
    assert caught.value.where == "0.jpg"
    stock(**plain, unmasked_weight=0.1)
    stock(**plain, focus="mask")


def test_a_mask_of_another_shape_names_the_mask(stock: Callable[..., Any], masked: Path) -> None:
    Image.new("L", (120, 120), 255).save(masked / "0-masklabel.png")
    Image.new("L", (10, 120), 255).save(masked / "2-masklabel.png")
    with pytest.raises(UserError, match="2 pictures cannot be used") as caught:
        stock(fill=False, mask="file")
    assert "0-masklabel.png" in caught.value.where
    assert "2-masklabel.png" in caught.value.where


def test_a_damaged_mask_names_the_mask(stock: Callable[..., Any], masked: Path) -> None:
    content = io.BytesIO()
    Image.effect_noise((120, 80), 90).save(content, "PNG")
    (masked / "0-masklabel.png").write_bytes(content.getvalue()[:500])
    with pytest.raises(UserError, match="damaged") as caught:
        stock(mask="file")
    assert caught.value.where == "0-masklabel.png"
