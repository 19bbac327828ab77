"""Optimizers, and the learning rates that they get."""

import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import packages_distributions
from io import StringIO
from typing import Any

import torch
from torch import nn

from sdxl_trainer import sharding
from sdxl_trainer.config import Optimizer, Train
from sdxl_trainer.errors import UserError, closest
from sdxl_trainer.optim import adafactor, masters, muon, rounding
from sdxl_trainer.optim.clipping import clip
from sdxl_trainer.optim.rates import SHAPES, factor, set_learning_rates
from sdxl_trainer.parameters import Group

__all__ = [
    "KINDS",
    "SHAPES",
    "clip",
    "evaluates",
    "evaluating",
    "factor",
    "loaded",
    "make",
    "refuse",
    "refuse_sharded",
    "refuse_unwritable",
    "rounds",
    "set_learning_rates",
    "state_bytes",
    "workspace_bytes",
]


def _largest(shapes: Sequence[torch.Size]) -> int:
    return max((shape.numel() for shape in shapes), default=0)


def _two(shapes: Sequence[torch.Size]) -> int:
    return 2 * _largest(shapes)


def _all(shapes: Sequence[torch.Size]) -> int:
    return sum(shape.numel() for shape in shapes)


@dataclass(frozen=True)
class Kind:
    """Where an optimizer's class is, the package that brings it, and arguments that should not be its own defaults.

    `state`: what it keeps of each learning number: how many in the weights' type, and how many bytes beside.
    `workspace`: how many numbers of the weights' type a step holds beside that for a moment, by the tensors' shapes.
    `rounds`: whether steps on bf16 weights are computed in fp32 and rounded by chance, for which it may not need all
    tensors at once; its weights' type is then fp32. `narrow`: state that is kept in bf16 and rounded as well.
    """

    place: str
    package: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    state: tuple[float, float] = (2, 0)
    workspace: Callable[[Sequence[torch.Size]], int] = _largest
    sharded: bool = False  # whether it can step on a shard of each tensor: what it does is done to each number alone
    rounds: bool = False
    narrow: tuple[str, ...] = ()


KINDS: dict[str, Kind] = {
    # Fused: one kernel over all tensors, 3 to 5 times faster than the default, on the CPU too.
    "adamw": Kind("sdxl_trainer.optim.fused:AdamW", arguments={"fused": True}, sharded=True, rounds=True),
    # Block-wise 8-bit moments (Dettmers et al. 2022); paged: moved to host memory when the GPU's is short.
    "adamw8bit": Kind("bitsandbytes.optim:AdamW8bit", "bitsandbytes", state=(0, 2.05), rounds=True),
    "paged_adamw8bit": Kind("bitsandbytes.optim:PagedAdamW8bit", "bitsandbytes", state=(0, 2.05), rounds=True),
    "adamw_bf16": Kind(
        "sdxl_trainer.optim.fused:AdamW",
        arguments={"fused": True},
        state=(0, 4),
        sharded=True,
        rounds=True,
        narrow=("exp_avg", "exp_avg_sq"),
    ),
    # Factored second moments, no first (Shazeer & Stern 2018): almost no memory of its own.
    "adafactor": Kind(
        "sdxl_trainer.optim.adafactor:Adafactor", state=(0.02, 0), workspace=adafactor.workspace, rounds=True
    ),
    # Factored as well, with a first moment that is trusted as far as it is steady (Luo et al. 2023). Tensor by tensor:
    # over all at once it and lion would hold copies of all weights for a moment, and they are chosen for their memory.
    "came": Kind("pytorch_optimizer:CAME", "pytorch-optimizer", {"foreach": False}, (1.05, 0), _two, rounds=True),
    # The sign of a momentum (Chen et al. 2023).
    "lion": Kind("pytorch_optimizer:Lion", "pytorch-optimizer", {"foreach": False}, (1, 0), sharded=True, rounds=True),
    "muon": Kind("sdxl_trainer.optim.muon:Muon", state=(1, 0), workspace=muon.workspace, rounds=True),
    # Finds its rate by itself (Mishchenko & Defazio 2024), with the settings of the reference's scripts.
    "prodigy": Kind(
        "prodigyopt:Prodigy", "prodigyopt", {"use_bias_correction": True, "safeguard_warmup": True}, state=(4, 0)
    ),
    # Averages instead of lowering the rate (Defazio et al. 2024).
    "schedulefree": Kind("schedulefree:AdamWScheduleFree", "schedulefree", workspace=_all, sharded=True),
    "sgd": Kind("torch.optim:SGD", arguments={"fused": True}, state=(0, 0), sharded=True, rounds=True),
}


