"""Small layers that learn beside frozen ones: LoRA and its kin (Hu et al. 2021 and after), injected through peft.

An adapter's parameters are named after the layer they stand beside: `unet.….to_q.lora_A.default.weight`.
"""

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sdxl_trainer import keyed
from sdxl_trainer.config import Adapter
from sdxl_trainer.errors import UserError
from sdxl_trainer.model import SDXL

NAME = "default"  # of the adapter that learns, as peft writes it into parameter names
ATTENTION = re.compile(r".*\.attn[12]\.(to_[qkv]|to_out\.0)|.*\.self_attn\.(q|k|v|out)_proj")
TARGETS: dict[str, Callable[[str, nn.Module], bool]] = {
    "attention": lambda name, layer: ATTENTION.fullmatch(name) is not None,
    "linear": lambda name, layer: isinstance(layer, nn.Linear),
    "all": lambda name, layer: True,
}


@dataclass(frozen=True)
class Site:
    """A layer that gets an adapter: its name within its part, the rank, and alpha."""

    name: str
    layer: nn.Module
    rank: int
    alpha: float


def inject(sdxl: SDXL, options: Adapter, seed: int) -> None:
    """Put adapters into the model, in fp32, with fresh weights that `seed` decides; they change nothing yet."""
    from peft import inject_adapter_in_model

    before = {name for name, _ in sdxl.named_parameters()}
    for part, places in sites(sdxl, options).items():
        config = KINDS[options.kind](options, places)
        with torch.random.fork_rng([]), quiet():
            torch.manual_seed(int(keyed.generator(seed, "adapter").integers(1 << 63)))
            inject_adapter_in_model(config, getattr(sdxl, part), NAME)
    # Layers that peft wrapped have other names now.
    added = [n for n, _ in sdxl.named_parameters() if n.replace(".base_layer.", ".") not in before]
    for name in added:
        parameter = sdxl.get_parameter(name)
        parameter.data = parameter.data.float()
    sdxl.added.update(added)
    for layer in layers(sdxl):
        if isinstance(getattr(layer, "module_dropout", None), dict):
            # peft leaves a LoHa or LoKr layer out where a draw from 0 to 1 is not above this: with 0 it may happen.
            layer.module_dropout[NAME] = -1.0
    if options.dropout:
        _key_dropout(sdxl, options.dropout)


def sites(sdxl: SDXL, options: Adapter) -> dict[str, list[Site]]:
    """The layers that get an adapter, by part; every pattern must have named one."""
    found: dict[str, list[Site]] = {}
    used: set[str] = set()
    for part in dict.fromkeys(options.parts):
        module = sdxl.parts()[part]
        found[part] = [_site(part, n, m, options, used) for n, m in _layers(sdxl, part, options.targets)]
        if not found[part]:
            some = next(n for n, m in module.named_modules() if isinstance(m, nn.Linear))
            what = f"adapter.targets = '{options.targets}' names no layer of {part}"
            fix = f"attention, linear, all, or a regular expression over whole names such as {part}.{some}"
            raise UserError(what, "adapter.targets", fix)
    for table, patterns in (("ranks", options.ranks), ("alphas", options.alphas)):
        for pattern in patterns:
            if f"{table} {pattern}" not in used:
                what = f"the pattern '{pattern}' decides nothing: no layer with an adapter matches it first"
                some = next(f"{part}.{places[0].name}" for part, places in found.items())
                raise UserError(what, f"adapter.{table}", f"names look like {some}; the whole name must match")
    convolutions = any(isinstance(s.layer, nn.Conv2d) for places in found.values() for s in places)
    for name in ("conv_rank", "conv_alpha"):
        if getattr(options, name) is not None and not convolutions:
            what = f"adapter.{name} has no effect: no convolution gets an adapter"
            raise UserError(what, f"adapter.{name}", f'remove it, or set targets = "all" (now: {options.targets})')
    return _whole_unscaled(found, options) if options.kind == "lokr" else found


