"""`sdxl demo`: micro-SDXL, which comes with the package, learns a shape from twenty pictures. No download."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_trainer import files
from sdxl_trainer.configfile import validated
from sdxl_trainer.formats.folder import MICRO
from sdxl_trainer.log import duration

BASE = MICRO
SHAPE = "hourglass"  # neither the base's pictures nor its captions know it
# Pictures to learn from: of the new shape, and, two for each of it, of those that the base knows and may not forget.
PICTURES, SEEDS = {"new": 20, "old": 1600}, {"new": 33, "old": 55}
RESOLUTION = 128
# As the base was trained: shapes are decided where there is much noise.
TIMESTEPS = {"bias": "later", "portion": 0.6, "multiplier": 3.0}
# Asked before and after, with the same first noises.
ASKED, ASKED_SEED = {"new": 32, "old": 96}, 9077
SHOWN = {"new": 6, "old": 2}
# More guidance than that distorts the shapes of a model as small as this one (docs/log.md).
GUIDANCE = 2.0
DRAWING = {"num_inference_steps": 20, "guidance_scale": GUIDANCE, "height": RESOLUTION, "width": RESOLUTION}
BATCH = 32

Scored = dict[str, dict[str, float]]


def run(out: Path, steps: int) -> None:
    """Draw the pictures, ask the base, train, ask again; print and save what changed."""
    began = time.monotonic()
    with files.explained(out):
        out.mkdir(parents=True, exist_ok=True)
    print(
        f"demo: micro-SDXL draws circles, stars, hearts ... in colours and places; it has never seen an {SHAPE}.\n"
        f"      It is asked for {ASKED['new']} of them, learns from {PICTURES['new']} pictures in {steps} steps, and"
        f" is asked again,\n      also for {ASKED['old']} pictures of shapes that it knew: what was forgotten? Against"
        f" that,\n      {PICTURES['old']:,} pictures of these are mixed in.\n"
        f"      About three minutes on two free CPU cores; nothing is downloaded. Everything goes to {out}",
        flush=True,
    )
    asked = questions()
    before, pictures_before = measure(pipeline(BASE), asked)
    data = [pictures(out / kind, kind) for kind in PICTURES]
    from sdxl_trainer.train import train

    trained = time.monotonic()
    output = train(validated(settings(out, data, steps), "the demo's config"))
    trained = time.monotonic() - trained
    after, pictures_after = measure(pipeline(output), asked)
    sheet = before_after(asked, pictures_before, pictures_after)
    files.write_atomically(output / "before-after.png", lambda path: sheet.save(path, format="PNG"))
    accuracy = {"before": before, "after": after, "training_seconds": round(trained, 1)}
    files.write_json(output / "accuracy.json", accuracy)
    print("\n" + table(before, after))
    print(f"\nthe training took {duration(trained)}, the whole demo {duration(time.monotonic() - began)}")
    print(f"  trained model     {output}")
    print(f"  before and after  {(output / 'before-after.png').resolve()}")
    print(f"  report            {(output / 'report.html').resolve()}")


def settings(out: Path, data: list[Path], steps: int) -> dict[str, Any]:
    """The demo's config as plain data: an ordinary run, which `sdxl train <out>/run/config.toml` would repeat."""
    return {
        "output_dir": str(out / "run"),
        "model": {"path": str(BASE)},
        "data": [
            {"path": str(path), "resolution": RESOLUTION, "caption_dropout": 0.1, "repeats": repeats}
            for path, repeats in zip(data, (PICTURES["old"] // PICTURES["new"] // 2, 1), strict=True)
        ],
        "timesteps": TIMESTEPS,
        "train": {"steps": steps, "batch_size": 16, "learning_rate": 1.3e-3, "checkpoint_every": max(1, steps // 2)},
        "schedule": {"name": "cosine", "warmup_steps": min(10, steps - 1)},
        "ema": {"enabled": True, "decay": 0.98},
        "validation": {"prompts": [words for _, words in questions()["new"][:2]], "images": 2, "guidance": GUIDANCE},
    }


def measure(drawing: Any, asked: dict[str, Any]) -> tuple[Scored, dict[str, list[np.ndarray]]]:
    """Shares, by attribute, of what a pipeline was asked for and drew; and the pictures."""
    from toyworld import score

    pictures = {kind: _drawn(drawing, [words for _, words in pairs]) for kind, pairs in asked.items()}
    rates = {
        kind: {k: rate.rate for k, rate in score.accuracy(pictures[kind], [scene for scene, _ in pairs]).items()}
        for kind, pairs in asked.items()
    }
    return rates, pictures


def shapes_of(kind: str) -> tuple[str, ...]:
    import toyworld

    return (SHAPE,) if kind == "new" else tuple(toyworld.BASE_SHAPES)


def questions() -> dict[str, Any]:
    """(scene, caption) pairs of each kind."""
    import toyworld

    return {kind: toyworld.prompts(count, ASKED_SEED, shapes=shapes_of(kind)) for kind, count in ASKED.items()}


def pictures(folder: Path, kind: str) -> Path:
    """A folder of one kind's pictures with captions, drawn once."""
    import toyworld

    if not (folder / "metadata.jsonl").is_file():
        shapes, size = shapes_of(kind), (RESOLUTION, RESOLUTION)
        holdout = None if kind == "new" else False
        toyworld.write_folder(
            folder, PICTURES[kind], SEEDS[kind], holdout=holdout, shapes=shapes, count=1, size=size, terse=0.0
        )
    return folder


def pipeline(model: Path) -> Any:
    """Stock diffusers, quiet."""
    import torch
    from diffusers import StableDiffusionXLPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    made: Any = StableDiffusionXLPipeline.from_pretrained(model, dtype=torch.float32, add_watermarker=False)
    made.set_progress_bar_config(disable=True)
    return made


def _drawn(drawing: Any, prompts: Sequence[str]) -> list[np.ndarray]:
    """One picture [128, 128, 3] for each prompt; its first noise depends on its number alone."""
    import torch

    found: list[np.ndarray] = []
    for start in range(0, len(prompts), BATCH):
        some = list(prompts[start : start + BATCH])
        noise = [torch.Generator().manual_seed(start + index) for index in range(len(some))]
        drawn = drawing(some, generator=noise, output_type="np", **DRAWING).images
        found += list((drawn * 255).round().astype(np.uint8))
    return found


def before_after(asked: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> Any:
    """A picture of two rows: the same prompts and first noises, before and after."""
    import toyworld

    rows: list[list[np.ndarray]] = [[], []]
    words: list[str] = []
    for kind, count in SHOWN.items():
        rows[0] += before[kind][:count]
        rows[1] += after[kind][:count]
        words += [caption for _, caption in asked[kind][:count]]
    return toyworld.sheet(rows[0] + rows[1], [f"before: {w}" for w in words] + [f"after: {w}" for w in words])


def table(before: Scored, after: Scored) -> str:
    """What was right, in percent, before and after."""
    names = {"new": f"{ASKED['new']} pictures with an {SHAPE}", "old": f"{ASKED['old']} pictures with other shapes"}
    lines = [f"{'right, in percent':<32}{'before':>8}{'after':>8}"]
    for kind, title in names.items():
        lines.append(title)
        for attribute in ("shape", "colour", "place", "background"):
            was, now = before[kind][attribute], after[kind][attribute]
            lines.append(f"  {attribute:<30}{100 * was:8.0f}{100 * now:8.0f}")
    return "\n".join(lines)
