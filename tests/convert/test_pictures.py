"""Files that a run leaves, and what they are converted into, draw in stock diffusers what the live model drew."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from sdxl_trainer.train import train
from tests.test_sample import pixels

VALIDATION = {"prompts": ["a red circle"], "images": 1, "steps": 3, "guidance": 4.0, "seed": 5}
TRAIN = {"steps": 2, "learning_rate": 1e-2, "checkpoint_every": 0}


def picture(model: Path, base: Path, adapter: Path | None = None) -> np.ndarray:
    """What diffusers draws with a folder or a single file, and an adapter's file."""
    from diffusers import StableDiffusionXLPipeline

    if model.is_dir():
        pipeline: Any = StableDiffusionXLPipeline.from_pretrained(model)
    else:
        pipeline = StableDiffusionXLPipeline.from_single_file(model, config=str(base), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipeline.load_lora_weights(adapter.parent, weight_name=adapter.name)
    drawn = pipeline(
        "a red circle", num_inference_steps=3, guidance_scale=4.0, height=64, width=64,
        generator=torch.Generator().manual_seed(5),
    ).images[0]  # fmt: skip
    return np.asarray(drawn).astype(int)


def test_a_whole_model(config: Callable[..., Any], base: Path, tmp_path: Path, convert: Callable[..., int]) -> None:
    """Text encoders learn too, so that all of the file is of the run."""
    learn = [{"match": r"(unet|text_encoder|text_encoder_2)\..*"}]
    run = train(config(export={"formats": ["single"], "name": "mine"}, validation=VALIDATION, train=TRAIN, learn=learn))
    live = pixels(run / "samples" / "step-000002" / "0-0.png")
    assert np.abs(live - picture(base, base)).max() > 3
    single = picture(run / "mine.safetensors", base)
    assert np.abs(single - live).max() <= 1
    assert np.abs(picture(run, base) - live).max() <= 1
    assert convert(run / "mine.safetensors", tmp_path / "back", "--base", base) == 0
    assert convert(tmp_path / "back", tmp_path / "again.safetensors") == 0
    for path in (tmp_path / "back", tmp_path / "again.safetensors"):
        # Where in memory weights lie decides the order of sums; the weights themselves are the same bits.
        assert np.abs(picture(path, base) - single).max() <= 1
    first, last = load_file(run / "mine.safetensors"), load_file(tmp_path / "again.safetensors")
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_an_adapter(config: Callable[..., Any], base: Path, tmp_path: Path, convert: Callable[..., int]) -> None:
    """Alpha is not the rank, convolutions and text encoders have adapters too."""
    adapter = {"rank": 4, "alpha": 6.0, "targets": "all", "parts": ["unet", "text_encoder", "text_encoder_2"]}
    export = {"formats": ["kohya"], "name": "mine"}
    run = train(config(adapter=adapter, export=export, validation=VALIDATION, train=TRAIN))
    live, own = pixels(run / "samples" / "step-000002" / "0-0.png"), run / "pytorch_lora_weights.safetensors"
    assert np.abs(live - picture(base, base)).max() > 3
    first = picture(base, base, own)
    assert np.abs(first - live).max() <= 1
    assert np.abs(picture(base, base, run / "mine.safetensors") - live).max() <= 1
    assert convert(run / "mine.safetensors", tmp_path / "back") == 0
    assert (picture(base, base, tmp_path / "back" / own.name) == first).all()
