"""Benchmarks that no machine here can run as they are meant run small, so that they work where they are."""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

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
    assert '"failed"' not in json.dumps(found)
    assert all(fact["finite"] for fact in found["attention"].values() if "not_here" not in fact)


def test_what_fails_on_a_gpu_is_told_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu
    import torch
    from gpu_step import Bench

    kept = []

    def measure() -> dict[str, float]:
        model = torch.nn.Linear(1, 1)
        model.itself = [model]
        kept.append(weakref.ref(model))
        raise RuntimeError("no compiler here")

    found = gpu._attempt(Bench(torch.device("cpu"), {}, (), (), 1, 0.0), measure)
    assert found == {"failed": "RuntimeError: no compiler here"}
    assert kept[0]() is None


def test_the_page_tells_what_is_met_and_what_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import common
    import page

    def compared(ratio: float) -> dict[str, float | list[float]]:
        return {"ratio": ratio, "quartiles": [ratio, ratio]}

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    peers = {
        "start": {"reference": [8.0], "ours": [2.0], "times_faster": compared(4.0)},
        "resume": {"reference": [8.0], "ours": [4.0], "times_faster": compared(2.0)},
        "memory": {
            "peak_bytes": {
                "caching": {"reference": 10e9, "ours": 4e9},
                "training": {"reference": 10e9, "ours": 6e9},
            },
            "share": {"caching": 0.4, "training": 0.6},
        },
    }
    (tmp_path / "peers.json").write_text(json.dumps(peers), encoding="utf-8")
    found = {target.label: target.row.split(" | ")[1:] for target in page.targets()}
    assert found == {
        "start to the first optimizer step, everything cached": [
            "0.25 × the reference's time",
            "≤ 0.35 × the reference's time",
            "yes |",
        ],
        "start to the step after a checkpoint": [
            "0.5 × the reference's time",
            "≤ 0.3 × the reference's time",
            "**no** |",
        ],
        "memory at most, caching": ["0.4 × the reference's", "≤ 0.5 × the reference's", "yes |"],
        "memory at most, training": ["0.6 × the reference's", "≤ 0.5 × the reference's", "**no** |"],
    }
    assert ("memory at most, encoded", "10.00 GB", "6.00 GB", "1.67 ×") in page.rows()