def _layers(sdxl: SDXL, part: str, targets: str) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers and convolutions of a part that are targets, but for those that nothing depends on."""
    chosen = TARGETS.get(targets) or _pattern(targets)
    unused = {name.rpartition(".")[0] for name in sdxl.unused()}
    for name, layer in sdxl.parts()[part].named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and f"{part}.{name}" not in unused:
            if chosen(f"{part}.{name}", layer):
                yield name, layer


def _pattern(targets: str) -> Callable[[str, nn.Module], bool]:
    pattern = _compiled(targets, "adapter.targets")
    return lambda name, layer: pattern.fullmatch(name) is not None


def _site(part: str, name: str, layer: nn.Module, options: Adapter, used: set[str]) -> Site:
    rank, alpha = options.rank, options.alpha
    if isinstance(layer, nn.Conv2d) and options.conv_rank is not None:
        rank, alpha = options.conv_rank, alpha and alpha / options.rank * options.conv_rank
    if isinstance(layer, nn.Conv2d) and options.conv_alpha is not None:
        alpha = options.conv_alpha
    scale = (alpha or rank) / rank
    own = _first(f"{part}.{name}", options.ranks, "ranks", used)
    rank, alpha = (own, own * scale) if own is not None else (rank, rank * scale)
    own_alpha = _first(f"{part}.{name}", options.alphas, "alphas", used)
    return Site(name, layer, rank, alpha if own_alpha is None else own_alpha)


def _first(name: str, patterns: Mapping[str, Any], table: str, used: set[str]) -> Any:
    for pattern, value in patterns.items():
        if _compiled(pattern, f"adapter.{table}").fullmatch(name):
            used.add(f"{table} {pattern}")
            return value
    return None


def _compiled(pattern: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        what = f"'{pattern}' is not a regular expression: {error}"
        raise UserError(what, where, r"for example 'unet\.up_blocks.*attn2.*'") from None


def _places(options: Adapter, places: list[Site]) -> dict[str, Any]:
    """What peft is told of the layers: their names, and the ranks and alphas that differ from most."""
    ranks, alphas = ({s.name: value(s) for s in places} for value in (lambda s: s.rank, lambda s: s.alpha))
    rank, alpha = (max(set(v.values()), key=list(v.values()).count) for v in (ranks, alphas))
    return {
        "r": rank,
        "alpha": alpha,
        "rank_pattern": {re.escape(name): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(name): a for name, a in alphas.items() if a != alpha},
        "target_modules": [s.name for s in places],
    }


def _lora(options: Adapter, places: list[Site], dora: bool = False) -> Any:
    from peft import LoraConfig

    told = _places(options, places)
    return LoraConfig(
        lora_alpha=told.pop("alpha"),
        lora_dropout=options.dropout,
        use_rslora=options.rslora,
        use_dora=dora,
        init_lora_weights="gaussian" if options.init == "gaussian" else True,
        **told,
    )


def _dora(options: Adapter, places: list[Site]) -> Any:
    """Direction and length of each row learn apart (Liu et al. 2024)."""
    return _lora(options, places, dora=True)


def _loha(options: Adapter, places: list[Site]) -> Any:
    """The update is the element-wise product of two low-rank ones (Hyeon-Woo et al. 2022)."""
    from peft import LoHaConfig

    return LoHaConfig(**_places(options, places))


def _lokr(options: Adapter, places: list[Site]) -> Any:
    """The update is a Kronecker product (Yeh et al. 2024). As in LyCORIS the first factor begins at random and the
    second at zero."""
    from peft import LoKrConfig

    return LoKrConfig(decompose_factor=options.factor or -1, init_weights="lycoris", **_places(options, places))


def _whole_unscaled(found: dict[str, list[Site]], options: Adapter) -> dict[str, list[Site]]:
    """LoKr's sites, without a scale where the rank makes the second factor no smaller, so that it is whole: LyCORIS,
    and whoever reads its files, scales products of two matrices alone."""
    whole = [_second_is_whole(place, options.factor or -1) for places in found.values() for place in places]
    if all(whole) and (options.alpha or options.conv_alpha or options.alphas):
        what = f"alpha has no effect: with rank {options.rank} the second factor of every layer is whole"
        raise UserError(what, "adapter.alpha", "remove alpha, or set a smaller rank")
    kept = iter(whole)
    return {
        part: [replace(place, alpha=float(place.rank)) if next(kept) else place for place in places]
        for part, places in found.items()
    }


def _second_is_whole(place: Site, factor: int) -> bool:
    from peft.tuners.lokr.layer import factorization

    layer: Any = place.layer
    linear = isinstance(layer, nn.Linear)
    sides = (layer.out_features, layer.in_features) if linear else (layer.out_channels, layer.in_channels)
    return place.rank >= max(factorization(side, factor)[1] for side in sides) / 2


def _oft(options: Adapter, places: list[Site]) -> Any:
    """The layer's input is rotated in blocks (Qiu et al. 2023)."""
    from peft import OFTConfig

    for place in places:
        if isinstance(place.layer, nn.Conv2d) and place.layer.kernel_size != (1, 1):
            # peft adds up patches that overlap: unturned they already multiply the layer's input by up to 9.
            what = f"oft on '{place.name}', a convolution of 3 x 3, with which peft's does not begin as the base"
            raise UserError(what, "adapter.targets", 'set targets = "linear", or kind = "boft", which turns weights')
    size = _block(options, places, 32)
    # The exact rotation; peft's default is the first terms of a series for it.
    return OFTConfig(r=0, oft_block_size=size, use_cayley_neumann=False, target_modules=[s.name for s in places])


