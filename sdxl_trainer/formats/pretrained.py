"""Loading the parts of a model: what libraries say of damaged or foreign files becomes a message for the user, and
weights that are missing or not finite are refused, not made up."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdxl_trainer import sharding
from sdxl_trainer.errors import UserError, plural, shortened

COPY = "copy or download this part of the model again; its config and weights must be of one model"


def load(kind: Any, folder: Path, variant: str | None, **options: Any) -> Any:
    """A diffusers or transformers model with the weights of a folder, of which every value is known and finite."""
    with explained(folder), _quiet():
        module, report = kind.from_pretrained(
            folder, variant=variant, use_safetensors=True, output_loading_info=True, **options
        )
    # transformers names tensors of other shapes as (name, shape, shape); diffusers raises.
    reshaped = sorted(entry[0] for entry in report["mismatched_keys"])
    for names, verb in ((sorted(report["missing_keys"]), "lack"), (reshaped, "have in other shapes")):
        if names:
            some = plural(len(names), "tensor")
            what = f"the weights of '{folder.name}' {verb} {some} of its config: {shortened(names, 3)}"
            raise UserError(what, str(folder), COPY)
    refuse_broken(module, folder)
    return module


def tensors(
    folder: Path, file: str, variant: str | None, wanted: dict[str, Tensor], prefix: str = ""
) -> dict[str, Tensor] | None:
    """The wanted weights of a folder, mapped; None if any is missing, of another shape than that of its namesake, or
    not finite, or if they cannot be read. `file` is the usual name of the file, `prefix` what its names may begin
    with."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, Tensor] = {}
    try:
        for path in weight_files(folder, file, variant):
            with safe_open(path, framework="pt") as opened:
                names = {name.removeprefix(prefix): name for name in opened.keys()}
                found |= {name: opened.get_tensor(names[name]) for name in names.keys() & wanted.keys()}
    except (SafetensorError, OSError, ValueError, KeyError):
        return None
    right = found.keys() == wanted.keys() and all(found[name].shape == wanted[name].shape for name in wanted)
    return found if right and all(map(_is_finite, found.values())) else None


def weight_files(folder: Path, file: str, variant: str | None) -> list[Path]:
    """The files of a part's weights: one, or the shards that an index names."""
    stem, _, ending = file.partition(".")
    dotted = f".{variant}" if variant else ""
    index = folder / f"{stem}.{ending}.index{dotted}.json"
    if not index.is_file():
        return [folder / f"{stem}{dotted}.{ending}"]
    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(shards))]


def refuse_broken(module: nn.Module, folder: Path) -> None:
    """Refuse weights of a folder that are not finite."""
    broken = broken_weights(module)
    if broken:
        what = f"the weights of '{folder.name}' hold values that are not finite: {shortened(broken, 3)}"
        raise UserError(what, str(folder), "use an undamaged model: copy it again, or use the one it was made from")


def broken_weights(model: nn.Module) -> list[str]:
    """Names of parameters that hold a value that is not finite."""
    return [name for name, p in model.named_parameters() if not _is_finite(sharding.local(p.detach()))]


def _is_finite(values: Tensor) -> bool:
    # The smallest and the largest of values with a NaN are NaN: one look at each, and no memory.
    return not values.numel() or bool(torch.stack(values.aminmax()).isfinite().all())


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn what the libraries raise on configs and weights that they cannot use into a message."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        said = str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
        raise UserError(f"'{folder.name}' cannot be loaded: {said}", str(folder), COPY) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No reports from the libraries about weights: what matters is refused here."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
