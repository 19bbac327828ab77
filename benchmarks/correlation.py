"""Does the validation loss tell which model draws what it is asked for? And the training loss?

micro-SDXL learns the demo's new shape beside shapes that it knows, twenty times: once as it should be done, the other
times with one setting changed, to good or bad, as people change them. After each run stock diffusers draws what fixed
prompts ask for, half of them about the new shape, and the reader of the toy world says what share is right in
everything asked: that is the accuracy. The validation loss is the trainer's own, with its defaults, of pictures that no
run trains on and whose captions come from the same grammar as the prompts; the training loss is what metrics.jsonl
says, over the last tenth of the steps.

Beside these, stock diffusers measures on the same pictures the plain mean of the losses, which the validation loss was
before, and the gain by the caption: by which factor the loss falls when the model is told the caption.

The list of runs was written down before any of it was run. On a first series of these runs measures were compared and
the validation loss was defined as it is; list, definition and analysis were then committed, and everything was drawn
anew for a second: pictures, prompts, the trainings' seed. This is the second.

    python benchmarks/correlation.py [RUN ...] [--work runs/correlation]     what is finished is not run again
    python benchmarks/correlation.py --page      writes docs/validation.md and its picture, and runs nothing
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np

import toyworld
from sdxl_trainer import attach, demo, files
from sdxl_trainer.configfile import validated
from sdxl_trainer.log import read_metrics
from sdxl_trainer.run import Start
from sdxl_trainer.train import train
from toyworld import score

RESULT = common.RESULTS / "correlation.json"
DOCS = Path(__file__).parent.parent / "docs"
SIDE, STEPS, RATE = 128, 240, 7e-4
SHAPES = {kind: demo.shapes_of(kind) for kind in demo.PICTURES}
TRAINED, HELD_OUT, ASKED = {"new": 40, "old": 240}, 60, 96  # the last two of each kind
SEEDS = {"trained": 301, "held-out": 302, "asked": 303, "training": 1}  # in the first series 201, 202, 203, 0
DRAWN = {"num_inference_steps": 12, "guidance_scale": demo.GUIDANCE, "height": SIDE, "width": SIDE}
BATCH = 12
# What is changed, and its name. `data` is about all that is trained, `new` about the new shape's pictures.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "recipe": ("as it should be done", {}),
    "rate-hundredth": ("learning rate a hundredth", {"train": {"learning_rate": RATE / 100}}),
    "rate-tenth": ("learning rate a tenth", {"train": {"learning_rate": RATE / 10}}),
    "rate-4": ("learning rate four times as large", {"train": {"learning_rate": 4 * RATE}}),
    "rate-20": ("learning rate twenty times as large", {"train": {"learning_rate": 20 * RATE}}),
    "short": ("a sixth of the steps", {"train": {"steps": STEPS // 6}}),
    "long": ("twice the steps", {"train": {"steps": 2 * STEPS}}),
    "raw": ("no averaged weights, constant rate", {"ema": {"enabled": False}, "schedule": {"name": "constant"}}),
    "wrong-captions": ("each picture has another one's caption", {"captions": "turned"}),
    "one-caption": ("all pictures have one caption", {"data": {"caption": "a picture", "caption_only": True}}),
    "noise-offset": ("noise offset 0.3", {"objective": {"noise_offset": 0.3}}),
    "min-snr": ("Min-SNR, gamma 5", {"objective": {"snr_gamma": 5.0}}),
    "dropout": ("caption dropout 0.8", {"data": {"caption_dropout": 0.8}}),
    "five": ("five pictures of the new shape", {"new": {"max_samples": 5, "repeats": 240 / 5}}),
    "alone": ("no pictures of old shapes", {"only": "new"}),
    "lora": ("LoRA r8, all layers, 2e-3", {"adapter": {"rank": 8, "targets": "all"}, "train": {"learning_rate": 2e-3}}),
    "lora-weak": ("LoRA r2, attention, 2e-4", {"adapter": {"rank": 2}, "train": {"learning_rate": 2e-4}}),
    "clean": (
        "timesteps below 300 only",
        {"timesteps": {"bias": "range", "begin": 0, "end": 300, "multiplier": 1e6}},
    ),
    "small-batch": ("batches of 2", {"train": {"batch_size": 2}}),
    "flip": ("mirrored half of the time, though captions say left and right", {"data": {"flip": True}}),
}
MEASURES = {
    "validation": "validation loss",
    "training": "training loss, last tenth of the steps",
    "trained": "loss of trained pictures, measured as the validation loss is",
    "plain": "plain mean of the losses of the held-out pictures",
    "gain": "gain by the caption",
}
PARTS = 4  # equal parts of the schedule in each of which a picture is measured once, as the validation loss does


def main() -> None:
    import torch

    parser = common.parser(__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"default: all of {', '.join(RUNS)}")
    parser.add_argument("--work", type=Path, default=Path("runs/correlation"))
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {"runs": {}}
    if "base" not in found and not options.page:
        found["base"] = accuracy(demo.pipeline(demo.BASE))
    for name in [] if options.page else options.runs or RUNS:
        if name not in found["runs"]:
            found["runs"][name] = row = run(name, options)
            common.write("correlation", found)
            print(name, f"{row['accuracy']['all']:.3f}", {kind: round(row[kind], 4) for kind in MEASURES}, flush=True)
    page(found)


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train one of the runs, and ask."""
    tree = settings(name, options.work)
    began, used = time.monotonic(), time.process_time()
    output = train(validated(tree, "benchmarks/correlation.py"), Start("restart"))
    spent = {"seconds": round(time.monotonic() - began, 1), "cpu_seconds": round(time.process_time() - used, 1)}
    rows = read_metrics(output / "metrics.jsonl")
    losses = [row["loss"] for row in rows]
    model = pipeline(name, options.work)
    return {
        "accuracy": accuracy(model),
        **measured(model, options.work),
        "validation": rows[-1]["validation_loss"],
        "interval": rows[-1]["validation_loss_interval"],
        "validation_raw": rows[-1].get("validation_loss_raw", rows[-1]["validation_loss"]),
        "by_timestep": rows[-1]["validation_loss_at"],
        "trained": rows[-1]["trained_loss"],
        "training": statistics.fmean(losses[-len(losses) // 10 :]),
        **spent,
    }


def pipeline(name: str, work: Path) -> Any:
    """A finished run's model in stock diffusers."""
    beside = "adapter" in RUNS[name][1]
    made = demo.pipeline(demo.BASE if beside else work / name)
    attach.attach(made, [str(work / name)] if beside else [])
    return made


def measured(model: Any, work: Path) -> dict[str, float]:
    """Of the squared error of v on the held-out pictures, at `PARTS` timesteps each with noise that is the same for
    every run: the plain mean, and the mean logarithm of how many times as large it is without their captions."""
    import torch
    from PIL import Image

    pixels, captions = [], []
    for kind in SHAPES:
        place = folder(work, "held-out", kind, HELD_OUT)
        for line in (place / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
            captions.append(json.loads(line)["text"])
            pixels.append(np.asarray(Image.open(place / json.loads(line)["file_name"]).convert("RGB")))
    count, schedule = len(captions), model.scheduler.alphas_cumprod.double()
    with torch.no_grad():
        pictures = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
        encoded = [model.vae.encode(some).latent_dist.mode() for some in pictures.split(BATCH)]
        latents = torch.cat(encoded) * model.vae.config.scaling_factor
        embeds, _, pooled, _ = model.encode_prompt(captions, device="cpu", do_classifier_free_guidance=False)
        texts = [(embeds, pooled), (torch.zeros_like(embeds), torch.zeros_like(pooled))]  # as dropped captions are
        sizes = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * count).float()
        errors = np.zeros((2, PARTS, count))
        for part in range(PARTS):
            generator = torch.Generator().manual_seed(part)
            noise = torch.randn(latents.shape, generator=generator)
            share = torch.rand(count, generator=generator)
            times = ((part + share) / PARTS * len(schedule)).long()
            signal, sigma = (a.sqrt().float()[times, None, None, None] for a in (schedule, 1 - schedule))
            noisy, wanted = signal * latents + sigma * noise, signal * noise - sigma * latents
            for number, (states, state) in enumerate(texts):
                given = {"text_embeds": state, "time_ids": sizes}
                guess = model.unet(noisy, times, encoder_hidden_states=states, added_cond_kwargs=given).sample
                errors[number, part] = (guess - wanted).square().mean((1, 2, 3)).numpy()
    told, untold = errors
    return {"plain": float(told.mean()), "gain": float(np.log(untold / told).mean())}


def settings(name: str, work: Path) -> dict[str, Any]:
    """A run's config: the recipe with its changes."""
    changes = dict(RUNS[name][1])
    turned, only = changes.pop("captions", None) is not None, changes.pop("only", None)
    every, new = changes.pop("data", {}), changes.pop("new", {})
    common_options = {"resolution": SIDE, "caption_dropout": 0.1, **every}
    balance = TRAINED["old"] / TRAINED["new"]
    trained = [
        {"path": str(folder(work, "trained", kind, TRAINED[kind], turned)), **common_options, **more}
        for kind, more in (("new", {"repeats": balance, **new}), ("old", {}))
        if only in (None, kind)
    ]
    held = [
        {"path": str(folder(work, "held-out", kind, HELD_OUT)), "resolution": SIDE, "held_out": 1} for kind in SHAPES
    ]
    tree: dict[str, Any] = {
        "output_dir": str(work / name),
        "seed": SEEDS["training"],
        "model": {"path": str(demo.BASE)},
        "data": [*trained, *held],
        "cache": {"path": str(work / "cache")},
        "train": {"steps": STEPS, "batch_size": 12, "learning_rate": RATE, "checkpoint_every": 0},
        "schedule": {"name": "cosine", "warmup_steps": 10},
        "ema": {"enabled": True, "decay": 0.98},
    }
    for section, change in changes.items():
        whole = section == "schedule" or change == {"enabled": False}
        tree[section] = change if whole else {**tree.get(section, {}), **change}
    tree["validation"] = {"loss_every": tree["train"]["steps"]}
    return tree


def folder(work: Path, part: str, kind: str, count: int, turned: bool = False) -> Path:
    """Pictures of one kind with captions, or with the captions turned by one."""
    path = work / f"{part}-{kind}{'-turned' if turned else ''}"
    if not (path / "metadata.jsonl").is_file():
        toyworld.write_folder(
            path, count, SEEDS[part], holdout=None, shapes=SHAPES[kind], count=1, size=(SIDE, SIDE), terse=0.0
        )
        if turned:
            rows = [json.loads(line) for line in (path / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
            texts = [row["text"] for row in rows]
            made = [{**row, "text": text} for row, text in zip(rows, texts[1:] + texts[:1], strict=True)]
            files.write_text(path / "metadata.jsonl", "".join(f"{json.dumps(row)}\n" for row in made))
    return path


def accuracy(drawing: Any) -> dict[str, Any]:
    """The share of prompts answered rightly in all that they ask; and by kind, and of each attribute. `verdicts`: a 1
    for each picture that is right in all, a 0 for each other."""
    import torch

    scenes = {
        kind: [toyworld.scene(SEEDS["asked"], number, shapes=SHAPES[kind], count=1) for number in range(ASKED)]
        for kind in SHAPES
    }
    found: dict[str, Any] = {"verdicts": {}}
    for kind, asked in scenes.items():
        prompts = [toyworld.caption(scene, SEEDS["asked"], number, terse=0.0) for number, scene in enumerate(asked)]
        pictures: list[np.ndarray] = []
        for start in range(0, ASKED, BATCH):
            noise = [torch.Generator().manual_seed(start + number) for number in range(BATCH)]
            drawn = drawing(prompts[start : start + BATCH], generator=noise, output_type="np", **DRAWN).images
            pictures += list((np.nan_to_num(drawn) * 255).round().astype(np.uint8))
        rates = score.accuracy(pictures, asked)
        right = [dict(score.judge(picture, scene))["all"] for picture, scene in zip(pictures, asked, strict=True)]
        found["verdicts"][kind] = "".join("01"[verdict] for verdict in right)
        found |= {f"{kind} {name}": rates[name].rate for name in ("all", "shape", "colour", "place", "background")}
    return {"all": statistics.fmean(found[f"{kind} all"] for kind in SHAPES), **found}


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 0; equal values share the mean of theirs."""
    of = np.asarray(values, dtype=float)
    return (of[:, None] > of).sum(1) + ((of[:, None] == of).sum(1) - 1) / 2


def correlation(losses: Iterable[float], accuracies: Iterable[float]) -> float:
    """Spearman's rank correlation of low losses with high accuracies: 1 where the loss orders models as they are."""
    return float(np.corrcoef(ranks([-loss for loss in losses]), ranks(list(accuracies)))[0, 1])


def interval(losses: Sequence[float], accuracies: Sequence[float], draws: int = 4000) -> tuple[float, float]:
    """The middle 95 % of the correlation over runs drawn with replacement."""
    generator = np.random.Generator(np.random.Philox(0))
    of, right = np.asarray(losses), np.asarray(accuracies)
    chosen = [generator.integers(len(of), size=len(of)) for _ in range(draws)]
    found = [correlation(of[some], right[some]) for some in chosen if len(set(some.tolist())) > 2]
    low, high = np.nanquantile(found, [0.025, 0.975])
    return float(low), float(high)


def agreement(runs: dict[str, dict[str, Any]]) -> float:
    """The rank correlation of the accuracies from every second prompt with those from the others."""
    halves = [
        [
            statistics.fmean(right == "1" for kind in SHAPES for right in row["accuracy"]["verdicts"][kind][half::2])
            for row in runs.values()
        ]
        for half in (0, 1)
    ]
    return -correlation(*halves)


def finished(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The runs that are done, by name, in the order of the list."""
    return {name: found["runs"][name] for name in RUNS if name in found["runs"]}


def page(found: dict[str, Any]) -> None:
    """docs/validation.md and its picture, once there is something to rank."""
    runs = finished(found)
    if len(runs) < 3:
        return
    accuracies = [row["accuracy"]["all"] for row in runs.values()]
    lines = [
        *INTRODUCTION,
        "",
        f"{len(runs)} of {len(RUNS)} runs, 1 where they are ordered as their pictures are right:",
        "",
    ]
    lines += ["| | rank correlation | 95 % interval |", "| --- | --- | --- |"]
    for key, title in MEASURES.items():
        values = [-row[key] if key == "gain" else row[key] for row in runs.values()]
        low, high = interval(values, accuracies)
        lines.append(f"| {title} | {correlation(values, accuracies):.2f} | {low:.2f} to {high:.2f} |")
    lines.append(f"| the accuracy from one half of the prompts with that from the other | {agreement(runs):.2f} | |")
    lines += [
        "",
        *NOTES,
        "",
        "![accuracy of the runs, sorted by validation loss and by training loss](images/validation.svg)",
        "",
    ]
    lines += ["| | changed | validation loss | training loss | gain | right, % | new shape | old shapes |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for number, (name, row) in enumerate(runs.items(), 1):
        right = " | ".join(f"{100 * row['accuracy'][key]:.0f}" for key in ("all", "new all", "old all"))
        title = RUNS[name][0]
        measures = " | ".join(f"{row[key]:.4f}" if key in row else "" for key in ("validation", "training", "gain"))
        lines.append(f"| {number} | {title} | {measures} | {right} |")
    base = " | ".join(f"{100 * found['base'][key]:.0f}" for key in ("all", "new all", "old all"))
    lines += [f"| | the base, before any training | | | | {base} |", ""]
    files.write_text(DOCS / "validation.md", "\n".join(lines))
    files.write_text(DOCS / "images" / "validation.svg", picture(runs))


INTRODUCTION = f"""# Does the validation loss tell the truth?

Made by `python benchmarks/correlation.py` from `benchmarks/results/correlation.json`.

{len(RUNS)} runs teach micro-SDXL the demo's new shape ({TRAINED["new"]} pictures) beside shapes that it knows
({TRAINED["old"]} pictures), each with one setting changed as people change them, well or badly. After each run stock
diffusers answers {2 * ASKED} prompts, half of them about the new shape: "right" is the share of pictures in which
number, shape, colour, place and background are as asked. The validation loss is measured as
[data.md](data.md#held-out-pictures) says, with its defaults, on {2 * HELD_OUT} pictures of a data set of their own
(`held_out = 1`), with captions of the prompts' kind. The training loss is the mean of the last tenth of the steps. All
runs predict v by one schedule.

This is a second series. On a first one of the same runs measures were compared, and the validation loss was defined as
it is ([log.md](log.md#what-the-validation-loss-does-not-see)). Then the list, the definition and this analysis were
committed, and all was drawn anew: the pictures to train on and to measure, the prompts, the trainings' seed.
""".splitlines()


NOTES = """The intervals are of runs drawn with replacement. The gain by the caption is the
mean logarithm of how many times as large the loss of the held-out pictures is without their captions as with them.
What the loss does not see: [log.md](log.md#what-the-validation-loss-does-not-see).
""".splitlines()


def picture(runs: dict[str, dict[str, Any]]) -> str:
    """Accuracy by the place of the run when sorted by validation loss and by training loss, the lowest first; each run
    with its number in the table."""
    width, height, left, top, bottom = 420, 340, 52, 34, 36
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * width} {height}" font-family="sans-serif" '
        'font-size="12" fill="#222">',
        f'<rect width="{2 * width}" height="{height}" fill="#fff"/>',
    ]
    accuracies = [row["accuracy"]["all"] for row in runs.values()]
    wide, tall = width - left - 24, height - top - bottom
    for panel, key in enumerate(("validation", "training")):
        begin, losses = panel * width + left, [row[key] for row in runs.values()]
        for share in (0, 0.25, 0.5, 0.75, 1):
            y = top + (1 - share) * tall
            parts.append(f'<path d="M{begin} {y:.1f}h{wide}" stroke="#ddd"/>')
            parts.append(f'<text x="{begin - 6}" y="{y + 4:.1f}" text-anchor="end">{100 * share:.0f} %</text>')
        title = f"{key} loss: rank correlation {correlation(losses, accuracies):.2f}"
        parts.append(f'<text x="{begin}" y="20" font-size="14">{title}</text>')
        label = "runs, the lowest loss first"
        parts.append(f'<text x="{begin + wide / 2:.0f}" y="{height - 12}" text-anchor="middle">{label}</text>')
        for number, (place, share) in enumerate(zip(ranks(losses), accuracies, strict=True), 1):
            x, y = begin + (place + 0.5) / len(losses) * wide, top + (1 - share) * tall
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#2f6f9f"/>')
            parts.append(f'<text x="{x:.1f}" y="{y - 8:.1f}" font-size="10" text-anchor="middle">{number}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    main()
