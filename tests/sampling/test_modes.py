"""Every way of drawing equals the call of the stock pipeline of diffusers, pixel for pixel."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sdxl_trainer import sample
from sdxl_trainer.blueprint import SIZES, build
from sdxl_trainer.formats import lora
from sdxl_trainer.sampling import order
from tests.conftest import CAPTIONS
from tests.convert.conftest import adapt

PROMPT, OTHER = "a red circle", "a blue square"
PLAIN = {"num_inference_steps": 4, "guidance_scale": 4.0}
Draw = Callable[..., list[np.ndarray]]


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def draw(tmp_path: Path) -> Draw:
    def run(
        model: Path, prompts: tuple[str, ...] = (PROMPT,), images: int = 1, batch: int = 1, **given: Any
    ) -> list[np.ndarray]:
        told = {"steps": 4, "guidance": 4.0, "seed": 5, **given}
        made = order.made(str(model), told, prompts, images=images)
        return [pixels(path) for path in sample.run(made, tmp_path / "drawn", batch)]

    return run


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def stock(kind: str, model: Path, **components: Any) -> Any:
    import diffusers

    pipeline = getattr(diffusers, kind).from_pretrained(model, add_watermarker=False, **components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.copy()


def test_text_to_image(draw: Draw, base: Path) -> None:
    pipeline = stock("StableDiffusionXLPipeline", base)
    (found,) = draw(base)
    expected = pipeline(PROMPT, height=64, width=64, generator=seeded(), **PLAIN).images[0]
    assert (found == np.asarray(expected)).all()


def test_a_named_sampler_does_without_what_the_model_s_own_needs(
    draw: Draw, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LMSDiscreteScheduler needs scipy; diffusers reads it with the pipeline."""
    monkeypatch.setattr("sdxl_trainer.sampling.samplers.find_spec", lambda package: None)
    other = shutil.copytree(base, tmp_path / "other")
    for name, old in (("model_index.json", "EulerDiscrete"), ("scheduler/scheduler_config.json", "EulerDiscrete")):
        text = (other / name).read_text()
        assert old in text
        (other / name).write_text(text.replace(old, "LMSDiscrete"))
    (found,), (expected,) = (draw(model, sampler="Euler") for model in (other, base))
    assert (found == expected).all()


def test_everything_that_a_prompt_can_be_told(draw: Draw, base: Path) -> None:
    """Prompts for both encoders, micro-conditioning of both sides, guidance rescale."""
    pipeline = stock("StableDiffusionXLPipeline", base)
    told = {
        "original_size": (100, 90),
        "crops_coords_top_left": (3, 4),
        "target_size": (64, 72),
        "negative_original_size": (50, 60),
        "negative_crops_coords_top_left": (1, 2),
        "negative_target_size": (32, 40),
    }
    words = {"prompt_2": OTHER, "negative_prompt": "a green circle", "negative_prompt_2": "a red square"}
    expected = pipeline(
        PROMPT, height=64, width=72, guidance_rescale=0.6, generator=seeded(), **told, **words, **PLAIN
    ).images[0]
    settings = {key.replace("crops_coords_top_left", "crop"): value for key, value in told.items()}
    (found,) = draw(
        base,
        prompt_2=OTHER,
        negative="a green circle",
        negative_2="a red square",
        rescale=0.6,
        height=64,
        width=72,
        **settings,
    )
    assert (found == np.asarray(expected)).all()
    (other,) = draw(base, prompt_2=OTHER, negative="a green circle", negative_2="a red square", height=64, width=72)
    assert (other != found).any()


def test_image_to_image(draw: Draw, base: Path, picture: Path) -> None:
    pipeline = stock("StableDiffusionXLImg2ImgPipeline", base)
    expected = pipeline(PROMPT, image=opened(picture), strength=0.6, generator=seeded(), **PLAIN).images[0]
    (found,) = draw(base, image=str(picture), strength=0.6)
    assert (found == np.asarray(expected)).all()
    assert found.shape == (72, 64, 3)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_inpainting_with_a_base(draw: Draw, base: Path, picture: Path, mask: Path, strength: float) -> None:
    pipeline = stock("StableDiffusionXLInpaintPipeline", base)
    expected = pipeline(
        PROMPT, image=opened(picture), mask_image=opened(mask), height=72, width=64, strength=strength,
        generator=seeded(), **PLAIN,
    ).images[0]  # fmt: skip
    (found,) = draw(base, image=str(picture), mask=str(mask), strength=strength)
    assert (found == np.asarray(expected)).all()


