"""Small trainings from random weights at 64 pixels, and what their pictures show.

Text encoders, VAE and tokenizers are micro-SDXL's own; only its UNet begins anew.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline

import toyworld
from sdxl_trainer.configfile import validated
from sdxl_trainer.demo import BASE
from sdxl_trainer.train import train

SIDE = 64
SEEDS = (0, 1, 2)
STEPS = 120

Asked = Sequence[tuple[toyworld.Scene, str]]


def pictures(place: Path, name: str = "squares", size: tuple[int, int] = (SIDE, SIDE), count: int = 2000) -> Path:
    """Drawn scenes of one object each, all of one size (height, width)."""
    path = place / name
    if not path.exists():
        toyworld.write_folder(path, count, 21, holdout=None, count=1, size=size, terse=0.0)
    return path


def trained(place: Path, name: str, seed: int, data: dict[str, Any], **sections: dict[str, Any]) -> Path:
    """The pipeline after STEPS steps of 32 pictures; `sections` are laid over the settings that all arms share."""
    out = place / f"{name}-{seed}"
    settings: dict[str, Any] = {
        "timesteps": {"bias": "later", "portion": 0.6, "multiplier": 3.0},
        "train": {"steps": STEPS, "batch_size": 32, "learning_rate": 5e-3, "precision": "fp32", "checkpoint_every": 0},
        "optimizer": {"name": "muon", "betas": [0.9, 0.99]},
        "schedule": {"name": "linear", "warmup_steps": 20},
        "ema": {"enabled": True, "decay": 0.98},
        "cache": {"path": str(place / "cache"), "batch_size": 32, "workers": 0},
    }
    for section, options in sections.items():
        settings[section] = settings.get(section, {}) | options
    model = {"path": str(BASE), "init": "random"}
    data = {"resolution": SIDE, "caption_dropout": 0.1} | data
    config = validated(settings | {"output_dir": str(out), "seed": seed, "model": model, "data": [data]}, name)
    return train(config)


def drawn(
    model: Path, asked: Asked, guidance: float = 3.0, original: tuple[int, int] = (SIDE, SIDE)
) -> list[np.ndarray]:
    """One picture [64, 64, 3] for each caption; its first noise depends on its number alone.
    `original`: the size (height, width) that the UNet is told the picture was cropped from."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(model, dtype=torch.float32, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    found: list[np.ndarray] = []
    for start in range(0, len(asked), 32):
        words = [caption for _, caption in asked[start : start + 32]]
        noise = [torch.Generator().manual_seed(start + index) for index in range(len(words))]
        sizes = {"height": SIDE, "width": SIDE, "num_inference_steps": 20, "guidance_scale": guidance}
        images = pipeline(words, generator=noise, output_type="np", original_size=original, **sizes).images
        found += list((images * 255).round().astype(np.uint8))
    return found
