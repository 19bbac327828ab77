"""A training step of the UNet with random weights and inputs, as `gpu.py` takes it, and what a GPU is asked for."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdxl_trainer import optim
from sdxl_trainer import unet as unets
from sdxl_trainer.config import Optimizer
from sdxl_trainer.parameters import Group

# Floating-point operations of a forward and backward pass for one picture at this many pixels, counted on SDXL.
OPERATIONS = {512: 4.714e12, 768: 10.871e12, 1024: 20.231e12}


@dataclass(frozen=True)
class Bench:
    device: torch.device
    config: dict[str, Any]
    sides: tuple[int, ...]
    samples: tuple[int, ...]
    steps: int
    ends: float

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, step: Callable[[], Any], warm: int = 3) -> list[float]:
        """Of each step, after some to warm up; stops early when time is up."""
        for _ in range(warm):
            step()
        found = []
        for _ in range(self.steps):
            self.wait()
            began = time.perf_counter()
            step()
            self.wait()
            found.append(time.perf_counter() - began)
            if time.monotonic() > self.ends:
                break
        return found

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0


def make_optimizer(model: Any, name: str, rate: float) -> Any:
    names, tensors = zip(*model.named_parameters(), strict=True)
    return optim.make([Group("", rate, 1e-2, names, tensors)], Optimizer(name=name), 0, tensors[0].device)


def make_unet(bench: Bench, dtype: torch.dtype, library: bool = False) -> Any:
    torch.manual_seed(0)
    with bench.device:
        if library:
            from diffusers import UNet2DConditionModel

            return UNet2DConditionModel.from_config(bench.config).train()
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return unets.UNet(bench.config).train()
        finally:
            torch.set_default_dtype(before)


def make_inputs(
    bench: Bench, side: int, samples: int, dtype: torch.dtype, seed: int = 0
) -> tuple[dict[str, Any], Tensor]:
    draw = torch.Generator(bench.device).manual_seed(seed)
    config, latent = bench.config, side // 8
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device=bench.device)

    added = {"text_embeds": normal(samples, pooled).to(dtype)}
    added["time_ids"] = torch.full((samples, 6), side, device=bench.device)
    given = {
        "sample": normal(samples, 4, latent, latent).to(dtype),
        "timestep": torch.randint(0, 1000, (samples,), generator=draw, device=bench.device),
        "encoder_hidden_states": normal(samples, 77, config["cross_attention_dim"]).to(dtype),
    }
    return {**given, "added_cond_kwargs": added, "return_dict": False}, normal(samples, 4, latent, latent)


def make_passes(model: Any, given: dict[str, Any], target: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.autocast(target.device.type, torch.bfloat16, enabled=dtype == torch.float32):
            prediction = model(**given)[0]
        loss = (prediction.float() - target).square().mean()
        loss.backward()
        return loss.detach()

    return run


def make_step(
    bench: Bench,
    model: Any,
    optimizer: Any,
    parameters: list[Any],
    side: int,
    samples: int,
    dtype: torch.dtype,
    reads: bool = False,
) -> Callable[[], None]:
    passes = make_passes(model, *make_inputs(bench, side, samples, dtype), dtype)

    def run() -> None:
        loss = passes()
        if reads:
            loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def figures(bench: Bench, seconds: list[float], side: int, samples: int) -> dict[str, Any]:
    median = statistics.median(seconds)
    found: dict[str, Any] = {"seconds": median, "spread": [min(seconds), max(seconds)], "steps": len(seconds)}
    found |= {"images_per_second": samples / median, "peak_bytes": bench.peak()}
    if side in OPERATIONS and bench.device.type == "cuda":
        found["operations_per_second"] = OPERATIONS[side] * samples / median
    return found
