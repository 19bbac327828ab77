"""Full-size SDXL on one GPU, in ten minutes: images per second, share of the measured limits, memory, numerics.

    python benchmarks/gpu.py [--minutes 9] [--only limits,full,...]
    python benchmarks/gpu.py --device cpu --size tiny --sides 64 --samples 2 --steps 2     what the tests run

It needs torch, numpy, safetensors and pydantic; with diffusers it also measures the library's UNet in the loop of the
reference script (fp32 weights under autocast, AdamW as PyTorch makes it, the norm clipped and the loss read every
step; its data pipeline is left out, in its favour). Weights and inputs are random. What counts most comes first; each
figure is written as soon as it is there, into what an earlier call on the same device left, and what no time or no
library is there for is named.
"""

import gc
import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from gpu_step import Bench, add_lora, figures, make_inputs, make_optimizer, make_passes, make_step, make_unet, update
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdxl_trainer import model as models
from sdxl_trainer import narrow
from sdxl_trainer import unet as unets
from sdxl_trainer.optim import backward

CONFIG = Path(unets.__file__).parent / "assets" / "sdxl" / "unet" / "config.json"
TINY = {"block_out_channels": [32, 64, 64], "attention_head_dim": [2, 4, 4], "transformer_layers_per_block": [1, 1, 1]}
TINY |= {"layers_per_block": 1, "norm_num_groups": 16}
# What compilers, drivers and libraries raise where they have not been tried.
FAILURES = (RuntimeError, ImportError, OSError, ValueError, TypeError, AttributeError, AssertionError, LookupError)
# Seconds that a row is given at least; without them it is left out.
LEAST = {"compiled": 90.0}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", default="sdxl", choices=["sdxl", "tiny"])
    parser.add_argument("--sides", default="1024,512", help="pixels")
    parser.add_argument("--samples", default="8,4,16,1", help="batches to try, in this order")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", default=",".join(BENCHMARKS), help="some of " + ", ".join(BENCHMARKS))
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="folder")
    options = parser.parse_args()
    config = json.loads(CONFIG.read_text(encoding="utf-8")) | (TINY if options.size == "tiny" else {})
    sides, samples = (tuple(int(n) for n in text.split(",")) for text in (options.sides, options.samples))
    ends = time.monotonic() + 60 * options.minutes
    bench = Bench(torch.device(options.device), config, sides, samples, options.steps, ends)
    result = _earlier(options.results / "gpu.json", {"device": _device(bench), "size": options.size, "left_out": []})
    for name in options.only.split(","):
        result["left_out"] = [text for text in result["left_out"] if not text.startswith(f"{name}: ")]
        for key, measure in BENCHMARKS[name](bench):
            if isinstance(measure, str):
                result["left_out"].append(f"{name}: {key}: {measure}")
                continue
            if time.monotonic() + LEAST.get(name, 0.0) > ends:
                result["left_out"].append(f"{name}: {key}: no time")
                continue
            began = time.monotonic()
            found = {**_attempt(bench, measure), "took": round(time.monotonic() - began, 1)}
            result.setdefault(name, {})[key] = found
            print(f"{name}: {key}: {json.dumps(found)}", flush=True)
            common.write("gpu", result, options.results)
    common.write("gpu", result, options.results)


