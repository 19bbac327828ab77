"""Benchmarks that no machine here can run as they are meant run small, so that they work where they are."""

import json
import os
import statistics
import subprocess
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.made_up_gpu import made_up_gpu, real_gpu

ROOT = Path(__file__).parent.parent


SMALL = ["--size", "tiny", "--sides", "64", "--samples", "1", "--steps", "1", "--compiler", "aot_eager"]
SMALL += ["--minutes", "60"]  # what a busy machine may take


def test_the_gpu_s_runs_on_a_cpu(tmp_path: Path) -> None:
    """Where the package is not installed."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", *SMALL]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    groups = ["--only", "limits,gate,ladder,attention,whole"]
    subprocess.run([*command, *groups, "--results", str(tmp_path)], env=environment, cwd=tmp_path, check=True)
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert found["left_out"] == []
    assert '"failed"' not in json.dumps(found)
    assert all(fact["finite"] for fact in found["attention"].values() if "not_here" not in fact)
    assert found["gate"]["64 px"]["off"]["ours fp32"] < 1e-3
    assert found["gate"]["64 px"]["off"]["ours bf16"] < 1e-2
    assert found["whole"]["sdxl train, 64 px, batch 1, bf16 weights, masters"]["images_per_second"] > 0


def gpu() -> Any:
    """`gpu.py`, where `rows` has found it."""
    import gpu

    return gpu


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`gpu_rows`, on a path where benchmarks find each other."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_rows

    return gpu_rows


def measured(folder: Path, *options: str, call: str = "1") -> dict[str, Any]:
    """What the process that measures writes."""
    gpu().measure(gpu().parse([*SMALL, "--results", str(folder), "--call", call, *options]))
    return json.loads((folder / "gpu.json").read_text(encoding="utf-8"))


def test_the_gpu_s_goes_on_from_an_earlier_call_and_names_what_it_lacks(
    rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = {"one": lambda: {"value": 1}, "two": "no library", "three": lambda: {"value": 3}}
    monkeypatch.setattr(rows, "BENCHMARKS", {"some": lambda bench: iter(some.items()), "more": lambda bench: iter(())})
    cpu = ("--device", "cpu", "--only")
    found = measured(tmp_path, *cpu, "some")
    assert [found["some"][name]["value"] for name in ("one", "three")] == [1, 3]
    assert found["left_out"] == ["some: two: no library"]
    some |= {"one": lambda: {"value": 4}, "two": lambda: {"value": 2}}
    missing = measured(tmp_path, *cpu, "some", "--missing", call="2")
    assert [missing["some"][name]["value"] for name in ("one", "two", "three")] == [1, 2, 3]
    del some["three"]
    found = measured(tmp_path, *cpu, "some", call="3")
    assert [found["some"][name]["value"] for name in ("one", "two", "three")] == [4, 2, 3]
    assert found["left_out"] == []
    late = measured(tmp_path, *cpu, "some", "--minutes", "0", call="4")
    assert late["left_out"] == ["some: one: no time", "some: two: no time"]
    assert "some" in measured(tmp_path, *cpu, "more", call="5")
    assert "some" not in measured(tmp_path, *cpu, "more", "--size", "sdxl", call="6")


def test_what_the_gpu_s_has_no_library_for(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_ladder
    import gpu_step
    import gpu_whole

    for module in (rows, gpu_ladder, gpu_step, gpu_whole):
        monkeypatch.setattr(module, "find_spec", lambda name: None, raising=False)
    bench = rows.bench(gpu().parse(["--device", "cpu", *SMALL]))
    kinds = (rows.full, rows.adapter, rows.gate, rows.whole)
    lacking = {key: why for kind in kinds for key, why in kind(bench) if isinstance(why, str)}
    assert set(lacking.values()) == {"no diffusers", "no bitsandbytes"}
    row = dict(rows.adapter(bench))["bf16 base, batch 1"]
    assert not isinstance(row, str)
    assert row()["layers"] == "like peft's"


def test_the_gpu_s_measures_first_what_counts(rows: Any) -> None:
    bench = rows.bench(gpu().parse(["--device", "cpu"]))
    labels = [f"{name}: {key}" for name, key, _ in gpu().rows(bench, gpu().GROUPS.split(","))]
    assert len(labels) == len(set(labels))
    there = [label for label in gpu().FIRST if not label.startswith("tests")]  # those are for GPUs alone
    assert labels[: len(there)] == there


def test_attention_whose_gradients_are_no_numbers_is_not_finite(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import common

    def attended(function: Any, inputs: Any, up: torch.Tensor) -> list[torch.Tensor]:
        return [torch.ones(1), torch.full((1,), torch.nan if up.dtype == torch.bfloat16 else 1.0), torch.ones(1)]

    monkeypatch.setattr(rows, "_attended", attended)
    (row, *_) = dict(rows.attention(rows.bench(gpu().parse(["--device", "cpu", *SMALL])))).values()
    assert row()["finite"] is False
    assert common.largest([0.1, float("nan"), 0.2]) != common.largest([0.1, 0.2]) == 0.2


class Stands:
    """For streams and graphs of CUDA: what is captured takes place at once, and once more when it is replayed."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> "Stands":
        return self

    def __exit__(self, *_: Any) -> None: ...

    def wait_stream(self, other: "Stands") -> None: ...

    def replay(self) -> None: ...


