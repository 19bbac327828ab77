"""Where the time of a step goes on a GPU, and what single changes would gain: layout, attention, compiler, graphs."""

import json
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from gpu_step import Bench, Measures, figures, make_inputs, make_optimizer, make_passes, make_step, make_unet
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# Kinds of kernels, by what their names hold; the first that fits.
KINDS = {
    "attention": "fmha|flash|sdpa|attention",
    "layout": "nchwToNhwc|nhwcToNchw|nchw2nhwc|nhwc2nchw|tensorTransform",
    "convolution": "conv|fprop|dgrad|wgrad",
    "product": "gemm|nvjet|cutlass|splitK|cublas",
    "optimizer": "multi_tensor|FusedAdam|distribution_elementwise|random_from_to",
    "norm": "layer_?norm|group_?norm|RowwiseMoments|FusedParams|GammaBeta|GradInput",
    "compiled": "triton_",
    "copy": "copy|memcpy|memset|CatArray|fill",
    "sum": "reduce",
    "elementwise": "elementwise|vectorized|unrolled|gelu|silu|upsample",
}
LONGEST = 25


def kernels(bench: Bench) -> Measures:
    """What a step's kernels are, how long they take and how long the device has nothing to do."""

    def measure(side: int, samples: int) -> dict[str, Any]:
        step, count = _step(bench, make_unet(bench, torch.bfloat16), side, samples), 2
        seconds = bench.seconds(step)
        found = _events(bench, step, count)
        times: dict[str, float] = defaultdict(float)
        launches: dict[str, int] = defaultdict(int)
        names: dict[str, list[float]] = defaultdict(list)
        for event in found:
            kind = next((k for k, text in KINDS.items() if re.search(text, event["name"], re.IGNORECASE)), "other")
            times[kind] += event["dur"] * 1e-6 / count
            launches[kind] += 1
            names[event["name"][:100]].append(event["dur"] * 1e-6 / count)
        longest = sorted(names.items(), key=lambda item: -sum(item[1]))[:LONGEST]
        made = {**figures(bench, seconds, side, samples), "busy_seconds": sum(times.values()), "kinds": dict(times)}
        made["launches"] = {kind: number / count for kind, number in launches.items()}
        return made | {"longest": [[name, len(each) / count, sum(each)] for name, each in longest]}

    for side, samples in [*places(bench), (bench.sides[0], min(bench.samples))]:
        yield f"{side} px, batch {samples}", lambda s=side, b=samples: measure(s, b)


def _events(bench: Bench, step: Callable[[], None], count: int) -> list[dict[str, Any]]:
    """What the device did in so many steps; of a CPU, what PyTorch was asked for."""
    with torch.profiler.profile(activities=torch.profiler.supported_activities()) as profile:
        for _ in range(count):
            step()
        bench.wait()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    kinds = {"kernel", "gpu_memcpy", "gpu_memset"} if bench.device.type == "cuda" else {"cpu_op"}
    return [event for event in events if event.get("cat") in kinds and "dur" in event]


def places(bench: Bench) -> list[tuple[int, int]]:
    """Sides and batches at which the device has enough to do: the first batch at the first side, the second at the
    last."""
    return list(dict.fromkeys([(bench.sides[0], bench.samples[0]), (bench.sides[-1], bench.samples[:2][-1])]))


def ladder(bench: Bench) -> Measures:
    """One change each of our step in bf16, which `kernels` measures as it is."""

    def measure(change: Callable[[Bench, nn.Module], Any], side: int, samples: int) -> dict[str, Any]:
        model = make_unet(bench, torch.bfloat16)
        with change(bench, model) or nullcontext():
            step = _step(bench, model, side, samples)
            began = time.perf_counter()
            step()
            bench.wait()
            first = time.perf_counter() - began
            return {**figures(bench, bench.seconds(step), side, samples), "first_step_seconds": first}

    wide, batches = places(bench), [(side, min(bench.samples)) for side in dict.fromkeys(bench.sides)]
    for name, change in CHANGES.items():
        for side, samples in [*wide, *(batches if name == "compiled blocks" else [])]:
            yield f"{name}, {side} px, batch {samples}", lambda c=change, s=side, b=samples: measure(c, s, b)


def _step(bench: Bench, model: Any, side: int, samples: int) -> Callable[[], None]:
    optimizer = make_optimizer(model, "adamw", 1e-6, master=True)
    return make_step(bench, model, optimizer, list(model.parameters()), side, samples, torch.bfloat16)


def _channels_last(bench: Bench, model: nn.Module) -> None:
    model.to(memory_format=torch.channels_last)


def _compiled(*kinds: str) -> Callable[[Bench, nn.Module], None]:
    """Each block of these kinds compiled alone: those of one shape share what was compiled."""

    def change(bench: Bench, model: nn.Module) -> None:
        torch.compiler.reset()
        torch._dynamo.config.recompile_limit = 64  # one for each shape of a block
        for module in model.modules():
            if type(module).__name__ in kinds:
                module.compile(dynamic=False, backend=bench.compiler)
        if "ResnetBlock2D" in kinds:
            _channels_last(bench, model)

    return change


CHANGES: dict[str, Callable[[Bench, nn.Module], Any]] = {
    "channels last": _channels_last,
    "flash attention": lambda bench, model: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    "cuDNN attention": lambda bench, model: sdpa_kernel(
        [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True
    ),
    "compiled blocks": _compiled("BasicTransformerBlock"),
    "compiled blocks and resnets, channels last": _compiled("BasicTransformerBlock", "ResnetBlock2D"),
}


def graphs(bench: Bench) -> Measures:
    """What replaying the passes as one CUDA graph would gain."""

    def made(side: int, samples: int) -> Callable[[], None]:
        model = make_unet(bench, torch.bfloat16)
        passes = make_passes(model, *make_inputs(bench, side, samples, torch.bfloat16), torch.bfloat16)

        def run() -> None:
            model.zero_grad()
            passes()

        return run

    def eager(side: int, samples: int) -> list[float]:
        return bench.seconds(made(side, samples))

    def graphed(side: int, samples: int) -> list[float]:
        run, stream = made(side, samples), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())  # on which weights and inputs were made
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
        return bench.seconds(graph.replay)

    def measure(seconds: Callable[[int, int], list[float]], side: int, samples: int) -> dict[str, Any]:
        return {**figures(bench, seconds(side, samples), side, samples), "of_it": "forward and backward alone"}

    for side in dict.fromkeys(bench.sides):
        for samples in sorted(bench.samples)[:2]:
            for name, seconds in {"eager passes": eager, "graph of the passes": graphed}.items():
                if seconds is eager or bench.device.type == "cuda":
                    key = f"{name}, {side} px, batch {samples}"
                    yield key, lambda f=seconds, s=side, b=samples: measure(f, s, b)
