"""Small trainings of micro-SDXL, and what their pictures show.

Text encoders, VAE and tokenizers are micro-SDXL's own. Where a UNet begins anew, it is smaller still and draws 64
pixels: in a hundred steps it learns backgrounds, and where objects are, but neither colours nor shapes of objects.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import toyworld
from sdxl_trainer import demo
from sdxl_trainer.configfile import validated
from sdxl_trainer.log import read_metrics
from sdxl_trainer.train import train

SIDE = 64
SEEDS = (0, 1, 2)
UNET = {"block_out_channels": [32, 48, 64], "attention_head_dim": [1, 2, 2], "norm_num_groups": 4}
# For those that begin anew: batches of 32, matrices by Muon, averaged weights.
ANEW: dict[str, Any] = {
    "timesteps": {"bias": "later", "portion": 0.6, "multiplier": 3.0},
    "train": {"steps": 120, "batch_size": 32, "learning_rate": 5e-3},
    "optimizer": {"name": "muon", "betas": [0.9, 0.99]},
    "schedule": {"name": "linear", "warmup_steps": 10},
    "ema": {"enabled": True, "decay": 0.95},
}

Asked = Sequence[tuple[toyworld.Scene, str]]


def base(place: Path, **scheduler: Any) -> Path:
    """micro-SDXL whose schedule does not end in pure noise, as that of SDXL, with further changes to its scheduler."""
    path = place / "-".join(["base", *(f"{name}-{value}" for name, value in scheduler.items())])
    if not path.exists():
        shutil.copytree(demo.BASE, path)
        settings = path / "scheduler" / "scheduler_config.json"
        changed = json.loads(settings.read_text(encoding="utf-8")) | {"rescale_betas_zero_snr": False} | scheduler
        settings.write_text(json.dumps(changed), encoding="utf-8")
    return path


def pictures(place: Path, name: str, count: int, size: tuple[int, int], terse: float = 0.0) -> Path:
    """Drawn scenes of one object each, all of one size (height, width); `terse`: see `toyworld.caption`."""
    path = place / name
    if not path.exists():
        toyworld.write_folder(path, count, 21, holdout=None, count=1, size=size, terse=terse)
    return path


def trained(out: Path, model: dict[str, Any], data: dict[str, Any], seed: int, *sections: dict[str, Any]) -> Path:
    """The pipeline after a training; later `sections` are laid over earlier ones."""
    settings: dict[str, Any] = {"cache": {"path": str(out.parent / "cache"), "batch_size": 32, "workers": 0}}
    settings["train"] = {"precision": "fp32", "checkpoint_every": 0}
    for more in sections:
        settings |= {name: settings.get(name, {}) | options for name, options in more.items()}
    whole = settings | {"output_dir": str(out), "seed": seed, "model": model, "data": [data]}
    return train(validated(whole, out.name))


def validation_losses(model: Path) -> list[float]:
    """Of the held-out pictures, in each quarter of the schedule from clean to noisy, as they were last measured."""
    found = [row["validation_loss_at"] for row in read_metrics(model / "metrics.jsonl") if "validation_loss_at" in row]
    return [found[-1][middle] for middle in sorted(found[-1], key=int)]


def drawn(model: Path, asked: Asked, guidance: float, side: int = SIDE, **more: Any) -> list[np.ndarray]:
    """One picture [side, side, 3] for each caption; its first noise depends on its number alone."""
    import torch

    pipeline = demo.pipeline(model)
    found: list[np.ndarray] = []
    for start in range(0, len(asked), 48):
        words = [caption for _, caption in asked[start : start + 48]]
        noise = [torch.Generator().manual_seed(start + index) for index in range(len(words))]
        settings = {"height": side, "width": side, "num_inference_steps": 16, "guidance_scale": guidance} | more
        images = pipeline(words, generator=noise, output_type="np", **settings).images
        found += list((images * 255).round().astype(np.uint8))
    return found


def frame(picture: np.ndarray) -> np.ndarray:
    """The colour [3] of a picture's outer three pixels, where no object is."""
    inside = np.zeros(picture.shape[:2], bool)
    inside[3:-3, 3:-3] = True
    return np.median(picture[~inside].astype(np.float32), axis=0)


def over_seeds(name: str, measure: Callable[[int], Any]) -> float:
    """The mean; what it is made of is printed."""
    values = [float(measure(seed)) for seed in SEEDS]
    print(f"\n{name}: {np.mean(values):.3f} of {', '.join(f'{value:.3f}' for value in values)}", flush=True)
    return float(np.mean(values))
