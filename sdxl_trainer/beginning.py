"""The weights of an older adapter as those that a new run begins with."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_trainer.adapter_files import FOLDER, tensors_of, told
from sdxl_trainer.adapters import NAME
from sdxl_trainer.attach import AGAIN, located, read_folder, refuse_foreign, refuse_unfit, renamed
from sdxl_trainer.errors import UserError, plural, shortened
from sdxl_trainer.formats import header, lora
from sdxl_trainer.formats.lora_names import Layout
from sdxl_trainer.model import SDXL

WHERE = "adapter.start"
LIKE = "give the kind, parts, targets, ranks and factor that it was made with"
# By which of its tensors a layer's rank is known, and by which side of it.
_RANKS = {".lora_B": 1, ".hada_w1_b": 0, ".lokr_w2_b": 0}


@torch.no_grad()
def load(sdxl: SDXL, start: str) -> None:
    """Give the adapter the values of the file or run's folder `start`, which must be of an adapter like it."""
    path, weight = located(start, WHERE)
    if weight != 1.0:
        raise UserError("an adapter to begin with has no weight", WHERE, f"write only '{path}'")
    parts = {part: module for part, module in sdxl.parts().items() if hasattr(module, "peft_config")}
    values = {name: sdxl.get_parameter(name) for name in sdxl.added}
    mine = {_plain(f"{part}.{n}"): p for part in parts for n, p in tensors_of(part, values).items()}
    found, alpha_of = (_folders if path.is_dir() else _file)(path, sdxl)
    for names, verb in ((mine.keys() - found.keys(), "lacks"), (found.keys() - mine.keys(), "has, unlike this one,")):
        if names:
            what = f"the adapter to begin with {verb} {plural(len(names), 'tensor')}: {shortened(sorted(names), 2)}"
            raise UserError(what, str(path), LIKE)
    for name, parameter in mine.items():
        if found[name].shape != parameter.shape:
            what = f"'{name}' is {list(found[name].shape)} in the file, and {list(parameter.shape)} by the config"
            raise UserError(what, str(path), LIKE)
    for part, module in parts.items():
        _refuse_scales(part, told(module.peft_config[NAME]), mine, alpha_of, path)
    for name, parameter in mine.items():
        parameter.copy_(found[name])


class _Alphas:
    """Alpha of a layer, and whether the scale is alpha / sqrt(rank), as an adapter's file says."""

    def __init__(self, configs: Mapping[str, dict[str, Any]], alphas: Mapping[str, float] | None = None) -> None:
        self.configs, self.alphas = configs, alphas or {}

    def __call__(self, layer: str, rank: int) -> tuple[float, bool]:
        if layer + ".alpha" in self.alphas:
            return float(self.alphas[layer + ".alpha"]), False
        part, _, name = layer.partition(".")
        config = self.configs.get(part)
        if config is None:
            return float(rank), False  # files that say nothing: alpha is the rank
        return alpha(config, name, rank), bool(config.get("use_rslora"))

    def scales_whole(self, layer: str) -> bool:
        """Whether LoKr's update by two whole factors has a scale: only peft gives it one, alpha / rank."""
        part, _, name = layer.partition(".")
        config = self.configs.get(part)
        return config is not None and alpha(config, name, 0) != _pattern(config, "rank_pattern", name, config.get("r"))


