"""The refiner and inpainting models are trained by the same step: resumed bitwise, read by stock pipelines."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from sdxl_trainer import checkpoint
from sdxl_trainer.config import Inpainting
from sdxl_trainer.data import holes
from sdxl_trainer.errors import UserError
from sdxl_trainer.log import read_metrics
from sdxl_trainer.train import train
from tests.conftest import CAPTIONS


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from sdxl_trainer.blueprint import build

    folder = tmp_path_factory.mktemp("kinds")
    kinds: list[Any] = ["refiner", "inpainting"]
    return {kind: build(folder / kind, "tiny", captions=CAPTIONS, kind=kind) for kind in kinds}


@pytest.fixture
def made(config: Callable[..., Any], bases: dict[str, Path], pictures: Path, tmp_path: Path) -> Callable[..., Any]:
    """The config of a small run with the base of a kind, and validation pictures."""
    hidden = tmp_path / "mask.png"
    values = np.zeros((100, 80), dtype=np.uint8)
    values[24:64, 16:48] = 255
    Image.fromarray(values.T.copy()).save(hidden)

    def make(kind: str, **sections: Any) -> Any:
        given = sections.pop("validation", {})
        validation = {"prompts": ["a red circle"], "images": 1, "steps": 2, "image": str(pictures / "0.png"), **given}
        validation |= {"mask": str(hidden), "height": 64, "width": 64} if kind == "inpainting" else {}
        more = {"model": {"path": str(bases[kind])}, "cache": {"path": str(tmp_path / "cache")}}
        return config(**{**more, "validation": validation, **sections})

    return make


def weights(output: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read_weights(output / "unet")


@pytest.mark.parametrize("kind", ["refiner", "inpainting"])
def test_a_run_interrupted_and_resumed_is_bitwise_that_of_one_that_was_not(
    made: Callable[..., Any], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(made(kind, output_dir=str(tmp_path / "whole")))
    from sdxl_trainer import train as module

    original, calls = module.train_step, []

    def dying(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("killed")
        return original(*arguments)

    monkeypatch.setattr(module, "train_step", dying)
    with pytest.raises(RuntimeError, match="killed"):
        train(made(kind, output_dir=str(tmp_path / "broken")))
    monkeypatch.setattr(module, "train_step", original)
    resumed = train(made(kind, output_dir=str(tmp_path / "broken")))
    one, two = weights(whole), weights(resumed)
    assert all(torch.equal(one[name], two[name]) for name in one)
    losses = [[row["loss"] for row in read_metrics(output / "metrics.jsonl")] for output in (whole, resumed)]
    assert losses[0] == losses[1]
    smaller = train(made(kind, output_dir=str(tmp_path / "micro"), train={"micro_batch": 1, "steps": 4}))
    assert weights(smaller).keys() == one.keys()
    for first, second in zip(losses[0], read_metrics(smaller / "metrics.jsonl"), strict=True):
        assert second["loss"] == pytest.approx(first, rel=1e-4), "the micro-batch changes the order of sums alone"


def test_stock_pipelines_read_the_refiner(made: Callable[..., Any], pictures: Path) -> None:
    from diffusers import StableDiffusionXLImg2ImgPipeline

    output = train(made("refiner", train={"steps": 2}))
    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(output)
    assert pipeline.config.requires_aesthetics_score
    assert pipeline.text_encoder is None
    pipeline.set_progress_bar_config(disable=True)
    with Image.open(pictures / "0.png") as image:
        expected = pipeline(
            "a red circle",
            image=image,
            strength=0.75,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
        ).images[0]
    drawn = Image.open(output / "samples" / "step-000002" / "0-0.png")
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(expected)).max() <= 1


def test_stock_pipelines_read_the_inpainting_model(made: Callable[..., Any], pictures: Path) -> None:
    from diffusers import StableDiffusionXLInpaintPipeline

    built = made("inpainting", train={"steps": 2})
    output = train(built)
    pipeline = StableDiffusionXLInpaintPipeline.from_pretrained(output)
    assert pipeline.unet.config.in_channels == 9
    pipeline.set_progress_bar_config(disable=True)
    size = Image.Resampling.LANCZOS
    image = Image.open(pictures / "0.png").convert("RGB").resize((64, 64), size)
    mask = Image.open(built.validation.mask).convert("L").resize((64, 64), size)
    expected = pipeline(
        "a red circle", image=image, mask_image=mask, height=64, width=64, strength=1.0, num_inference_steps=2,
        guidance_scale=5.0, generator=torch.Generator().manual_seed(0),
    ).images[0]  # fmt: skip
    drawn = Image.open(output / "samples" / "step-000002" / "0-0.png")
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(expected)).max() <= 1


def batches(built: Any, step: int = 0) -> Any:
    """The batch of a step, as a run of this config makes it."""
    from sdxl_trainer import base as modules
    from sdxl_trainer.data import loader, prepare

    base = modules.resolve(built.model, prepare.cache_folder(built))
    stock = prepare.take_stock(built, base, "fp32")
    prepare.fill(built, base, stock, torch.device("cpu"), lambda *_: None, lambda _: None)
    samples = prepare.samples(built, base, stock, 1000)
    epoch, chosen = prepare.order(built, stock).step(step)
    return loader.batch(samples, epoch, [(sample, True) for sample in chosen]), samples, chosen


def test_a_refiner_is_told_size_crop_and_score(made: Callable[..., Any], pictures: Path) -> None:
    data = [{"path": str(pictures), "resolution": 64, "aesthetic_score": 7.25, "crop": "random"}]
    batch, samples, chosen = batches(made("refiner", data=data))
    assert batch.time_ids.shape == (2, 5)
    for row, sample in zip(batch.time_ids.tolist(), chosen, strict=True):
        original = samples.picture(sample).geometries[0].original
        assert tuple(row[:2]) == original
        assert row[4] == 7.25
    assert batch.text["prompt_embeds"].shape[2] == 40


def test_what_an_inpainting_model_sees_beside_the_noise(made: Callable[..., Any], bases: dict[str, Path]) -> None:
    """The mask, and the masked picture's latents as diffusers' own pipeline prepares them."""
    from diffusers import AutoencoderKL

    batch, samples, chosen = batches(made("inpainting"))
    assert batch.extra.shape == (2, 5, 8, 8)
    assert batch.entering(torch.zeros(2, 4, 8, 8)).shape == (2, 9, 8, 8)
    vae = AutoencoderKL.from_pretrained(bases["inpainting"] / "vae")
    from sdxl_trainer.data import images

    options = Inpainting()
    for row, sample in zip(batch.extra, chosen, strict=True):
        picture = samples.picture(sample)
        geometry = picture.geometries[0]
        found = images.cut(
            images.resized(images.decode(picture.record.read(), "x"), geometry, picture.data.interpolation), geometry
        )
        content = int(picture.content[:16], 16)
        masks = [holes.drawn((64, 64), content, variant, options) for variant in range(4)]
        small = [torch.nn.functional.interpolate(torch.from_numpy(m)[None, None].float(), (8, 8)) for m in masks]
        which = [i for i, cells in enumerate(small) if torch.equal(cells[0, 0], row[0])]
        assert which, "the mask is one of the picture's"
        pixels = torch.from_numpy(found).permute(2, 0, 1)[None].float() / 127.5 - 1
        hidden = torch.from_numpy(masks[which[0]])
        with torch.no_grad():
            posterior = vae.encode(pixels * (hidden < 0.5)).latent_dist
        spread = (row[1:] - posterior.mean[0] * 0.13025) / (posterior.std[0] * 0.13025)
        assert spread.abs().max() < 6, "a posterior sample of the masked picture"
    again, _, _ = batches(made("inpainting"), step=3)
    assert not torch.equal(again.extra, batch.extra)


def test_masks_are_drawn_from_the_picture_s_bytes_and_cover_what_they_should() -> None:
    options = Inpainting(whole=0.25)
    found = [holes.drawn((64, 96), content, 0, options) for content in range(400)]
    assert all((a == holes.drawn((64, 96), content, 0, options)).all() for content, a in enumerate(found[:20]))
    shares = np.array([mask.mean() for mask in found])
    assert 0.18 < (shares == 1).mean() < 0.32
    rest = shares[shares < 1]
    assert rest.min() > 0
    assert 0.1 < rest.mean() < 0.6
    assert all(holes.drawn((8, 8), content, 1, Inpainting(whole=1.0)).all() for content in range(5))
    boxes = holes.drawn((64, 64), 7, 0, Inpainting(whole=0.0, strokes=0.0))
    edges = np.abs(np.diff(boxes.astype(int), axis=1)).sum()
    assert 0 < edges < 64 * 7


def test_the_validation_loss_of_an_inpainting_model_is_fixed(made: Callable[..., Any], tmp_path: Path) -> None:
    def measured(name: str, seed: int) -> list[Any]:
        validation = {"loss_every": 1, "trained_pictures": 3, "at_end": False}
        options = {"steps": 1, "learning_rate": 1e-30, "checkpoint_every": 0}
        output = train(
            made("inpainting", validation=validation, train=options, seed=seed, output_dir=str(tmp_path / name))
        )
        return [row["pictures"] for row in read_metrics(output / "validation.jsonl")]

    assert measured("one", 1) == measured("two", 2)


def test_adapters_of_an_inpainting_model(made: Callable[..., Any]) -> None:
    output = train(made("inpainting", adapter={"rank": 2}, train={"steps": 2}))
    assert (output / "pytorch_lora_weights.safetensors").is_file()
    assert (output / "samples" / "step-000002" / "0-0.png").is_file()


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("refiner", {"adapter": {"parts": ["text_encoder"]}}, "adapter.parts has 'text_encoder'"),
    ("refiner", {"token": [{"name": "<x>"}]}, "new words are for both"),
    ("refiner", {"text": {"drop_encoder_1": 0.5}}, "drop_encoder_1 has no effect"),
    ("refiner", {"validation": {"image": None}}, "there is none to begin with"),
    ("refiner", {"inpainting": {"whole": 0.5}}, "the base is no inpainting model"),
    ("inpainting", {"export": {"formats": ["single"]}}, "is not written for an inpainting model"),
]


@pytest.mark.parametrize(("kind", "sections", "what"), REFUSED, ids=[what for *_, what in REFUSED])
def test_what_does_not_go_with_a_kind_is_refused(
    made: Callable[..., Any], pictures: Path, kind: str, sections: dict[str, Any], what: str
) -> None:
    if "token" in sections:
        sections = {**sections, "data": [{"path": str(pictures), "resolution": 64, "caption_prefix": "<x> "}]}
    with pytest.raises(UserError, match=what):
        train(made(kind, **sections))


def test_a_score_for_a_base_is_refused(config: Callable[..., Any], pictures: Path) -> None:
    with pytest.raises(UserError, match="only a refiner is told a score"):
        train(config(data=[{"path": str(pictures), "aesthetic_score": 5.0}]))


def test_what_a_finished_refiner_says_of_itself(made: Callable[..., Any]) -> None:
    output = train(made("refiner", train={"steps": 1}))
    index = json.loads((output / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLImg2ImgPipeline"
    assert not (output / "text_encoder").exists()
    assert set(json.loads((output / "manifest.json").read_text())["base"]["hashes"]) == {"vae", "text_encoder_2"}


def test_the_file_of_a_refiner_s_adapter_says_whose_it_is(made: Callable[..., Any]) -> None:
    export = {"formats": ["kohya"], "name": "detail"}
    output = train(made("refiner", train={"steps": 1}, adapter={"rank": 2}, export=export))
    with safe_open(output / "detail.safetensors", "pt") as opened:
        assert opened.metadata()["modelspec.architecture"] == "stable-diffusion-xl-v1-refiner/lora"
