"""Every whole config of the documents trains: as it stands, but on a small model, few pictures and one step."""

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxl_trainer import configfile, objective, schedule
from sdxl_trainer.config import Objective
from sdxl_trainer.train import train
from tests.documents.test_documents import PAGES, ROOT, blocks, name

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}

WHOLE = [
    pytest.param(text, id=f"{name(page)}-{number}")
    for page in PAGES
    for number, text in enumerate(blocks(page, "toml"))
    if {"output_dir", "model", "data", "train"} <= tomllib.loads(text).keys()
]


@pytest.mark.parametrize("text", WHOLE)
def test_it_trains(text: str, base: Path, pictures: Path, tmp_path: Path) -> None:
    tree = tomllib.loads(text)
    photos = tmp_path / "photos"
    photos.mkdir()
    rows = []
    for path in sorted(pictures.glob("*.png")):
        shutil.copy(path, photos)
        rows.append(json.dumps({"file_name": path.name, "text": "a red circle", "focus": [0.5, 0.4]}) + "\n")
    (photos / "metadata.jsonl").write_text("".join(rows), encoding="utf-8")
    output = train(configfile.validated(small(tree, base, photos, tmp_path), "the page's config"))
    (row,) = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(row)["step"] == 1
    assert (output / "report.html").is_file()


def small(tree: dict[str, Any], base: Path, photos: Path, tmp_path: Path) -> dict[str, Any]:
    """The config with another model, other pictures and smaller numbers; everything else stays."""
    data = []
    for entry in tree["data"]:
        drawn = "generate" in entry
        few = {"generate": 1, "generate_steps": 1} if drawn else {}
        held_out = {"held_out": 0.4} if "held_out" in entry else {}
        path = tmp_path / "class" if drawn else photos
        data.append({**entry, "path": str(path), "resolution": 64, **few, **held_out})
    made = {
        **tree,
        "output_dir": str(tmp_path / "run"),
        "model": {"path": str(base)},
        "data": data,
        "cache": {**tree.get("cache", {}), "path": str(tmp_path / "cache"), "workers": 0},
        "train": {**tree["train"], "steps": 1, "batch_size": 2, "micro_batch": 1},
        "log": {},
    }
    if tree["train"].get("weights") != "bf16":
        made["train"]["precision"] = "fp32"
    if "validation" in tree:
        made["validation"] = {**tree["validation"], "steps": 1, "images": 1}
    return made


EXAMPLES = [pytest.param(p.read_text(encoding="utf-8"), id=p.name) for p in sorted((ROOT / "examples").glob("*.toml"))]


@pytest.mark.parametrize("text", [*WHOLE, *EXAMPLES])
def test_zero_terminal_snr_is_not_weighted_away(text: str) -> None:
    """Drawing begins at the last timestep: what has no weight there is not learned, and the rescaling has no effect."""
    chosen = Objective.model_validate_json(json.dumps(tomllib.loads(text).get("objective", {})))
    if not chosen.zero_terminal_snr:
        return
    made = schedule.from_scheduler_config(SDXL, zero_terminal_snr=True)
    weights = objective.Objective(made, str(chosen.prediction), chosen).weight(torch.arange(1000))
    assert weights[900:].sum() / weights.sum() == pytest.approx(0.1, rel=1e-3)
    told = chosen.model_copy(update={"snr_gamma": 5.0})  # what the page says of it
    weights = objective.Objective(made, str(chosen.prediction), told).weight(torch.arange(1000))
    assert weights[900:].sum() / weights.sum() == pytest.approx(0.0003, abs=5e-5)
