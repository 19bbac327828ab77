"""Adapters on disk, whatever their layout: LoRA with or without convolutions, DoRA, LoHa, LoKr, and full differences.

An adapter is a table of modules; reading takes any layout of `lora_names`, writing knows two: kohya's, which ComfyUI,
A1111 and Forge read, and that of diffusers and PEFT. What a module's tensors mean is in `lora_math`.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_trainer.errors import UserError, plural, shortened
from sdxl_trainer.formats import families, folder, header, lora_names
from sdxl_trainer.formats.lora_names import SDXL, Layout

ADAPTER_METADATA = "lora_adapter_metadata"  # what diffusers reads ranks and alphas from
# Says which UNet the original names are those of, where it is not full-size SDXL's.
LAYOUT = "sdxl_trainer.unet_layout"
AGAIN = "copy or download the file again"
# The role by which each kind of module is known, in this order.
_KINDS = {"lora_up": "lora", "hada_w1_a": "loha", "lokr_w1": "lokr", "lokr_w1_a": "lokr", "diff": "full"}
_KINDS |= {"diff_b": "full", "w_norm": "norm"}
_NEEDED = {
    "lora": ("lora_up", "lora_down"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "lokr": (),
    "full": (),
    "norm": (),
}


@dataclass(frozen=True)
class Module:
    """One module's tensors by role. The change of the weight is their product times `alpha / rank`; no alpha: times 1.

    `magnitude` is DoRA's, one number per output: [out] of a LoRA; as LyCORIS keeps it, [out, 1, ...] or one per input
    [1, in, ...], where it cannot be had so.
    """

    kind: str
    tensors: dict[str, Tensor]
    alpha: float | None = None

    @property
    def rank(self) -> int:
        """The rank of the product; 0 for what has none: full matrices."""
        sides = {"lora": ("lora_down", 0), "loha": ("hada_w1_b", 0), "lokr": ("lokr_w2_b", 0)}
        name, side = sides.get(self.kind, ("", 0))
        if self.kind == "lokr" and name not in self.tensors:
            name = "lokr_w1_b"
        return self.tensors[name].shape[side] if name in self.tensors else 0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.alpha is not None and self.rank else 1.0

    @property
    def written_alpha(self) -> float:
        """The alpha in files. LyCORIS wants one of each LoKr, also of two whole factors, which it does not scale; it
        writes the rank that was asked for."""
        return float(self.rank or 1) if self.alpha is None else self.alpha

    @property
    def per_input(self) -> bool:
        """Whether this is a DoRA with a magnitude per input."""
        magnitude = self.tensors.get("magnitude")
        return magnitude is not None and magnitude.dim() > 1 and magnitude.shape[0] != outputs(self.kind, self.tensors)


def outputs(kind: str, tensors: Mapping[str, Tensor]) -> int:
    """How many outputs the module has; 0 where its tensors do not tell."""
    if kind == "lora":
        return tensors["lora_up"].shape[0]
    if kind == "loha":
        return tensors["hada_w1_a"].shape[1 if "hada_t1" in tensors else 0]
    if kind == "lokr":
        first = tensors.get("lokr_w1", tensors.get("lokr_w1_a"))
        second = tensors["lokr_w2"].shape[0] if "lokr_w2" in tensors else 0
        second = second or tensors["lokr_w2_a"].shape[1 if "lokr_t2" in tensors else 0]
        return first.shape[0] * second if first is not None else 0
    return 0


@dataclass(frozen=True)
class Adapter:
    """Modules by their diffusers path with the part in front, and the file's metadata."""

    modules: dict[str, Module]
    metadata: dict[str, str] = field(default_factory=dict)
    layout: Layout = SDXL

    def parts(self) -> list[str]:
        return [part for part in lora_names.KOHYA if any(name.startswith(f"{part}.") for name in self.modules)]


