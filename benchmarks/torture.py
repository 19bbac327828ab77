"""Runs of every method, killed at random moments 200 times: is the end bitwise that of a run that nothing happened to?

For each method and number of processes one run is left alone. Then the same run, in a folder and with a cache of its
own, is killed again and again (SIGKILL to all processes, or to one and then the rest): after a random time, or at the
moment when a half-written checkpoint or cache file is seen. It is started by the same call each time, until it is done.
Then its weights, its last checkpoint and its losses have to be those of the run that was left alone, and nothing
half-written may be there.

    python benchmarks/torture.py [--kills 200] [--seed 0]      (make torture)
"""

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ranks

import toyworld
from sdxl_trainer import blueprint, checkpoint, files
from sdxl_trainer.cli import guarded
from sdxl_trainer.configfile import dumps, load, validated
from sdxl_trainer.log import read_metrics
from sdxl_trainer.train import train

RESULT = Path(__file__).parent / "results" / "torture.json"
TEXT = {"learn": [{"match": r"unet\..*"}, {"match": r"text_encoder.*"}]}
PIVOTAL = [{"match": r".*token_embedding\.new\..*", "until": 0.5}, {"match": r".*"}]
METHODS: dict[str, dict[str, Any]] = {
    "full": {"ema": {"enabled": True}, "train": {"gradient_checkpointing": True}},
    "full, 8-bit": {"optimizer": {"name": "adamw8bit"}},
    "full, adafactor": {"optimizer": {"name": "adafactor"}},
    "full, prodigy": {"optimizer": {"name": "prodigy"}, "train": {"learning_rate": 1.0}},
    "full, schedule-free": {"optimizer": {"name": "schedulefree"}},
    "text encoders": {**TEXT, "ema": {"enabled": True}},
    "lora": {"adapter": {"kind": "lora", "rank": 4, "dropout": 0.1}, "ema": {"enabled": True}},
    "dora": {"adapter": {"kind": "dora", "rank": 4}},
    "lokr": {"adapter": {"kind": "lokr", "rank": 4}},
    "loha": {"adapter": {"kind": "loha", "rank": 4}},
    "oft": {"adapter": {"kind": "oft"}},
    "boft": {"adapter": {"kind": "boft"}},
    "lora on int8": {"adapter": {"kind": "lora", "rank": 4}, "train": {"frozen": "int8"}},
    "new words": {"token": [{"name": "shape", "vectors": 2}]},
    "pivotal": {"token": [{"name": "shape"}], "adapter": {"rank": 4}, "learn": PIVOTAL},
    "sharded": {**TEXT, "ema": {"enabled": True}, "train": {"shard": True}},
}
STEPS, MOST = 12, 5  # kills of one run before it may finish


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    draw, rows, kills = random.Random(options.seed), list[dict[str, Any]](), 0
    cases = [(name, count) for count in (1, 2) for name in METHODS if name != "sharded" or count == 2]
    with tempfile.TemporaryDirectory() as folder:
        root, references = Path(folder), dict[tuple[str, int], float]()
        prepare(root)
        while kills < options.kills:
            case = cases[len(rows) % len(cases)]
            if case not in references:
                references[case] = alone(root, *case)
            row = tortured(root, *case, references[case], draw)
            rows.append(row)
            kills += len(row["kills"])
            print(json.dumps(row), flush=True)
            write(options, rows, kills)
            if row["wrong"]:
                sys.exit(1)
    print(f"{kills} kills of {len(rows)} runs: every one ended as the run that nothing happened to")


def write(options: argparse.Namespace, rows: list[dict[str, Any]], kills: int) -> None:
    moments = [kill["when"] for row in rows for kill in row["kills"]]
    result = {
        "command": f"python benchmarks/torture.py --kills {options.kills} --seed {options.seed}",
        "kills": kills,
        "runs": len(rows),
        "wrong": sum(bool(row["wrong"]) for row in rows),
        "in_a_checkpoint": moments.count("checkpoint"),
        "in_a_cache_file": moments.count("cache"),
        "methods": sorted({f"{row['method']} on {row['processes']}" for row in rows}),
        "rows": rows,
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "sdxl-trainer")},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def prepare(root: Path) -> None:
    data = toyworld.write_folder(root / "pictures", 10, seed=0)
    path = data / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    blueprint.build(root / "base", "tiny", captions=[row["text"] for row in rows])
    for row in rows:
        row["text"] += " shape"  # no word of the tokenizers: the method that learns one learns this
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def config(root: Path, name: str, output: Path) -> Path:
    tree: dict[str, Any] = {
        "output_dir": str(output),
        "model": {"path": str(root / "base")},
        "data": [{"path": str(root / "pictures"), "resolution": 64, "crop": "random", "caption_dropout": 0.2}],
        "cache": {"workers": 0},
        "train": {"steps": STEPS, "batch_size": 4, "micro_batch": 2, "learning_rate": 1e-3, "checkpoint_every": 2},
    }
    tree["train"]["checkpoints_limit"] = 2
    for section, value in METHODS[name].items():
        tree[section] = {**tree.get(section, {}), **value} if isinstance(value, dict) else value
    path = output.with_suffix(".toml")
    path.write_text(dumps(validated(tree, "torture")), encoding="utf-8")
    return path


