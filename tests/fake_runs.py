"""Folders of runs as training leaves them, made up: for tests of the report."""

import json
import math
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

HOSTILE = '<script>alert("1")</script> \'"><img src=x onerror=alert(2)> & a cat'
CONFIG = """output_dir = "runs/shapes"
seed = 7

[model]
path = "models/micro"

[[data]]
path = "photos/shapes"
resolution = 128

[train]
steps = {steps}
batch_size = 4
learning_rate = 1e-4

[validation]
prompts = ["a red circle", "a blue square"]
guidance = 4.5
"""
MANIFEST: dict[str, Any] = {
    "versions": {"sdxl-trainer": "0.1.0", "torch": "2.8.0+cpu", "diffusers": "0.42.1"},
    "command": ["sdxl", "train", "shapes config.toml", "train.steps=400"],
    "hardware": {"device": "AMD EPYC 7B13", "cores": 2, "memory_gb": 15.6, "processes": 1},
    "started": "2025-03-01T09:15:00+00:00",
    "finished": "2025-03-01T09:21:12+00:00",
    "seconds": 372.4,
    "base": {"path": "models/micro", "hashes": {"unet": "ab" * 32, "vae": "cd" * 32}},
    "data": {
        "pictures": 1234,
        "captions": 2468,
        "sets": [{"path": "photos/shapes", "pictures": 1234, "resolution": 128, "flipped": True, "x": [1]}],
    },
    "parameters": {
        "learning": 5678901,
        "frozen": 1234567,
        "rules": [{"match": r"unet\..*", "tensors": 321, "parameters": 5678901, "learning_rate": 1e-4}],
    },
    "timings": {"loading": 4.25, "caching": 31.0, "training": 290.5, "validation_pictures": 40.0},
}


def picture(prompt: str, seed: int, progress: float, side: int) -> Image.Image:
    """A scene that grows clearer, as training pictures do."""
    draw = random.Random(f"{prompt}{seed}")
    colour = "firebrick" if "red" in prompt else "royalblue"
    image = Image.new("RGB", (side, side), (210, 205, 190))
    x, y, r = draw.uniform(0.35, 0.65) * side, draw.uniform(0.35, 0.65) * side, 0.22 * side
    shape = ImageDraw.Draw(image)
    (shape.ellipse if "circle" in prompt else shape.rectangle)((x - r, y - r, x + r, y + r), fill=colour)
    return Image.blend(Image.effect_noise((side, side), 90).convert("RGB"), image, 0.15 + 0.85 * progress)


def draw_samples(folder: Path, prompts: tuple[str, ...], steps: range, seeds: int, side: int, ema: bool) -> None:
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    rows = []
    for step in steps:
        for i, prompt in enumerate(prompts):
            for seed in range(seeds):
                for weights in ("raw", "ema") if ema and step else ("raw",):
                    file = f"{step:06d}-{i}-{seed}-{weights}.png"
                    picture(prompt, seed, step / max(steps[-1], 1), side).save(folder / "samples" / file)
                    rows.append({"step": step, "file": file, "prompt": prompt, "seed": seed, "weights": weights})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "samples" / "samples.jsonl").write_text(text, encoding="utf-8")


def metrics(steps: int) -> list[dict[str, Any]]:
    draw = random.Random(0)
    return [
        {
            "step": step,
            "epoch": step // 100,
            "loss": 0.05 + 0.25 * math.exp(-4 * step / steps) * draw.lognormvariate(0, 0.5),
            "memory_gb": 3.5 + step / steps,
            "learning_rate": 1e-4 * min(1, step / 40),
            "grad_norm": draw.lognormvariate(-1, 0.4) * (40 if step in (90, 210) else 1),
            "samples_per_second": 4.5 + draw.gauss(0, 0.15),
            "surprise": {"deep": [step]},
        }
        for step in range(1, steps + 1)
    ]


def validation_rows(steps: int, ema: bool, rise: float = 0.0) -> list[dict[str, Any]]:
    """Measures every eighth of a run: falling, on ten pictures; from the middle on rising by `rise`."""
    rows = []
    for step in range(0, steps + 1, max(1, steps // 8)):
        level = 0.3 * math.exp(-3 * step / steps) + rise * max(0.0, step / steps - 0.5)
        for name, weights in [("held_out", "ema")] * ema + [("held_out", "raw"), ("trained", "raw")]:
            pictures = [level * (0.5 + i / 10) + 0.01 * (name == "held_out") for i in range(10)]
            mean = sum(pictures) / 10
            rows.append(
                {
                    "step": step,
                    "set": name,
                    "weights": weights,
                    "loss": mean,
                    "interval": 0.05,
                    "timesteps": [125, 375, 625, 875],
                    "by_timestep": [mean * f for f in (2.0, 1.0, 0.7, 0.3)],
                    "pictures": pictures,
                }
            )
    return rows


def write_metrics(folder: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


def fake_run(
    folder: Path,
    steps: int = 400,
    taken: int | None = None,
    side: int = 128,
    prompts: tuple[str, ...] = (),
    ema: bool = True,
) -> Path:
    """A run's folder as training leaves it."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(CONFIG.format(steps=steps), encoding="utf-8")
    finished = {} if taken is None else {"finished": None}
    (folder / "manifest.json").write_text(json.dumps({**MANIFEST, **finished}), encoding="utf-8")
    write_metrics(folder, metrics(steps)[:taken])
    measured = "".join(json.dumps(row) + "\n" for row in validation_rows(steps, ema))
    (folder / "validation.jsonl").write_text(measured, encoding="utf-8")
    prompts = prompts or ("a red circle", "a blue square", HOSTILE)
    draw_samples(folder, prompts, range(0, (taken or steps) + 1, 100), 2, side, ema)
    return folder