def read(path: Path, layout: Layout | None = None) -> Adapter:
    """The adapter of a file in any layout, memory-mapped. UserError for what is none, or one for another model."""
    from safetensors.torch import load_file

    entries, metadata = header.described(path, AGAIN)
    families.refuse_foreign(path, entries, "adapter")
    layout = layout or (Layout(*json.loads(metadata[LAYOUT])) if LAYOUT in metadata else SDXL)
    configured = _configured(metadata, path)
    found: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    for name, tensor in sorted(load_file(path).items()):
        parts = lora_names.split(name)
        if parts is None:
            unknown.append(name)
            continue
        roles = found.setdefault(_place(parts[0], layout, path), {})
        if parts[1] in roles:
            what = f"two tensors of the file are one: the second is {name}"
            raise UserError(what, str(path), "use a file that holds the adapter once")
        roles[parts[1]] = tensor
    if unknown:
        raise _foreign(unknown, path)
    if not found:
        raise UserError("the file holds no tensors", str(path), "name the file of an adapter")
    return Adapter({name: _module(name, roles, configured, path) for name, roles in found.items()}, metadata, layout)


def read_peft(path: Path, part: str, config: dict[str, Any]) -> Adapter:
    """The adapter of one part from the file that peft keeps beside its configuration."""
    from safetensors.torch import load_file

    header.read(path, AGAIN)
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in sorted(load_file(path).items()):
        parts = lora_names.split(name.removeprefix("base_model.model."))
        if parts is None:
            raise _foreign([name], path)
        found.setdefault(_place(f"{part}.{parts[0]}", SDXL, path), {})[parts[1]] = tensor
    return Adapter({name: _module(name, roles, {part: config}, path) for name, roles in found.items()})


def kohya_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors under kohya's names, every module with its alpha."""
    tensors: dict[str, Tensor] = {}
    for name, module in adapter.modules.items():
        plain = lora_names.kohya(name, adapter.layout)
        for role, tensor in module.tensors.items():
            shaped = _magnitude_column(module, tensor) if role == "magnitude" else tensor
            tensors[plain + lora_names.KOHYA_ENDS.get(role, f".{role}")] = shaped
        if module.rank or module.kind == "lokr":
            tensors[f"{plain}.alpha"] = torch.tensor(module.written_alpha, dtype=torch.float32)
    return tensors


def peft_tensors(adapter: Adapter, where: str) -> dict[str, Tensor]:
    """The tensors under the names of diffusers and PEFT; the alphas go into the metadata."""
    tensors: dict[str, Tensor] = {}
    for name, module in adapter.modules.items():
        refused = _not_for_peft(module)
        if refused:
            what = f"{name} is {refused}, which diffusers and PEFT have no place for"
            raise UserError(what, where, "keep it in the kohya layout, or merge it into a base: --lora FILE")
        shapes = {role: tensor for role, tensor in _without_mid(module).items()}
        for role, tensor in shapes.items():
            if role == "magnitude" and shapes["lora_down"].dim() == 4:
                tensor = tensor.reshape(1, -1, 1, 1)
            end = lora_names.PEFT_ENDS.get(role, f".{role}")
            # transformers, which loads the text encoders' adapters, passes over magnitudes under peft's own name.
            end += ".weight" if role == "magnitude" and not name.startswith("unet.") else ""
            tensors[name + end] = tensor
    return tensors


def adapter_metadata(adapter: Adapter) -> dict[str, str]:
    """The entry from which diffusers builds each part's `LoraConfig`: ranks, alphas, DoRA, and the modules."""
    tree: dict[str, Any] = {}
    for part in adapter.parts():
        mine = {_local(name): m for name, m in adapter.modules.items() if name.startswith(f"{part}.")}
        own = {name: m for name, m in mine.items() if m.rank or m.kind == "lokr"}
        if not own:
            continue
        alphas = {name: m.written_alpha for name, m in own.items()}
        # Two whole factors have no scale: as many ranks as alpha.
        ranks = {name: m.rank or _number(alphas[name]) for name, m in own.items()}
        rank, alpha = _usual(ranks.values()), _usual(alphas.values())
        kind = next(iter(own.values())).kind
        config: dict[str, Any] = {
            "r": rank,
            "lora_alpha" if kind == "lora" else "alpha": _number(alpha),
            "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
            "alpha_pattern": {name: _number(value) for name, value in alphas.items() if value != alpha},
            "target_modules": sorted(own),
        }
        if kind == "lora":
            config |= {"use_dora": any("magnitude" in m.tensors for m in own.values()), "bias": "none"}
        else:
            config["peft_type"] = kind.upper()
        tree |= {f"{part}.{key}": value for key, value in config.items()}
    return {ADAPTER_METADATA: json.dumps(tree, indent=2, sort_keys=True)} if tree else {}


