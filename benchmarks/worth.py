"""What buckets and long captions are worth: micro-SDXL fine-tuned with and without them, asked, and its pictures read.

- buckets: the same pictures, twice as wide as tall or the other way round, in buckets or as square crops from their
  middle. Asked for as many wide and tall pictures.
- long captions: the background's colour is the only thing that a caption says after its 100th token. Chunks of 75, or
  cut off. Asked with captions made alike, encoded as in training.

Both ways start from the same weights and see the same pictures equally often, in the same order of draws, by seed.

python benchmarks/worth.py --seeds 0 1
"""

import json
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from sdxl_trainer import base as bases
from sdxl_trainer import demo, files, text
from sdxl_trainer.chunking import Prompt
from sdxl_trainer.config import Model, TextOptions
from sdxl_trainer.configfile import validated
from sdxl_trainer.train import train

ASKED_SEED = 9077  # no training picture was made with it
WIDE, TALL = (96, 192), (192, 96)  # (height, width)
LONG_SIDE = (64, 64)  # of pictures with long captions, whose backgrounds alone are read
FILLER = "in a picture with a side, "
GROUNDS = ("black", "white", "blue", "yellow")  # of long captions: what the decisive word chooses from
DECISIVE = 100  # the token from which on the decisive word stands
STEPS = {"buckets": 400, "long captions": 240}
RATES = {"buckets": 1e-3, "long captions": 4e-4}
PICTURES = {"buckets": 960, "long captions": 80}  # to learn from
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "buckets": {
        "buckets": {"data": {"buckets": "sizes", "bucket_sizes": [[192, 96], [96, 192]]}},
        "square crops": {"data": {"resolution": 128}},
    },
    "long captions": {
        "chunks": {"data": {"resolution": 64}, "text": {"long_captions": "a1111"}},
        "cut": {"data": {"resolution": 64}, "text": {"long_captions": "cut"}},
    },
}
ATTRIBUTES = {
    "buckets": ("all", "place", "shape", "colour", "background"),
    "long captions": ("background",),
}


def long_caption(tokenizers: Sequence[Any], scene: Any) -> str:
    """What is in the picture and where, words without a meaning, and the background from the 100th token on."""
    thing = scene.things[0]
    words = f"a {thing.colour} {thing.shape} {'in' if thing.place == 'center' else 'at'} the {thing.place}, "
    while min(len(t(words, add_special_tokens=False, verbose=False)["input_ids"]) for t in tokenizers) < DECISIVE:
        words += FILLER
    return f"{words}a {scene.background} background"


def grounds(scenes: Iterable[Any]) -> Iterator[Any]:
    """Those with one of a few backgrounds."""
    return (scene for scene in scenes if scene.background in GROUNDS)


