"""The same config on 1, 2 and 4 processes, replicated and sharded, in several micro-batches: is it the same training?

Everything that is drawn at random is on: buckets with steps that hold several sizes and epochs that end in partial
batches, crops, flips, caption dropout, stratified timesteps, noise offset. Each process notes what its micro-batches
held: which picture, which timestep, and hashes of noise, posterior noise, text and size conditioning. What all
processes of a step noted together has to be the same, sample by sample; the losses have to agree within 1e-5.

    python benchmarks/exactness.py [--steps 50]     writes benchmarks/results/exactness.json and docs/exactness.md
"""

import argparse
import hashlib
import json
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ranks

import toyworld
from sdxl_trainer import blueprint, train
from sdxl_trainer.configfile import dumps, load, validated
from sdxl_trainer.log import read_metrics

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "exactness.json"
PAGE = ROOT / "docs" / "exactness.md"
BEGIN = "<!-- written by benchmarks/exactness.py -->"
# (processes, sharded, micro-batch); the first is what the others are compared with.
ROWS = [
    (1, False, 6),
    (1, False, 1),
    (2, False, 6),
    (4, False, 2),
    (2, True, 2),
    (4, True, 1),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options.steps)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    head = PAGE.read_text(encoding="utf-8").partition(BEGIN)[0]
    PAGE.write_text(f"{head}{BEGIN}\n\n{table(result)}", encoding="utf-8")
    print(table(result))


def measure(folder: Path, steps: int) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for text in ("cached text", "text encoders learn too"):
        prepared = prepare(folder / text.split()[0], steps, text != "cached text")
        first = None
        for processes, sharded, micro in ROWS:
            drawn, losses = run(prepared, processes, sharded, micro)
            first = first or (drawn, losses)
            largest = max(abs(a / b - 1) for a, b in zip(losses, first[1], strict=True))
            same = drawn == first[0]
            rows.append(
                {
                    "learns": text,
                    "processes": processes,
                    "kind": "one" if processes == 1 else "FSDP2" if sharded else "DDP",
                    "micro_batch": micro,
                    "steps": len(losses),
                    "samples": sum(map(len, drawn)),
                    "same_draws": same,
                    "largest_relative_difference": largest,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return {
        "command": f"python benchmarks/exactness.py --steps {steps}",
        "rows": rows,
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "accelerate", "diffusers", "sdxl-trainer")},
    }


def prepare(folder: Path, steps: int, text: bool) -> tuple[Path, dict[str, Any]]:
    folder.mkdir()
    data = toyworld.write_folder(folder / "pictures", 40, seed=0)
    captions = [json.loads(line)["text"] for line in (data / "metadata.jsonl").read_text("utf-8").splitlines()]
    base = blueprint.build(folder / "base", "tiny", captions=captions)
    pictures = {"path": str(data), "resolution": 96, "crop": "random", "flip": True, "crops_per_image": 2}
    tree: dict[str, Any] = {
        "model": {"path": str(base)},
        "data": [{**pictures, "caption_dropout": 0.2, "repeats": 1.15, "buckets": "area", "bucket_step": 16}],
        "cache": {"path": str(folder / "cache"), "workers": 0},
        "objective": {"noise_offset": 0.05, "snr_gamma": 5.0},
        "timesteps": {"sampling": "stratified"},
        "ema": {"enabled": True},
        "train": {"steps": steps, "batch_size": 6, "learning_rate": 1e-5, "checkpoint_every": 0, "precision": "fp32"},
    }
    if text:
        tree["learn"] = [{"match": r"unet\..*"}, {"match": r"text_encoder.*"}]
    return folder, tree


def run(prepared: tuple[Path, dict[str, Any]], processes: int, sharded: bool, micro: int) -> tuple[list[Any], Any]:
    """What each step trained on, and the losses."""
    folder, tree = prepared
    output = folder / f"run-{processes}-{sharded}-{micro}"
    tree = {**tree, "output_dir": str(output), "train": {**tree["train"], "micro_batch": micro, "shard": sharded}}
    config = folder / f"{output.name}.toml"
    config.write_text(dumps(validated(tree, "benchmark")), encoding="utf-8")
    exits = ranks.finished(ranks.start(worker, (config,), processes))
    if any(exits):
        sys.exit(f"{output.name}: exit codes {exits}")
    steps: dict[int, list[Any]] = {}
    for path in output.glob("drawn-*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            step, sample = json.loads(line)
            steps.setdefault(step, []).append(sample)
    losses = [row["loss"] for row in read_metrics(output / "metrics.jsonl")]
    return [sorted(steps[step]) for step in sorted(steps)], losses


def worker(path: Path) -> None:
    """One process of a run, which notes what it trains on."""
    config = load(path)
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    step = train.train_step
    with (output / f"drawn-{os.environ.get('RANK', '0')}.jsonl").open("w", encoding="utf-8") as file:

        def noting(run: Any, state: Any, batches: list[Any], images: int) -> Any:
            for batch in batches:
                for index, name in enumerate(batch.names):
                    if float(batch.weight[index]):  # one without weight only keeps a process company
                        file.write(json.dumps([state.step, described(batch, index, name)]) + "\n")
            return step(run, state, batches, images)

        train.train_step = noting  # type: ignore[assignment]
        train.train(config)


def described(batch: Any, index: int, name: str) -> list[Any]:
    own = [batch.mean, batch.posterior_noise, batch.noise, batch.time_ids]
    own += [t for n, t in batch.text.items() if n in {"pooled", "kept"}]
    digest = hashlib.sha256(b"".join(t[index].contiguous().numpy().tobytes() for t in own)).hexdigest()
    return [Path(name).name, int(batch.timesteps[index]), float(batch.weight[index]), digest[:16]]


def table(result: dict[str, Any]) -> str:
    lines = [
        "| what learns | processes | kind | micro-batch | same draws | largest difference of a loss |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        same = f"yes, all {row['samples']}" if row["same_draws"] else "NO"
        what = "UNet" if row["learns"] == "cached text" else "UNet and text encoders"
        difference = f"{row['largest_relative_difference']:.1e}"
        cells = (what, row["processes"], row["kind"], row["micro_batch"], same, difference)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    steps = result["rows"][0]["steps"]
    foot = f"`{result['command']}`: {steps} steps each, fp32 on a CPU with gloo; {versions}."
    return "\n".join([*lines, "", foot, ""])


if __name__ == "__main__":
    main()
