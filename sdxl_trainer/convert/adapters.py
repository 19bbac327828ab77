"""Adapters: between layouts, of another rank, several as one, or extracted from two models."""

import json
import shutil
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sdxl_trainer.convert import preview, sources
from sdxl_trainer.convert.models import dated
from sdxl_trainer.convert.request import Request
from sdxl_trainer.convert.sources import Source
from sdxl_trainer.errors import UserError, plural, shortened
from sdxl_trainer.formats import ADAPTER_FILE, lora, lora_math, lora_names, metadata
from sdxl_trainer.formats.lora import Adapter, Module
from sdxl_trainer.formats.lora_math import Reduced

# Entries of a whole model's file, or of bytes that are no longer the same, which an adapter made from it must not say.
_NOT_KEPT = ("format", metadata.HASH, metadata.SD_HASH, metadata.LEGACY_HASH, lora.ADAPTER_METADATA)


def convert(source: Source, request: Request) -> list[str]:
    """Write the adapter in the wanted layout, alone or together with others, with its own rank or another."""
    request.only("an adapter", "dtype", "base", "loras", "weight", "rank", "energy", "entries", "metadata", "preview")
    shape = sources.layout(sources.model(request.base, "--base")) if request.base else None
    adapter = sources.adapter(source, shape)
    plain = ("loras", "weight", "rank", "energy", "dtype", "entries", "metadata", "preview")
    changes = any(getattr(request, name) for name in plain)
    if request.to == source.kind and not changes:
        what = f"there is nothing to convert: the adapter is in the layout '{source.kind}' already"
        other = "diffusers" if source.kind == "kohya" else "kohya"
        raise UserError(what, str(source.path), f"--to {other}, or name a change such as --rank, --dtype or --set")
    lines: list[str] = []
    if request.loras or request.weight:
        adapter, lines = together(adapter, request)
    elif request.rank or request.energy:
        reduced = {name: _smaller(name, module, request) for name, module in adapter.modules.items()}
        adapter = Adapter(_modules(reduced), adapter.metadata, adapter.layout)
        lines = [_residual(reduced)]
    return lines + write(adapter, request, source)


def together(first: Adapter, request: Request) -> tuple[Adapter, list[str]]:
    """One adapter that changes as much as all: exact by ranks side by side, or approximated with a rank."""
    weights = request.weight or dict.fromkeys(lora_names.KOHYA, 1.0)
    others = [(sources.adapter(sources.identify(path), first.layout), strengths) for path, strengths in request.loras]
    all_of_them = [(first, weights), *others]
    names = sorted({name for adapter, _ in all_of_them for name in adapter.modules})
    modules: dict[str, Module] = {}
    reduced: dict[str, Reduced] = {}
    for name in names:
        part = name.partition(".")[0]
        own = [(a.modules[name], w[part]) for a, w in all_of_them if name in a.modules and w[part]]
        if not own:
            continue
        if not request.rank and not request.energy:
            modules[name] = lora_math.joined(own, name)
        elif all(_plain(module) for module, _ in own):
            reduced[name] = lora_math.compressed(lora_math.joined(own, name), request.rank, request.energy)
        else:
            reduced[name] = _approximated(name, own, request)
    if not modules and not reduced:
        raise UserError("all weights are 0: nothing is left", "--weight", "give weights other than 0")
    result = Adapter(modules or _modules(reduced), first.metadata, first.layout)
    return result, [_residual(reduced)] if reduced else [f"{plural(len(modules), 'module')}, ranks side by side: exact"]


def extract(source: Source, request: Request) -> list[str]:
    """The adapter that turns the model --extract-from into SRC, as far as its rank allows."""
    request.only(
        "an adapter that is extracted", "extract_from", "rank", "energy", "dtype", "entries", "metadata", "preview"
    )
    if not request.rank and not request.energy:
        fix = "give --rank 32, or --energy 0.95 for the least rank that keeps so much"
        raise UserError("an adapter needs a rank", "--extract-from", fix)
    assert request.extract_from is not None
    base = sources.model(request.extract_from, "--extract-from")
    tuned, before = sources.components(source), sources.components(base)
    reduced: dict[str, Reduced] = {}
    lost: list[str] = []
    for part in lora_names.KOHYA:
        if tuned[part].keys() != before[part].keys():
            odd = sorted(tuned[part].keys() ^ before[part].keys())
            what = f"the two models differ in their tensors of {part}: {shortened(odd, 2)}"
            raise UserError(what, str(source.path), "give two models of one architecture")
        for name, weight in tuned[part].items():
            found = _difference(f"{part}.{name}", weight, before[part][name], request)
            if isinstance(found, Reduced):
                reduced[f"{part}.{name.removesuffix('.weight')}"] = found
            elif found:
                lost.append(f"{part}.{name}")
    if not reduced:
        raise UserError(
            "the two models have the same matrices", str(source.path), "give a model and its fine-tuned one"
        )
    lines = [_residual(reduced)]
    if lost:
        lines.append(f"not in the adapter: {len(lost)} biases, norms and embeddings that differ ({shortened(lost, 2)})")
    adapter = Adapter(_modules(reduced), {}, sources.layout(source))
    return lines + write(adapter, request, source)