def make(
    groups: Sequence[Group],
    options: Optimizer,
    seed: int = 0,
    device: torch.device | None = None,
    sharded: bool = False,
) -> torch.optim.Optimizer:
    """An optimizer whose param_groups keep their rule's `base_lr`, for parameters that will be on `device`."""
    if options.name.startswith("paged") and (device is None or device.type != "cuda"):
        what = f"{options.name} pages between the memory of an NVIDIA GPU and the host's, and there is no such GPU"
        raise UserError(what, "optimizer.name", f"choose {options.name.removeprefix('paged_')}")
    kind = KINDS.get(options.name) or Kind(options.name, options.name.partition(":")[0].partition(".")[0])
    found = _class(kind)
    taken = inspect.signature(found).parameters
    if "weight_decay" not in taken and any(g.weight_decay != Optimizer().weight_decay for g in groups):
        what = f"{options.name} takes no 'weight_decay'"
        raise UserError(what, "optimizer.weight_decay", "remove it, here and in the rules under [[learn]]")
    described = [
        {"params": list(g.parameters), "names": g.names, "lr": g.learning_rate, "base_lr": g.learning_rate}
        | ({"weight_decay": g.weight_decay} if "weight_decay" in taken else {})
        for g in groups
    ]
    given = {"betas": options.betas, "eps": options.eps}
    own = {} if sharded and options.name == "sgd" else kind.arguments  # PyTorch has no fused SGD of shards
    arguments = own | {name: value for name, value in given.items() if value is not None}
    arguments |= {n: tuple(v) if isinstance(v, list) else v for n, v in options.arguments.items()}
    _refuse_unknown(arguments, taken, options)
    try:
        with redirect_stdout(StringIO()):  # prodigyopt prints
            made = _on_bf16(found, kind, groups, options, seed)(described, **arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        what = f"{options.name} cannot be made: {error}"
        raise UserError(what, "optimizer", "change the options under [optimizer]") from error
    if evaluates(made):
        made.train()
    return made


def _on_bf16(found: Any, kind: Kind, groups: Sequence[Group], options: Optimizer, seed: int) -> Any:
    """Where weights are bf16, the class with steps on fp32 masters or, where it can have them, rounded by chance."""
    narrow = {p.dtype for group in groups for p in group.parameters} == {torch.bfloat16}
    if kind.narrow and not narrow:
        raise ValueError("all learning tensors have to be bf16")
    if narrow and options.master:
        return masters.kept(found)
    return rounding.rounded(found, seed, kind.narrow) if kind.rounds and narrow else found


def refuse_sharded(options: Optimizer) -> None:
    """Refuse an optimizer that needs whole tensors where each process holds a shard of them."""
    able = sorted(name for name, kind in KINDS.items() if kind.sharded)
    if options.name not in able:
        what = f"{options.name} needs whole tensors, and sharding leaves each process a part of them"
        raise UserError(what, "optimizer.name", f"use {', '.join(able)}; or train without sharding (DDP)")


def refuse(options: Optimizer, train: Train, device: torch.device) -> None:
    """Refuse what cannot be made, or not be resumed, before hours are spent on what comes before it. A class that is
    not one of ours takes a step on a trial tensor."""
    trial = nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16 if train.weights == "bf16" else torch.float32))
    group = Group("", train.learning_rate, options.weight_decay, ("trial",), (trial,))
    made = make([group], options, device=device)
    if options.name in KINDS:
        return
    trial.grad = torch.ones_like(trial)
    try:
        made.step()
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        what = f"{options.name} cannot take a step: {error}"
        raise UserError(what, "optimizer.name", "choose another optimizer, or other arguments") from error
    refuse_unwritable(options.name, made.state[trial])


