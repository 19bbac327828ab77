"""Drawing with the pipelines of diffusers: text to image, image to image, inpainting, and the refiner after them.

Prompts come as embeddings, and networks keep their own type while everything between their calls is fp32 on fp32 noise
from the CPU, as in ComfyUI: so a seed means the same on every device and in every precision.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdxl_trainer import text
from sdxl_trainer.data import images, resize
from sdxl_trainer.errors import UserError, plural
from sdxl_trainer.model import latent_scale
from sdxl_trainer.sampling import samplers
from sdxl_trainer.sampling.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image

# Embeddings [n * 77, 2048] and pooled output [1280] of a prompt.
Embedded = tuple[Tensor, Tensor]
# Called after every denoising step.
Step = Callable[[], None]


def live_pipeline(unet: Any, vae: Any, scheduler: dict[str, Any], refines: bool = False) -> Any:
    """A pipeline around modules that are in memory; prompts come as embeddings."""
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

    parts: list[Any] = [vae, None, None, None, None, unet, samplers.scheduler(scheduler, None)]
    if refines:
        return _quiet(StableDiffusionXLImg2ImgPipeline(*parts, requires_aesthetics_score=True, add_watermarker=False))
    return _quiet(StableDiffusionXLPipeline(*parts, add_watermarker=False))


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def from_picture(pipeline: Any, request: Request, scheduler: dict[str, Any]) -> Any:
    """The pipeline for a request that begins with a picture or latents, around the same modules."""
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline

    kind: Any = StableDiffusionXLInpaintPipeline if request.mask else StableDiffusionXLImg2ImgPipeline
    parts = [getattr(pipeline, name) for name in (*text.PARTS, *text.TOKENIZERS)]
    return _quiet(
        kind(
            pipeline.vae,
            *parts,
            pipeline.unet,
            samplers.scheduler(scheduler, request.sampler),
            requires_aesthetics_score=bool(pipeline.config.get("requires_aesthetics_score", False)),
            add_watermarker=False,
        )
    )


def in_fp32(unet: Any) -> None:
    """Let a UNet of another type take and give fp32."""
    if unet.dtype != torch.float32:
        unet.register_forward_pre_hook(partial(_enter, unet.dtype), with_kwargs=True)
        unet.register_forward_hook(_leave)


def _enter(dtype: torch.dtype, module: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
    return tuple(_cast(value, dtype) for value in positional), {k: _cast(v, dtype) for k, v in named.items()}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {name: inner if name == "time_ids" else _cast(inner, dtype) for name, inner in value.items()}
    # Timesteps and micro-conditioning are numbers whose sinusoids the UNet makes in fp32.
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1 else value


def _leave(module: Any, inputs: Any, output: Any) -> Any:
    return (output[0].float(),) if isinstance(output, tuple) else type(output)(sample=output.sample.float())


def latents(
    pipeline: Any,
    requests: Sequence[Request],
    conditions: dict[str, Tensor],
    step: Step | None = None,
    **more: Any,
) -> Tensor:
    """Latents [n, 4, h, w] of n pictures that differ in their prompts and seeds alone, in the UNet's scale. Conditions
    of one row are those of all. `more` goes to the pipeline: a picture, a mask, where to begin and to end."""
    first = requests[0]
    if "image" not in more:
        more |= {"height": first.height, "width": first.width}
    repeated = {
        name: t if len(t) == len(requests) else t.repeat_interleave(len(requests), 0) for name, t in conditions.items()
    }
    generators = [torch.Generator("cpu").manual_seed(request.seed) for request in requests]
    return pipeline(
        output_type="latent",
        **repeated,
        **micro(first),
        **more,
        num_inference_steps=first.steps,
        guidance_scale=first.guidance,
        guidance_rescale=first.rescale,
        generator=generators if len(generators) > 1 else generators[0],
        **({"callback_on_step_end": partial(_stepped, step)} if step else {}),
    ).images


@dataclass(frozen=True)
class Model:
    """A pipeline, the config of its scheduler, and the conditions of the pictures to draw."""

    pipeline: Any
    scheduler: dict[str, Any]
    conditions: dict[str, Tensor]


@torch.no_grad()
def paint(
    model: Model,
    requests: Sequence[Request],
    refiner: Model | None = None,
    step: Step | None = None,
    autocast: AbstractContextManager[Any] | None = None,
) -> list["Image"]:
    """Pictures that differ in their prompts and seeds alone. The refiner takes over in the middle of the denoising
    (Podell et al. 2023, section 2.5), or with `refine_strength` draws the finished picture anew. The VAE decodes in its
    own type outside of `autocast`: SDXL's original one overflows in fp16."""
    first, pipeline, more = requests[0], model.pipeline, dict[str, Any]()
    if first.image is None:
        pipeline.scheduler = samplers.scheduler(model.scheduler, first.sampler)
    else:
        pipeline = from_picture(pipeline, first, model.scheduler)
        more = {"image": picture(first), "strength": first.how_strong}
        if first.mask:
            more |= {"mask_image": mask(first), "height": first.height, "width": first.width}
        more |= {"aesthetic_score": first.aesthetic, "negative_aesthetic_score": first.negative_aesthetic}
    together = refiner is not None and first.refine_strength is None
    more |= {"denoising_end": first.refined_from} if together else {}
    with autocast or nullcontext():
        found = latents(pipeline, requests, model.conditions, step, **more)
    if refiner is not None:
        again: dict[str, Any] = (
            {"denoising_start": first.refined_from} if together else {"strength": first.refine_strength}
        )
        again |= {"aesthetic_score": first.aesthetic, "negative_aesthetic_score": first.negative_aesthetic}
        plain = replace(first, mask=None)
        found = latents(
            from_picture(refiner.pipeline, plain, refiner.scheduler),
            requests,
            refiner.conditions,
            step,
            image=found,
            **again,
        )
    # Slices keep the memory format, and with it the order of sums that the stock pipelines have.
    return [decoded(pipeline, found[i : i + 1]) for i in range(len(found))]