def wide_and_tall(folder: Path, seed: int) -> Path:
    import toyworld

    for number, (name, (height, width)) in enumerate({"wide": WIDE, "tall": TALL}.items()):
        if not (folder / name / "metadata.jsonl").is_file():
            size = (height * 4 // 3, width * 4 // 3)
            toyworld.write_folder(
                folder / name,
                PICTURES["buckets"] // 2,
                100 + 2 * seed + number,
                count=1,
                size=size,
                terse=0.0,
            )
    return folder


def long_captioned(folder: Path, seed: int, tokenizers: Sequence[Any]) -> Path:
    from PIL import Image

    import toyworld

    if not (folder / "metadata.jsonl").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        scenes = grounds(toyworld.scene(200 + seed, index, holdout=False, count=1) for index in count())
        for index, scene in enumerate(islice(scenes, PICTURES["long captions"])):
            Image.fromarray(toyworld.draw(scene, LONG_SIDE)).save(folder / f"{index:03d}.png")
            rows.append({"file_name": f"{index:03d}.png", "text": long_caption(tokenizers, scene)})
        files.write_text(folder / "metadata.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def trained(work: Path, data: Path, seed: int, kind: str, changes: dict[str, dict[str, Any]]) -> Path:
    tree = {
        "output_dir": str(work),
        "seed": seed,
        "model": {"path": str(demo.BASE)},
        "data": [{"path": str(data), "caption_dropout": 0.1, **changes.get("data", {})}],
        "text": changes.get("text", {}),
        "cache": {"path": str(work.parent / "cache"), "workers": 0},
        "train": {
            "steps": STEPS[kind],
            "batch_size": 8,
            "learning_rate": RATES[kind],
            "checkpoint_every": 0,
        },
        "schedule": {"name": "cosine", "warmup_steps": 5},
        "ema": {"enabled": True, "decay": 0.95},
        "timesteps": demo.TIMESTEPS,
    }
    return train(validated(tree, "benchmark"))


def embedded(model: Path, work: Path, prompts: Sequence[str], options: TextOptions) -> dict[str, torch.Tensor]:
    """Embeddings as the training had them, as long as the longest of them."""
    encoders = text.load(bases.resolve(Model(path=str(model)), work), torch.float32, torch.device("cpu"))
    states, pooled = zip(
        *text.encode(encoders, [Prompt(prompt) for prompt in prompts], options),
        strict=True,
    )
    assert len({len(state) for state in states}) == 1
    return {"prompt_embeds": torch.stack(states), "pooled_prompt_embeds": torch.stack(pooled)}


def drawn(
    model: Path,
    work: Path,
    asked: Sequence[tuple[str, tuple[int, int]]],
    options: TextOptions,
) -> list[Any]:
    """A picture for each (prompt, size); its first noise depends on its number alone."""
    pipeline, pictures = demo.pipeline(model), list[Any]()
    for start in range(0, len(asked), 8):
        some = asked[start : start + 8]
        (height, width) = some[0][1]
        noise = [torch.Generator().manual_seed(start + index) for index in range(len(some))]
        size = {**demo.DRAWING, "height": height, "width": width}
        words = embedded(model, work, [prompt for prompt, _ in some], options)
        made = pipeline(**words, generator=noise, output_type="np", **size).images
        pictures += list((made * 255).round().astype(np.uint8))
    return pictures


def measured(model: Path, work: Path, kind: str, options: TextOptions, prompts: int) -> dict[str, float]:
    import toyworld
    from toyworld import score

    pairs = toyworld.prompts(prompts, ASKED_SEED)
    if kind == "long captions":
        scenes = grounds(toyworld.scene(ASKED_SEED, index, count=1) for index in count())
        pairs = [(scene, "") for scene in islice(scenes, prompts)]
    if kind == "buckets":
        asked = [(words, WIDE if number < prompts // 2 else TALL) for number, (_, words) in enumerate(pairs)]
    else:
        tokenizers = text.tokenizers(bases.resolve(Model(path=str(demo.BASE)), work))
        asked = [(long_caption(tokenizers, scene), LONG_SIDE) for scene, _ in pairs]
    pictures = drawn(model, work, asked, options)
    rates = score.accuracy(pictures, [scene for scene, _ in pairs])
    return {name: rates[name].rate for name in ATTRIBUTES[kind]}


def compared(work: Path, kind: str, seeds: Sequence[int], prompts: int) -> dict[str, Any]:
    found: dict[str, Any] = {name: {"rows": {}} for name in WAYS[kind]}
    for name, changes in WAYS[kind].items():
        options = TextOptions(**changes.get("text", {}))
        if kind != "buckets" or name == "buckets":  # of pictures without training both ways are one
            found.setdefault("base", {})[name] = measured(demo.BASE, work, kind, options, prompts)
        for seed in seeds:
            data = work / f"{kind}-{seed}".replace(" ", "-")
            if kind == "buckets":
                wide_and_tall(data, seed)
            else:
                long_captioned(
                    data,
                    seed,
                    text.tokenizers(bases.resolve(Model(path=str(demo.BASE)), work)),
                )
            place = work / f"{kind}-{name}-{seed}".replace(" ", "-")
            output = trained(place, data, seed, kind, changes)
            found[name]["rows"][str(seed)] = measured(output, work, kind, options, prompts)
            print(kind, name, seed, found[name]["rows"][str(seed)], flush=True)
        rows = found[name]["rows"].values()
        found[name]["mean"] = {a: statistics.mean(row[a] for row in rows) for a in ATTRIBUTES[kind]}
    return {**found, "steps": STEPS[kind], "pictures": PICTURES[kind], "prompts": prompts}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--kinds", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--work", type=Path, default=Path("runs/worth"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = common.RESULTS / "worth.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for kind in options.kinds:
        began = time.process_time()
        made = compared(options.work, kind, options.seeds, options.prompts)
        found[kind] = {**made, "cpu_seconds": round(time.process_time() - began)}
        common.write("worth", found)


if __name__ == "__main__":
    main()
