"""How long a step of each optimizer takes, on the CPU and on gradients that are drawn; all alternate in one process.

    python benchmarks/optimizers.py [--size tiny] [--rounds 7] [--only adamw,muon]
    python benchmarks/optimizers.py --host [--only adamw,adafactor]

The UNet is one of `sdxl_trainer.blueprint`. `torch.optim.Muon` (matrices; the rest by fused AdamW) is there to compare
with ours. `--host`: as many tensors as SDXL's UNet has, of eight numbers each, in fp32 and in bf16. With nearly nothing
to compute, what is left is what a step asks of the host, for which a GPU waits where it has little to do.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import common
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from sdxl_trainer import blueprint, optim, parameters
from sdxl_trainer.config import OPTIMIZERS, Learn, Optimizer, Train
from sdxl_trainer.optim import KINDS

TENSORS = 1680  # of SDXL's UNet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="tiny", choices=sorted(blueprint.SIZES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default=",".join(n for n in OPTIMIZERS if not n.startswith("paged")))
    parser.add_argument("--host", action="store_true", help="what a step asks of the host")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.host:
        _host(options.only.split(","), options.rounds)
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


def _host(names: list[str], rounds: int) -> None:
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    steps = {}
    for name in names:
        for label, kind in kinds.items():
            if name in KINDS and KINDS[name].rounds and (name != "adamw_bf16" or label == "bf16"):
                module = nn.Module()
                module.many = nn.ParameterList(torch.randn(8, dtype=kind) for _ in range(TENSORS))
                steps[f"{name}, {label} weights"] = _step(module, name)
    print(f"{TENSORS:,} tensors, medians")
    for name, found in common.in_turn(steps, rounds).items():
        print(f"{name:28} {1e3 * statistics.median(found):8.1f} ms")


def _model(size: str, name: str) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Module()
    module.unet = UNet2DConditionModel.from_config(blueprint.configs(blueprint.SIZES[size])["unet"])
    return module.to(torch.bfloat16 if name == "adamw_bf16" else torch.float32)


def _step(module: nn.Module, name: str) -> Callable[[], None]:
    chosen = Optimizer(name=name)
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
