"""An optimizer's whole state as named tensors and numbers, and back: nothing is pickled."""

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sdxl_trainer import optim, sharding
from sdxl_trainer.errors import UserError
from sdxl_trainer.optim import rounding
from sdxl_trainer.parameters import Group

# Key of the tensor that trains, of an optimizer that shows others for use.
TRAINING = "training"


def _entries(optimizer: torch.optim.Optimizer, groups: Sequence[Group]) -> Iterator[tuple[str, str, Any]]:
    """(owner, key, value) of all state: of each parameter by its name, of each group as #<number>.

    What a group holds under a name that the optimizer's constructor does not take is state that the optimizer
    keeps there (prodigy's d, schedule-free's sums); the rest comes from the config.
    """
    configured = {*inspect.signature(type(optimizer)).parameters, "params", "names", "lr", "base_lr", "weight_decay"}
    for number, (group, members) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        yield from ((f"#{number}", key, value) for key, value in members.items() if key not in configured)
        for name, parameter in zip(group.names, group.parameters, strict=True):
            yield from ((name, key, value) for key, value in optimizer.state.get(parameter, {}).items())
            if optim.evaluates(optimizer):
                yield name, TRAINING, parameter.detach()


def tensors(optimizer: torch.optim.Optimizer, groups: Sequence[Group]) -> dict[str, Tensor]:
    """All tensors of the state, as <owner>|<key>."""
    seen: set[int] = set()
    found = {}
    for owner, key, value in _entries(optimizer, groups):
        if isinstance(value, Tensor):
            # 8-bit optimizers share their quantisation map among parameters; a file may not.
            place = sharding.local(value).data_ptr()
            found[f"{owner}|{key}"] = value.clone() if place in seen else value.contiguous()
            seen.add(place)
    return found


def scalars(optimizer: torch.optim.Optimizer, groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """All numbers of the state by owner and key. State of other kinds is an error."""
    found: dict[str, dict[str, Any]] = {}
    for owner, key, value in _entries(optimizer, groups):
        optim.refuse_unwritable(type(optimizer).__name__, {key: value})
        if not isinstance(value, Tensor):
            found.setdefault(owner, {})[key] = value
    return found


def load(
    optimizer: torch.optim.Optimizer, groups: Sequence[Group], path: Path, numbers: dict[str, dict[str, Any]]
) -> None:
    """Bring back what `tensors` and `scalars` gave, in the types that it had; the optimizer decides on devices."""
    position = {name: index for index, name in enumerate(name for group in groups for name in group.names)}
    owners = {**position, **{f"#{number}": -1 - number for number in range(len(groups))}}
    found: dict[int, dict[str, Any]] = {owners[owner]: dict(values) for owner, values in numbers.items()}
    with safe_open(path, framework="pt") as file:
        for entry in file.keys():
            owner, _, key = entry.rpartition("|")
            found.setdefault(owners[owner], {})[key] = file.get_tensor(entry)
    if getattr(optimizer, "rounds", False) and any(rounding.STEPS not in found[index] for index in found if index >= 0):
        what = "its optimizer's state is of a version that rounded bf16 weights otherwise"
        raise UserError(what, str(path), "continue it with that version, or begin a new run from its weights")
    training = [found.get(index, {}).pop(TRAINING, None) for index in position.values()]
    described = optimizer.state_dict()["param_groups"]
    described = [group | found.pop(-1 - number, {}) for number, group in enumerate(described)]
    optimizer.load_state_dict({"state": found, "param_groups": described})
    parameters = [p for group in groups for p in group.parameters]
    for index, values in found.items():
        state = optimizer.state[parameters[index]]
        # PyTorch gives state the parameter's type; some optimizers keep it in another.
        given = {key: sharding.like(v, parameters[index]) for key, v in values.items() if isinstance(v, Tensor)}
        state |= {key: v.to(state[key].device) for key, v in given.items()}
    optim.loaded(optimizer)
    with torch.no_grad():
        for parameter, value in zip(parameters, training, strict=True):
            if value is not None:
                parameter.copy_(sharding.like(value, parameter))
