"""`sdxl train` itself on a GPU: its tests, and a run of the full size."""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_step import Bench, Measures

ROOT = Path(__file__).parent.parent
TESTS = ["tests/train/test_gpu.py"]
# Their longest, in seconds.
TESTS_SECONDS, RUN_SECONDS = 140, 280


def tests(bench: Bench) -> Measures:
    """Whole runs of small models of every kind, which are to be those of a CPU and to wait for nothing."""
    lacks = next(
        (name for name in ("pytest", "pytest_timeout", "diffusers", "accelerate", "peft") if not find_spec(name)), None
    )
    if bench.device.type != "cuda":
        return
    yield "on this device", f"no {lacks}" if lacks else lambda: _tested(bench.ends - time.monotonic())


def _tested(left: float) -> dict[str, Any]:
    most = min(TESTS_SECONDS, left + 15.0)
    # Libraries of other versions may warn, and what was found counts also where time runs out.
    options = ["-q", "-p", "no:cacheprovider", "--tb=line", "-W", "default", f"--session-timeout={most - 25:.0f}"]
    several = ["-n", str(min(8, os.cpu_count() or 1))] if find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", *options, *several]
    said = _said([*command, *TESTS], most)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", said[-300:])}
    told = [line[:300] for line in said.splitlines() if re.match(r"(FAILED|ERROR|E |/.*: )", line)]
    return {"counts": counts, "told": told[:40]} if counts else {"failed": said[-1500:]}


def whole(bench: Bench) -> Measures:
    """The command from its start to its end: a base of random weights, pictures that are drawn, everything encoded."""
    lacks = next((name for name in ("diffusers", "accelerate", "transformers") if not find_spec(name)), None)

    def measure(samples: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            return _run(bench, Path(folder), samples)

    samples = bench.samples[0]
    key = f"sdxl train, {bench.sides[0]} px, batch {samples}, bf16 weights, masters"
    yield key, f"no {lacks}" if lacks else lambda: measure(samples)


def _run(bench: Bench, place: Path, samples: int) -> dict[str, Any]:
    import toyworld

    size = "sdxl" if bench.large else "tiny"
    toyworld.write_folder(place / "pictures", 64, seed=0)
    build = (
        "import json, pathlib, sys, torch; from sdxl_trainer import blueprint; "
        "lines = pathlib.Path(sys.argv[1], 'metadata.jsonl').read_text('utf-8').splitlines(); "
        "captions = [json.loads(line)['text'] for line in lines]; "
        "blueprint.build(sys.argv[2], sys.argv[3], captions=captions, dtype=torch.bfloat16)"
    )
    _said([sys.executable, "-c", build, str(place / "pictures"), str(place / "base"), size], RUN_SECONDS)
    config = f"""
        output_dir = "{place / "run"}"
        [model]
        path = "{place / "base"}"
        [[data]]
        path = "{place / "pictures"}"
        resolution = {bench.sides[0]}
        max_upscale = 16.0
        [train]
        steps = {4 * bench.steps}
        batch_size = {samples}
        weights = "bf16"
        checkpoint_every = 0
        [optimizer]
        name = "adamw"
        master = true
        [log]
        every = {bench.steps}
    """
    (place / "run.toml").write_text(config, encoding="utf-8")
    said = _said([sys.executable, "-m", "sdxl_trainer", "train", str(place / "run.toml")], RUN_SECONDS)
    lines = (place / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    rates = [row["samples_per_second"] for row in rows[bench.steps :]]  # the first reading has what is done once
    found = {"images_per_second": statistics.median(rates), "peak_bytes": 1e9 * rows[-1]["memory_gb"]}
    manifest = json.loads((place / "run" / "manifest.json").read_text(encoding="utf-8"))
    return {**found, "losses": [row["loss"] for row in rows], "seconds": manifest.get("seconds"), "said": said[-1500:]}


def _said(command: list[str], most: float) -> str:
    """What a command prints, where it ends well or is of tests that fail."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=most
    )
    if ended.returncode and "pytest" not in command:
        raise RuntimeError(f"{command[:3]} ended with {ended.returncode}: {ended.stdout[-1500:]}")
    return ended.stdout
