"""A thousand hostile or broken inputs: each ends with exit 0 or 2, without a traceback, in time, within memory, and
without a write outside of the output folder and the cache.

Every input is made from its number by a seeded generator, and tried by `sdxl train` in a process of its own, forked
from this one. `--only N` tries one again, and shows what it said.

    python benchmarks/hostile.py [--count 1000] [--only N]
"""

import argparse
import json
import os
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hostile_inputs import KINDS, toml

import toyworld
from sdxl_trainer import blueprint, files
from sdxl_trainer.cli import command, guarded
from sdxl_trainer.configfile import validated
from sdxl_trainer.train import train

RESULT = Path(__file__).parent / "results" / "hostile.json"
SECONDS, MEMORY = 30.0, 2 << 30
# Written by every run that gets going; all else has to stay as it was.
FREE = ("run", "cache")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--only", type=int)
    options = parser.parse_args()
    os.environ |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        pristine = prepare(Path(folder))
        before = children_memory()
        found: list[dict[str, Any]] = []
        for number in [options.only] if options.only is not None else range(options.count):
            row = attempt(number, pristine, Path(folder) / "place", shown=options.only is not None)
            found.append(row)
            if row["wrong"]:
                print(json.dumps(row), flush=True)
            if options.only is None and (number + 1) % 50 == 0:
                write(found, before, options.count)
    print(json.dumps(summary(found)))


def write(found: list[dict[str, Any]], before: float, count: int) -> None:
    result = {
        "command": f"python benchmarks/hostile.py --count {count}",
        "tried": len(found),
        **summary(found),
        "wrong": [row for row in found if row["wrong"]],
        "longest_seconds": max(row["seconds"] for row in found),
        "most_memory_bytes_more": children_memory() - before,
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "sdxl-trainer")},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    kinds = Counter(row["kind"] for row in found)
    return {
        "kinds": dict(kinds),
        "exits": {str(code): n for code, n in Counter(row["exit"] for row in found).items()},
        "wrong_count": sum(bool(row["wrong"]) for row in found),
    }


def prepare(root: Path) -> Path:
    """A base, pictures, and a finished run of two steps with its cache."""
    place = root / "pristine"
    data = toyworld.write_folder(place / "pictures", 6, seed=0)
    captions = [json.loads(line)["text"] for line in (data / "metadata.jsonl").read_text("utf-8").splitlines()]
    blueprint.build(place / "base", "tiny", captions=captions)
    os.chdir(place)
    pid = os.fork()
    if pid == 0:
        options = tree()
        options["train"]["steps"] = 2
        train(validated(options, "pristine"))
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    return place


def tree() -> dict[str, Any]:
    return {
        "output_dir": "run",
        "model": {"path": "base"},
        "data": [{"path": "pictures", "resolution": 64}],
        "cache": {"path": "cache", "workers": 0},
        "train": {"steps": 3, "batch_size": 2, "learning_rate": 1e-3, "checkpoint_every": 2, "workers": 0},
    }


def attempt(number: int, pristine: Path, place: Path, shown: bool) -> dict[str, Any]:
    """Make input `number` and try it."""
    draw = random.Random(number)
    files.remove(place)
    shutil.copytree(pristine, place, symlinks=True)
    kind, make = KINDS[number % len(KINDS)]
    options = tree()
    make(draw, place, options)
    if not (place / "config.toml").exists():
        (place / "config.toml").write_text(toml(options), encoding="utf-8", errors="surrogatepass")
    kept = state(place)
    output, began = place.parent / "said", time.monotonic()
    pid = os.fork()
    if pid == 0:
        child(place, output)
    status, timed_out = None, False
    while status is None:
        done, code = os.waitpid(pid, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
        elif time.monotonic() - began > SECONDS:
            timed_out = True
            os.kill(pid, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.01)
    said = output.read_text(encoding="utf-8", errors="replace")
    wrong = []
    wrong += [f"exit {status}"] if status not in {0, 2} and not timed_out else []
    wrong += ["traceback"] if "Traceback" in said else []
    wrong += [f"more than {SECONDS:g} s"] if timed_out else []
    wrong += [f"changed {name}" for name, was in kept.items() if state(place).get(name) != was]
    # A config whose cache.path was changed names where it writes; nothing else does.
    named = kind in {"config bytes", "config values"}
    wrong += [f"made {name}" for name in state(place).keys() - kept.keys() if not named]
    wrong += [f"made {p.name}" for p in place.parent.iterdir() if p.name not in {"pristine", "place", "said"}]
    if shown:
        print(said)
    last = said.strip().splitlines()[-3:] if wrong else []
    seconds = round(time.monotonic() - began, 2)
    return {"number": number, "kind": kind, "exit": status, "seconds": seconds, "wrong": wrong, "said": last}


def child(place: Path, output: Path) -> None:
    """The command, in a process that may not take more memory than it has and 2 GB."""
    code = 1
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        os.chdir(place)
        sys.argv = ["sdxl", "train", "config.toml"]
        code = guarded(command)
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        if sys.exc_info()[0] is not None:
            import traceback

            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def state(place: Path) -> dict[str, Any]:
    """What must not change."""
    found = {}
    for path in place.rglob("*"):
        name = path.relative_to(place).as_posix()
        if not name.startswith(FREE) and not path.is_dir():
            facts = path.lstat()
            found[name] = (facts.st_size, facts.st_mtime_ns)
    return found


def children_memory() -> float:
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


if __name__ == "__main__":
    main()