def picture(request: Request) -> "Image":
    """The picture that a request begins with, in the size that it asks for."""
    assert request.image is not None
    return _sized(images.decode(_read(request.image, "--image"), request.image), request)


def mask(request: Request) -> "Image":
    """What of it is drawn anew: white."""
    assert request.mask is not None
    return _sized(images.decode(_read(request.mask, "--mask"), request.mask).convert("L"), request)


def size(name: str) -> tuple[int, int]:
    """Height and width of a picture to begin with, in whole latent cells."""
    height, width = images.probe(_read(name, "--image"), name)
    return height // 8 * 8, width // 8 * 8


def _sized(image: "Image", request: Request) -> "Image":
    size = (request.width, request.height)
    return image if image.size == size else image.resize(size, resize.FILTERS["lanczos"])


def _read(name: str, where: str) -> bytes:
    try:
        return Path(name).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"'{name}' cannot be read: {error.strerror}", where, "give the path of a picture") from None


def _stepped(step: Step, pipeline: Any, number: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    step()
    return tensors


def micro(request: Request) -> dict[str, Any]:
    """The micro-conditioning that was asked for, by the pipelines' names."""
    names = {
        "original_size": request.original_size,
        "crops_coords_top_left": request.crop,
        "target_size": request.target_size,
        "negative_original_size": request.negative_original_size,
        "negative_crops_coords_top_left": request.negative_crop,
        "negative_target_size": request.negative_target_size,
    }
    return {name: value for name, value in names.items() if value is not None}


@torch.no_grad()
def decoded(pipeline: Any, latents: Tensor) -> "Image":
    """The picture of latents [1, 4, h, w]."""
    vae = pipeline.vae
    pixels = vae.decode(latent_scale(vae.config).to(latents.device).undo(latents.float()).to(vae.dtype))[0]
    return pipeline.image_processor.postprocess(pixels.float(), output_type="pil")[0]


def conditions(prompt: Embedded, negative: Embedded, zeros: bool) -> dict[str, Tensor]:
    """What the pipeline takes: both of one length, by repetition, which changes nothing. With `zeros` the negative
    prompt's are zeros."""
    length = lcm(len(prompt[0]), len(negative[0]))
    embeds, other = (states.repeat(length // len(states), 1)[None] for states, _ in (prompt, negative))
    pooled, other_pooled = prompt[1][None], negative[1][None]
    return {
        "prompt_embeds": embeds,
        "pooled_prompt_embeds": pooled,
        "negative_prompt_embeds": torch.zeros_like(other) if zeros else other,
        "negative_pooled_prompt_embeds": torch.zeros_like(other_pooled) if zeros else other_pooled,
    }


def together(many: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Conditions of several pictures as those of one batch, all of one length by repetition."""
    length = lcm(*(one["prompt_embeds"].shape[1] for one in many))
    rows: dict[str, Tensor] = {}
    for name in many[0]:
        tensors = [one[name] for one in many]
        if tensors[0].ndim == 3:
            tensors = [t.repeat(1, length // t.shape[1], 1) for t in tensors]
        rows[name] = torch.cat(tensors)
    return rows


def steps_taken(request: Request) -> int:
    """Roughly how many times the networks are asked for a picture, for a progress bar."""
    taken = request.steps if request.image is None else max(1, int(request.steps * request.how_strong))
    again = request.refine_strength
    return taken + (int(request.steps * again) if request.refiner and again else 0)


def refuse_no_step(request: Request) -> None:
    """Refuse a strength that leaves no denoising step."""
    for name, share in (
        ("strength", request.how_strong if request.image else None),
        ("refine_strength", request.refine_strength),
    ):
        if share is not None and int(request.steps * share) < 1:
            what = f"{name} = {share:g} of {plural(request.steps, 'step')} is no step"
            raise UserError(what, f"prompt '{request.prompt[:40]}'", f"give more steps, or {name} = 1 / steps or more")
