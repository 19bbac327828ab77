"""Pictures from a model: during training from the live modules, and from any model on disk."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdxl_trainer import chunking, files, text
from sdxl_trainer.chunking import Prompt
from sdxl_trainer.config import TextOptions
from sdxl_trainer.errors import UserError, closest
from sdxl_trainer.formats import pretrained
from sdxl_trainer.model import TEXT, latent_scale
from sdxl_trainer.schedule import is_edm

if TYPE_CHECKING:
    from PIL.Image import Image


# Embeddings [n * 77, 2048] and pooled output [1280] of a prompt.
Embedded = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Request:
    """One picture to draw. Its first noise is drawn on the CPU from `seed`, so that any device draws it alike."""

    prompt: str
    seed: int
    negative: str | None = None
    steps: int = 25
    guidance: float = 5.0
    height: int = 1024
    width: int = 1024


def scheduler_config(base: dict[str, Any], prediction: str, zero_terminal_snr: bool) -> dict[str, Any]:
    """The scheduler that fits how the model was trained: used for previews and saved with the model."""
    config = {**base, "prediction_type": prediction}
    if zero_terminal_snr:
        # Sampling must start at the terminal timestep, which only trailing spacing visits (Lin et al. 2024, 3.3).
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config


def live_pipeline(unet: Any, vae: Any, scheduler: dict[str, Any]) -> Any:
    """A pipeline around modules that are in memory; prompts come as embeddings."""
    from diffusers import EDMEulerScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline

    pipeline: Any = StableDiffusionXLPipeline(
        vae,
        None,
        None,
        None,
        None,
        unet,
        (EDMEulerScheduler if is_edm(scheduler) else EulerDiscreteScheduler).from_config(scheduler),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def draw(
    pipeline: Any, request: Request, autocast: AbstractContextManager[Any] | None = None, **conditions: Tensor
) -> "Image":
    """One picture; `conditions` are what `conditions` gives. The VAE decodes in its own type outside of `autocast`:
    SDXL's original one overflows in fp16."""
    with autocast or nullcontext():
        drawn = latents(pipeline, [request], conditions)
    return decoded(pipeline, drawn)


def latents(pipeline: Any, requests: Sequence[Request], conditions: dict[str, Tensor]) -> Tensor:
    """Latents [n, 4, h, w] of n pictures that differ in their seeds alone, in the UNet's scale."""
    first = requests[0]
    return pipeline(
        output_type="latent",
        **{name: tensor.repeat_interleave(len(requests), 0) for name, tensor in conditions.items()},
        num_inference_steps=first.steps,
        guidance_scale=first.guidance,
        height=first.height,
        width=first.width,
        generator=[torch.Generator("cpu").manual_seed(request.seed) for request in requests],
    ).images


@torch.no_grad()
def decoded(pipeline: Any, latents: Tensor) -> "Image":
    """The picture of latents [1, 4, h, w]."""
    vae = pipeline.vae
    pixels = vae.decode(latent_scale(vae.config).to(vae.device).undo(latents.float()).to(vae.dtype))[0]
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


def _embedded(pipeline: Any, texts: Sequence[str], reading: TextOptions) -> dict[str, Embedded]:
    """Texts through a pipeline's text encoders; what is cut off is told."""
    tokenizers, encoders = ([getattr(pipeline, n) for n in names] for names in (text.TOKENIZERS, text.PARTS))
    encoding = text.TextEncoders((tokenizers[0], tokenizers[1]), (encoders[0], encoders[1]))
    # A word of several vectors is as many tokens.
    whole = [Prompt(pipeline.maybe_convert_prompt(t, tokenizers[0]), emphasis=reading.emphasis != "off") for t in texts]
    read = text.tokenize(encoding.tokenizers, whole, reading)
    for cut in text.cuts(encoding.tokenizers, whole, read):
        print(f"'{cut.prompt.text[:40]}' loses its last {cut.tokens} tokens: {cut.text[:80]}", file=sys.stderr)
    return dict(zip(texts, text.encode_tokens(encoding, read, reading), strict=True))


