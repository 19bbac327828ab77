"""What is asked of a conversion, and the refusal of what would have no effect."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from sdxl_trainer.dtypes import DTYPES
from sdxl_trainer.errors import UserError, closest
from sdxl_trainer.formats.lora_names import KOHYA

# Strength of an adapter by part of the model.
Strengths = dict[str, float]

_FLAGS = {"entries": "--set", "metadata": "--metadata", "loras": "--lora", "extract_from": "--extract-from"}
_NEVER = ("source", "target", "to", "overwrite")
ENTRIES = ("title", "author", "description", "license", "usage_hint", "tags", "trigger_phrase", "merged_from", "date")


@dataclass(frozen=True)
class Request:
    """The command line of `sdxl convert`; None, empty and False mean that an option was not given."""

    source: Path
    target: Path
    to: str | None = None
    dtype: str | None = None
    base: Path | None = None
    loras: tuple[tuple[Path, Strengths], ...] = ()
    weight: Strengths | None = None
    extract_from: Path | None = None
    rank: int | None = None
    energy: float | None = None
    token: str | None = None
    entries: Mapping[str, str] = field(default_factory=dict)
    metadata: str | None = None
    preview: Path | None = None
    overwrite: bool = False

    def aimed(self, kind: str) -> "Request":
        return replace(self, to=kind)

    def inputs(self) -> list[Path]:
        given = [self.source, self.base, self.extract_from, self.preview, *(path for path, _ in self.loras)]
        return [path for path in given if path is not None]

    def only(self, what: str, *used: str) -> None:
        """Refuse options that are given and not used by this conversion."""
        default = Request(self.source, self.target)
        for entry in fields(self):
            given = getattr(self, entry.name) != getattr(default, entry.name)
            if given and entry.name not in (*_NEVER, *used):
                flag = _FLAGS.get(entry.name, f"--{entry.name}")
                raise UserError(f"{flag} has no effect on {what}", flag, f"remove {flag}")

    def torch_dtype(self) -> torch.dtype | None:
        return DTYPES[self.dtype] if self.dtype else None


def checked(**given: Any) -> Request:
    """A request from the words of a command line; UserError for values that cannot be."""
    if given["dtype"] is not None and given["dtype"] not in DTYPES:
        raise UserError(f"there is no dtype '{given['dtype']}'", "--dtype", closest(given["dtype"], DTYPES))
    kinds = ("folder", "single", "kohya", "diffusers", "embedding", "learned")
    if given["to"] is not None and given["to"] not in kinds:
        raise UserError(f"there is no kind '{given['to']}'", "--to", closest(given["to"], kinds))
    if given["rank"] is not None and given["rank"] < 1:
        raise UserError(f"a rank of {given['rank']} leaves nothing", "--rank", "give a rank of at least 1")
    if given["energy"] is not None and not 0 < given["energy"] <= 1:
        what = f"--energy {given['energy']:g} is no share"
        raise UserError(what, "--energy", "give a share of the energy to keep, above 0 and at most 1, such as 0.95")
    modes = ("full", "minimal", "none")
    if given["metadata"] is not None and given["metadata"] not in modes:
        what = f"there is no --metadata {given['metadata']}"
        raise UserError(what, "--metadata", closest(given["metadata"], modes))
    weight = strengths(given.pop("weight"), "--weight") if given["weight"] is not None else given.pop("weight")
    loras = tuple(_lora(text) for text in given.pop("loras") or ())
    entries = dict(_entry(text) for text in given.pop("entries") or ())
    if entries and given["metadata"] == "none":
        raise UserError("--set has no effect with --metadata none", "--set", "remove one of them, or take minimal")
    return Request(**given, weight=weight, loras=loras, entries=entries)


def strengths(text: str, where: str) -> Strengths:
    """Strengths from one number, from two for UNet and text encoders, or from three: 0.8 or 0.8,0.5 or 0.8,0.5,0."""
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 3 or not all(math.isfinite(number) for number in numbers):
        fix = "give one number, or two for UNet,text encoders, or three for UNet,CLIP-L,bigG"
        raise UserError(f"'{text}' is not a weight", where, fix)
    return dict(zip(KOHYA, numbers + [numbers[-1]] * (3 - len(numbers)), strict=True))


def _lora(text: str) -> tuple[Path, Strengths]:
    path, equals, number = text.rpartition("=")
    if equals and not Path(text).exists():
        return Path(path), strengths(number, f"--lora {text}")
    return Path(text), strengths("1", "--lora")


def _entry(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"'{text}' is not an entry", "--set", "write name=value, such as author=me")
    if name.startswith(("ss_", "modelspec.")):
        return name, value
    if name not in ENTRIES:
        raise UserError(f"there is no entry '{name}'", "--set", closest(name, ENTRIES))
    return f"modelspec.{name}", value
