"""A training step of the UNet with random weights and inputs, as `gpu.py` takes it, and what a GPU is asked for."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from sdxl_trainer import optim
from sdxl_trainer import unet as unets
from sdxl_trainer.config import Optimizer
from sdxl_trainer.parameters import Group

# After so many seconds a row has enough with three steps.
ROW_SECONDS = 12.0
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
    compiler: str = "inductor"

    @property
    def large(self) -> bool:
        """Whether it measures what a GPU is for, or only runs, in tests."""
        return max(self.sides) >= 512

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, step: Callable[[], Any], warm: int = 3) -> list[float]:
        """Of each step, after some to warm up. Steps that take long are fewer of both; none begins when time is up.
        The peak of memory is theirs, not that of what was made before."""
        began = time.monotonic()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for number in range(warm):
            step()
            self.wait()
            if number and time.monotonic() - began > ROW_SECONDS / 3:
                break
        found: list[float] = []
        while len(found) < self.steps:
            self.wait()
            start = time.perf_counter()
            step()
            self.wait()
            found.append(time.perf_counter() - start)
            spent = time.monotonic() - began
            if time.monotonic() > self.ends or (len(found) >= 3 and spent > ROW_SECONDS):
                break
        return found

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0


# Rows: what is measured, or why it is not.
Measures = Iterator[tuple[str, Callable[[], dict[str, Any]] | str]]


def make_optimizer(model: Any, name: str, rate: float, master: bool = False) -> Any:
    names, tensors = zip(*model.named_parameters(), strict=True)
    return optim.make(
        [Group("", rate, 1e-2, names, tensors)], Optimizer(name=name, master=master), 0, tensors[0].device
    )


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


def make_passes(
    model: Any, given: dict[str, Any], target: Tensor, dtype: torch.dtype, cached: bool = False
) -> Callable[[], Tensor]:
    """Under autocast where the weights are fp32, which may keep what it cast."""

    def run() -> Tensor:
        kind, on = target.device.type, dtype == torch.float32
        with torch.autocast(kind, torch.bfloat16, enabled=on, cache_enabled=cached):
            prediction = model(**given)[0]
        loss = (prediction.float() - target).square().mean()
        loss.backward()
        return loss.detach()

    return run


class Lora(nn.Module):
    """What peft makes of a linear layer, for machines without it: the same products in the same types."""

    def __init__(self, base_layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base_layer, device = base_layer, base_layer.weight.device
        self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False, device=device)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def add_lora(model: Any, rank: int) -> str:
    """Adapters beside all attention layers of a frozen model, in fp32; says whose layers they are."""
    if find_spec("peft"):
        from peft import LoraConfig, inject_adapter_in_model

        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), model)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data = parameter.data.float()
        return "peft's"
    for name, layer in list(model.named_modules()):
        if name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0")):
            model.set_submodule(name, Lora(layer, rank))
    return "like peft's"


def update(optimizer: Any, parameters: list[Any]) -> None:
    """As `train.train_step` does it: clipped by the norm of all gradients, in the kernel where that can, and none that
    is not finite."""
    norm = optim.clip(optimizer, parameters, 1.0)
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = (~torch.isfinite(norm)).float()
        optimizer.step()
    elif bool(torch.isfinite(norm)):
        optimizer.step()
    optimizer.zero_grad()


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
    """Our step, or that of the reference, which reads the loss."""
    passes = make_passes(model, *make_inputs(bench, side, samples, dtype), dtype, cached=reads)

    def run() -> None:
        loss = passes()
        if not reads:
            update(optimizer, parameters)
            return
        loss.item()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def figures(bench: Bench, seconds: list[float], side: int, samples: int) -> dict[str, Any]:
    median = statistics.median(seconds)
    found: dict[str, Any] = {"seconds": median, "spread": [min(seconds), max(seconds)], "steps": len(seconds)}
    found |= {"images_per_second": samples / median, "peak_bytes": bench.peak()}
    if bench.device.type == "cuda":  # with what the allocator holds, and CUDA and its libraries for themselves
        free, every = torch.cuda.mem_get_info()
        found["card_bytes"] = every - free
    if side in OPERATIONS and bench.device.type == "cuda":
        found["operations_per_second"] = OPERATIONS[side] * samples / median
    return found
