"""What `gpu.py` measures: groups of rows, each a name and what is measured, or why it is not."""

import argparse
import gc
import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from gpu_drift import drift
from gpu_ladder import graphs, kernels, ladder
from gpu_step import (
    Bench,
    Measures,
    add_lora,
    figures,
    make_inputs,
    make_optimizer,
    make_passes,
    make_step,
    make_unet,
    update,
)
from gpu_whole import tests, whole
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdxl_trainer import model as models
from sdxl_trainer import narrow
from sdxl_trainer import unet as unets
from sdxl_trainer import vae as vaes
from sdxl_trainer.optim import backward

CONFIGS = Path(unets.__file__).parent / "assets" / "sdxl"
TINY = {"block_out_channels": [32, 64, 64], "attention_head_dim": [2, 4, 4], "transformer_layers_per_block": [1, 1, 1]}
TINY |= {"layers_per_block": 1, "norm_num_groups": 16}


# What compilers, drivers and libraries raise where they have not been tried. Anything else ends the process, and
# `gpu.py` begins another.
FAILURES = (RuntimeError, ImportError, OSError, ValueError, TypeError, AttributeError, AssertionError, LookupError)


def bench(options: argparse.Namespace) -> Bench:
    config = json.loads((CONFIGS / "unet" / "config.json").read_text(encoding="utf-8")) | (
        TINY if options.size == "tiny" else {}
    )
    sides, samples = (tuple(int(n) for n in text.split(",")) for text in (options.sides, options.samples))
    ends = time.monotonic() + 60 * options.minutes
    return Bench(torch.device(options.device), config, sides, samples, options.steps, ends, options.compiler)