def write(
    adapter: Adapter, path: Path, kind: str, metadata: Mapping[str, str], dtype: torch.dtype | None = None
) -> None:
    """Write the adapter whole or not at all; `kind` is 'kohya' or 'diffusers'."""
    entries = {key: value for key, value in metadata.items() if key not in (ADAPTER_METADATA, LAYOUT)}
    if adapter.layout != SDXL:
        entries[LAYOUT] = json.dumps([adapter.layout.levels, adapter.layout.layers])
    if kind == "kohya":
        tensors = kohya_tensors(adapter)
        alphas = {name: tensor for name, tensor in tensors.items() if name.endswith(".alpha")}
        cast = tensors if dtype is None else {name: tensor.to(dtype) for name, tensor in tensors.items()} | alphas
        folder.write_tensors(path, cast, entries)
    else:
        folder.write_tensors(path, peft_tensors(adapter, str(path)), entries | adapter_metadata(adapter), dtype)


def _place(name: str, layout: Layout, path: Path) -> str:
    try:
        return lora_names.module(name, layout)
    except UserError as error:
        raise UserError(error.what, str(path), error.fix) from None


def _module(name: str, roles: dict[str, Tensor], configured: dict[str, dict[str, Any]], path: Path) -> Module:
    """One module from its tensors, with its alpha from beside them or from the file's configuration."""
    kind = next((kind for role, kind in _KINDS.items() if role in roles), None)
    missing = [role for role in _NEEDED[kind] if role not in roles] if kind else ["the other half of its tensors"]
    if kind == "lokr":
        halves = [w for w in ("lokr_w1", "lokr_w2") if w not in roles]
        missing = [f"{w}_{side}" for w in halves for side in "ab" if f"{w}_{side}" not in roles]
    if missing or kind is None:
        what = f"{name} lacks {' and '.join(missing)}"
        raise UserError(what, str(path), "the file is not complete: copy it again, or save the adapter again")
    given = roles.pop("alpha", None)
    if any(0 in tensor.shape for tensor in roles.values()):
        raise UserError(f"{name} has rank 0", str(path), "use an adapter with a rank of at least 1")
    if kind == "lora" and not _fits(roles):
        shapes = f"up {list(roles['lora_up'].shape)}, down {list(roles['lora_down'].shape)}"
        raise UserError(f"{name} has matrices that do not fit: {shapes}", str(path), AGAIN)
    roles = _with_magnitude(kind, roles)
    config = configured.get(name.partition(".")[0], {})
    module = Module(kind, roles)
    if kind == "lokr" and not module.rank and given is None and "alpha" in config:
        # PEFT scales full matrices too; readers of kohya's layout do not look at their alpha.
        alpha, rank = (_of_layer(name, config, table) for table in ("alpha", "r"))
        if alpha == rank:
            return Module(kind, roles, float(alpha))
        return Module(kind, {**roles, "lokr_w1": roles["lokr_w1"] * (alpha / rank)})
    alpha = _decimal(given) if given is not None else _configured_alpha(name, module, config)
    if alpha is not None and not math.isfinite(alpha):
        raise UserError(f"{name} has the alpha {alpha}", str(path), "use an undamaged adapter")
    return Module(kind, roles, alpha if module.rank or kind == "lokr" else None)


def _fits(roles: Mapping[str, Tensor]) -> bool:
    """Whether the matrices of a LoRA can be multiplied."""
    up, down, mid = roles["lora_up"], roles["lora_down"], roles.get("lora_mid")
    inner = down.shape[0] if mid is None else mid.shape[0]
    core = mid is None or mid.shape[1] == down.shape[0]
    return up.dim() >= 2 and down.dim() >= 2 and up.shape[1] == inner and core


