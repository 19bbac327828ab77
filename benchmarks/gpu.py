"""Full-size SDXL on one GPU, in ten minutes: images per second, share of the measured limits, memory, numerics.

    python benchmarks/gpu.py [--minutes 8.5] [--only full,low_memory,...] [--missing] [--results FOLDER]
    python benchmarks/gpu.py --device cpu --size tiny --sides 64 --samples 2 --steps 2     what the tests run

Weights and inputs are random. What counts most comes first (FIRST). Each figure is written as soon as it is there, into
what an earlier call on the same device left; `--missing` measures only what is not there yet. What no time or no
library is there for is named. Rows run in a process of their own: where a kernel hangs, or breaks the device or the
process, that row has failed and the rest goes on.

It needs torch, numpy, safetensors and pydantic. With diffusers it also measures the library's UNet in the loop of the
reference script (fp32 weights under autocast, AdamW as PyTorch makes it, the norm clipped and the loss read every step;
its data pipeline is left out, in its favour), and builds bases for `whole` and `tests`, which run `sdxl train` itself
and want pytest, accelerate, transformers, peft and the like; with bitsandbytes nf4 and 8-bit AdamW. To a machine that
has PyTorch for CUDA 13 on Python 3.12 and reaches no package index they are brought as wheels; of bitsandbytes only the
part for that CUDA is wanted:

    pip download -d wheels --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        -c constraints.txt pydantic pydantic_core annotated-types typing-inspection diffusers importlib_metadata \
        lazy-importer bitsandbytes
    zip -q -d wheels/bitsandbytes-*.whl '*cuda11*' '*cuda12*' '*cuda132*' '*rocm*' '*xpu*'
    pip install --no-index --no-deps --no-compile --target SITE wheels/*.whl      # there, then:
    PYTHONPATH=SITE python benchmarks/gpu.py --results FOLDER
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # the package need not be installed

import common

# What is measured first, in this order: whether it is right and reaches what is promised; then all else, group by
# group, in the order of `gpu_rows.BENCHMARKS`.
FIRST = [
    "limits: bf16 product",
    "limits: copy",
    "full: ours bf16, 1024 px, batch 8",
    "full: ours bf16, 512 px, batch 16",
    "full: ours bf16, by chance, 1024 px, batch 8",
    "full: reference, 1024 px, batch 8",
    "full: reference, 512 px, batch 16",
    "low_memory: bf16, Adafactor, fused backward",
    "adapter: fp8 base, batch 1, checkpointing",
    "low_memory: bf16, Adafactor",
    "adapter: bf16 base, batch 1, checkpointing",
    "gate: 512 px",
    "attention: cudnn_attention, 20 heads, 988 x 988",
    "attention: cudnn_attention, 10 heads, 3952 x 77",
    "tests: on this device",
    "kernels: 1024 px, batch 8",
    "kernels: 512 px, batch 16",
    "full: ours bf16, 1024 px, batch 1",
    "ladder: channels last, 1024 px, batch 8",
    "ladder: flash attention, 1024 px, batch 8",
    "drift: AdamW",
    "drift: Adafactor",
    "ladder: compiled blocks, 1024 px, batch 8",
    "drift: 8 bits",
]
GROUPS = "limits,full,gate,low_memory,adapter,kernels,ladder,drift,vae,graphs,attention,tests,whole"
# Seconds that a row of a group is given at least, without which it is left out, and at most. Rows bound themselves by
# `gpu_step.ROW_SECONDS` or a limit of their own; at most is for what hangs.
LEAST = {"tests": 60.0, "whole": 150.0, "ladder: compiled": 75.0, "drift": 60.0}
MOST = {"tests": 150.0, "whole": 300.0, "ladder": 240.0, "gate": 150.0, "drift": 200.0}
USUALLY = 90.0
# Seconds for the row that is measured when time is up.
GRACE = 25.0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", default="sdxl", choices=["sdxl", "tiny"])
    parser.add_argument("--sides", default="1024,512", help="pixels")
    parser.add_argument("--samples", default="8,16,4,1,32", help="batches to try, in this order")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--only", default=GROUPS, help=f"some of {GROUPS}")
    parser.add_argument("--missing", action="store_true", help="keep the rows that an earlier call measured")
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="folder")
    parser.add_argument("--compiler", default="inductor", help="what compiles blocks: a backend of torch.compile")
    parser.add_argument("--call", help=argparse.SUPPRESS)  # names this call, in the process that measures
    return parser.parse_args(arguments)


def main() -> None:
    """Keep a process at work that measures: one that ends early or hangs is followed by another, for other rows."""
    arguments, options, call = sys.argv[1:], parse(sys.argv[1:]), str(time.time_ns())
    ends, path, progress = time.monotonic() + 60 * options.minutes, options.results / "gpu.json", 0
    while (left := ends - time.monotonic()) > 0:
        again = ["--call", call, "--minutes", f"{left / 60:.4f}"]
        with subprocess.Popen([sys.executable, __file__, *arguments, *again], start_new_session=True) as process:
            if _watched(process, path, call, ends) == 0:
                return
        before, progress = progress, len(_of_call(path, call).get("begun", []))
        if progress == before:
            sys.exit("the process that measures ended without a row")


def _watched(process: "subprocess.Popen[bytes]", path: Path, call: str, ends: float) -> int:
    """How the process ends: by itself, or because a row takes longer than any should."""
    started = time.time()
    try:
        while True:
            try:
                return process.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                row = _of_call(path, call).get("now")
                own = row is not None and row["began"] >= started  # not that of the process before
                long = own and time.time() - row["began"] > MOST.get(row["group"], USUALLY)
                if long or time.monotonic() > ends + GRACE:
                    process.kill()
    finally:
        with suppress(ProcessLookupError):  # nothing that a row has started goes on beside the next ones
            os.killpg(process.pid, signal.SIGKILL)


def _of_call(path: Path, call: str) -> dict[str, Any]:
    """What the processes of this call have written."""
    found = read(path)
    return found if found.get("call") == call else {}


def read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or just being written
        return {}
    return found


def measure(options: argparse.Namespace) -> None:
    """All rows that this call has not begun yet."""
    import gpu_rows

    bench, path = gpu_rows.bench(options), options.results / "gpu.json"
    result = _earlier(path, {"device": gpu_rows.device(bench), "size": options.size, "left_out": []})
    begun = set(result.pop("begun", [])) if result.get("call") == options.call else set()
    result |= {"call": options.call}
    groups = options.only.split(",")
    if not begun:
        result["left_out"] = [text for text in result["left_out"] if text.partition(":")[0] not in groups]
    for name, key, row in rows(bench, groups):
        label = f"{name}: {key}"
        known = result.get(name, {}).get(key)
        if label in begun or (options.missing and known and "failed" not in known):
            continue
        least = next((seconds for start, seconds in LEAST.items() if label.startswith(start)), 0.0)
        lacks = row if isinstance(row, str) else "no time" if time.monotonic() + least > bench.ends else None
        if lacks:
            result["left_out"] = [
                *(text for text in result["left_out"] if text != f"{label}: {lacks}"),
                f"{label}: {lacks}",
            ]
            continue
        begun.add(label)
        result.setdefault(name, {})[key] = {"failed": "it took too long, or the process ended"}
        now = {"group": name, "key": key, "began": time.time()}
        common.write("gpu", result | {"begun": sorted(begun), "now": now}, options.results)
        began = time.monotonic()
        found = {**gpu_rows.attempt(bench, row), "took": round(time.monotonic() - began, 1)}
        result[name][key] = found
        print(f"{label}: {json.dumps(found)}", flush=True)
        common.write("gpu", result | {"begun": sorted(begun)}, options.results)
        if gpu_rows.is_broken(bench):
            sys.exit(f"{label} broke the device")
    common.write("gpu", {key: value for key, value in result.items() if key != "call"}, options.results)


def rows(bench: Any, groups: list[str]) -> list[tuple[str, str, Any]]:
    """Group, name, and what is measured or why it is not, in the order of what counts."""
    import gpu_rows

    found = [(name, *row) for name in groups for row in gpu_rows.BENCHMARKS[name](bench)]
    order = {label: number for number, label in enumerate(FIRST)}
    return sorted(found, key=lambda row: order.get(f"{row[0]}: {row[1]}", len(FIRST)))


def _earlier(path: Path, new: dict[str, Any]) -> dict[str, Any]:
    """The results of an earlier call on the same device with the same model, to which more are added; else new ones."""
    found = read(path)
    alike = all(found.get(key) == new[key] for key in ("device", "size"))
    return {key: value for key, value in found.items() if key not in {"machine", "now"}} if alike else new


if __name__ == "__main__":
    given = parse(sys.argv[1:])
    measure(given) if given.call else main()