def write(adapter: Adapter, request: Request, source: Source) -> list[str]:
    """Write the adapter, its metadata and its preview; gives the line that says so."""
    target = request.target
    path = target / ADAPTER_FILE if target.suffix != ".safetensors" else target
    kept = {name: text for name, text in adapter.metadata.items() if name not in _NOT_KEPT}
    title = kept.get("modelspec.title") or (target if path != target else path).stem
    stem = target.name if path != target else path.stem
    entries = about(adapter, stem, title, kept, dated(source).isoformat(timespec="seconds")) | kept
    entries |= shape_entries(adapter) | {"ss_output_name": stem} | metadata.SDXL_ADAPTER | dict(request.entries)
    entries = metadata.reduced(metadata.with_places(entries), request.metadata or "full") | dict(request.entries)
    if request.preview and request.metadata != "none":
        entries["modelspec.thumbnail"] = preview.thumbnail(request.preview)
    assert request.to is not None
    if path != target and request.overwrite and target.is_dir():
        shutil.rmtree(target)
    lora.write(adapter, path, request.to, entries, request.torch_dtype())
    if request.preview:
        preview.beside(path, request.preview)
    size = path.stat().st_size / 1e6
    return [f"wrote {path} ({request.to}, {plural(len(adapter.modules), 'module')}, {size:.1f} MB)"]


def about(adapter: Adapter, name: str, title: str, kept: Mapping[str, str], date: str) -> dict[str, str]:
    """What an adapter's file says of itself where nothing is known but its tensors."""
    spec = metadata.modelspec(title, kind="lora", v_prediction=kept.get("modelspec.prediction_type") == "v")
    return {**spec, "modelspec.date": date, "ss_output_name": name}


def shape_entries(adapter: Adapter) -> dict[str, str]:
    """Rank, alpha and kind of network, as kohya's tools and A1111 name them."""
    kinds = sorted({module.kind for module in adapter.modules.values()})
    # LyCORIS names the rank that was asked for, also where both of LoKr's factors are whole.
    ranks = [m.rank or int(m.written_alpha) for m in adapter.modules.values() if m.rank or m.kind == "lokr"]
    alphas = [m.written_alpha if m.rank or m.kind == "lokr" else 0.0 for m in adapter.modules.values()]
    rank = max(set(ranks), key=lambda value: (ranks.count(value), value)) if ranks else 0
    alpha = max(set(alphas), key=lambda value: (alphas.count(value), value))
    dora = any("magnitude" in module.tensors for module in adapter.modules.values())
    if kinds == ["lora"] and not dora:
        network = {"ss_network_module": "networks.lora"}
    else:
        algo = {"lora": "locon", "norm": "full"}.get(kinds[0], kinds[0])
        arguments = {"algo": algo} | ({"dora_wd": "True", "wd_on_output": "True"} if dora else {})
        network = {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(arguments)}
    return {**network, "ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}


def _difference(name: str, weight: Tensor, base: Tensor, request: Request) -> Reduced | bool:
    """A weight's change as a LoRA; else whether there is one that no LoRA can hold."""
    if weight.shape != base.shape:
        what = f"{name} is {list(weight.shape)} in one model and {list(base.shape)} in the other"
        raise UserError(what, str(request.source), "give two models of one architecture")
    if weight.dtype == base.dtype and torch.equal(weight, base):
        return False
    difference = weight.float() - base.float()
    if not bool(difference.any()):
        return False
    if not name.endswith(".weight") or difference.dim() not in (2, 4) or "embedding.weight" in name:
        return True
    return lora_math.reduced(difference, request.rank, request.energy)


def _smaller(name: str, module: Module, request: Request) -> Reduced:
    if module.kind == "lora" and "lora_mid" not in module.tensors:
        return lora_math.compressed(module, request.rank, request.energy)
    return _approximated(name, [(module, 1.0)], request)


def _approximated(name: str, own: list[tuple[Module, float]], request: Request) -> Reduced:
    for module, _ in own:
        if "magnitude" in module.tensors or module.kind in ("norm", "full"):
            what = f"{name} is a {'DoRA' if 'magnitude' in module.tensors else 'full difference'}, which no LoRA equals"
            raise UserError(what, name, "merge it into a base instead: sdxl convert BASE DST --lora FILE")
    shape = lora_math.shape_of(own[0][0], name)
    total = sum(strength * lora_math.change(module, shape) for module, strength in own)
    assert isinstance(total, Tensor)
    return lora_math.reduced(total, request.rank, request.energy)


def _plain(module: Module) -> bool:
    return module.kind == "lora" and not {"lora_mid", "magnitude"} & module.tensors.keys()


def _modules(reduced: Mapping[str, Reduced]) -> dict[str, Module]:
    return {name: found.module for name, found in reduced.items()}


def _residual(reduced: Mapping[str, Reduced]) -> str:
    """How much of the change the new ranks leave out, in all and at worst, as shares of its norm."""
    whole = sum(found.total for found in reduced.values())
    share = (sum(max(found.left_out, 0.0) for found in reduced.values()) / whole) ** 0.5 if whole else 0.0
    worst = max(reduced, key=lambda name: _share(reduced[name]))
    ranks = _span(found.module.rank for found in reduced.values())
    return (
        f"rank {ranks} in {plural(len(reduced), 'module')}; residual {share:.2%} of the change's norm, "
        f"at most {_share(reduced[worst]):.2%} ({worst})"
    )


def _share(found: Reduced) -> float:
    return (max(found.left_out, 0.0) / found.total) ** 0.5 if found.total else 0.0


def _span(values: Iterable[int]) -> str:
    given = sorted(set(values))
    return str(given[0]) if len(given) == 1 else f"{given[0]}-{given[-1]}"
