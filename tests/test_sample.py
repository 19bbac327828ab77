"""Pictures: the same as the pipeline of diffusers draws, from live modules and from disk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_trainer import sample
from sdxl_trainer.errors import UserError
from sdxl_trainer.formats.folder import MICRO
from sdxl_trainer.sampling import models, order
from sdxl_trainer.train import train


@pytest.mark.parametrize("zeros", [True, False])
def test_validation_draws_what_the_saved_pipeline_draws(
    config: Callable[..., Any], base: Path, tmp_path: Path, zeros: bool
) -> None:
    """From live modules and cached embeddings; also where the unconditional is the embedding of ''."""
    import shutil

    from diffusers import StableDiffusionXLPipeline

    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    index = json.loads((copy / "model_index.json").read_text()) | {"force_zeros_for_empty_prompt": zeros}
    (copy / "model_index.json").write_text(json.dumps(index))
    validation = {"prompts": ["a red circle"], "images": 2, "steps": 3, "guidance": 4.0, "seed": 5}
    output = train(config(model={"path": str(copy)}, validation=validation, train={"steps": 1}))
    pipeline = StableDiffusionXLPipeline.from_pretrained(output)
    pipeline.set_progress_bar_config(disable=True)
    for image in range(2):
        expected = pipeline(
            "a red circle", num_inference_steps=3, guidance_scale=4.0, height=64, width=64,
            generator=torch.Generator().manual_seed(5 + image),
        ).images[0]  # fmt: skip
        drawn = pixels(output / "samples" / "step-000001" / f"0-{image}.png")
        assert np.abs(drawn - np.asarray(expected)).max() <= 1


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_validation_leaves_training_as_it_was(config: Callable[..., Any], tmp_path: Path) -> None:
    from sdxl_trainer.log import read_metrics

    validation = {"prompts": ["a red circle"], "images": 1, "steps": 1, "every_epochs": 1}
    plain = train(config(ema={"enabled": True}, output_dir=str(tmp_path / "plain")))
    drawn = train(config(ema={"enabled": True}, validation=validation, train={"validate_every": 1}))
    losses = [[row["loss"] for row in read_metrics(output / "metrics.jsonl")] for output in (plain, drawn)]
    assert losses[0] == losses[1]
    steps = {p.name for p in (drawn / "samples").iterdir() if p.is_dir()}
    assert steps == {f"step-{step:06}" for step in range(1, 5)}


def test_pictures_from_disk_are_noted_with_their_settings(base: Path, tmp_path: Path) -> None:
    settings = {"negative": "a blue square", "steps": 2, "guidance": 3.0, "height": 64, "width": 72, "seed": 7}
    wanted = order.made(str(base), settings, ["a red circle", "a green square"], images=2)
    paths = list(sample.run(wanted, tmp_path))
    assert [p.name for p in paths] == ["0-0.png", "0-1.png", "1-0.png", "1-1.png"]
    assert {pixels(path).shape for path in paths} == {(64, 72, 3)}
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == [7, 8, 7, 8]
    assert all(row["negative"] == "a blue square" and row["steps"] == 2 for row in rows)


def test_the_shipped_model_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert models.find("micro").folder == MICRO
    (tmp_path / "micro").mkdir()
    with pytest.raises(UserError, match="no diffusers model here"):
        models.find("micro")