def refuse_unwritable(name: str, state: dict[str, Any]) -> None:
    """Refuse state that is neither tensors nor plain values: it could not be brought back from a checkpoint."""
    for key, value in state.items():
        if not isinstance(value, torch.Tensor | bool | int | float | str | None):
            what = f"{name} keeps '{key}' as {type(value).__name__}, which cannot be written to a checkpoint"
            raise UserError(what, "optimizer.name", "choose another optimizer")


def rounds(options: Optimizer) -> bool:
    """Whether it keeps small steps of bf16 weights."""
    return options.name in KINDS and KINDS[options.name].rounds


def state_bytes(options: Optimizer, weight: int) -> float:
    """Bytes of state per learning number whose weight has `weight` bytes; of an unknown optimizer as of AdamW."""
    kind = KINDS.get(options.name, Kind(""))
    copies, beside = kind.state
    momentum = options.name == "sgd" and bool(options.arguments.get("momentum"))
    return (copies + momentum) * (4 if kind.rounds else weight) + beside + 4 * options.master


def workspace_bytes(options: Optimizer, shapes: Sequence[torch.Size], weight: int, most: float = math.inf) -> float:
    """Bytes that a step holds for a moment beside weights, gradients and state, if it is of `most` numbers at once."""
    kind = KINDS.get(options.name, Kind(""))
    every = bool(options.arguments.get("foreach", False))
    own = min((_all if every else kind.workspace)(shapes), most)
    if kind.rounds and weight == 2:
        kinds = 1 if options.master else 2 + len(kind.narrow)
        return 4 * (own + rounding.copies(shapes, kinds, most))
    return weight * own


def _class(kind: Kind) -> Any:
    module, _, name = kind.place.partition(":")
    if kind.place not in {known.place for known in KINDS.values()}:
        _refuse_uninstalled(module)
    try:
        found = getattr(importlib.import_module(module), name)
    except ImportError as error:
        what = f"{kind.place} needs {kind.package}, which cannot be imported: {error}"
        fix = f"pip install {kind.package}, or choose another optimizer"
        raise UserError(what, "optimizer.name", fix) from None
    except AttributeError:
        names = [n for n, v in vars(importlib.import_module(module)).items() if _is_optimizer(v)]
        raise UserError(f"{module} has no '{name}'", "optimizer.name", closest(name, names)) from None
    if not _is_optimizer(found) or "lr" not in inspect.signature(found).parameters:
        what = f"{kind.place} is not an optimizer of PyTorch with a learning rate 'lr'"
        raise UserError(what, "optimizer.name", "name a subclass of torch.optim.Optimizer")
    return found


def _refuse_uninstalled(module: str) -> None:
    """A config may name what was installed, not make a file run that lies in some folder."""
    package = module.partition(".")[0]
    if package not in packages_distributions():
        what = f"{module} is not of an installed package, and importing it would run whatever it is"
        raise UserError(what, "optimizer.name", f"pip install {package}, or choose another optimizer")


def _is_optimizer(found: Any) -> bool:
    return inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)


def _refuse_unknown(arguments: dict[str, Any], taken: Any, options: Optimizer) -> None:
    """An argument that a class would swallow in **kwargs would have no effect."""
    known = [name for name, p in taken.items() if p.kind not in {p.VAR_KEYWORD, p.VAR_POSITIONAL}]
    for name in arguments:
        if name not in known:
            key = f"optimizer.arguments.{name}" if name in options.arguments else f"optimizer.{name}"
            raise UserError(f"{options.name} takes no '{name}'", key, closest(name, set(known) - {"params", "lr"}))


def evaluates(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the weights that it trains are others than those to be used (schedule-free)."""
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))


@contextmanager
def evaluating(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The model as it is to be used; the tensors that train are back afterwards, bit by bit."""
    if not evaluates(optimizer):
        yield
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    training = [p.detach().clone() for p in parameters]
    optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]
        with torch.no_grad():
            torch._foreach_copy_([sharding.local(p) for p in parameters], [sharding.local(t) for t in training])


def loaded(optimizer: torch.optim.Optimizer) -> None:
    """What has to be done after state was loaded: paged state is brought back into paged memory."""
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        for key in state.keys() & {"state1", "state2"}:
            buffer = optimizer.get_state_buffer(parameter, dtype=state[key].dtype)  # type: ignore[attr-defined]
            state[key] = buffer.copy_(state[key])
