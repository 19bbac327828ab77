"""Make the folder that is shipped from a run of the trainer, finished or not: fp16, averaged weights.

    python recipes/micro/ship.py RUN OUT

RUN is the output folder of `sdxl train`; of an unfinished run the last checkpoint is taken. OUT becomes a diffusers
folder with a model card and `hashes.json`, which names the SHA-256 of every other file.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch

from sdxl_trainer import checkpoint, files
from sdxl_trainer.formats import folder

LEARNABLE = ("unet", "text_encoder", "text_encoder_2")
# What the trainer notes of its averages in the UNet's configuration, for other tools that go on with them.
AVERAGING = {"decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power"}
CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# micro-SDXL

A Stable Diffusion XL of {millions:.1f} million parameters with all the parts of the real one: two text encoders with
their tokenizers, a UNet with micro-conditioning, an autoencoder. It draws simple shapes in a place on a plain
background, at 128 x 128 pixels, from captions such as "a large striped red ring in the top right corner on a blue
background". It is made for tests and demonstrations of training code, and knows nothing else.

Trained from random weights for {steps:,} steps on pictures drawn by a program, with the files of `recipes/micro` of
sdxl-trainer. It predicts v, and its noise schedule ends in pure noise.
"""


def sources(run: Path) -> tuple[dict[str, Path], Path, int]:
    """(folder of each part that is written anew, folder of everything else, number of steps) of a run. What did not
    learn is not in a checkpoint, but in the base."""
    if (run / folder.INDEX).exists():
        rows = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return {name: run / name for name in LEARNABLE}, run, json.loads(rows[-1])["step"]
    last = checkpoint.verify(checkpoint.found(run)[-1])
    base = Path(last.state()["config"]["model"]["path"]).expanduser()
    averaged = {name: last.path / f"{name}_ema" for name in LEARNABLE}
    return {name: path if path.exists() else base / name for name, path in averaged.items()}, base, last.step


def half(source: Path, name: str, out: Path) -> int:
    """Write one part's weights in fp16 and its settings; gives its number of parameters."""
    weights = checkpoint.read_weights(source)
    halves = {key: value.half() for key, value in weights.items()}
    broken = [key for key, value in halves.items() if not torch.isfinite(value).all()]
    if broken:
        raise ValueError(f"not finite in fp16: {broken[:3]}")
    folder.write_tensors(out / name / folder.WEIGHTS[name], halves)
    config = json.loads((source / folder.CONFIGS[name]).read_text(encoding="utf-8"))
    for key in {"dtype", "torch_dtype"} & config.keys():
        config[key] = "float16"
    dropped = {"_name_or_path", *(AVERAGING if name == "unet" else ())}
    config = {key: value for key, value in config.items() if key not in dropped}
    files.write_json(out / name / folder.CONFIGS[name], config)
    return sum(value.numel() for value in weights.values())


def ship(run: Path, out: Path) -> dict[str, int]:
    """Write the folder; gives the number of parameters of each part."""
    parts, rest, steps = sources(run)
    if out.exists():
        shutil.rmtree(out)
    counts = {name: half(source, name, out) for name, source in (parts | {"vae": rest / "vae"}).items()}
    for name in (*folder.TOKENIZERS, "scheduler"):
        shutil.copytree(rest / name, out / name)
    card = CARD.format(millions=sum(counts.values()) / 1e6, steps=steps)
    files.write_text(out / "README.md", card)
    files.write_bytes(out / folder.INDEX, (rest / folder.INDEX).read_bytes())
    files.write_json(out / "hashes.json", files.tree_hashes(out))
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the folder that is shipped from a run of the trainer.")
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    counts = ship(arguments.run, arguments.out)
    size = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    print(f"{arguments.out}: {size:,} bytes, {sum(counts.values()):,} parameters:")
    print(", ".join(f"{name} {count:,}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
