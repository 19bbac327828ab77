"""Checkpoints: whole or absent, hashed, verified before they are trusted, nothing unpickled.

checkpoint-N/  unet/  unet_ema/          as diffusers folders, in the type in which they are trained; likewise
               text_encoder/ ...         the text encoders, if they learn
               added.safetensors         or, of a run with an adapter, what was injected, by parameter name; its
               added_ema.safetensors     averages; and the adapter as other programs load it
               optimizer.safetensors     tensors named <parameter>|<key>, or #<group>|<key>
               state.json                step, counts, loss scale, the last losses, the run's config
               manifest.json             SHA-256 of every file above
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdxl_trainer import adapter_files, files, optim, sharding, tokens
from sdxl_trainer.ema import Ema
from sdxl_trainer.errors import UserError
from sdxl_trainer.formats import folder as pipelines
from sdxl_trainer.formats import stream
from sdxl_trainer.model import SDXL
from sdxl_trainer.optim import state as optim_state
from sdxl_trainer.parameters import Group

PREFIX = "checkpoint-"
_NEEDED = {"state.json", "optimizer.safetensors"}
_WEIGHTS = {"unet/config.json", "added.safetensors"}  # one of them
_FIX = "delete this folder: the same command continues from the checkpoint before it"


class Damaged(UserError):
    """A checkpoint is not what was written."""


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int

    def state(self) -> dict[str, Any]:
        """What state.json says."""
        with understood(self.path):
            state = json.loads((self.path / "state.json").read_text(encoding="utf-8"))
            kinds = {"step": int, "config": dict, "data": str, "optimizer": dict, "ema_updates": int}
            for name, kind in kinds.items():
                if not isinstance(state[name], kind):
                    raise TypeError(f"{name} of state.json is no {kind.__name__}")
            if state["step"] != self.step:
                raise ValueError(f"state.json is of step {state['step']}")
            return {"scaler": None, **state}


@contextmanager
def understood(folder: Path) -> Iterator[None]:
    """Turn what libraries raise on files that are no checkpoint of this run, though their hashes are right, into a
    message."""
    try:
        yield
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise Damaged(f"this is not a checkpoint of this run: {said}", str(folder), _FIX) from error


def found(output: Path) -> list[Checkpoint]:
    """All checkpoints of an output folder, oldest first. Folders with other names are left alone."""
    numbers = {p: p.name.removeprefix(PREFIX) for p in output.glob(f"{PREFIX}*") if p.is_dir()}
    return sorted((Checkpoint(p, int(n)) for p, n in numbers.items() if n.isdigit()), key=lambda c: c.step)


def verify(checkpoint: Checkpoint, from_disk: bool = False) -> Checkpoint:
    """Compare every file with the manifest; Damaged names the first that differs. `from_disk`: read what the disk
    holds, not what the system still has in memory from writing it."""
    where = checkpoint.path
    try:
        manifest = dict(json.loads((where / "manifest.json").read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise Damaged("the checkpoint has no readable manifest.json", str(where), _FIX) from None
    lacking = _NEEDED if _WEIGHTS & manifest.keys() else _NEEDED | {"unet/config.json"}
    for name in lacking - manifest.keys():
        raise Damaged(f"the checkpoint's manifest.json does not name {name}", str(where), _FIX)
    for name, digest in manifest.items():
        path = where / name
        if not path.is_file():
            raise Damaged(f"the checkpoint lacks {name}", str(where), _FIX)
        try:
            if from_disk:
                files.forget(path)
            found_digest = files.sha256(path)
        except OSError as error:
            raise UserError(f"{name} cannot be read: {error.strerror}", str(where), "make it readable") from None
        if found_digest != digest:
            raise Damaged(f"{name} is damaged: its bytes are not those that were written", str(where), _FIX)
    return checkpoint


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds: texts and tensors by the path of their file. Until they are `kept` the tensors are the
    run's own, which the next step changes."""

    step: int
    texts: dict[str, str]
    tensors: dict[str, dict[str, Tensor]]
    adapted: SDXL | None = None  # whose adapter is also written as other programs load it

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for own in self.tensors.values() for t in own.values())

    def kept(self, keep: Callable[[str, Tensor], Tensor]) -> "Contents":
        """The same with tensors that nothing changes; `keep` copies each, whose name in the checkpoint it is given."""
        copied = {file: {n: keep(f"{file}|{n}", t) for n, t in own.items()} for file, own in self.tensors.items()}
        return replace(self, tensors=copied)


def contents(
    step: int,
    sdxl: SDXL,
    ema: Ema | None,
    optimizer: torch.optim.Optimizer,
    groups: list[Group],
    state: dict[str, Any],
) -> Contents:
    """All that the run after `step` steps consists of."""
    texts, tensors = dict[str, str](), dict[str, dict[str, Tensor]]()
    with optim.evaluating(optimizer):
        if sdxl.added:
            tensors["added.safetensors"] = added(sdxl, None)
            if ema is not None:
                tensors["added_ema.safetensors"] = added(sdxl, ema)
        for name, part in sdxl.parts().items() if not sdxl.added else ():
            for own, averages in {name: None, **({f"{name}_ema": ema} if ema else {})}.items():
                texts[f"{own}/config.json"] = config_text(name, part, averages)
                tensors[f"{own}/{pipelines.WEIGHTS[name]}"] = weights(name, part, averages)
        if optim.evaluates(optimizer):  # which ends with the block
            tensors = {file: {n: t.clone() for n, t in own.items()} for file, own in tensors.items()}
    tensors["optimizer.safetensors"] = optim_state.tensors(optimizer, groups)
    numbers = optim_state.scalars(optimizer, groups)
    texts["state.json"] = json.dumps({**state, "step": step, "optimizer": numbers}, indent=1)
    return Contents(step, texts, tensors, sdxl if sdxl.added else None)


