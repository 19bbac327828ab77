"""How long a run will take: from an earlier run in its folder, else from counted operations and a short measurement."""

import json
import time
from pathlib import Path
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from sdxl_trainer.base import Base
from sdxl_trainer.config import Config
from sdxl_trainer.memory import PASSES
from sdxl_trainer.model import SDXL

# What training reaches of the rate at which the device multiplies matrices. A rule of thumb: the rest is memory
# traffic, small kernels and waiting.
SHARE = 0.4
# Side of the matrices on a CPU, and elsewhere: products of small ones are over before a GPU is told of the next.
_SIDE, _LARGE, _SECONDS = 1024, 4096, 0.3


def estimate(
    config: Config, base: Base, sdxl: SDXL, samples: int, area: float, dtype: torch.dtype
) -> tuple[float, str]:
    """(seconds, what they are taken from) for so many samples of `area` latent cells on average. `sdxl` is the model
    without weights."""
    seen = _earlier(Path(config.output_dir).expanduser() / "metrics.jsonl")
    if seen is not None:
        return samples / seen, f"{seen:.3g} images/s of this folder's last steps"
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    rate = _matmul(device, dtype)
    wanted = flops(base, sdxl, area) * (PASSES + config.train.gradient_checkpointing)
    told = f"{wanted / 1e12:.3g} TFLOP per image at {SHARE:.0%} of {rate / 1e12:.3g} TFLOP/s measured here"
    return samples * wanted / (rate * SHARE), f"{told}: right within a factor of two or so"


def flops(base: Base, sdxl: SDXL, area: float) -> float:
    """Operations of one forward pass of the UNet on a square picture of `area` latent cells."""
    config = base.config("unet")
    side = max(8, round(area**0.5 / 8) * 8)
    width = sum(base.config(part)["hidden_size"] for part in base.encoders)
    numbers = 5 if base.refines else 6
    pooled = config["projection_class_embeddings_input_dim"] - numbers * config["addition_time_embed_dim"]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        noisy = torch.empty(1, config["in_channels"], side, side)
        text, ids = torch.empty(1, 77, width), torch.empty(1, numbers)
        conditions = {"text_embeds": torch.empty(1, pooled), "time_ids": ids}
        sdxl.unet(noisy, torch.empty(1), text, added_cond_kwargs=conditions)
    return counter.get_total_flops() * area / side**2


def _earlier(path: Path) -> float | None:
    """Images per second in the last rows of a run's metrics."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[-20:]]
        return float(median(row["samples_per_second"] for row in rows)) if rows else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _matmul(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of square matrix products."""
    side = _SIDE if device.type == "cpu" else _LARGE
    a = torch.ones(side, side, device=device, dtype=dtype)

    def run(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            a @ a
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - began

    run(1)
    times = max(1, round(_SECONDS / max(run(1), 1e-5)))
    return times * 2 * side**3 / run(times)
