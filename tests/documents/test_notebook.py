"""The commands as functions for notebooks: cheap to import, results that show themselves, errors in three lines."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdxl_trainer import notebook as sdxl
from sdxl_trainer.errors import UserError


def test_nothing_heavy_is_imported_before_the_first_call() -> None:
    code = "import json, sys; from sdxl_trainer import notebook; print(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not set(json.loads(out)) & {"torch", "numpy", "PIL", "diffusers", "transformers", "accelerate", "pydantic"}


def test_a_job_in_a_notebook(tree: Callable[..., dict[str, Any]]) -> None:
    given = tree(train={"steps": 9})
    config = sdxl.load(given, "train.steps=2")
    assert config.train.steps == 2
    assert given["train"]["steps"] == 9, "the caller's data stays as it is"
    page = sdxl.check(config)
    assert "&lt;!DOCTYPE html&gt;" in page._repr_html_()
    assert 'sandbox="allow-scripts"' in page._repr_html_()
    run = sdxl.train(config)
    assert [row["step"] for row in run.metrics] == [1, 2]
    assert "Training loss" in run._repr_html_()
    pictures = sdxl.sample(run, ["a red circle", "a blue square"], images=2, seed=3, steps=2, height=64, width=64)
    assert [picture.size for picture in pictures] == [(64, 64)] * 4
    assert pictures._repr_html_().count('<img src="data:image/png;base64,') == 4
    again = sdxl.sample(run.folder, "a red circle", seed=4, steps=2, height=64, width=64)
    assert again[0].tobytes() == pictures[1].tobytes()
    assert Path(config.output_dir, "config.toml").is_file()
    assert sdxl.load(Path(config.output_dir) / "config.toml", "train.steps=3").train.steps == 3


def test_what_is_wrong_is_shown_in_three_lines() -> None:
    with pytest.raises(UserError) as caught:
        sdxl.load({"output_dir": "x", "model": {"path": "y"}, "data": [{"path": "z"}], "train": {"stepz": 1}})
    assert [line[:7] for line in caught.value._render_traceback_()] == ["error: ", "   at: ", "  fix: "]
    with pytest.raises(UserError, match="guidance"):
        sdxl.sample("model", "prompt", guidanse=3)