def _boft(options: Adapter, places: list[Site]) -> Any:
    """Rotated in blocks, and scaled (Liu et al. 2024). One butterfly factor: peft needs a compiler for CUDA to have
    more, and without one makes it one."""
    from peft import BOFTConfig
    from peft.tuners.boft import layer

    layer._FBD_CUDA = False  # type: ignore[assignment]  # do not compile, nor try to for every layer
    size = _block(options, places, 4)
    return BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=1, target_modules=[s.name for s in places])


def _block(options: Adapter, places: list[Site], default: int) -> int:
    size = options.block_size or default
    for place in places:
        width = int(place.layer.weight[0].numel())  # type: ignore[index]
        if width % size:
            what = f"blocks of {size} do not divide the {width} inputs of '{place.name}'"
            possible = [str(n) for n in (4, 8, 16, 32, 64) if width % n == 0]
            fix = f"one of {', '.join(possible)}" if possible else "exclude this layer by adapter.targets"
            raise UserError(what, "adapter.block_size", fix)
    return size


KINDS: dict[str, Callable[[Adapter, list[Site]], Any]] = {
    "lora": _lora,
    "dora": _dora,
    "loha": _loha,
    "lokr": _lokr,
    "oft": _oft,
    "boft": _boft,
}


class KeyedDropout(nn.Module):
    """Dropout whose mask for a sample depends on the sample's key and the layer alone (law 1). `keys` is shared by
    all layers; the model sets it before each pass. So are `lengths`, of layers that read the text of a batch: there a
    sample's mask is repeated with its text, since without dropout repetition changes nothing."""

    def __init__(self, share: float, layer: int, keys: list[int], lengths: list[int] | None = None) -> None:
        super().__init__()
        self.share, self.layer, self.keys, self.lengths = share, layer, keys, lengths

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        if self.lengths is None:
            masks = [self._mask(x[0], key) for key in self.keys]
        else:
            own = zip(self.keys, self.lengths, strict=True)
            masks = [self._mask(x[0, :length], key).repeat(len(x[0]) // length, 1) for key, length in own]
        return x * torch.stack(masks) / (1.0 - self.share)

    def _mask(self, like: Tensor, key: int) -> Tensor:
        seed = (key + self.layer * 0x9E3779B97F4A7C15) & ((1 << 63) - 1)
        draw = torch.Generator(like.device).manual_seed(seed)
        return torch.rand(like.shape, generator=draw, device=like.device) >= self.share


def _key_dropout(sdxl: SDXL, share: float) -> None:
    """Replace peft's dropout, whose draws depend on history, by one that does not."""
    found = [(name, getattr(module, "lora_dropout", None)) for name, module in sdxl.named_modules()]
    layers = [(name, layer) for name, layer in found if isinstance(layer, nn.ModuleDict)]
    for number, (name, layer) in enumerate(layers):
        lengths = sdxl.dropout_lengths if name.endswith(("attn2.to_k", "attn2.to_v")) else None
        keys = sdxl.dropout_keys if name.startswith("unet.") else sdxl.dropout_chunks
        layer[NAME] = KeyedDropout(share, number, keys, lengths)


def layers(model: nn.Module) -> list[Any]:
    """The layers that got an adapter, as peft wrapped them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def switched_off(layers: Sequence[Any]) -> Iterator[None]:
    """While it lasts these layers are those of the base. peft's own switch would also say anew what learns."""
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextmanager
def quiet() -> Iterator[None]:
    """peft and diffusers warn of what is refused or meant here."""
    loaders = logging.getLogger("diffusers.loaders")
    level = loaders.level
    loaders.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        loaders.setLevel(level)