def worker(path: Path) -> None:
    descriptor = os.open(path.with_suffix(".said"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 2)
    raise SystemExit(guarded(lambda: train(load(path))))


def alone(root: Path, name: str, processes: int) -> float:
    """The run that nothing happens to; gives its seconds."""
    output, began = root / f"alone-{name}-{processes}", time.monotonic()
    exits = ranks.finished(ranks.start(worker, (config(root, name, output),), processes))
    if any(exits):
        sys.exit(f"{name} on {processes}: {exits}\n{output.with_suffix('.said').read_text()}")
    return time.monotonic() - began


def tortured(root: Path, name: str, processes: int, seconds: float, draw: random.Random) -> dict[str, Any]:
    output = root / "tortured"
    files.remove(output)
    path, kills, exits = config(root, name, output), list[dict[str, Any]](), list[int]()
    for number in range(draw.randint(2, MOST) + 1):
        running = ranks.start(worker, (path,), processes)
        if number < MOST:
            kill = killed(running, output, seconds, draw)
            if kill is not None:
                kills.append(kill)
        exits = ranks.finished(running)
        if exits == [0] * processes:
            break
    while -signal.SIGKILL in exits:  # one that is left says so with an exit code of its own
        exits = ranks.finished(ranks.start(worker, (path,), processes))
    return {"method": name, "processes": processes, "kills": kills, "wrong": compared(root, name, processes, exits)}


def killed(running: list[Any], output: Path, seconds: float, draw: random.Random) -> dict[str, Any] | None:
    """Kill the processes at a moment of chance; None if they were done before."""
    kind = draw.choice(["time", "time", "checkpoint", "cache"])
    patterns = {"checkpoint": [".checkpoint-*.tmp"], "cache": ["cache/*/.*.tmp"], "time": []}[kind]
    after, late = draw.uniform(0, seconds), draw.uniform(0, 0.05)
    began = time.monotonic()
    while any(p.is_alive() for p in running):
        seen = any(next(output.glob(pattern), None) for pattern in patterns)
        if seen or (kind == "time" and time.monotonic() - began > after):
            time.sleep(late if seen else 0)
            for process in draw.sample(running, len(running)):
                if process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)
                time.sleep(draw.choice([0.0, 0.0, 0.3]) if len(running) > 1 else 0)
            return {"when": kind, "after": round(time.monotonic() - began, 3)}
        time.sleep(0.001)
    return None


def compared(root: Path, name: str, processes: int, exits: list[int]) -> list[str]:
    """What differs from the run that nothing happened to."""
    ours, theirs = root / "tortured", root / f"alone-{name}-{processes}"
    if any(exits):
        return [f"exit codes {exits}: {(root / 'tortured.said').read_text()[-500:]}"]
    # In the cache a draft may be of another process that writes there too: it is never read, and stays.
    hidden = [p for p in ours.rglob(".*") if "cache" not in p.relative_to(ours).parts]
    wrong = [f"left behind: {p.name}" for p in hidden if p.name.endswith((".tmp", ".old"))]
    # Headers of results tell when the run began: tensors are compared, and whole files of checkpoints.
    hashes = [
        {
            path: digest if path.startswith("checkpoint-") else tensors_of(place / path)
            for path, digest in files.tree_hashes(place).items()
            if path.endswith(".safetensors") and not path.startswith("cache")
        }
        for place in (ours, theirs)
    ]
    both = hashes[0].keys() | hashes[1].keys()
    wrong += [f"differs: {path}" for path in sorted(both) if hashes[0].get(path) != hashes[1].get(path)]
    rows = [
        [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(place / "metrics.jsonl")]
        for place in (ours, theirs)
    ]
    wrong += ["other losses"] if rows[0] != rows[1] else []
    for found in checkpoint.found(ours):
        checkpoint.verify(found)
    shutil.rmtree(ours)
    return wrong


def tensors_of(path: Path) -> str:
    """SHA-256 of all bytes after a safetensors file's header."""
    content = path.read_bytes()
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


if __name__ == "__main__":
    main()
