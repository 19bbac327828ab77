"""Processes as the reference's scripts meet them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _fresh_process() -> Iterator[None]:
    """accelerate keeps one state per process; each run here stands for a process of its own."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a user who has just installed: no configuration of accelerate, no login."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "HF_", "WANDB_"))}
    home = {"HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "home" / "hf"), "HF_HUB_OFFLINE": "1"}
    return {**kept, **home, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"}