def test_inpainting_with_an_inpainting_model(draw: Draw, inpainting: Path, picture: Path, mask: Path) -> None:
    pipeline = stock("StableDiffusionXLInpaintPipeline", inpainting)
    expected = pipeline(
        PROMPT, image=opened(picture), mask_image=opened(mask), height=72, width=64, strength=0.9,
        generator=seeded(), **PLAIN,
    ).images[0]  # fmt: skip
    (found,) = draw(inpainting, image=str(picture), mask=str(mask), strength=0.9)
    assert (found == np.asarray(expected)).all()


def test_the_refiner_takes_over(draw: Draw, base: Path, refiner: Path) -> None:
    """Ensemble of experts: the base up to 0.5, the refiner from there."""
    first = stock("StableDiffusionXLPipeline", base)
    second = stock("StableDiffusionXLImg2ImgPipeline", refiner, vae=first.vae)
    latents = first(
        PROMPT, denoising_end=0.5, output_type="latent", height=64, width=64, generator=seeded(), **PLAIN
    ).images
    scores = {"aesthetic_score": 7.0, "negative_aesthetic_score": 2.0}
    expected = second(
        PROMPT, image=latents, denoising_start=0.5, negative_prompt=None, generator=seeded(), **scores, **PLAIN
    ).images[0]
    told = {"refine_from": 0.5, "aesthetic": 7.0, "negative_aesthetic": 2.0}
    (found,) = draw(base, refiner=str(refiner), **told)
    assert (found == np.asarray(expected)).all()
    (plain,) = draw(base)
    assert (plain != found).any()


def test_the_refiner_draws_a_finished_picture_anew(draw: Draw, base: Path, refiner: Path) -> None:
    first = stock("StableDiffusionXLPipeline", base)
    second = stock("StableDiffusionXLImg2ImgPipeline", refiner, vae=first.vae)
    latents = first(PROMPT, output_type="latent", height=64, width=64, generator=seeded(), **PLAIN).images
    expected = second(PROMPT, image=latents, strength=0.5, generator=seeded(), **PLAIN).images[0]
    (found,) = draw(base, refiner=str(refiner), refine_strength=0.5)
    assert (found == np.asarray(expected)).all()


def test_the_refiner_by_itself(draw: Draw, refiner: Path, picture: Path) -> None:
    pipeline = stock("StableDiffusionXLImg2ImgPipeline", refiner)
    expected = pipeline(
        PROMPT, image=opened(picture), strength=0.5, negative_prompt=OTHER, generator=seeded(), **PLAIN
    ).images[0]
    (found,) = draw(refiner, image=str(picture), strength=0.5, negative=OTHER)
    assert (found == np.asarray(expected)).all()


SAMPLERS = {
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
    "dpmpp_2m_sde_exponential": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_exponential_sigmas": True},
    ),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "ddim sgm_uniform": ("DDIMScheduler", {"timestep_spacing": "trailing"}),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_by_name(draw: Draw, base: Path, name: str) -> None:
    import diffusers

    pipeline = stock("StableDiffusionXLPipeline", base)
    kind, options = SAMPLERS[name]
    pipeline.scheduler = getattr(diffusers, kind).from_config(pipeline.scheduler.config, **options)
    expected = pipeline(PROMPT, height=64, width=64, generator=seeded(), **PLAIN).images[0]
    (found,) = draw(base, sampler=name)
    assert (found == np.asarray(expected)).all()


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_loras_with_weights(draw: Draw, base: Path, tmp_path: Path) -> None:
    """Two of them, in both layouts, of which one is subtracted; and one by itself."""
    files = [str(tmp_path / f"{layout}.safetensors") for layout in ("diffusers", "kohya")]
    lora.write(adapt(base), Path(files[0]), "diffusers", {})
    lora.write(adapt(base, seed=1, rank=2, alpha=1.0, parts=("unet", "text_encoder_2")), Path(files[1]), "kohya", {})
    pipeline = stock("StableDiffusionXLPipeline", base)
    for name, file in zip("ab", files, strict=True):
        pipeline.load_lora_weights(file, adapter_name=name)
    told = {"height": 64, "width": 64, **PLAIN}
    drawn = []
    for weights in ({"a": 0.7, "b": -0.4}, {"a": 1.0}):
        pipeline.set_adapters(list(weights), list(weights.values()))
        expected = pipeline(PROMPT, generator=seeded(), **told).images[0]
        loras = tuple(f"{file}:{weights[name]}" for name, file in zip("ab", files, strict=True) if name in weights)
        (found,) = draw(base, loras=loras)
        assert (found == np.asarray(expected)).all()
        drawn.append(found)
    (plain,) = draw(base)
    assert all(np.abs(one - plain).max() > 3 for one in drawn)
    assert (drawn[0] != drawn[1]).any()


