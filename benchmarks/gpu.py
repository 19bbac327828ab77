"""Full-size SDXL on one GPU, in ten minutes: images per second, share of the measured limits, memory, numerics.

    python benchmarks/gpu.py [--minutes 9] [--only limits,full,...]
    python benchmarks/gpu.py --device cpu --size tiny --sides 64 --samples 2 --steps 2     what the tests run

It needs torch, numpy, safetensors and pydantic; with diffusers it also measures the library's UNet in the loop of the
reference script (fp32 weights under autocast, AdamW as PyTorch makes it, the norm clipped and the loss read every
step; its data pipeline is left out, in its favour), with peft also adapters. Weights and inputs are random. Each
figure is written as soon as it is there, and what no time is left for is named.
"""

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from gpu_step import Bench, figures, make_inputs, make_optimizer, make_passes, make_step, make_unet
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdxl_trainer import unet as unets
from sdxl_trainer.optim import backward

CONFIG = Path(unets.__file__).parent / "assets" / "sdxl" / "unet" / "config.json"
TINY = {"block_out_channels": [32, 64, 64], "attention_head_dim": [2, 4, 4], "transformer_layers_per_block": [1, 1, 1]}
TINY |= {"layers_per_block": 1, "norm_num_groups": 16}
# What compilers, drivers and libraries raise where they have not been tried.
FAILURES = (RuntimeError, ImportError, OSError, ValueError, TypeError, AttributeError)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", default="sdxl", choices=["sdxl", "tiny"])
    parser.add_argument("--sides", default="1024,512", help="pixels")
    parser.add_argument("--samples", default="1,4,8,16", help="batches to try")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", default=",".join(BENCHMARKS), help="some of " + ", ".join(BENCHMARKS))
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="folder")
    options = parser.parse_args()
    config = json.loads(CONFIG.read_text(encoding="utf-8")) | (TINY if options.size == "tiny" else {})
    sides, samples = (tuple(int(n) for n in text.split(",")) for text in (options.sides, options.samples))
    ends = time.monotonic() + 60 * options.minutes
    bench = Bench(torch.device(options.device), config, sides, samples, options.steps, ends)
    result: dict[str, Any] = {"device": _device(bench), "size": options.size, "left_out": []}
    for name in options.only.split(","):
        for key, measure in BENCHMARKS[name](bench):
            if time.monotonic() > ends:
                result["left_out"].append(f"{name}: {key}")
                continue
            found = _attempt(bench, measure)
            result.setdefault(name, {})[key] = found
            print(f"{name}: {key}: {json.dumps(found)}", flush=True)
            common.write("gpu", result, options.results)


def _attempt(bench: Bench, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is measured, or that it does not fit or fails: the rest is worth its time. Nothing of it stays in memory."""
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        return measure()
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    except FAILURES as error:
        return {"failed": f"{type(error).__name__}: {error}"[:500]}
    finally:
        gc.collect()  # models too that something holds in a circle
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def _device(bench: Bench) -> dict[str, Any]:
    if bench.device.type != "cuda":
        return {"name": bench.device.type}
    facts, cudnn = torch.cuda.get_device_properties(0), torch.backends.cudnn.version()
    return {"name": facts.name, "bytes": facts.total_memory, "cuda": torch.version.cuda, "cudnn": cudnn}


Measures = Iterator[tuple[str, Callable[[], dict[str, Any]]]]


def limits(bench: Bench) -> Measures:
    """Matrix products, copies, convolutions: what other figures are set against."""
    large, size = bench.device.type == "cuda", 8192 if bench.device.type == "cuda" else 256

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
    places = ((10, 4096), (20, 1024)) if bench.device.type == "cuda" else ((2, 64),)
    kinds = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)

    def measure(heads: int, length: int, kind: SDPBackend) -> dict[str, Any]:
        draw = torch.Generator(bench.device).manual_seed(0)
        shape = (4, heads, length, 64)
        q, k, v, up = (torch.randn(shape, generator=draw, device=bench.device) for _ in range(4))
        exact = _attended(F.scaled_dot_product_attention, (q, k, v), up)
        narrow = tuple(t.bfloat16() for t in (q, k, v))
        try:
            with sdpa_kernel(kind):
                found = _attended(F.scaled_dot_product_attention, narrow, up.bfloat16())
                seconds = bench.seconds(lambda: _attended(F.scaled_dot_product_attention, narrow, up.bfloat16()))
        except RuntimeError as error:
            return {"not_here": str(error).splitlines()[0][:120]}
        off = [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
        work = 3.5 * 4 * 4 * heads * length**2 * 64
        return {"operations_per_second": work / statistics.median(seconds), "off": off, "finite": max(off) < 0.02}

    for heads, length in places:
        for kind in kinds:
            yield f"{kind.name.lower()}, {heads} heads, {length}", lambda h=heads, n=length, k=kind: measure(h, n, k)


def _attended(function: Any, inputs: Any, up: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    out.backward(up)
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def full(bench: Bench) -> Measures:
    """Full fine-tuning: ours in bf16 with rounding by chance, ours in fp32 under autocast, the reference's loop."""
    for side in bench.sides:
        for samples in bench.samples:
            for name in ("ours bf16", "ours fp32", "reference"):
                if name != "reference" or find_spec("diffusers"):
                    yield f"{name}, {side} px, batch {samples}", lambda n=name, s=side, b=samples: _full(bench, n, s, b)


def _full(bench: Bench, name: str, side: int, samples: int) -> dict[str, Any]:
    dtype = torch.bfloat16 if name == "ours bf16" else torch.float32
    model = make_unet(bench, dtype, library=name == "reference")
    parameters = list(model.parameters())
    if name == "ours bf16":
        optimizer: Any = make_optimizer(model, "adamw_bf16", 1e-6)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, **({} if name == "reference" else {"fused": True}))
    step = make_step(bench, model, optimizer, parameters, side, samples, dtype, reads=name == "reference")
    return figures(bench, bench.seconds(step), side, samples)


