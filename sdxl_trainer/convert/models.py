"""Whole models: between the diffusers folder and one file in the original layout, with adapters merged on the way."""

import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_trainer import files
from sdxl_trainer.convert import sources
from sdxl_trainer.convert.request import Request, Strengths
from sdxl_trainer.convert.sources import Source
from sdxl_trainer.errors import UserError, shortened
from sdxl_trainer.formats import folder, lora_math, modules, single_file
from sdxl_trainer.formats.lora import Adapter, Module
from sdxl_trainer.formats.metadata import modelspec, reduced
from sdxl_trainer.formats.stream import Lazy

Applied = Sequence[tuple[Adapter, Strengths]]


def convert(source: Source, request: Request) -> list[str]:
    """Write the model in the wanted layout; adapters given with --lora become part of it."""
    to_single = request.to == "single"
    request.only(
        f"a model that becomes a {'file' if to_single else 'folder'}",
        "dtype",
        "loras",
        *(("entries", "metadata") if to_single else ()),
        *(("base",) if source.kind == "single" and not to_single else ()),
    )
    changes = request.loras or request.dtype or request.entries or request.metadata
    if request.to == source.kind and not changes:
        what = f"there is nothing to convert: {source.path} is a {source.kind} already"
        raise UserError(what, "--to", "name the other kind, or a change: --dtype, --lora, --set or --metadata")
    shape = sources.layout(source)
    loras = [(sources.adapter(sources.identify(path), shape), weights) for path, weights in request.loras]
    write = _write_single if to_single else _write_folder
    write(source, request, loras)
    lines = [f"{path.name}: {_told(weights)}" for path, weights in request.loras]
    return [*lines, f"wrote {request.target} ({_size(request.target) / 1e9:.2f} GB)"]


def merged(components: single_file.Components, loras: Applied) -> Any:
    """The components with each adapter's change, in order; a changed weight is made when it is written."""
    plans: dict[tuple[str, str], list[tuple[Module, float]]] = {}
    for adapter, weights in loras:
        lost = []
        for name, module in adapter.modules.items():
            part, _, path = name.partition(".")
            kinds = ["weight"] if set(module.tensors) - {"diff_b", "b_norm"} else []
            kinds += ["bias"] if set(module.tensors) & {"diff_b", "b_norm"} else []
            for kind in kinds:
                if f"{path}.{kind}" not in components[part]:
                    lost.append(f"{name}.{kind}")
                elif weights[part]:
                    plans.setdefault((part, f"{path}.{kind}"), []).append((module, weights[part]))
        if lost:
            what = f"the base has no {len(lost)} of the weights that the adapter changes: {shortened(lost, 2)}"
            raise UserError(what, "--lora", "use an adapter for a model of this shape")
    result: dict[str, dict[str, Any]] = {part: dict(weights) for part, weights in components.items()}
    for (part, name), changes in plans.items():
        weight = components[part][name]
        for module, _ in changes:
            _refuse_misfit(f"{part}.{name}", weight, module)
        make = partial(_changed, weight, changes, name.endswith(".bias"))
        # The second encoder's queries, keys and values lie stacked in the original layout, which needs real tensors.
        result[part][name] = make() if part == "text_encoder_2" else Lazy(tuple(weight.shape), weight.dtype, make)
    return result


def dated(source: Source) -> datetime:
    """When a source was made, so that converting it again gives the same bytes."""
    path = source.path / folder.INDEX if source.kind == "folder" else source.path
    return datetime.fromtimestamp(path.stat().st_mtime, UTC)


def _write_single(source: Source, request: Request, loras: Applied) -> None:
    components = sources.components(source)
    if source.kind == "single":
        about = single_file.about(source.path)
        marks = about.v_prediction, about.zero_terminal_snr
        kept = {name: text for name, text in about.metadata.items() if name != "format"}
        resolution = (1024, 1024)
    else:
        for part, weights in components.items():
            modules.check(part, folder.read_config(part, source.path), weights, str(source.path))
        marks, kept = single_file.trained(source.path), {}
        resolution = (folder.read_config("vae", source.path)["sample_size"],) * 2
    written = modelspec(request.target.stem, resolution=resolution, v_prediction=marks[0], date=dated(source))
    if loras:
        written["modelspec.merged_from"] = ", ".join([source.path.name, *(path.name for path, _ in request.loras)])
    # What the source said of itself holds on, but for the hash, which is that of other bytes.
    renewed = {name: text for name, text in written.items() if "hash" in name or "merged" in name}
    metadata = {**written, **kept, **renewed, **request.entries}
    single_file.write(
        request.target,
        merged(components, loras),
        {**reduced(metadata, request.metadata or "full"), **request.entries},
        v_prediction=marks[0],
        zero_terminal_snr=marks[1],
        dtype=request.torch_dtype(),
    )


def _write_folder(source: Source, request: Request, loras: Applied) -> None:
    def change(components: single_file.Components) -> Any:
        return merged(components, loras)

    if source.kind == "single":
        base = sources.model(request.base, "--base").path if request.base else None
        if base and not base.is_dir():
            raise UserError("--base is a file", str(base), "name a diffusers folder to take the configurations from")
        write: Any = partial(single_file.expand, source.path, configs=base, dtype=request.torch_dtype(), change=change)
    else:
        write = partial(_copy, source.path, dtype=request.torch_dtype(), change=change)
    files.write_atomically(request.target, write)


def _copy(root: Path, target: Path, dtype: torch.dtype | None, change: single_file.Change) -> None:
    """A diffusers folder again, with other weights."""
    weights = {component: folder.read_weights(component, root) for component in folder.WEIGHTS}
    for component, tensors in change(weights).items():
        folder.write_component(target, component, tensors, folder.read_config(component, root), dtype)
    for name in (*folder.TOKENIZERS, "scheduler"):
        shutil.copytree(root / name, target / name, dirs_exist_ok=True)
    shutil.copyfile(root / folder.INDEX, target / folder.INDEX)


def _changed(weight: Tensor, changes: list[tuple[Module, float]], bias: bool) -> Tensor:
    new = weight.float()
    for module, strength in changes:
        if bias:
            new = new + strength * module.tensors.get("diff_b", module.tensors.get("b_norm")).float()  # type: ignore[union-attr]
        else:
            new = lora_math.applied(new, module, strength)
    return new.to(weight.dtype)


def _refuse_misfit(name: str, weight: Tensor, module: Module) -> None:
    if name.endswith(".weight") and lora_math.numel(module) != weight.numel():
        what = f"the adapter does not fit {name}: it changes {lora_math.numel(module):,} numbers of {weight.numel():,}"
        raise UserError(what, "--lora", "use an adapter for a model of this shape")


def _told(weights: Strengths) -> str:
    return ", ".join(f"{part} {value:g}" for part, value in weights.items())


def _size(path: Path) -> int:
    paths = path.rglob("*") if path.is_dir() else [path]
    return sum(p.stat().st_size for p in paths if p.is_file())
