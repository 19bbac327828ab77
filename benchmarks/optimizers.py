"""How long a step of each optimizer takes, on the CPU and on gradients that are drawn; all alternate in one process.

    python benchmarks/optimizers.py [--size tiny] [--rounds 7] [--only adamw,muon]
    python benchmarks/optimizers.py --host [--only adamw,adafactor]
    python benchmarks/optimizers.py --traffic [--only adamw,adafactor]

The UNet is one of `sdxl_trainer.blueprint`. `torch.optim.Muon` (matrices; the rest by fused AdamW) is there to compare
with ours. `--host`: as many tensors as SDXL's UNet has, of eight numbers each, in fp32 and in bf16. With nearly nothing
to compute, what is left is what a step asks of the host, for which a GPU waits where it has little to do. `--traffic`:
bytes that a step reads and writes for each number that learns, the norm of all gradients included, counted at each
operation: on a GPU, whose caches are far smaller, that is its time.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import common
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdxl_trainer import blueprint, optim, parameters
from sdxl_trainer.config import OPTIMIZERS, Learn, Optimizer, Train
from sdxl_trainer.optim import KINDS, clipping

TENSORS = 1680  # of SDXL's UNet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="tiny", choices=sorted(blueprint.SIZES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default=",".join(n for n in OPTIMIZERS if not n.startswith("paged")))
    parser.add_argument("--host", action="store_true", help="what a step asks of the host")
    parser.add_argument("--traffic", action="store_true", help="bytes that a step moves")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.host:
        _host(options.only.split(","), options.rounds)
        return
    if options.traffic:
        _traffic(options.only.split(","))
        return
    steps = {name: _step(_model(options.size, name), name) for name in options.only.split(",")}
    steps["torch.optim.Muon"] = _theirs(_model(options.size, "adamw"))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # makes the state
    for _ in range(options.rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    print(f"{sum(p.numel() for p in _model(options.size, 'adamw').parameters()):,} parameters, medians")
    for name, found in seconds.items():
        print(f"{name:20} {1e3 * statistics.median(found):8.1f} ms")


def _kinds(names: list[str]) -> dict[str, tuple[str, torch.dtype, bool]]:
    """Optimizer, type of the weights and whether there are masters, by what they are called."""
    found = {}
    for name in names:
        if name in KINDS and KINDS[name].rounds:
            if name != "adamw_bf16":
                found[f"{name}, fp32 weights"] = (name, torch.float32, False)
                found[f"{name}, bf16 weights, masters"] = (name, torch.bfloat16, True)
            found[f"{name}, bf16 weights"] = (name, torch.bfloat16, False)
    return found


def _host(names: list[str], rounds: int) -> None:
    steps = {}
    for label, (name, kind, master) in _kinds(names).items():
        module = nn.Module()
        module.many = nn.ParameterList(torch.randn(8, dtype=kind) for _ in range(TENSORS))
        steps[label] = _step(module, name, master)
    print(f"{TENSORS:,} tensors, medians")
    for name, found in common.in_turn(steps, rounds).items():
        print(f"{name:36} {1e3 * statistics.median(found):8.1f} ms")


def _traffic(names: list[str]) -> None:
    print("bytes moved for each number")
    for label, (name, kind, master) in _kinds(names).items():
        weight = nn.Parameter(torch.randn(1000, 1000).to(kind))
        chosen = Optimizer(name=name, master=master)
        made = optim.make([parameters.Group("", 1e-4, 1e-2, ("weight",), (weight,))], chosen)
        for _ in range(2):  # the first makes the state
            weight.grad = torch.randn_like(weight)
            with Moved() as moved:
                clipping.shorten(made, [weight], 1.0, torch.tensor(2.0))
                made.step()
        norm = weight.element_size()  # on a GPU one kernel reads all gradients for it
        print(f"{label:36} {moved.bytes / weight.numel() + norm:8.1f}")


class Moved(TorchDispatchMode):
    """Counts the bytes that operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if function.is_view:
            return found
        name = function.overloadpacket.__name__
        given = [*zip(function._schema.arguments, args, strict=False)]
        for argument, value in given:
            written = argument.alias_info is not None and argument.alias_info.is_write
            only_written = written and name in {"copy_", "_foreach_copy_", "random_", "zero_", "fill_"}
            self.bytes += (written + (not only_written)) * _size(value)
        known = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, Tensor)}
        new = [t for t in tree_leaves(found) if isinstance(t, Tensor) and t.untyped_storage()._cdata not in known]
        self.bytes += 0 if name.startswith(("empty", "new_empty")) else _size(new)
        return found


def _size(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(value) if isinstance(t, Tensor))


def _model(size: str, name: str) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Module()
    module.unet = UNet2DConditionModel.from_config(blueprint.configs(blueprint.SIZES[size])["unet"])
    return module.to(torch.bfloat16 if name == "adamw_bf16" else torch.float32)


def _step(module: nn.Module, name: str, master: bool = False) -> Callable[[], None]:
    chosen = Optimizer(name=name, master=master)
    groups = parameters.apply_rules(module, (Learn(match=".*"),), Train(steps=1, learning_rate=1e-4), chosen)
    made = optim.make(groups, chosen)
    gradients = {p: 1e-3 * torch.randn_like(p) for group in groups for p in group.parameters}

    def step() -> None:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient.clone()  # schedule-free divides them in place
        made.step()

    return step


def _theirs(module: nn.Module) -> Callable[[], None]:
    matrices = [p for p in module.parameters() if p.ndim == 2]
    rest = [p for p in module.parameters() if p.ndim != 2]
    pair = (torch.optim.Muon(matrices, lr=1e-4), torch.optim.AdamW(rest, lr=1e-4, fused=True))
    for parameter in module.parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)

    def step() -> None:
        for optimizer in pair:
            optimizer.step()

    return step


if __name__ == "__main__":
    main()
