"""The first steps of the recipe are repeated by code that no processor and no environment changes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.recipes.loading import RECIPES, recipe

TOLD = """
import os
import sys

import numpy as np

sys.path.insert(0, sys.argv.pop())
import pinned


def told():
    import torch

    print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), torch.backends.mkldnn.enabled)
    print(torch.backends.nnpack.set_flags(False)[0], os.environ["MKL_CBWR"])
    left = torch.randn(256, 300, generator=torch.Generator().manual_seed(0))
    print(torch.equal(left.abs().sqrt(), torch.from_numpy(np.sqrt(left.abs().numpy()))))
    print((left @ left.T).double().square().sum().item().hex())


pinned.cli.main = told
pinned.main()
"""
ELSEWHERE = {
    "OMP_NUM_THREADS": "2",
    "MKL_NUM_THREADS": "2",
    "MKL_CBWR": "AUTO",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "ATEN_CPU_CAPABILITY": "default",
}


def told(environment: dict[str, str]) -> list[str]:
    command = [sys.executable, "-c", TOLD, RECIPES]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in {"AVX2", "AVX512"}, reason="AVX2 is pinned")
def test_pins_win_over_the_environment() -> None:
    found = told(ELSEWHERE)
    assert found[:3] == ["AVX2 1 False", "False COMPATIBLE", "True"]
    assert found == told({})


def test_a_record_is_compared_loss_by_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repeat = recipe("repeat")
    path = tmp_path / "record.jsonl"
    path.write_text('{"loss": 1.0}\n{"loss": 2.0}\n{"loss": 4.0}\n{"loss": 8.0}\n')
    assert repeat.compared([1.0, 2.001, 4.4], path, "the record") == pytest.approx(0.1)
    assert "1 of 3 losses are the same bits; the first 2 are within 0.001" in capsys.readouterr().out
