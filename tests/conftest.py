"""A tiny SDXL with random weights and pictures drawn here: nothing is downloaded."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# Sums over threads are the same whatever else the machine does, and small models are not faster with more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image

CAPTIONS = [f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("circle", "square")]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL as a diffusers folder."""
    from sdxl_trainer.blueprint import build

    return build(tmp_path_factory.mktemp("base") / "tiny", "tiny", captions=CAPTIONS)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures of several sizes with metadata.jsonl."""
    return draw_folder(
        tmp_path_factory.mktemp("pictures"), [(80, 100), (96, 72), (64, 64), (70, 130), (90, 90), (120, 66)]
    )


def draw_folder(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    rows = []
    for index, (height, width) in enumerate(sizes):
        pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "text": CAPTIONS[index % len(CAPTIONS)]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture
def tree(base: Path, pictures: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Makes the plain data of a small run's config; sections given as keywords are merged into it."""

    def make(**sections: Any) -> dict[str, Any]:
        made: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "model": {"path": str(base)},
            "data": [{"path": str(pictures), "resolution": 64}],
            "cache": {"path": str(base.parent / "cache"), "workers": 0},
            "train": {"steps": 4, "batch_size": 2, "learning_rate": 1e-3, "checkpoint_every": 2},
        }
        for name, value in sections.items():
            if name == "data":
                made["data"] = [{**made["data"][0], **entry} for entry in value]
            else:
                made[name] = {**made.get(name, {}), **value} if isinstance(value, dict) else value
        return made

    return make


@pytest.fixture
def config(tree: Callable[..., dict[str, Any]]) -> Callable[..., Any]:
    """Makes the config of a small run."""
    from sdxl_trainer.configfile import validated

    return lambda **sections: validated(tree(**sections), "test.toml")