def alpha(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """What a config of peft says of a layer's alpha; the rank for kinds that have none."""
    return float(_pattern(config, "alpha_pattern", layer, config.get("lora_alpha", config.get("alpha", rank))))


def _pattern(config: Mapping[str, Any], table: str, layer: str, default: Any) -> Any:
    from peft.utils.other import get_pattern_key

    patterns: dict[str, Any] = config.get(table) or {}
    return patterns.get(get_pattern_key(list(patterns), layer), default)


def _refuse_scales(part: str, config: dict[str, Any], mine: Mapping[str, Tensor], theirs: _Alphas, path: Path) -> None:
    """Refuse another alpha: the same tensors would be another update."""
    for name, parameter in mine.items():
        layer = name.rpartition(".")[0] if name.endswith(".lokr_w2") else ""
        if layer.startswith(f"{part}.") and theirs.scales_whole(layer):
            what = f"the update of '{layer}' had a scale, and by two whole factors it has none here"
            raise UserError(
                what, str(path), f"sdxl convert {path} FILE.safetensors puts it into a factor: begin with that"
            )
        mark = next((mark for mark in _RANKS if mark in name), None)
        if mark is None or not name.startswith(f"{part}."):
            continue
        layer, rank = name.partition(mark)[0], parameter.shape[_RANKS[mark]]
        ours = (alpha(config, layer.removeprefix(f"{part}."), rank), bool(config.get("use_rslora")))
        if theirs(layer, rank) != ours:
            (was, root), (now, new_root) = theirs(layer, rank), ours
            kinds = {False: "alpha / rank", True: "alpha / sqrt(rank)"}
            what = f"'{layer}' was trained with {kinds[root]}, alpha {was:g}; the config has {kinds[new_root]}, {now:g}"
            raise UserError(what, str(path), f"set adapter.alpha = {was:g} and adapter.rslora = {str(root).lower()}")


def _folders(path: Path, sdxl: SDXL) -> tuple[dict[str, Tensor], _Alphas]:
    folders = {f.name.removesuffix(FOLDER): f for f in sorted(path.glob(f"*{FOLDER}"))}
    configs = {part: json.loads((f / "adapter_config.json").read_text("utf-8")) for part, f in folders.items()}
    found = {_plain(f"{part}.{n}"): t for part, folder in folders.items() for n, t in read_folder(folder).items()}
    return found, _Alphas(configs)


def _file(path: Path, sdxl: SDXL) -> tuple[dict[str, Tensor], _Alphas]:
    """From a file that diffusers reads, which changes kohya's keys into its own."""
    from diffusers import StableDiffusionXLPipeline

    names = header.read(path, AGAIN)
    refuse_foreign(names, path)
    if any(kind in name for name in names for kind in (".hada_", ".lokr_", ".dora_scale")):
        return _lycoris(path, sdxl)
    try:
        state, alphas, metadata = StableDiffusionXLPipeline.lora_state_dict(
            path, unet_config=sdxl.unet.config, return_lora_metadata=True
        )
    except (ValueError, RuntimeError, KeyError) as error:
        said = str(error).strip().splitlines()[0]
        raise UserError(f"the adapter cannot be read: {said}", str(path), "use a LoRA made for SDXL base") from error
    parts = sdxl.parts()
    state = renamed(state)
    refuse_unfit(parts, {key: value for key, value in state.items() if key.split(".")[0] in parts}, path)
    configs: dict[str, dict[str, Any]] = {}
    for key, value in (metadata or {}).items():
        part, _, option = key.partition(".")
        configs.setdefault(part, {})[option] = value
    # The alpha of a text encoder's layer is named after its tensor, that of the UNet's after the layer.
    of_layer = {
        _plain(k): v for k, v in renamed({k.removesuffix(".alpha"): v for k, v in (alphas or {}).items()}).items()
    }
    by_layer = {key.partition(".lora_")[0] + ".alpha": value for key, value in of_layer.items()}
    return {_plain(key): tensor for key, tensor in state.items()}, _Alphas(configs, by_layer)


def _lycoris(path: Path, sdxl: SDXL) -> tuple[dict[str, Tensor], _Alphas]:
    """From a file of LoHa, LoKr or DoRA as LyCORIS or `sdxl convert` write them, which diffusers does not read."""
    config = sdxl.unet.config
    read = lora.read(path, Layout(len(config["block_out_channels"]), config["layers_per_block"]))
    found = {_plain(name): tensor for name, tensor in lora.peft_tensors(read, str(path)).items()}
    alphas = {n: float(m.rank) if m.alpha is None else m.alpha for n, m in read.modules.items()}
    return found, _Alphas({}, {f"{_plain(name)}.alpha": value for name, value in alphas.items()})


def _plain(key: str) -> str:
    """One name for what libraries and their versions call differently."""
    return key.replace("text_model.", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
