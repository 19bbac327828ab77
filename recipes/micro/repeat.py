"""Repeat the first steps of the recorded training and compare their losses with the record.

    python recipes/micro/repeat.py OUT [--steps 200]

OUT is a folder of make.py with the parts that come before the training; its `repeat` folder is written anew. The
record, logs/base.jsonl, was made with one thread: on the same kind of processor the losses are the same bits.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import make

RECORD = make.HERE / "logs" / "base.jsonl"


def losses(path: Path, steps: int) -> list[float]:
    return [json.loads(line)["loss"] for line in path.read_text(encoding="utf-8").splitlines()[:steps]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Repeat the first steps of the recorded training.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    run = arguments.out / "repeat"
    shutil.rmtree(run, ignore_errors=True)
    changes = [f"{option}={value}" for option, value in (make.places(arguments.out) | {"output_dir": run}).items()]
    changes += [f"train.steps={arguments.steps}", "schedule.cooldown_steps=0"]
    os.environ["OMP_NUM_THREADS"] = "1"
    make.run("-m", "sdxl_trainer", "train", make.HERE / "base.toml", *changes)
    recorded, repeated = (losses(path, arguments.steps) for path in (RECORD, run / "metrics.jsonl"))
    equal = sum(a == b for a, b in zip(recorded, repeated, strict=True))
    largest = max(abs(a - b) / a for a, b in zip(recorded, repeated, strict=True))
    print(f"{equal} of {len(recorded)} losses are the recorded bits; the largest relative difference is {largest:.2e}")
    sys.exit(0 if largest <= 1e-3 else 1)


if __name__ == "__main__":
    main()