def _earlier(path: Path, new: dict[str, Any]) -> dict[str, Any]:
    """The results of an earlier call on the same device with the same model, to which more are added; else new ones."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    alike = all(found.get(key) == new[key] for key in ("device", "size"))
    return {key: value for key, value in found.items() if key != "machine"} if alike else new


def _attempt(bench: Bench, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
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
            torch.cuda.empty_cache()


def _device(bench: Bench) -> dict[str, Any]:
    if bench.device.type != "cuda":
        return {"name": bench.device.type}
    facts, cudnn = torch.cuda.get_device_properties(0), torch.backends.cudnn.version()
    return {"name": facts.name, "bytes": facts.total_memory, "cuda": torch.version.cuda, "cudnn": cudnn}


# Rows: what is measured, or why it is not.
Measures = Iterator[tuple[str, Callable[[], dict[str, Any]] | str]]


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
    """Full fine-tuning: ours in bf16 with rounding by chance, ours in fp32 under autocast, the reference's loop, and
    that around our UNet."""
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
            for name in ("ours bf16", "reference", "ours fp32", "reference's loop, our UNet"):
                key = f"{name}, {side} px, batch {samples}"
                if name == "reference" and not find_spec("diffusers"):
                    yield key, "no diffusers"
                elif name in {"ours bf16", "reference"} or samples == bench.samples[0]:
                    yield key, lambda n=name, s=side, b=samples: measure(n, s, b)


def _full(bench: Bench, name: str, side: int, samples: int) -> dict[str, Any]:
    dtype, ours = torch.bfloat16 if name == "ours bf16" else torch.float32, name.startswith("ours")
    model = make_unet(bench, dtype, library=name == "reference")
    parameters = list(model.parameters())
    if ours:
        optimizer = make_optimizer(model, "adamw_bf16" if name == "ours bf16" else "adamw", 1e-6)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    step = make_step(bench, model, optimizer, parameters, side, samples, dtype, reads=not ours)
    return figures(bench, bench.seconds(step), side, samples)


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


def graphs(bench: Bench) -> Measures:
    """What replaying the passes as one CUDA graph would gain."""

    def made(samples: int) -> Callable[[], None]:
        model = make_unet(bench, torch.bfloat16)
        passes = make_passes(model, *make_inputs(bench, bench.sides[0], samples, torch.bfloat16), torch.bfloat16)

        def run() -> None:
            model.zero_grad()
            passes()

        return run

    def graphed(samples: int) -> list[float]:
        run, stream = made(samples), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())  # on which weights and inputs were made
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return bench.seconds(graph.replay)

    def measure(samples: int, seconds: Callable[[int], list[float]]) -> dict[str, Any]:
        return {**figures(bench, seconds(samples), bench.sides[0], samples), "of_it": "forward and backward alone"}

    for samples in sorted(bench.samples)[:2]:
        yield f"eager passes, batch {samples}", lambda b=samples: measure(b, lambda n: bench.seconds(made(n)))
        if bench.device.type == "cuda":
            yield f"graph of the passes, batch {samples}", lambda b=samples: measure(b, graphed)


def compiled(bench: Bench) -> Measures:
    """What compiling the transformer blocks would gain."""

    def measure(samples: int) -> dict[str, Any]:
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

    for samples in sorted(bench.samples)[:2] if bench.device.type == "cuda" else ():
        yield f"compiled blocks, batch {samples}", lambda b=samples: measure(b)


def drift(bench: Bench) -> Measures:
    """Losses of bf16 weights, rounded by chance, and of fp32 ones on the same random pictures over 150 steps."""

    def measure(dtype: torch.dtype, name: str) -> dict[str, Any]:
        model = make_unet(bench, dtype)
        parameters = list(model.parameters())
        optimizer = make_optimizer(model, name, RATES[name])
        losses: list[Tensor] = []
        count = 150 if bench.device.type == "cuda" else 3
        sets = [make_inputs(bench, bench.sides[-1], 1, dtype, seed) for seed in range(8)]
        for number in range(count):
            losses.append(make_passes(model, *sets[number % 8], dtype)())
            update(optimizer, parameters)
            if time.monotonic() > bench.ends:
                return {"steps": number + 1, "failed": "no time"}
        values = torch.stack(losses).tolist()
        return {"first": statistics.mean(values[:8]), "last": statistics.mean(values[-16:])}

    yield "fp32", lambda: measure(torch.float32, "adamw")
    yield "bf16", lambda: measure(torch.bfloat16, "adamw_bf16")
    yield "fp32, Adafactor", lambda: measure(torch.float32, "adafactor")
    yield "bf16, Adafactor", lambda: measure(torch.bfloat16, "adafactor")


# Of drift; Adafactor's is relative to each tensor.
RATES = {"adamw": 1e-5, "adamw_bf16": 1e-5, "adafactor": 1e-3}
# In the order of what counts.
BENCHMARKS: dict[str, Callable[[Bench], Measures]] = {
    "limits": limits,
    "full": full,
    "low_memory": low_memory,
    "adapter": adapter,
    "drift": drift,
    "attention": attention,
    "graphs": graphs,
    "compiled": compiled,
}


if __name__ == "__main__":
    main()
