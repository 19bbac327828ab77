"""Checkpoints: whole or absent, hashed, verified before they are trusted, nothing unpickled.

checkpoint-N/  unet/  unet_ema/          as diffusers folders, in the type in which they are trained; likewise
               text_encoder/ ...         the text encoders, if they learn
               added.safetensors         or, of a run with an adapter, what was injected, by parameter name; its
               added_ema.safetensors     averages; and the adapter as other programs load it
               optimizer.safetensors     tensors named <parameter>|<key>, or #<group>|<key>
               state.json                step, counts, loss scale, the run's config
               manifest.json             SHA-256 of every file above
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sdxl_trainer import adapter_files, files, optim, tokens
from sdxl_trainer.ema import Ema
from sdxl_trainer.errors import UserError
from sdxl_trainer.formats import folder as pipelines
from sdxl_trainer.model import SDXL
from sdxl_trainer.optim import state as optim_state
from sdxl_trainer.parameters import Group

PREFIX = "checkpoint-"
_NEEDED = {"state.json", "optimizer.safetensors"}
_WEIGHTS = {"unet/config.json", "added.safetensors"}  # one of them


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int

    def state(self) -> dict[str, Any]:
        return json.loads((self.path / "state.json").read_text(encoding="utf-8"))


def found(output: Path) -> list[Checkpoint]:
    """All checkpoints of an output folder, oldest first. Folders with other names are left alone."""
    numbers = {p: p.name.removeprefix(PREFIX) for p in output.glob(f"{PREFIX}*") if p.is_dir()}
    return sorted((Checkpoint(p, int(n)) for p, n in numbers.items() if n.isdigit()), key=lambda c: c.step)


def verify(checkpoint: Checkpoint) -> Checkpoint:
    """Compare every file with the manifest; UserError names the first that differs."""
    where, fix = checkpoint.path, "delete this folder: the same command continues from the checkpoint before it"
    try:
        manifest = dict(json.loads((where / "manifest.json").read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError("the checkpoint has no readable manifest.json", str(where), fix) from None
    lacking = _NEEDED if _WEIGHTS & manifest.keys() else _NEEDED | {"unet/config.json"}
    for name in lacking - manifest.keys():
        raise UserError(f"the checkpoint's manifest.json does not name {name}", str(where), fix)
    for name, digest in manifest.items():
        path = where / name
        if not path.is_file():
            raise UserError(f"the checkpoint lacks {name}", str(where), fix)
        try:
            found_digest = files.sha256(path)
        except OSError as error:
            raise UserError(f"{name} cannot be read: {error.strerror}", str(where), "make it readable") from None
        if found_digest != digest:
            raise UserError(f"{name} is damaged: its bytes are not those that were written", str(where), fix)
    return checkpoint


def save(
    output: Path,
    step: int,
    sdxl: SDXL,
    ema: Ema | None,
    optimizer: torch.optim.Optimizer,
    groups: list[Group],
    state: dict[str, Any],
) -> Checkpoint:
    """Write checkpoint-<step>, replacing one of that name."""

    def write(folder: Path) -> None:
        folder.mkdir()
        with optim.evaluating(optimizer):
            if sdxl.added:
                _save_added(folder, sdxl, ema)
            for name, part in sdxl.parts().items() if not sdxl.added else ():
                save_part(name, part, folder / name)
                if ema is not None:
                    save_averaged(name, part, ema, folder / f"{name}_ema")
        files.save_tensors(folder / "optimizer.safetensors", optim_state.tensors(optimizer, groups))
        numbers = optim_state.scalars(optimizer, groups)
        files.write_json(folder / "state.json", {**state, "step": step, "optimizer": numbers})
        files.write_json(folder / "manifest.json", {"files": files.tree_hashes(folder)})

    path = output / f"{PREFIX}{step}"
    files.write_atomically(path, write)
    return Checkpoint(path, step)


def _save_added(folder: Path, sdxl: SDXL, ema: Ema | None) -> None:
    """What was injected, to continue from and to draw with."""
    values = added(sdxl, None)
    files.save_tensors(folder / "added.safetensors", values)
    if ema is not None:
        files.save_tensors(folder / "added_ema.safetensors", added(sdxl, ema))
    save_added(folder, sdxl, added(sdxl, ema), {})


def save_added(folder: Path, sdxl: SDXL, values: dict[str, Tensor], facts: dict[str, str], suffix: str = "") -> None:
    """What was injected, with these values, as other programs load it."""
    adapter_files.save(folder, sdxl, values, facts, suffix)
    tokens.save(folder, sdxl, values, facts, suffix)


def added(sdxl: SDXL, ema: Ema | None) -> dict[str, Tensor]:
    """The injected parameters by name, averaged where they are."""
    averages = ema.state() if ema else {}
    return {name: averages.get(name, sdxl.get_parameter(name).detach()) for name in sorted(sdxl.added)}


@torch.no_grad()
def load_added(checkpoint: Checkpoint, sdxl: SDXL) -> None:
    """Give the injected parameters the values that they had."""
    saved = _tensors(checkpoint.path / "added.safetensors")
    for name in sdxl.added:
        sdxl.get_parameter(name).copy_(saved[name])


def _tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}


def save_averaged(name: str, part: Any, ema: Ema, folder: Path, noted: bool = True) -> None:
    """A part with its averaged weights in fp32; `noted`: the UNet with what diffusers' EMAModel reads from its config,
    of which a model that is loaded for drawing would complain."""
    averages = {n.removeprefix(f"{name}."): t for n, t in ema.state().items() if n.startswith(f"{name}.")}
    with torch.device("meta"):
        averaged = type(part).from_config(part.config) if name == "unet" else type(part)(part.config)
    averaged.load_state_dict({**part.state_dict(), **averages}, assign=True)
    if name == "unet" and noted:
        averaged.register_to_config(
            decay=ema.decay,
            min_decay=0.0,
            optimization_step=ema.updates,
            update_after_step=0,
            use_ema_warmup=False,
            inv_gamma=1.0,
            power=2 / 3,
        )
    save_part(name, averaged, folder)


def save_part(name: str, part: Any, folder: Path) -> None:
    """A part as a folder of a pipeline. Text encoders get the names of published files, which all versions read."""
    if name == "unet":
        part.save_pretrained(folder)
        mode = (folder / "config.json").stat().st_mode
        for path in folder.glob("*.safetensors"):
            path.chmod(mode)  # safetensors makes files that only their owner can read
        return
    part.config.save_pretrained(folder)
    pipelines.write_tensors(folder / pipelines.WEIGHTS[name], pipelines.published_names(name, part.state_dict()))


def load_training_state(
    checkpoint: Checkpoint, sdxl: SDXL, optimizer: torch.optim.Optimizer, groups: list[Group], ema: Ema | None
) -> None:
    """Optimizer moments and averages; the weights themselves were loaded with the model."""
    state = checkpoint.state()
    optim_state.load(optimizer, groups, checkpoint.path / "optimizer.safetensors", state["optimizer"])
    if ema is not None:
        averages = dict(_averages(checkpoint, sdxl))
        ema.load({name: averages[name] for name in ema.names}, state["ema_updates"])


@torch.no_grad()
def restore(checkpoint: Checkpoint, sdxl: SDXL, ema: Ema | None) -> None:
    """Give the model, and its averages, the weights that they had."""
    if sdxl.added:
        load_added(checkpoint, sdxl)
    for name, part in sdxl.parts().items() if not sdxl.added else ():
        for key, tensor in _weights(name, part, checkpoint.path / name).items():
            part.get_parameter(key).copy_(tensor)
    if ema is not None:
        averages = dict(_averages(checkpoint, sdxl))
        ema.load({name: averages[name] for name in ema.names}, checkpoint.state()["ema_updates"])


def _weights(name: str, part: Any, folder: Path) -> dict[str, Tensor]:
    """A part's parameters by the names in its module. The modules of transformers have other names than published
    files: it alone can read them back."""
    read = read_weights(folder) if name == "unet" else type(part).from_pretrained(folder).state_dict()
    known = {key for key, _ in part.named_parameters()}
    return {key: tensor for key, tensor in read.items() if key in known}


def _averages(checkpoint: Checkpoint, sdxl: SDXL) -> Iterator[tuple[str, Tensor]]:
    if sdxl.added:
        yield from _tensors(checkpoint.path / "added_ema.safetensors").items()
    for name, part in sdxl.parts().items() if not sdxl.added else ():
        weights = _weights(name, part, checkpoint.path / f"{name}_ema")
        yield from ((f"{name}.{key}", tensor) for key, tensor in weights.items())


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a diffusers folder, sharded or not."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(_tensors(path))
    return tensors


def prune(output: Path, limit: int, kept: int | None = None) -> None:
    """Delete the oldest checkpoints until `limit` are left, but not that of the step `kept`."""
    for old in found(output)[:-limit]:
        if old.step != kept:
            files.remove(old.path)


def sweep(output: Path) -> None:
    """Remove what a killed process left half-written."""
    for pattern in (f".{PREFIX}*.tmp", f".{PREFIX}*.old"):
        for path in output.glob(pattern):
            files.remove(path)