def reading(emphasis: str, long_prompts: str, clip_skip: int) -> TextOptions:
    """How prompts given on the command line are read. UserError names what is not known."""
    for flag, value, known in (
        ("--emphasis", emphasis, chunking.EMPHASIS),
        ("--long-prompts", long_prompts, chunking.CUTS),
    ):
        if value not in known:
            raise UserError(f"{flag} {value} is not known", "command line", closest(value, known))
    chosen = {"emphasis": emphasis, "long_captions": long_prompts, "clip_skip": clip_skip}
    # kohya's chunks are always as many as may be; for the others all that there can be is no cost.
    return TextOptions.model_validate(chosen | ({} if long_prompts == "kohya" else {"max_chunks": 12}))


def refuse_editing(prompts: Sequence[str], reading: TextOptions) -> None:
    """Refuse prompts that would change while a picture is drawn: A1111 does that, nothing here does."""
    for prompt in prompts if reading.emphasis.startswith("a1111") else ():
        found = chunking.editing(prompt)
        if found:
            what = f"'{found}' changes the prompt while the picture is drawn: that is not done here"
            raise UserError(what, f"prompt '{prompt[:40]}'", "write one prompt for each; a literal bracket is \\[")


def from_disk(
    model: str,
    prompts: Sequence[str],
    out: Path,
    images: int,
    seed: int,
    settings: dict[str, Any],
    loras: Sequence[str] = (),
    embeddings: Sequence[str] = (),
    reading: TextOptions = TEXT,
) -> Iterator[Path]:
    """Draw pictures with a model on disk or on the hub and save them with their settings in samples.jsonl."""
    from diffusers import StableDiffusionXLPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from sdxl_trainer import attach, distributed, tokens
    from sdxl_trainer.base import resolve, weights_file
    from sdxl_trainer.config import Model
    from sdxl_trainer.data.encode import DTYPES

    refuse_editing([*prompts, settings["negative"] or ""], reading)
    base = resolve(Model(path=model), Path.home() / ".cache" / "sdxl-trainer")
    device, dtype = distributed.device_type(), DTYPES[distributed.precision("auto", print)]
    side = base.config("unet").get("sample_size", 128) * 8
    settings = {**settings, "height": settings["height"] or side, "width": settings["width"] or side}
    for name in ("height", "width"):
        below = settings[name] // 8 * 8
        if settings[name] != below:
            what = f"--{name} {settings[name]} is not a multiple of 8"
            raise UserError(what, "command line", f"give {below} or {below + 8}")
    with files.explained(out):
        out.mkdir(parents=True, exist_ok=True)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    with pretrained.explained(base.folder):
        pipeline: Any = StableDiffusionXLPipeline.from_pretrained(
            base.folder,
            variant=weights_file(base, "unet"),
            dtype={"vae": torch.float32, "default": dtype},
            use_safetensors=True,
            add_watermarker=False,
        ).to(device)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        pretrained.refuse_broken(getattr(pipeline, name), base.part(name))
    attach.attach(pipeline, loras)
    tokens.attach(pipeline, embeddings)
    text.refuse_clip_skip(base, reading)
    embedded = _embedded(pipeline, [*prompts, settings["negative"] or ""], reading)
    zeros = settings["negative"] is None and base.zeros_for_empty()
    for name, request in requests(prompts, images, seed, **settings):
        both = embedded[request.prompt], embedded[request.negative or ""]
        save(draw(pipeline, request, None, **conditions(*both, zeros)), out / name)
        record(out, [note(request, name, 0, " + ".join([model, *loras, *embeddings]))])
        yield out / name


def requests(prompts: Sequence[str], images: int, seed: int, **settings: Any) -> Iterator[tuple[str, Request]]:
    """`images` pictures per prompt, each prompt with the same seeds; named <prompt>-<image>.png."""
    for number, prompt in enumerate(prompts):
        for image in range(images):
            yield f"{number}-{image}.png", Request(prompt, seed + image, **settings)


def save(image: "Image", path: Path) -> None:
    files.write_atomically(path, lambda temporary: image.save(temporary, format="PNG"))


def record(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Note pictures in samples.jsonl; pictures of the same file replace an older note."""
    path = folder / "samples.jsonl"
    old = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    new = {row["file"] for row in rows}
    kept = [row for row in old if row["file"] not in new]
    files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*kept, *rows]))


def note(request: Request, file: str, step: int, weights: str) -> dict[str, Any]:
    """A line of samples.jsonl."""
    return {"step": step, "file": file, "weights": weights, **asdict(request)}