def low_memory(bench: Bench) -> Measures:
    """One picture at the first side: what each step down takes, and its speed."""
    narrow, wide = torch.bfloat16, torch.float32
    levels = {
        "fp32, AdamW": ("adamw", wide, 1.0, False),
        "bf16, AdamW, nothing computed again": ("adamw_bf16", narrow, 0.0, False),
        "bf16, AdamW, half of the blocks": ("adamw_bf16", narrow, 0.5, False),
        "bf16, AdamW": ("adamw_bf16", narrow, 1.0, False),
        "bf16, Adafactor": ("adafactor", narrow, 1.0, False),
        "bf16, Adafactor, fused backward": ("adafactor", narrow, 1.0, True),
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
                backward.step(optimizer, parameters, norm, 1.0, passes)

        return figures(bench, bench.seconds(step), side, 1)

    for label, level in levels.items():
        yield label, lambda chosen=level: measure(*chosen)


def adapter(bench: Bench) -> Measures:
    """LoRA of rank 16 on all attention layers beside bf16 weights."""

    def measure(samples: int, checkpointing: bool) -> dict[str, Any]:
        from peft import LoraConfig, inject_adapter_in_model

        model = make_unet(bench, torch.bfloat16).requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        if checkpointing:
            model.enable_gradient_checkpointing()
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        step = make_step(bench, model, optimizer, parameters, bench.sides[0], samples, torch.bfloat16)
        return figures(bench, bench.seconds(step), bench.sides[0], samples)

    for samples in bench.samples[:2] if find_spec("peft") else ():
        for checkpointing in (False, True):
            name = f"batch {samples}" + (", checkpointing" if checkpointing else "")
            yield name, lambda b=samples, c=checkpointing: measure(b, c)


def faster(bench: Bench) -> Measures:
    """What compiling transformer blocks, and replaying the passes as one CUDA graph, would gain."""

    def compiled(samples: int) -> dict[str, Any]:
        model = make_unet(bench, torch.bfloat16)
        for module in model.modules():
            if type(module).__name__ in model._repeated_blocks:
                module.compile(dynamic=False)
        parameters = list(model.parameters())
        optimizer = make_optimizer(model, "adamw_bf16", 1e-6)
        step = make_step(bench, model, optimizer, parameters, bench.sides[0], samples, torch.bfloat16)
        began = time.perf_counter()
        step()
        bench.wait()
        warm = time.perf_counter() - began
        return {**figures(bench, bench.seconds(step), bench.sides[0], samples), "first_step_seconds": warm}

    def graphed(samples: int) -> dict[str, Any]:
        model = make_unet(bench, torch.bfloat16)
        passes = make_passes(model, *make_inputs(bench, bench.sides[0], samples, torch.bfloat16), torch.bfloat16)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                model.zero_grad()
                passes()
        torch.cuda.current_stream().wait_stream(stream)
        model.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            passes()
        seconds = bench.seconds(graph.replay)
        return {**figures(bench, seconds, bench.sides[0], samples), "of_it": "forward and backward alone"}

    def eager(samples: int) -> dict[str, Any]:
        model = make_unet(bench, torch.bfloat16)
        passes = make_passes(model, *make_inputs(bench, bench.sides[0], samples, torch.bfloat16), torch.bfloat16)
        seconds = bench.seconds(lambda: (model.zero_grad(), passes()))
        return {**figures(bench, seconds, bench.sides[0], samples), "of_it": "forward and backward alone"}

    for samples in bench.samples[:2]:
        yield f"eager passes, batch {samples}", lambda b=samples: eager(b)
        if bench.device.type == "cuda":
            yield f"graph of the passes, batch {samples}", lambda b=samples: graphed(b)
            yield f"compiled blocks, batch {samples}", lambda b=samples: compiled(b)


def drift(bench: Bench) -> Measures:
    """Losses of bf16 weights, rounded by chance, and of fp32 ones on the same random pictures over 150 steps."""

    def measure(dtype: torch.dtype, name: str) -> dict[str, Any]:
        model = make_unet(bench, dtype)
        parameters = list(model.parameters())
        optimizer = make_optimizer(model, name, 1e-5)
        losses: list[Tensor] = []
        count = 150 if bench.device.type == "cuda" else 3
        sets = [make_inputs(bench, bench.sides[-1], 1, dtype, seed) for seed in range(8)]
        for number in range(count):
            losses.append(make_passes(model, *sets[number % 8], dtype)())
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        values = torch.stack(losses).tolist()
        return {"first": statistics.mean(values[:8]), "last": statistics.mean(values[-16:])}

    yield "fp32", lambda: measure(torch.float32, "adamw")
    yield "bf16", lambda: measure(torch.bfloat16, "adamw_bf16")
    yield "fp32, Adafactor", lambda: measure(torch.float32, "adafactor")
    yield "bf16, Adafactor", lambda: measure(torch.bfloat16, "adafactor")


BENCHMARKS: dict[str, Callable[[Bench], Measures]] = {
    "limits": limits,
    "attention": attention,
    "full": full,
    "adapter": adapter,
    "low_memory": low_memory,
    "faster": faster,
    "drift": drift,
}


if __name__ == "__main__":
    main()
