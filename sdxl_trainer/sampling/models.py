"""Models from disk to draw with: a base or inpainting model with adapters and words, and a refiner."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_trainer import attach, base, chunking, distributed, text, tokens
from sdxl_trainer.base import Base
from sdxl_trainer.chunking import Prompt
from sdxl_trainer.config import Model, TextOptions, Token
from sdxl_trainer.dtypes import DTYPES
from sdxl_trainer.errors import UserError, closest, plural
from sdxl_trainer.formats import pretrained
from sdxl_trainer.formats.folder import MICRO
from sdxl_trainer.sampling import checkpoints, draw
from sdxl_trainer.sampling.draw import Embedded
from sdxl_trainer.sampling.request import Request

CACHE = Path.home() / ".cache" / "sdxl-trainer"
OFFLOADS = {"model": "enable_model_cpu_offload", "sequential": "enable_sequential_cpu_offload"}


@dataclass
class Loaded:
    """A pipeline with its base. `loras` and `embeddings` are what is in it, `words` those of the embeddings; `known`
    are prompts that are encoded."""

    base: Base
    pipeline: Any
    scheduler: dict[str, Any]
    loras: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    words: list[Token] = field(default_factory=list)
    known: dict[tuple[Any, ...], Embedded] = field(default_factory=dict)

    @property
    def side(self) -> int:
        """Pixels on a side of the pictures that the model draws by default."""
        return side(self.base)


def side(of: Base) -> int:
    return of.config("unet").get("sample_size", 128) * 8


def find(name: str, where: str = "MODEL") -> Base:
    """The model on disk or on the hub, or micro, the shipped one; the cache holds what is unpacked from single files,
    and links that make models of checkpoints."""
    if name == MICRO.name and not Path(name).exists():
        return base.resolve(Model(path=str(MICRO)), CACHE)
    checkpoint = checkpoints.assembled(Path(name).expanduser(), CACHE)
    return base.resolve(Model(path=str(checkpoint or name)), CACHE)


def load(name: str, offload: str | None = None) -> Loaded:
    """A model ready to draw. UserError tells what is wrong with it."""
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline, StableDiffusionXLPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    found = find(name)
    device, dtype = distributed.device_type(), DTYPES[distributed.precision("auto", print)]
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    kind: Any = StableDiffusionXLPipeline
    if found.refines or found.inpaints:
        kind = StableDiffusionXLImg2ImgPipeline if found.refines else StableDiffusionXLInpaintPipeline
    with pretrained.explained(found.folder):
        pipeline: Any = kind.from_pretrained(
            found.folder,
            variant=base.weights_file(found, "unet"),
            dtype={"vae": torch.float32, "default": dtype},
            scheduler=None,  # each request has its own
            use_safetensors=True,
            add_watermarker=False,
        )
    for part in ("unet", "vae", *found.encoders):
        pretrained.refuse_broken(getattr(pipeline, part), found.part(part))
    if offload is None:
        pipeline.to(device)
    else:
        _offload(pipeline, offload, device)
    draw.in_fp32(pipeline.unet)
    pipeline.set_progress_bar_config(disable=True)
    return Loaded(found, pipeline, found.config("scheduler"))


def _offload(pipeline: Any, kind: str, device: str) -> None:
    if kind not in OFFLOADS:
        raise UserError(f"--offload {kind} is not known", "command line", closest(kind, OFFLOADS))
    if device == "cpu":
        what = f"--offload {kind} has no effect: there is no device beside the CPU"
        raise UserError(what, "command line", "remove it")
    getattr(pipeline, OFFLOADS[kind])(device=device)


def dress(loaded: Loaded, loras: tuple[str, ...], embeddings: tuple[str, ...]) -> bool:
    """Put adapters and words into a model; False if that takes one that is loaded afresh."""
    if (loras, embeddings) == (loaded.loras, loaded.embeddings):
        return True
    if loaded.embeddings not in ((), embeddings):
        return False
    if loaded.loras != loras:
        if any(attach.located(text, "--lora")[0].is_dir() for text in loaded.loras):
            return False
        if loaded.loras:
            loaded.pipeline.unload_lora_weights()
        attach.attach(loaded.pipeline, loras)
    if loaded.embeddings != embeddings:
        loaded.words = tokens.attach(loaded.pipeline, embeddings)
    loaded.loras, loaded.embeddings = loras, embeddings
    loaded.known.clear()
    return True


def reading(request: Request) -> TextOptions:
    """How a request's prompts are read. UserError names what is not known."""
    for flag, value, known in (
        ("--emphasis", request.emphasis, chunking.EMPHASIS),
        ("--long-prompts", request.long_prompts, chunking.CUTS),
    ):
        if value not in known:
            raise UserError(f"{flag} {value} is not known", "command line", closest(value, known))
    chosen: dict[str, Any] = {
        "emphasis": request.emphasis,
        "long_captions": request.long_prompts,
        "clip_skip": request.clip_skip,
    }
    # kohya's chunks are always as many as may be; for the others all that there can be is no cost.
    return TextOptions.model_validate(chosen | ({} if request.long_prompts == "kohya" else {"max_chunks": 12}))


def refuse_editing(prompts: Sequence[str], emphasis: str) -> None:
    """Refuse prompts that would change while a picture is drawn: A1111 does that, nothing here does."""
    for prompt in prompts if emphasis.startswith("a1111") else ():
        found = chunking.editing(prompt)
        if found:
            what = f"'{found}' changes the prompt while the picture is drawn: that is not done here"
            raise UserError(what, f"prompt '{prompt[:40]}'", "write one prompt for each; a literal bracket is \\[")


def conditions(loaded: Loaded, request: Request) -> dict[str, Tensor]:
    """What the pipeline takes for a request's prompts, in fp32."""
    none = request.negative is None and request.negative_2 is None
    zeros = none and loaded.base.zeros_for_empty()
    both = (
        _embedded(loaded, request, request.prompt, request.prompt_2),
        _embedded(loaded, request, request.negative or "", request.negative_2),
    )
    made = draw.conditions(*both, zeros=zeros)
    return {name: tensor.to(_device(loaded)).float() for name, tensor in made.items()}


def _device(loaded: Loaded) -> torch.device:
    return loaded.pipeline._execution_device


def _embedded(loaded: Loaded, request: Request, first: str, second: str | None) -> Embedded:
    """A prompt through the text encoders; what is cut off is told."""
    options = reading(request)
    text.refuse_clip_skip(loaded.base, options)
    refuse_editing([first, second or ""], request.emphasis)
    key = (first, second, options)
    if key not in loaded.known:
        pipeline = loaded.pipeline
        own = [getattr(pipeline, name) for name in (*text.PARTS, *text.TOKENIZERS)]
        encoding = text.TextEncoders((own[2] or own[3], own[3]), (own[0], own[1]))
        prompt = tokens.expanded(loaded.words, Prompt(first, second, emphasis=request.emphasis != "off"))
        read = text.tokenize(encoding.tokenizers, [prompt], options)
        for cut in text.cuts(encoding.tokenizers, [prompt], read):
            print(
                f"'{cut.prompt.text[:40]}' loses its last {plural(cut.tokens, 'token')}: {cut.text[:80]}",
                file=sys.stderr,
            )
        loaded.known[key] = text.encode_tokens(encoding, read, options, device=_device(loaded))[0]
    return loaded.known[key]
