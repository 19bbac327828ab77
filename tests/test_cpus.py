"""How many CPUs a process may keep busy: quotas of control groups, as the kernel writes them."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_trainer import cpus

# The process's line, files below the mount, and the CPUs that they allow to one that sees eight.
QUOTAS = {
    "none": ("0::/", {"cgroup.procs": ""}, 8),
    "no limit": ("0::/", {"cpu.max": "max 100000"}, 8),
    "a container's": ("0::/", {"cpu.max": "200000 100000"}, 2),
    "a part counts as one more": ("0::/", {"cpu.max": "250000 100000"}, 3),
    "less than one": ("0::/", {"cpu.max": "50000 100000"}, 1),
    "more than there are": ("0::/", {"cpu.max": "6400000 100000"}, 8),
    "one above": ("0::/pods/one", {"pods/cpu.max": "300000 100000", "pods/one/cpu.max": "max 100000"}, 3),
    "the least of all": ("0::/pods/one", {"cpu.max": "400000 100000", "pods/one/cpu.max": "500000 100000"}, 4),
    "a group of the host": ("0::/kubepods/pod7", {"cpu.max": "200000 100000"}, 2),
    "another's": ("0::/mine", {"others/cpu.max": "100000 100000"}, 8),
    "nonsense": ("0::/", {"cpu.max": "some"}, 8),
    "version 1": (
        "3:cpuset:/\n2:cpu,cpuacct:/docker/a",
        {"cpu,cpuacct/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
        3,
    ),
    "version 1, no limit": (
        "2:cpu:/",
        {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
        8,
    ),
    "version 1, another controller's": (
        "3:cpuset:/\n2:cpu:/",
        {"cpuset/cpu.cfs_quota_us": "100000\n", "cpuset/cpu.cfs_period_us": "100000\n"},
        8,
    ),
}


def laid_out(line: str, written: dict[str, str], place: Path) -> tuple[Path, Path]:
    """The folder of control groups with these files, and the file that says to which a process belongs."""
    own, groups = place / "own", place / "groups"
    own.write_text(line + "\n", encoding="utf-8")
    for name, text in written.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(text, encoding="utf-8")
    return groups, own


@pytest.mark.parametrize(("line", "written", "count"), QUOTAS.values(), ids=list(QUOTAS))
def test_quotas(
    line: str, written: dict[str, str], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpus, "bound", lambda: 8)
    assert cpus.allowed(*laid_out(line, written, tmp_path)) == count


MEMORY = {
    "no limit": ("0::/", {"memory.max": "max", "memory.current": "100", "memory.stat": ""}, math.inf),
    "a container's": ("0::/", {"memory.max": "1000", "memory.current": "400", "memory.stat": "anon 300"}, 600),
    "cached files give way": (
        "0::/",
        {"memory.max": "1000", "memory.current": "400", "memory.stat": "anon 300\ninactive_file 90\n"},
        690,
    ),
    "version 1": (
        "4:memory:/a\n2:cpu:/",
        {
            "memory/memory.limit_in_bytes": "1000\n",
            "memory/memory.usage_in_bytes": "400\n",
            "memory/memory.stat": "total_inactive_file 50\n",
        },
        650,
    ),
    "none": ("0::/", {"cgroup.procs": ""}, math.inf),
}


@pytest.mark.parametrize(("line", "written", "left"), MEMORY.values(), ids=list(MEMORY))
def test_what_memory_is_left(line: str, written: dict[str, str], left: float, tmp_path: Path) -> None:
    assert cpus.memory_left(*laid_out(line, written, tmp_path)) == left


def test_where_nothing_is_known_all_are_allowed(tmp_path: Path) -> None:
    assert cpus.allowed(tmp_path / "none", tmp_path / "none") == cpus.bound() > 0


def test_a_quota_decides_how_many_threads_compute_unless_it_is_said() -> None:
    limited = "import os, sys, types; cpus = sys.modules['sdxl_trainer.cpus'] = types.ModuleType('cpus')\n"
    limited += "cpus.allowed, cpus.bound = lambda: 1, lambda: 64\n"
    code = limited + "import sdxl_trainer, torch; print(os.environ['OMP_NUM_THREADS'], torch.get_num_threads())"
    plain = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    found = []
    for environment in (plain, plain | {"OMP_NUM_THREADS": "2"}):
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        found.append(done.stdout.split())
    assert found[0] == ["1", "1"]
    assert found[1][0] == "2"