def _with_magnitude(kind: str, roles: dict[str, Tensor]) -> dict[str, Tensor]:
    """DoRA's magnitudes under one role: those of a LoRA, one per output, as [out]; all others as they are."""
    if "magnitude" in roles:
        return {**roles, "magnitude": roles["magnitude"].reshape(-1)}
    if "dora_scale" not in roles:
        return roles
    scale = roles["dora_scale"]
    rest = {role: tensor for role, tensor in roles.items() if role != "dora_scale"}
    plain = kind == "lora" and scale.shape[0] == scale.numel() == outputs(kind, roles)
    return {**rest, "magnitude": scale.reshape(-1) if plain else scale}


def _magnitude_column(module: Module, magnitude: Tensor) -> Tensor:
    """A magnitude as LyCORIS keeps it: [out, 1] of a matrix, [out, 1, 1, 1] of a convolution."""
    return magnitude if magnitude.dim() > 1 else magnitude.reshape(-1, *[1] * (module.tensors["lora_down"].dim() - 1))


def _without_mid(module: Module) -> dict[str, Tensor]:
    """The tensors of a LoRA without a middle: [r, r, k, k] and a down [r, in, 1, 1] are one down [r, in, k, k]."""
    if "lora_mid" not in module.tensors:
        return module.tensors
    rest = {role: tensor for role, tensor in module.tensors.items() if role != "lora_mid"}
    mid, down = module.tensors["lora_mid"], rest["lora_down"]
    composed = torch.einsum("mnkl,ni->mikl", mid.float(), down.flatten(1).float())
    return {**rest, "lora_down": composed.to(down.dtype)}


def _not_for_peft(module: Module) -> str:
    if module.kind in ("full", "norm"):
        return "a full difference"
    if module.per_input:
        return "a DoRA with a magnitude per input"
    return f"a {module.kind} with magnitudes" if "magnitude" in module.tensors and module.kind != "lora" else ""


def _configured(metadata: Mapping[str, str], path: Path) -> dict[str, dict[str, Any]]:
    """The adapter's configuration by part, from where diffusers keeps it."""
    try:
        tree = json.loads(metadata.get(ADAPTER_METADATA, "{}"))
        parts: dict[str, dict[str, Any]] = {}
        for key, value in tree.items():
            part, _, name = key.partition(".")
            parts.setdefault(part, {})[name] = value
    except (ValueError, AttributeError):
        raise UserError(f"the entry {ADAPTER_METADATA} of the file is not valid JSON", str(path), AGAIN) from None
    return parts


def _configured_alpha(name: str, module: Module, config: dict[str, Any]) -> float | None:
    """The alpha for which `alpha / rank` is PEFT's factor; a rank-stabilised LoRA is scaled by alpha / sqrt(rank)."""
    if not module.rank:
        return None
    alpha = _of_layer(name, config, "lora_alpha" if "lora_alpha" in config else "alpha")
    if alpha is None:
        return None
    return float(alpha) * math.sqrt(module.rank) if config.get("use_rslora") else float(alpha)


def _of_layer(name: str, config: dict[str, Any], option: str) -> Any:
    """What a configuration of PEFT says of a module: its r, alpha or lora_alpha."""
    patterns = config.get("rank_pattern" if option == "r" else "alpha_pattern") or {}
    key = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", _local(name))), None)
    return patterns[key] if key else config.get(option)


def _decimal(alpha: Tensor) -> float:
    """The shortest decimal that is this number in fp32: 0.1, and not 0.10000000149."""
    return float(str(alpha.float().reshape(-1)[0].numpy()))


def _local(name: str) -> str:
    """A module's path within its part, as it ends in every version of transformers."""
    return name.partition(".")[2].removeprefix("text_model.")


def _usual(values: Any) -> Any:
    """The most frequent value; the largest of several."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value))


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def _foreign(names: list[str], path: Path) -> UserError:
    for end, kind in lora_names.FOREIGN_ROLES.items():
        if any(end in name for name in names):
            return UserError(f"this is an {kind} adapter", str(path), "LoRA, DoRA, LoHa and LoKr are converted")
    return UserError(
        f"{plural(len(names), 'tensor is', 'tensors are')} none of an adapter's: {shortened(names, 3)}",
        str(path),
        "name the file of a LoRA, DoRA, LoHa or LoKr; whole models and embeddings are recognised by their own names",
    )
