"""DreamBooth on micro-SDXL: how much of its class does a model keep, by what is done for it?

The subject is one circle, which is purple, shown in six pictures under "a sks circle". After the training three things
are counted with the reader of the toy world, for each of several seeds:

    learned  "a sks circle" drawn as a purple circle
    carried  "a large sks circle in the center on a ... background" drawn as one too: words that it was not taught with
    taken    "a large red circle ..." and its like in other colours drawn as a purple circle
    kept     the same drawn as what they say: a circle of that colour on that background

    python benchmarks/prior.py [--seeds 3] [--steps 160] [--work runs/prior]     what is finished is not run again
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

import toyworld
from sdxl_trainer import attach, demo, files
from sdxl_trainer.configfile import validated
from sdxl_trainer.train import train
from toyworld import score

RESULT = Path(__file__).parent / "results" / "prior.json"
SIDE, SUBJECT = 96, ("circle", "purple")
GROUNDS = ("white", "yellow", "green", "orange", "cyan", "pink", "black", "red")
COLOURS = ("red", "blue", "green", "orange", "cyan", "pink", "brown", "yellow")
ASKED, CLASS = 32, 32
WORDS = "a large {C} circle in the center on a {G} background".replace("C", "|".join(COLOURS)).replace(
    "G", "|".join(GROUNDS)
)
PROMPTS = [f"a large {c} circle in the center on a {g} background" for c in COLOURS for g in GROUNDS if c != g]
LORA: dict[str, Any] = {"adapter": {"rank": 8}, "train": {"learning_rate": 6e-3}}
FULL: dict[str, Any] = {"train": {"learning_rate": 4e-4}}
ARMS = {
    f"{method}, {prior}": (options, prior)
    for method, options in (("LoRA", LORA), ("full", FULL))
    for prior in ("nothing", "class pictures", "prior prediction")
}


def subject(folder: Path) -> Path:
    """Six pictures of the circle, on grounds of their own, in several places."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    places = ("center", "left", "right", "top", "bottom", "center")
    for number, (ground, place) in enumerate(zip(GROUNDS, places, strict=False)):
        size = ("large", "small")[number % 2]
        thing = toyworld.Thing(*SUBJECT, "plain", size, place, toyworld.PLACES[place])
        scene = toyworld.Scene((thing,), ground, None, (SIDE, SIDE))
        Image.fromarray(toyworld.draw(scene)).save(folder / f"{number}.png")
    return folder


def settings(work: Path, name: str, seed: int, steps: int) -> dict[str, Any]:
    """An arm as a config. All see the subject equally often; what keeps the class comes on top."""
    options, prior = ARMS[name]
    pictures = str(subject(work / "subject"))
    drawn = {
        "path": str(work / f"class-{seed}"),
        "generate": CLASS,
        "generate_prompts": PROMPTS[::2],
        "generate_steps": 20,
    }
    asked = {"path": pictures, "caption": WORDS, "caption_only": True, "wildcards": True, "caption_variants": CLASS}
    second: dict[str, Any] = {"resolution": SIDE, "regularisation": True}
    beside = {
        "nothing": [],
        "class pictures": [second | drawn],
        "prior prediction": [second | asked | {"prior_prediction": True}],
    }[prior]
    tree: dict[str, Any] = {
        "output_dir": str(work / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"),
        "seed": seed,
        "model": {"path": str(demo.BASE)},
        "data": [{"path": pictures, "caption": "a sks circle", "caption_only": True, "resolution": SIDE}, *beside],
        "cache": {"path": str(work / "cache"), "workers": 0},
        "train": {"steps": steps, "batch_size": 8 if beside else 4, "precision": "fp32", "checkpoint_every": 0},
        "schedule": {"name": "constant_with_warmup", "warmup_steps": 10},
    }
    return {**tree, **options, "train": tree["train"] | options["train"]}


def drawn(pipeline: Any, prompts: list[str]) -> list[np.ndarray]:
    """A picture for each prompt; its first noise depends on its number alone."""
    noise = [torch.Generator().manual_seed(number) for number in range(len(prompts))]
    sizes = {"height": SIDE, "width": SIDE, "num_inference_steps": 12, "guidance_scale": 4.0}
    return list((pipeline(prompts, generator=noise, output_type="np", **sizes).images * 255).round().astype(np.uint8))


def measured(pipeline: Any) -> dict[str, float]:
    """Learned, carried, taken and kept, each from 0 to 1."""
    pairs = [(c, g) for c in COLOURS for g in GROUNDS if c != g][1::2][:ASKED]
    found = {}
    for name, prompts in (
        ("subject", ["a sks circle"] * 16),
        ("elsewhere", [f"a large sks circle in the center on a {ground} background" for _, ground in pairs]),
        ("class", [f"a large {colour} circle in the center on a {ground} background" for colour, ground in pairs]),
    ):
        readings = [score.read(picture) for picture in drawn(pipeline, prompts)]
        found[name] = [((r.things[0].shape, r.things[0].colour) if r.things else None, r.background) for r in readings]
    wanted = [(("circle", colour), ground) for colour, ground in pairs]
    return {
        "learned": statistics.mean(thing == SUBJECT for thing, _ in found["subject"]),
        "carried": statistics.mean(thing == SUBJECT for thing, _ in found["elsewhere"]),
        "taken": statistics.mean(thing == SUBJECT for thing, _ in found["class"]),
        "kept": statistics.mean(seen == asked for seen, asked in zip(found["class"], wanted, strict=True)),
    }


def arm(work: Path, name: str, seed: int, steps: int) -> dict[str, float]:
    output = train(validated(settings(work, name, seed, steps), name))
    beside = "adapter" in ARMS[name][0]
    pipeline = demo.pipeline(demo.BASE if beside else output)
    attach.attach(pipeline, [str(output)] if beside else [])
    return measured(pipeline)


def table(results: dict[str, Any]) -> str:
    """Medians over the seeds, with the smallest and largest."""
    lines = ["| | learned | carried | taken | kept |", "| --- | --- | --- | --- | --- |"]
    for name, runs in {"the base": {"0": results["base"]}, **results["arms"]}.items():
        found = []
        for key in ("learned", "carried", "taken", "kept"):
            values = sorted(100 * run[key] for run in runs.values() if key in run)
            spread = f" ({values[0]:.0f} to {values[-1]:.0f})" if len(values) > 1 else ""
            found.append(f"{statistics.median(values):.0f} %{spread}")
        lines.append(f"| {name} | {' | '.join(found)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--work", type=Path, default=Path("runs/prior"))
    parser.add_argument("--arms", default="LoRA,full", help="methods, with commas")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {"arms": {}}
    if results.setdefault("steps", options.steps) != options.steps:
        results = {"arms": {}, "steps": options.steps}
    results.setdefault("base", None)
    if results["base"] is None:
        results["base"] = measured(demo.pipeline(demo.BASE))
    for seed in range(options.seeds):
        for name in (name for name in ARMS if name.partition(",")[0] in options.arms.split(",")):
            done = results["arms"].setdefault(name, {})
            if "learned" not in done.get(str(seed), {}):
                done[str(seed)] = arm(options.work, name, seed, options.steps)
                print(name, seed, done[str(seed)], flush=True)
                files.write_json(RESULT, results)
    print(table(results))


if __name__ == "__main__":
    main()
