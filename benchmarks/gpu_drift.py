"""Losses of the UNet over some hundred steps, for each way to keep weights and moments. `gpu.py` starts some at once,
each in a process of its own, since a step on one picture asks more of the host than of the device:

    python benchmarks/gpu_drift.py 500 LEVEL --minutes 2 [options of gpu.py]

All learn to tell the noise that was added to the same eight random pictures, the same in each step.
"""

import json
import math
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from typing import Any

import torch
from gpu_step import Bench, Measures, make_inputs, make_optimizer, make_passes, make_unet, update
from torch import Tensor

STEPS, SECONDS = 500, 150
# What is compared with the first of each: optimizer, weights, and whether it steps on masters.
LEVELS: dict[str, dict[str, tuple[str, torch.dtype, bool]]] = {
    "AdamW": {
        "fp32": ("adamw", torch.float32, False),
        "bf16": ("adamw", torch.bfloat16, True),
        "bf16, by chance": ("adamw_bf16", torch.bfloat16, False),
    },
    "Adafactor": {
        "fp32, Adafactor": ("adafactor", torch.float32, False),
        "bf16, Adafactor": ("adafactor", torch.bfloat16, False),
    },
    "8 bits": {
        "fp32, 8-bit AdamW": ("adamw8bit", torch.float32, False),
        "bf16, 8-bit AdamW": ("adamw8bit", torch.bfloat16, False),
    },
}
# Adafactor's is relative to each tensor.
RATES = {"adamw": 1e-5, "adamw_bf16": 1e-5, "adamw8bit": 1e-5, "adafactor": 1e-3}
PICTURES = 8


def drift(bench: Bench) -> Measures:
    """How far low-memory levels part from fp32 weights."""
    steps = STEPS if bench.large else 6
    for name, levels in LEVELS.items():
        lacks = name == "8 bits" and not find_spec("bitsandbytes")
        yield name, "no bitsandbytes" if lacks else lambda chosen=[*levels]: _together(bench, chosen, steps)


def _together(bench: Bench, levels: list[str], steps: int) -> dict[str, Any]:
    seconds = min(SECONDS, bench.ends - time.monotonic())
    options = ["--device", bench.device.type, "--size", "sdxl" if bench.large else "tiny"]
    options += ["--sides", str(bench.sides[-1]), "--minutes", f"{seconds / 60:.4f}"]
    command = [sys.executable, __file__, str(steps)]
    started = {
        name: subprocess.Popen([*command, name, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name in levels
    }
    losses = {}
    try:
        for name, process in started.items():
            said, told = process.communicate(timeout=seconds + 30)
            if process.returncode:
                raise RuntimeError(f"{name}: {told[-400:]}")
            losses[name] = json.loads(said.splitlines()[-1])
    finally:
        for process in started.values():
            process.kill()
    return compared(losses)


def compared(losses: dict[str, list[float]]) -> dict[str, Any]:
    """Means of the first and the last fifth of as many steps as all have taken, and how far the last ones are from
    those of the first level: `apart`, in standard errors of its mean."""
    count = min(len(each) for each in losses.values())
    fifth = max(count // 5, 2)
    last = {name: each[count - fifth : count] for name, each in losses.items()}
    exact = next(iter(last.values()))
    error = statistics.stdev(exact) / math.sqrt(fifth)
    rows = {
        name: {
            "first": statistics.mean(losses[name][:fifth]),
            "last": statistics.mean(each),
            "apart": abs(statistics.mean(each) - statistics.mean(exact)) / error,
            "curve": [round(statistics.mean(losses[name][i : i + fifth]), 5) for i in range(0, count - 1, fifth)],
        }
        for name, each in last.items()
    }
    return {"steps": count, "levels": rows}


def learned(bench: Bench, level: str, steps: int) -> list[float]:
    """The loss of each step, of as many as there is time for."""
    optimizer_name, dtype, master = next(levels[level] for levels in LEVELS.values() if level in levels)
    model = make_unet(bench, torch.float32).to(dtype)  # of the same numbers for all
    parameters = list(model.parameters())
    optimizer = make_optimizer(model, optimizer_name, RATES[optimizer_name], master)
    pictures = [make_inputs(bench, bench.sides[-1], 1, dtype, seed)[0] for seed in range(PICTURES)]
    losses: list[Tensor] = []
    for number in range(steps):
        if time.monotonic() > bench.ends:
            break
        given = pictures[number % PICTURES]
        draw = torch.Generator(bench.device).manual_seed(PICTURES + number)
        noise = torch.randn(given["sample"].shape, generator=draw, device=bench.device)
        timestep = torch.randint(0, 1000, (1,), generator=draw, device=bench.device)
        angle = (timestep + 0.5) / 1000 * (math.pi / 2)
        noisy = (angle.cos() * given["sample"].float() + angle.sin() * noise).to(dtype)
        losses.append(make_passes(model, {**given, "sample": noisy, "timestep": timestep}, noise, dtype)())
        update(optimizer, parameters)
    return torch.stack(losses).tolist()


def main() -> None:
    import gpu
    import gpu_rows

    steps, level, *options = sys.argv[1:]
    print(json.dumps(learned(gpu_rows.bench(gpu.parse(options)), level, int(steps))))


if __name__ == "__main__":
    main()
