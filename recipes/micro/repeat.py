"""Repeat the first steps of the training from the parts that are shipped, and compare their losses with the record.

    python recipes/micro/repeat.py OUT [--steps 200] [--record]

Text encoders, VAE and tokenizers are those of the package, the pictures are drawn into OUT if they are not there. The
record, logs/repeat.jsonl, was made by this command. pinned.py encodes and trains, so that the losses are the same bits
on every x86-64 processor with AVX2, as far as could be tried (docs/micro.md). What is encoded stays in OUT/pinned-cache
for the next time. The base itself was trained with its parts in fp32, which are shipped in fp16: how far its losses,
logs/base.jsonl, are from these is printed too.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import make

from sdxl_trainer import demo, files

RECORD, BASE = (make.HERE / "logs" / name for name in ("repeat.jsonl", "base.jsonl"))
CLOSE = 1e-3


def losses(path: Path, steps: int) -> list[float]:
    return [json.loads(line)["loss"] for line in path.read_text(encoding="utf-8").splitlines()[:steps]]


def repeated(out: Path, steps: int) -> list[float]:
    """The losses of a training that begins anew."""
    run, untrained = out / "repeat", out / "shipped"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(demo.BASE, untrained, ignore=shutil.ignore_patterns("unet"), dirs_exist_ok=True)
    make.run(make.HERE / "data.py", out / "data")
    places = make.places(out) | {"output_dir": run, "model.path": untrained, "cache.path": out / "pinned-cache"}
    changes = [f"{option}={value}" for option, value in places.items()]
    changes += [f"train.steps={steps}", "schedule.cooldown_steps=0"]
    make.run(make.HERE / "pinned.py", "train", make.HERE / "base.toml", *changes)
    return losses(run / "metrics.jsonl", steps)


def compared(found: list[float], path: Path, name: str) -> float:
    """The largest relative difference to a record, which is told."""
    recorded = losses(path, len(found))
    equal = sum(a == b for a, b in zip(recorded, found, strict=True))
    apart = [abs(a - b) / a for a, b in zip(recorded, found, strict=True)]
    close = next((number for number, one in enumerate(apart) if one > CLOSE), len(apart))
    print(
        f"{name}: {equal} of {len(found)} losses are the same bits; the first {close} are within {CLOSE:g}, "
        f"the largest relative difference is {max(apart):.2e}"
    )
    return max(apart)


def main() -> None:
    parser = argparse.ArgumentParser(description="Repeat the first steps of the training from the shipped parts.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--record", action="store_true", help="write the record")
    arguments = parser.parse_args()
    found = repeated(arguments.out, arguments.steps)
    if arguments.record:
        files.write_text(RECORD, "".join(f"{json.dumps({'step': n, 'loss': x})}\n" for n, x in enumerate(found, 1)))
    compared(found, BASE, "the training of the base")
    sys.exit(0 if compared(found, RECORD, "the record") <= CLOSE else 1)


if __name__ == "__main__":
    main()