def attempt(bench: Bench, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is measured, or that it does not fit or fails: the rest is worth its time. Nothing of it stays in memory."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    except (*FAILURES, subprocess.SubprocessError) as error:
        return {"failed": f"{type(error).__name__}: {error}"[:500]}
    finally:
        gc.collect()  # models too that something holds in a circle
        if bench.device.type == "cuda":
            with suppress(RuntimeError):  # of a device that is broken
                torch.cuda.empty_cache()


def is_broken(bench: Bench) -> bool:
    """Whether an error has left the device in a state that nothing in this process can use any more."""
    try:
        bench.wait()
    except RuntimeError:
        return True
    return False


def device(bench: Bench) -> dict[str, Any]:
    if bench.device.type != "cuda":
        return {"name": bench.device.type}
    facts, cudnn = torch.cuda.get_device_properties(0), torch.backends.cudnn.version()
    return {"name": facts.name, "bytes": facts.total_memory, "cuda": torch.version.cuda, "cudnn": cudnn}


def limits(bench: Bench) -> Measures:
    """Matrix products, copies, convolutions: what other figures are set against."""
    large, size = bench.large, 8192 if bench.large else 256

    def product() -> dict[str, Any]:
        a, b = (torch.randn(size, size, device=bench.device).bfloat16() for _ in range(2))
        return {"operations_per_second": 2 * size**3 / min(bench.seconds(lambda: a @ b))}

    def copy() -> dict[str, Any]:
        source = torch.empty(1 << (32 if large else 20), dtype=torch.uint8, device=bench.device)
        target = torch.empty_like(source)
        return {"bytes_per_second": 2 * source.numel() / min(bench.seconds(lambda: target.copy_(source)))}

    def convolution(layout: torch.memory_format) -> dict[str, Any]:
        layer = nn.Conv2d(320, 320, 3, padding=1, device=bench.device, dtype=torch.bfloat16).to(memory_format=layout)
        x = torch.randn(4, 320, 128 if large else 8, 128 if large else 8, device=bench.device).bfloat16()
        x = x.contiguous(memory_format=layout)
        work = 2 * 9 * 320 * x.numel()
        return {"operations_per_second": work / min(bench.seconds(lambda: layer(x)))}

    yield "bf16 product", product
    yield "copy", copy
    yield "convolution, channels first", lambda: convolution(torch.contiguous_format)
    yield "convolution, channels last", lambda: convolution(torch.channels_last)


def attention(bench: Bench) -> Measures:
    """Each of PyTorch's kernels on SDXL's shapes: speed forward and backward, and how far it is from fp32."""
    # Heads, places, and what they look at: themselves in a square and in a picture of another shape, and the text.
    places = ((10, 4096, 4096), (20, 1024, 1024), (20, 988, 988), (10, 3952, 77)) if bench.large else ((2, 64, 64),)
    kinds = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)

    def measure(heads: int, length: int, seen: int, kind: SDPBackend) -> dict[str, Any]:
        draw = torch.Generator(bench.device).manual_seed(0)
        shapes = [(4, heads, n, 64) for n in (length, seen, seen, length)]
        q, k, v, up = (torch.randn(shape, generator=draw, device=bench.device) for shape in shapes)
        exact = _attended(F.scaled_dot_product_attention, (q, k, v), up)
        narrow = tuple(t.bfloat16() for t in (q, k, v))
        try:
            with sdpa_kernel(kind):
                found = _attended(F.scaled_dot_product_attention, narrow, up.bfloat16())
                seconds = bench.seconds(lambda: _attended(F.scaled_dot_product_attention, narrow, up.bfloat16()))
        except RuntimeError as error:
            return {"not_here": str(error).splitlines()[0][:120]}
        off = [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
        work = 3.5 * 4 * 4 * heads * length * seen * 64
        return {
            "operations_per_second": work / statistics.median(seconds),
            "off": off,
            "finite": common.largest(off) < 0.02,
        }

    for place in places:
        heads, length, seen = place
        for kind in kinds:
            name = f"{kind.name.lower()}, {heads} heads, {length} x {seen}"
            yield name, lambda p=place, k=kind: measure(*p, k)


def _attended(function: Any, inputs: Any, up: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    out.backward(up)
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def full(bench: Bench) -> Measures:
    """Full fine-tuning: ours in bf16, with fp32 masters or rounded by chance, ours in fp32 under autocast, the loop of
    the reference, and that around our UNet."""
    least: dict[tuple[str, int], float] = {}  # what did not fit, of which no more has to be tried

    def measure(name: str, side: int, samples: int) -> dict[str, Any]:
        if samples >= least.get((name, side), math.inf):
            return {"out_of_memory": True}
        try:
            return _full(bench, name, side, samples)
        except torch.OutOfMemoryError:
            least[name, side] = samples
            raise

    for samples in bench.samples:
        for side in bench.sides:
            for name, needs in LOOPS.items():
                key, always = f"{name}, {side} px, batch {samples}", name.startswith("ours bf16") or name == "reference"
                if lacks := [package for package in needs if not find_spec(package)]:
                    yield key, f"no {lacks[0]}"
                elif always or samples in bench.samples[:2]:
                    yield key, lambda n=name, s=side, b=samples: measure(n, s, b)


# Of `full`, and the packages that they need.
LOOPS: dict[str, tuple[str, ...]] = {
    "ours bf16": (),
    "ours bf16, by chance": (),
    "reference": ("diffusers",),
    "ours fp32": (),
    "reference, 8-bit AdamW": ("diffusers", "bitsandbytes"),
    "reference's loop, our UNet": (),
}


def _full(bench: Bench, name: str, side: int, samples: int) -> dict[str, Any]:
    dtype, ours = torch.bfloat16 if name.startswith("ours bf16") else torch.float32, name.startswith("ours")
    model = make_unet(bench, dtype, library=name.startswith("reference") and not name.endswith("our UNet"))
    parameters = list(model.parameters())
    if ours:
        own = "adamw_bf16" if name.endswith("by chance") else "adamw"
        optimizer = make_optimizer(model, own, 1e-6, master=name == "ours bf16")
    elif name.endswith("8-bit AdamW"):
        from bitsandbytes.optim import AdamW8bit

        optimizer = AdamW8bit(parameters, lr=1e-6)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    step = make_step(bench, model, optimizer, parameters, side, samples, dtype, reads=not ours)
    return figures(bench, bench.seconds(step), side, samples)


def gate(bench: Bench) -> Measures:
    """Losses of the first steps from the same weights on the same inputs: a faster wrong answer would not count."""

    def measure(side: int) -> dict[str, Any]:
        torch.manual_seed(0)
        weights = {name: t.detach().cpu() for name, t in make_unet(bench, torch.float32).state_dict().items()}
        losses = {name: _losses(bench, name, weights, side) for name in ("reference", *GATED)}
        expected = losses["reference"]
        off = {
            name: common.largest([abs(a - b) / b for a, b in zip(found, expected, strict=True)])
            for name, found in losses.items()
        }
        return {"losses": losses, "off": off}

    side = bench.sides[-1]
    yield f"{side} px", (lambda: measure(side)) if find_spec("diffusers") else "no diffusers"


# Of `gate`: the optimizer, and whether it steps on masters.
GATED = {"ours fp32": ("adamw", False), "ours bf16": ("adamw", True), "ours bf16, by chance": ("adamw_bf16", False)}


def _losses(bench: Bench, name: str, weights: dict[str, Tensor], side: int) -> list[float]:
    dtype = torch.bfloat16 if name.startswith("ours bf16") else torch.float32
    model = make_unet(bench, dtype, library=name == "reference")
    model.load_state_dict(weights)
    parameters, samples = list(model.parameters()), 4 if bench.large else 1
    if name in GATED:
        optimizer = make_optimizer(model, GATED[name][0], 1e-5, GATED[name][1])
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=1e-2)
    losses = []
    for number in range(20 if bench.large else 3):
        passes = make_passes(model, *make_inputs(bench, side, samples, dtype, seed=number), dtype)
        losses.append(passes())
        if name in GATED:
            update(optimizer, parameters)
            continue
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses).tolist()