def test_embeddings(draw: Draw, base: Path, tmp_path: Path) -> None:
    """A word of two vectors in the prompt, one of one vector in what is not to be drawn."""
    noise = torch.Generator().manual_seed(3)
    words = {"cat": 2, "blur": 1}
    pipeline = stock("StableDiffusionXLPipeline", base)
    for word, count in words.items():
        rows = {key: torch.randn(count, width, generator=noise) for key, width in (("clip_l", 24), ("clip_g", 40))}
        save_file(rows, tmp_path / f"{word}.safetensors")
        for key, end in (("clip_l", ""), ("clip_g", "_2")):
            encoder, tokenizer = getattr(pipeline, f"text_encoder{end}"), getattr(pipeline, f"tokenizer{end}")
            pipeline.load_textual_inversion(rows[key], word, text_encoder=encoder, tokenizer=tokenizer)
    # New words have larger ids than the end of the text, which old configs say to be the largest.
    pipeline.text_encoder_2.text_model.eos_token_id = pipeline.tokenizer_2.eos_token_id
    told = {"negative_prompt": "a blur circle", "height": 64, "width": 64, **PLAIN}
    expected = pipeline("a red cat", generator=seeded(), **told).images[0]
    files = tuple(str(tmp_path / f"{word}.safetensors") for word in words)
    (found,) = draw(base, ("a red cat",), negative="a blur circle", embeddings=files)
    assert (found == np.asarray(expected)).all()
    (plain,) = draw(base, ("a red cat",), negative="a blur circle")
    assert np.abs(found - plain).max() > 3


@pytest.mark.parametrize("skip", [1, 3, 4])
def test_clip_skip(draw: Draw, tmp_path: Path, skip: int) -> None:
    """Layers are counted from the end here, as in A1111; by diffusers from the last but one, where SDXL was trained."""
    text = [replace(size, layers=4) for size in (SIZES["tiny"].text_1, SIZES["tiny"].text_2)]
    deep = build(tmp_path / "deep", replace(SIZES["tiny"], text_1=text[0], text_2=text[1]), captions=CAPTIONS)
    pipeline = stock("StableDiffusionXLPipeline", deep)
    told = {"clip_skip": skip - 2, "height": 64, "width": 64, **PLAIN}
    expected = pipeline(PROMPT, generator=seeded(), **told).images[0]
    (found,) = draw(deep, clip_skip=skip)
    assert (found == np.asarray(expected)).all()
    (plain,) = draw(deep)
    assert (found != plain).any()
    # A negative prompt is read from the same layer as the prompt; diffusers by itself reads it from the usual one.
    states, _, pooled, _ = pipeline.encode_prompt(OTHER, clip_skip=skip - 2, do_classifier_free_guidance=False)
    negative = {"negative_prompt_embeds": states, "negative_pooled_prompt_embeds": pooled}
    embeds = pipeline.encode_prompt(PROMPT, clip_skip=skip - 2, do_classifier_free_guidance=False)
    both = {"prompt_embeds": embeds[0], "pooled_prompt_embeds": embeds[2], **negative}
    expected = pipeline(generator=seeded(), height=64, width=64, **both, **PLAIN).images[0]
    (found,) = draw(deep, negative=OTHER, clip_skip=skip)
    assert (found == np.asarray(expected)).all()


def test_pictures_of_a_batch_are_those_drawn_alone(draw: Draw, base: Path) -> None:
    """Up to the order of sums: each has its own noise, whatever is drawn beside it."""
    alone = draw(base, (PROMPT, OTHER), images=2)
    batch = draw(base, (PROMPT, OTHER), images=2, batch=3)
    assert len(alone) == len(batch) == 4
    for one, two in zip(alone, batch, strict=True):
        assert np.abs(one - two).max() <= 1
    assert np.abs(alone[0] - alone[1]).max() > 10


def test_the_first_noise_is_torch_s_on_the_cpu(base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """So that ComfyUI, and A1111 with RNG: CPU, can repeat it."""
    seen: list[torch.Tensor] = []
    made = order.made(str(base), {"steps": 1, "guidance": 1.0, "seed": 9}, [PROMPT])
    from diffusers import UNet2DConditionModel

    forward = UNet2DConditionModel.forward

    def spy(self: Any, latents: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        seen.append(latents.clone())
        return forward(self, latents, *arguments, **named)

    monkeypatch.setattr(UNet2DConditionModel, "forward", spy)
    list(sample.run(made, tmp_path))
    noise = torch.randn(1, 4, 8, 8, generator=seeded(9))
    assert torch.allclose(seen[0] / seen[0].std(), noise / noise.std(), atol=1e-5)
