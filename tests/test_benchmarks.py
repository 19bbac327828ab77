"""Benchmarks that no machine here can run as they are meant run small, so that they work where they are."""

import json
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.made_up_gpu import made_up_gpu

ROOT = Path(__file__).parent.parent


def test_the_gpu_s_runs_on_a_cpu(tmp_path: Path) -> None:
    size = ["--device", "cpu", "--size", "tiny", "--sides", "64", "--samples", "1", "--steps", "1"]
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *size, "--results", str(tmp_path)]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert [text for text in found["left_out"] if "bitsandbytes" not in text] == []
    assert found["full"]["ours fp32, 64 px, batch 1"]["images_per_second"] > 0
    names = ("ours bf16", "ours fp32", "reference", "reference's loop, our UNet")
    assert found["full"].keys() == {f"{name}, 64 px, batch 1" for name in names}
    assert {"limits", "attention", "full", "adapter", "low_memory", "graphs", "drift"} <= found.keys()
    assert '"failed"' not in json.dumps(found)
    assert all(fact["finite"] for fact in found["attention"].values() if "not_here" not in fact)


def test_the_gpu_s_goes_on_from_an_earlier_call_and_names_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu
    import gpu_step

    rows = {"one": lambda: {"value": 1}, "two": "no library", "three": lambda: {"value": 3}}
    monkeypatch.setattr(gpu, "BENCHMARKS", {"some": lambda bench: iter(rows.items()), "more": lambda bench: iter(())})
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu_step, "find_spec", lambda name: None)

    def called(*options: str) -> dict[str, Any]:
        given = ["gpu.py", "--device", "cpu", "--size", "tiny", "--results", str(tmp_path), *options]
        monkeypatch.setattr(sys, "argv", given)
        gpu.main()
        return json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))

    found = called()
    assert [found["some"][name]["value"] for name in ("one", "three")] == [1, 3]
    assert found["left_out"] == ["some: two: no library"]
    rows |= {"one": lambda: {"value": 4}, "two": lambda: {"value": 2}}
    del rows["three"]
    found = called("--only", "some")
    assert [found["some"][name]["value"] for name in ("one", "two", "three")] == [4, 2, 3]
    assert found["left_out"] == []
    assert called("--only", "some", "--minutes", "0")["left_out"] == ["some: one: no time", "some: two: no time"]
    assert "some" in called("--only", "more")
    assert "some" not in called("--only", "more", "--size", "sdxl")
    bench = gpu_step.Bench(
        torch.device("cpu"), json.loads(gpu.CONFIG.read_text("utf-8")) | gpu.TINY, (64,), (1,), 1, time.monotonic() + 60
    )
    lacking = {key: why for name in (gpu.full, gpu.adapter) for key, why in name(bench) if isinstance(why, str)}
    assert set(lacking.values()) == {"no diffusers", "no bitsandbytes"}
    row = dict(gpu.adapter(bench))["bf16 base, batch 1"]
    assert not isinstance(row, str)
    assert row()["layers"] == "like peft's"


def test_the_gpu_s_rows_run_on_a_gpu_that_is_made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu
    import gpu_step

    monkeypatch.setattr(gpu_step, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu.Bench, "seconds", lambda bench, step, warm=3: [step() or 1.0])
    size = ["--size", "tiny", "--sides", "64", "--samples", "1", "--only", "full,adapter"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *size, "--results", str(tmp_path)])
    with made_up_gpu():
        gpu.main()
    text = (tmp_path / "gpu.json").read_text(encoding="utf-8")
    assert json.loads(text)["device"]["name"] == "a GPU that is made up"
    assert '"failed"' not in text


def test_layers_like_peft_s_compute_what_peft_s_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu
    import gpu_step

    bench = gpu_step.Bench(
        torch.device("cpu"), json.loads(gpu.CONFIG.read_text("utf-8")) | gpu.TINY, (64,), (1,), 1, 0.0
    )
    found = []
    for library in (True, False):
        monkeypatch.setattr(gpu_step, "find_spec", lambda name, there=library: there or None)
        model = gpu_step.make_unet(bench, torch.float32).requires_grad_(False)
        assert gpu_step.add_lora(model, 4) == ("peft's" if library else "like peft's")
        learning = [p for p in model.parameters() if p.requires_grad]
        for number, p in enumerate(learning):
            torch.nn.init.normal_(p, std=0.02, generator=torch.Generator().manual_seed(number))
        loss = gpu_step.make_passes(model, *gpu_step.make_inputs(bench, 64, 1, torch.float32), torch.float32)()
        found.append([loss, *(p.grad for p in learning)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_the_page_shows_a_gpu_whose_limits_were_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import common
    import page

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    row = {"images_per_second": 25.0, "peak_bytes": 7e9, "operations_per_second": 5e14}
    found = {"device": {"name": "a GPU"}, "full": {"ours": row, "theirs": {"out_of_memory": True}}}
    (tmp_path / "gpu.json").write_text(json.dumps(found), encoding="utf-8")
    assert page.gpu()[-1] == "| ours | 25.0 |  | 7.00 GB |"
    found["limits"] = {"bf16 product": {"operations_per_second": 1e15}}
    (tmp_path / "gpu.json").write_text(json.dumps(found), encoding="utf-8")
    assert page.gpu()[-1] == "| ours | 25.0 | 50% | 7.00 GB |"


def test_the_page_tells_what_a_gpu_is_to_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import common
    import page

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    assert {target.found for target in page.gpu_targets()} == {None}
    assert all("| not measured yet |" in target.row for target in page.gpu_targets())
    fast = {"images_per_second": 30.0, "peak_bytes": 40e9, "operations_per_second": 6e14}
    slow = {"images_per_second": 10.0, "peak_bytes": 7e9}
    found = {
        "limits": {"bf16 product": {"operations_per_second": 8e14}},
        "full": {
            "ours bf16, 1024 px, batch 4": slow,
            "ours bf16, 1024 px, batch 8": fast,
            "ours bf16, 1024 px, batch 16": {"out_of_memory": True},
            "reference, 1024 px, batch 8": {**slow, "images_per_second": 20.0},
        },
        "low_memory": {"bf16, Adafactor, fused backward": slow, "bf16, Adafactor": fast},
        "adapter": {"fp8 base, batch 1": slow, "bf16 base, batch 4": fast, "nf4 base, batch 1": {"failed": "no"}},
    }
    (tmp_path / "gpu.json").write_text(json.dumps(found), encoding="utf-8")
    figures = [target.found for target in page.gpu_targets()]
    assert figures == [30.0, None, 0.75, 1.5, 7.0, pytest.approx(1 / 3), 7.0]


def test_what_fails_on_a_gpu_is_told_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu
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
