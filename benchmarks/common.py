"""What the benchmarks share: rounds in turn, medians and spread, the machine, results as JSON."""

import argparse
import hashlib
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import sdxl_trainer  # noqa: F401 - it decides how threads wait, before PyTorch is loaded

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "sdxl-trainer")


def parser(document: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=(document or "").splitlines()[0])


def in_turn(contestants: Mapping[str, Callable[[], Any]], rounds: int, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of each contestant, round by round: A B A B, so that a neighbour's load meets them all."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(warm + rounds):
        for name, run in contestants.items():
            began = time.perf_counter()
            run()
            if number >= warm:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(seconds: Mapping[str, list[float]], slow: str, fast: str) -> dict[str, Any]:
    """How many times as long one takes as the other: of the medians, and the quartiles of the rounds."""
    of_rounds = [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)]
    low, _, high = statistics.quantiles(of_rounds, n=4) if len(of_rounds) > 1 else of_rounds * 3
    return {"ratio": statistics.median(seconds[slow]) / statistics.median(seconds[fast]), "quartiles": [low, high]}


def largest(numbers: Sequence[float]) -> float:
    """What is no number, if it is among them: `max` passes it over."""
    return max(numbers, key=lambda number: (math.isnan(number), number))


def job(folder: Path, options: argparse.Namespace, sections: dict[str, Any], data: Path | None = None) -> Any:
    """A training that is ready for its first step: of a base of random weights, of the `size`, on a folder of pictures
    (drawn if none is given) at the `resolution`, in batches of `batch`."""
    import toyworld
    from sdxl_trainer import blueprint, setup
    from sdxl_trainer.configfile import validated
    from sdxl_trainer.run import CONTINUE
    from sdxl_trainer.threads import keep_freed_memory

    keep_freed_memory()  # as `train.train` does before it makes its job
    data = data or toyworld.write_folder(folder / "pictures", 64, seed=0)
    captions = [json.loads(line)["text"] for line in (data / "metadata.jsonl").read_text("utf-8").splitlines()]
    tree = {
        "output_dir": str(folder / "run"),
        "model": {"path": str(blueprint.build(folder / "base", options.size, captions=captions))},
        "data": [{"path": str(data), "resolution": options.resolution, "max_upscale": 16.0}],
        **sections,
        "train": {"batch_size": options.batch, **sections["train"]},
    }
    made = setup.prepare_job(validated(tree, "benchmark"), CONTINUE)
    assert made is not None
    return made


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Hardware, load and versions, to stand beside every figure."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return {
        "processor": model or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "bf16_instructions": "avx512_bf16" in flags or "amx_bf16" in flags,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
        "date": datetime.now(UTC).date().isoformat(),
    }


def status_bytes(name: str) -> int:
    """What the system says of this program's memory, in bytes: VmHWM, the most so far, VmRSS, RssAnon, ... The most by
    `ru_maxrss` would be that of whoever started it, if that had more."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(name: str, result: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """<folder>/<name>.json, with the machine."""
    path = folder / f"{name}.json"
    folder.mkdir(exist_ok=True)
    unfinished = path.with_suffix(".json.new")
    unfinished.write_text(json.dumps({**result, "machine": machine()}, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
    return path
