"""A full-size SDXL (2,567,463,684 UNet parameters, random weights) takes optimizer steps on a CPU within 20 GB."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_trainer.configfile import dumps, validated
from sdxl_trainer.log import read_metrics

STEPS = 2
LIMIT_GB = 20.0


@pytest.mark.large
@pytest.mark.timeout(3000)
def test_full_size_training_fits_into_memory(pictures: Path, tmp_path: Path) -> None:
    build = (
        "import sys, torch; from sdxl_trainer.blueprint import build; build(sys.argv[1], 'sdxl', dtype=torch.bfloat16)"
    )
    base = tmp_path / "sdxl"
    subprocess.run([sys.executable, "-c", build, str(base)], check=True)
    config = validated(
        {
            "output_dir": str(tmp_path / "run"),
            "model": {"path": str(base)},
            "data": [{"path": str(pictures), "resolution": 256}],
            "train": {
                "steps": STEPS,
                "batch_size": 1,
                "learning_rate": 1e-5,
                "weights": "bf16",
                "gradient_checkpointing": True,
                "checkpoint_every": 0,
            },
            "optimizer": {"name": "adafactor"},
        },
        "test",
    )
    path = tmp_path / "run.toml"
    path.write_text(dumps(config), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    subprocess.run([sys.executable, "-m", "sdxl_trainer", "train", str(path)], check=True, env=environment)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    print(f"peak memory {peak:.1f} GB; seconds per step {[round(r['images'] / r['samples_per_second']) for r in rows]}")
    assert manifest["parameters"]["learning"] == 2_567_463_684
    assert [row["step"] for row in rows] == [1, 2]
    assert peak < LIMIT_GB