def test_the_gpu_s_rows_run_on_a_gpu_that_is_made_up(
    rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_ladder
    import gpu_step

    for name in [name for name in gpu_ladder.CHANGES if "compiled" in name]:  # those are taken on the CPU
        monkeypatch.delitem(gpu_ladder.CHANGES, name)
    names = set(gpu().GROUPS.split(",")) - {"gate", "drift", "tests", "whole"}
    monkeypatch.setattr(gpu_step, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu_step.Bench, "seconds", lambda bench, step, warm=3: [(step(), 1.0)[1]])
    for name in ("Stream", "stream", "current_stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, Stands)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 80 << 30))
    with made_up_gpu():
        found = measured(tmp_path, "--only", ",".join(names))
    assert found["device"]["name"] == "a GPU that is made up"
    assert found["graphs"]["graph of the passes, 64 px, batch 1"]["card_bytes"] == 79 << 30
    assert found["full"]["ours fp32, 64 px, batch 1"]["images_per_second"] > 0
    assert names <= found.keys()
    assert '"failed"' not in json.dumps(found)


def test_levels_are_as_far_apart_as_their_last_losses(rows: Any) -> None:
    import gpu_drift

    exact = [2.0] * 40 + [1.0, 1.2] * 5
    found = gpu_drift.compared({"fp32": exact, "bf16": [loss + 0.1 for loss in exact] + [9.0]})
    assert found["steps"] == 50
    error = statistics.stdev([1.0, 1.2] * 5) / 10**0.5
    levels = found["levels"]
    assert levels["fp32"]["apart"] == 0
    assert levels["bf16"]["apart"] == pytest.approx(0.1 / error)
    assert [levels["bf16"][key] for key in ("first", "last")] == pytest.approx([2.1, 1.2])
    assert levels["fp32"]["curve"] == [2.0] * 4 + [1.1]


def test_levels_begin_alike_and_meet_the_same_noise(rows: Any) -> None:
    import gpu_drift

    bench = rows.bench(gpu().parse(["--device", "cpu", *SMALL]))
    exact, other = (gpu_drift.learned(bench, level, 6) for level in ("fp32", "bf16, by chance"))
    assert len({*exact}) == 6
    assert exact != other
    assert other == pytest.approx(exact, rel=0.02)


def test_the_tests_of_a_gpu_are_counted_and_those_that_fail_are_told(
    rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_whole

    failing = tmp_path / "test_that_fails.py"
    failing.write_text("def test_one(): pass\ndef test_other(): assert 1 == 2\n", encoding="utf-8")
    monkeypatch.setattr(gpu_whole, "TESTS", [str(failing)])
    monkeypatch.setattr(gpu_whole, "find_spec", lambda name: None if name == "xdist" else name)
    with made_up_gpu():
        row = dict(rows.tests(rows.bench(gpu().parse(SMALL))))["on this device"]
    found = row()
    assert found["counts"] == {"failed": 1, "passed": 1}
    assert any("test_other" in line for line in found["told"])
    failing.write_text("import nothing_of_this_name\n", encoding="utf-8")
    assert row()["counts"] == {"error": 1}


def test_what_pytorch_tells_of_waiting_for_a_real_gpu_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    def set_mode(mode: str) -> None:
        modes.append(mode)
        if len(modes) == 1:  # PyTorch says it once
            warnings.warn("Synchronization debug mode is a prototype feature", UserWarning, stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with real_gpu() as waits:
        warnings.warn("called a synchronizing CUDA operation (Triggered internally)", UserWarning, stacklevel=1)
    assert len(waits) == 1
    assert "test_benchmarks.py" in waits[0]
    assert modes == ["warn", "default"]


def test_a_row_that_ends_the_process_or_hangs_has_failed_and_the_others_are_measured(tmp_path: Path) -> None:
    """Rows of a program that stands for `gpu.py`, whose process ends at one and hangs at another."""
    program = f"""
import os, pathlib, subprocess, sys, time
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import gpu, gpu_rows
gpu.__file__, gpu.MOST, gpu.USUALLY = __file__, {{"some": 8.0}}, 0.0
some = {{"ends": lambda: os._exit(3), "is": lambda: {{"value": 1}}}}
def hangs():
    beside = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    pathlib.Path("beside").write_text(str(beside.pid))
    time.sleep(60)
some |= {{"hangs": hangs, "is too": lambda: {{"value": 2}}, "raises": lambda: 1 / 0}}
gpu_rows.BENCHMARKS = {{"some": lambda bench: iter(some.items())}}
options = gpu.parse(sys.argv[1:])
gpu.measure(options) if options.call else gpu.main()
"""
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    command = [sys.executable, "program.py", "--device", "cpu", "--only", "some", "--results", "."]
    subprocess.run([*command, *SMALL], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["some"]
    assert [found[name]["value"] for name in ("is", "is too")] == [1, 2]
    assert [name for name, row in found.items() if "failed" in row] == ["ends", "hangs", "raises"]
    beside = int((tmp_path / "beside").read_text())
    assert not psutil.pid_exists(beside) or psutil.Process(beside).status() == psutil.STATUS_ZOMBIE


def test_layers_like_peft_s_compute_what_peft_s_do(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_step

    bench, found = rows.bench(gpu().parse(["--device", "cpu", *SMALL])), []
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
        "drift": {
            "AdamW": {"steps": 500, "levels": {"fp32": {"apart": 0.0}, "bf16": {"apart": 0.4}}},
            "8 bits": {"failed": "no"},
        },
    }
    (tmp_path / "gpu.json").write_text(json.dumps(found), encoding="utf-8")
    figures = [target.found for target in page.gpu_targets()]
    assert figures == [30.0, None, 0.75, 1.5, 7.0, pytest.approx(1 / 3), 7.0, 0.4]


def test_what_fails_on_a_gpu_is_told_and_leaves_nothing_behind(rows: Any) -> None:
    kept = []

    def measure() -> dict[str, float]:
        model = torch.nn.Linear(1, 1)
        model.itself = [model]
        kept.append(weakref.ref(model))
        raise RuntimeError("no compiler here")

    found = rows.attempt(rows.Bench(torch.device("cpu"), {}, (), (), 1, 0.0), measure)
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
