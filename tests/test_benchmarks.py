"""Benchmarks that no machine here can run as they are meant run small, so that they work where they are."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_gpu_s_runs_on_a_cpu(tmp_path: Path) -> None:
    size = ["--device", "cpu", "--size", "tiny", "--sides", "64", "--samples", "1", "--steps", "1"]
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *size, "--results", str(tmp_path)]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert found["left_out"] == []
    assert found["full"]["ours fp32, 64 px, batch 1"]["images_per_second"] > 0
    assert found["full"].keys() == {f"{n}, 64 px, batch 1" for n in ("ours bf16", "ours fp32", "reference")}
    assert {"limits", "attention", "full", "adapter", "low_memory", "faster", "drift"} <= found.keys()
    assert all(fact["finite"] for fact in found["attention"].values() if "not_here" not in fact)