def save(output: Path, contents: Contents) -> Checkpoint:
    """Write checkpoint-<step>, replacing one of that name, and verify it."""

    def write(folder: Path) -> None:
        folder.mkdir()
        hashes = dict[str, str]()  # taken on the way to the disk
        for file, own in contents.tensors.items():
            (folder / file).parent.mkdir(exist_ok=True)
            hashes[file] = stream.write(folder / file, own, {"format": "pt"}, whole=True)
        for file, text in contents.texts.items():
            files.write_text(folder / file, text + "\n")
        if contents.adapted is not None:
            last = "added_ema.safetensors" if "added_ema.safetensors" in contents.tensors else "added.safetensors"
            save_added(folder, contents.adapted, contents.tensors[last], {})
        files.write_json(folder / "manifest.json", {"files": files.tree_hashes(folder, hashes)})

    path = output / f"{PREFIX}{contents.step}"
    files.write_atomically(path, write)
    return verify(Checkpoint(path, contents.step), from_disk=True)


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
    with understood(checkpoint.path):
        saved = _tensors(checkpoint.path / "added.safetensors")
        for name in sdxl.added:
            own = sdxl.get_parameter(name)
            own.copy_(sharding.like(saved[name], own))


def _tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}


def weights(name: str, part: Any, ema: Ema | None = None) -> dict[str, Tensor]:
    """A part's tensors under the names of published files, averaged ones (fp32) in place of those that learn."""
    averages = ema.state() if ema else {}
    own = {key: averages.get(f"{name}.{key}", tensor) for key, tensor in part.state_dict().items()}
    return pipelines.published_names(name, own)


def config_text(name: str, part: Any, noted: Ema | None = None) -> str:
    """A part's config.json; with averages of the UNet also what diffusers' EMAModel reads from there, of which a model
    that is loaded for drawing would complain."""
    if name != "unet":
        return part.config.to_json_string().strip()
    config = json.loads(part.to_json_string())
    config.pop("_name_or_path", None)  # where this machine had it
    config["_class_name"] = config["_class_name"].removeprefix("FSDP")  # what fully_shard calls the sharded module
    if noted is not None:
        config |= {"decay": noted.decay, "min_decay": 0.0, "optimization_step": noted.updates}
        config |= {"update_after_step": 0, "use_ema_warmup": False, "inv_gamma": 1.0, "power": 2 / 3}
    return json.dumps(config, indent=2, sort_keys=True)


def save_part(folder: Path, name: str, config: str, tensors: Mapping[str, Tensor]) -> None:
    """A part as a folder of a pipeline, not atomically."""
    folder.mkdir()
    files.write_text(folder / "config.json", config + "\n")
    stream.write(folder / pipelines.WEIGHTS[name], tensors, {"format": "pt"})


def load_training_state(
    checkpoint: Checkpoint, sdxl: SDXL, optimizer: torch.optim.Optimizer, groups: list[Group], ema: Ema | None
) -> None:
    """Optimizer moments and averages; the weights themselves were loaded with the model."""
    state = checkpoint.state()
    with understood(checkpoint.path):
        optim_state.load(optimizer, groups, checkpoint.path / "optimizer.safetensors", state["optimizer"])
        _load_averages(checkpoint, sdxl, ema)


@torch.no_grad()
def restore(checkpoint: Checkpoint, sdxl: SDXL, ema: Ema | None) -> None:
    """Give the model, and its averages, the weights that they had."""
    if sdxl.added:
        load_added(checkpoint, sdxl)
    for name, part in sdxl.parts().items() if not sdxl.added else ():
        for key, tensor in _weights(name, part, checkpoint.path / name).items():
            own = part.get_parameter(key)
            own.copy_(sharding.like(tensor, own))
    _load_averages(checkpoint, sdxl, ema)


def _weights(name: str, part: Any, folder: Path) -> dict[str, Tensor]:
    """A part's parameters by the names in its module. The modules of transformers have other names than published
    files: it alone can read them back."""
    read = read_weights(folder) if name == "unet" else type(part).from_pretrained(folder).state_dict()
    known = {key for key, _ in part.named_parameters()}
    return {key: tensor for key, tensor in read.items() if key in known}


def _load_averages(checkpoint: Checkpoint, sdxl: SDXL, ema: Ema | None) -> None:
    if ema is not None:
        averages = dict(_averages(checkpoint, sdxl))
        ema.load({name: averages[name] for name in ema.names}, checkpoint.state()["ema_updates"])


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


def prune(output: Path, limit: int, last: int, kept: Collection[Path] = ()) -> None:
    """Delete the oldest checkpoints until `limit` up to step `last` are left, but none of those to be `kept`."""
    for old in [c for c in found(output) if c.step <= last][:-limit]:
        if old.path not in kept:
            files.remove(old.path)