def low_memory(bench: Bench) -> Measures:
    """One picture at the first side: what each step down takes, and its speed."""
    narrow, wide = torch.bfloat16, torch.float32
    levels = {
        "bf16, Adafactor, fused backward": ("adafactor", narrow, 1.0, True),
        "bf16, Adafactor": ("adafactor", narrow, 1.0, False),
        "bf16, AdamW": ("adamw_bf16", narrow, 1.0, False),
        "bf16, AdamW, half of the blocks": ("adamw_bf16", narrow, 0.5, False),
        "bf16, AdamW, nothing computed again": ("adamw_bf16", narrow, 0.0, False),
        "fp32, AdamW": ("adamw", wide, 1.0, False),
        "fp32, Adafactor, fused backward": ("adafactor", wide, 1.0, True),
    }

    def measure(name: str, dtype: torch.dtype, share: float, fused: bool) -> dict[str, Any]:
        model, side = make_unet(bench, dtype), bench.sides[0]
        model.enable_gradient_checkpointing(share)
        optimizer, parameters = make_optimizer(model, name, 1e-6), list(model.parameters())
        step = make_step(bench, model, optimizer, parameters, side, 1, dtype)
        if fused:
            passes = make_passes(model, *make_inputs(bench, side, 1, dtype), dtype)

            def step() -> None:
                _, norm = backward.norm(parameters, passes)
                if bool(torch.isfinite(norm)):
                    backward.step(optimizer, parameters, norm, 1.0, passes)

        return figures(bench, bench.seconds(step), side, 1)

    for label, level in levels.items():
        yield label, lambda chosen=level: measure(*chosen)


def adapter(bench: Bench) -> Measures:
    """LoRA of rank 16 on all attention layers, the base in each of the types it may be kept in."""

    def measure(kind: str, samples: int, share: float) -> dict[str, Any]:
        model = make_unet(bench, torch.float32).requires_grad_(False)
        sdxl = models.SDXL(model)
        narrow.pack(sdxl, kind, torch.bfloat16)
        layers = add_lora(model, 16)
        parameters = [p for p in model.parameters() if p.requires_grad]
        model.enable_gradient_checkpointing(share)
        optimizer = make_optimizer(model, "adamw", 1e-4)

        def call(**given: Any) -> Any:
            with sdxl.saving():
                return model(**given)

        step = make_step(bench, call, optimizer, parameters, bench.sides[0], samples, torch.float32)
        return {**figures(bench, bench.seconds(step), bench.sides[0], samples), "layers": layers}

    for kind, share, samples in (
        ("fp8", 1.0, 1), ("bf16", 1.0, 1), ("bf16", 0.0, 1), ("fp8", 0.0, 1), ("int8", 1.0, 1), ("nf4", 1.0, 1),
        ("bf16", 0.0, 4), ("bf16", 1.0, 4),
    ):  # fmt: skip
        name = f"{kind} base, batch {samples}" + (", checkpointing" if share else "")
        lacks = kind == "nf4" and not find_spec("bitsandbytes")
        yield name, "no bitsandbytes" if lacks else lambda k=kind, b=samples, s=share: measure(k, b, s)


def vae(bench: Bench) -> Measures:
    """Encoding pictures, and how far bf16 is from fp32 in parts of the posterior's deviation."""
    config = json.loads((CONFIGS / "vae" / "config.json").read_text(encoding="utf-8"))
    config |= {} if bench.large else {"block_out_channels": [32, 32, 32, 32]}

    @torch.no_grad()
    def measure(side: int, samples: int, dtype: torch.dtype) -> dict[str, Any]:
        torch.manual_seed(0)
        with bench.device:
            encoder, pixels = vaes.Encoder(config), torch.rand(samples, 3, side, side) * 2 - 1
        exact = encoder.encode(pixels[:1]).latent_dist
        encoder.to(dtype)
        pixels = pixels.to(dtype)
        found = encoder.encode(pixels[:1]).latent_dist
        off = float((found.mean.float() - exact.mean).square().mean().sqrt() / exact.std.mean())
        seconds = statistics.median(bench.seconds(lambda: encoder.encode(pixels).latent_dist.mean))
        return {"images_per_second": samples / seconds, "peak_bytes": bench.peak(), "off": off}

    for side in bench.sides:
        for dtype in (torch.bfloat16, torch.float32):
            name, samples = str(dtype).removeprefix("torch."), 8 if side <= 512 else 4
            yield f"{name}, {side} px, batch {samples}", lambda s=side, b=samples, t=dtype: measure(s, b, t)


BENCHMARKS: dict[str, Callable[[Bench], Measures]] = {
    "limits": limits,
    "full": full,
    "gate": gate,
    "low_memory": low_memory,
    "adapter": adapter,
    "kernels": kernels,
    "ladder": ladder,
    "drift": drift,
    "vae": vae,
    "graphs": graphs,
    "attention": attention,
    "tests": tests,
    "whole": whole,
}
