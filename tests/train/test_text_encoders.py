"""Text encoders that learn: the same step, other rules."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxl_trainer import base as bases
from sdxl_trainer import checkpoint, text
from sdxl_trainer.config import Model
from sdxl_trainer.log import read_metrics
from sdxl_trainer.run import Start
from sdxl_trainer.train import train

RULES = [
    {"match": r"unet\..*"},
    {"match": r"text_encoder\..*", "learning_rate": 5e-4},
    {"match": r"text_encoder_2\..*"},
]


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(output / "metrics.jsonl")]


def test_names_are_known_without_loading(base: Path, tmp_path: Path) -> None:
    found = bases.resolve(Model(path=str(base)), tmp_path)
    encoders = text.load_encoders(found, None, torch.float32)
    real = {f"{part}.{name}" for part, e in zip(text.PARTS, encoders, strict=True) for name, _ in e.named_parameters()}
    assert real <= set(text.parameter_names(found))


@pytest.mark.parametrize("dropped", ["zeros", "empty"])
def test_the_first_loss_is_that_of_cached_embeddings(config: Callable[..., Any], tmp_path: Path, dropped: str) -> None:
    common = {
        "data": [{"caption_dropout": 0.4}],
        "text": {"dropped_caption": dropped},
        "train": {"steps": 1, "batch_size": 6},
    }
    frozen = train(config(**common))
    learning = train(config(**common, learn=RULES, output_dir=str(tmp_path / "learning")))
    assert losses(learning) == pytest.approx(losses(frozen), rel=1e-5)


def test_what_learns_is_saved_and_what_nothing_depends_on_stays(config: Callable[..., Any], base: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    made = config(learn=RULES, ema={"enabled": True}, validation={"prompts": ["a red circle"], "images": 1, "steps": 2})
    output = train(made)
    for part in ("text_encoder", "text_encoder_2"):
        before, after = checkpoint.read_weights(base / part), checkpoint.read_weights(output / part)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        last = {n for n in before if part == "text_encoder" and ("layers.1." in n or "final_layer_norm" in n)}
        assert moved
        assert not moved & last
        assert moved | last | {n for n in before if "k_proj.bias" in n or "position" in n or "embedding" in n} >= set(
            before
        )
        raw = checkpoint.read_weights(output / f"{part}_raw")
        assert any(not torch.equal(raw[name], after[name]) for name in moved)
    pipeline = StableDiffusionXLPipeline.from_pretrained(output)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a red circle", num_inference_steps=1, height=64, width=64).images[0].size == (64, 64)


def test_resume_is_bitwise(config: Callable[..., Any], tmp_path: Path) -> None:
    options = {"learn": RULES, "ema": {"enabled": True}, "data": [{"caption_dropout": 0.3, "flip": True}]}
    whole = train(config(**options, output_dir=str(tmp_path / "whole")))
    part = config(**options, train={"steps": 2})
    train(part)
    parted = train(config(**options), Start("continue"))
    assert losses(parted) == losses(whole)
    for name in ("unet", "unet_raw", "text_encoder", "text_encoder_raw", "text_encoder_2", "text_encoder_2_raw"):
        one, two = (checkpoint.read_weights(output / name) for output in (whole, parted))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
