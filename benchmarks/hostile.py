"""A thousand hostile or broken inputs: each ends with exit 0 or 2, without a traceback, in time, within memory, and
without a write outside of the output folder and the cache.

Every input is made from its number by a seeded generator, and tried by `sdxl train` in a process of its own, forked
from one that has imported what a run imports, `--jobs` of them at a time. Rows are kept in `--work`: the same command
goes on where it was stopped. `--only N` tries one again, and shows what it said.

    python benchmarks/hostile.py [--count 1000] [--seed 0] [--jobs 2] [--work FOLDER] [--only N]
"""

import argparse
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import common
import torch
from hostile_inputs import KINDS, toml

import toyworld
from sdxl_trainer import blueprint, files
from sdxl_trainer.cli import command, guarded
from sdxl_trainer.configfile import validated
from sdxl_trainer.train import train

SECONDS, MEMORY = 30.0, 2 << 30
# Written by every run that gets going; all else has to stay as it was.
FREE = ("run", "cache")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "sdxl-hostile")
    parser.add_argument("--only", type=int)
    options = parser.parse_args()
    os.environ |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    kept = options.work / f"rows-{options.seed}.jsonl"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        pristine = prepare(root)
        if options.only is not None:
            print(json.dumps(attempt(options.seed, options.only, pristine, root / "one" / "place", shown=True)))
            return
        done = {row["number"] for row in rows(kept)}
        left = [number for number in range(options.count) if number not in done]
        workers = [
            work(options, left[job :: options.jobs], pristine, root / str(job), kept) for job in range(options.jobs)
        ]
        for pid in workers:
            assert os.waitpid(pid, 0)[1] == 0
    found = [row for row in rows(kept) if row["number"] < options.count]
    write(found, options)
    print(json.dumps(summary(found)))


def work(options: argparse.Namespace, numbers: list[int], pristine: Path, place: Path, kept: Path) -> int:
    """Try these inputs in a process of its own, and keep a row of each."""
    pid = os.fork()
    if pid:
        return pid
    place.mkdir()
    for number in numbers:
        row = attempt(options.seed, number, pristine, place / "place", shown=False)
        with kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if row["wrong"]:
            print(json.dumps(row), flush=True)
    os._exit(0)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def write(found: list[dict[str, Any]], options: argparse.Namespace) -> None:
    result = {
        "command": f"python benchmarks/hostile.py --count {options.count} --seed {options.seed} --jobs {options.jobs}",
        "tried": len(found),
        **summary(found),
        "wrong": [row for row in found if row["wrong"]],
        "longest_seconds": max(row["seconds"] for row in found),
        "most_memory_bytes_more": max(row["memory"] for row in found),
    }
    common.write("hostile", result)


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
    pid, imported = os.fork(), root / "imported"
    if pid == 0:
        options = tree()
        options["train"]["steps"] = 2
        train(validated(options, "pristine"))
        imported.write_text("\n".join(sys.modules), encoding="utf-8")
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    # What a run imports it need not import a thousand times. Some are names that cannot be imported by themselves.
    for name in imported.read_text("utf-8").splitlines():
        with suppress(ImportError, AttributeError, RuntimeError):
            importlib.import_module(name)
    return place


def tree() -> dict[str, Any]:
    return {
        "output_dir": "run",
        "model": {"path": "base"},
        "data": [{"path": "pictures", "resolution": 64}],
        "cache": {"path": "cache", "workers": 0},
        "train": {"steps": 3, "batch_size": 2, "learning_rate": 1e-3, "checkpoint_every": 2, "workers": 0},
    }


def attempt(seed: int, number: int, pristine: Path, place: Path, shown: bool) -> dict[str, Any]:
    """Make input `number` and try it."""
    draw = random.Random(number if seed == 0 else f"{seed}/{number}")
    place.parent.mkdir(exist_ok=True)
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
    status, memory = awaited(pid, began)
    said, after = output.read_text(encoding="utf-8", errors="replace"), state(place)
    wrong = []
    wrong += [f"more than {SECONDS:g} s"] if status is None else []
    wrong += [f"exit {status}"] if status not in {0, 2, None} else []
    wrong += ["traceback"] if "Traceback" in said else []
    wrong += [f"changed {name}" for name, was in kept.items() if after.get(name) != was]
    # A config whose cache.path was changed names where it writes; nothing else does.
    named = kind in {"config bytes", "config values"}
    wrong += [f"made {name}" for name in after.keys() - kept.keys() if not named]
    wrong += [f"made {p.name}" for p in place.parent.iterdir() if p.name not in {"place", "said"}]
    if shown:
        print(said)
    last = said.strip().splitlines()[-3:] if wrong else []
    facts = {"exit": status, "seconds": round(time.monotonic() - began, 2), "memory": memory}
    return {"number": number, "kind": kind, **facts, "wrong": wrong, "said": last}


def awaited(pid: int, began: float) -> tuple[int | None, int]:
    """Exit status of a child, None if it had to be ended, and the memory it took beyond this process's, in bytes."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    late = False
    while True:
        done, code, used = os.wait4(pid, os.WNOHANG)
        if done:
            more = max(0, used.ru_maxrss - own) * 1024
            return None if late else os.waitstatus_to_exitcode(code), more
        if time.monotonic() - began > SECONDS and not late:
            late = True
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


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


if __name__ == "__main__":
    main()
