"""How many CPUs a process may keep busy, and how much memory its control group leaves it."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

_GROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def bound() -> int:
    """Those that the process is bound to, or all of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def allowed(groups: Path = _GROUPS, own: Path = _OWN) -> int:
    """Those, or fewer where the process's control group has a quota of CPU time, as containers have: libraries start a
    thread for each CPU that they see, and all of them stand still when their time is used up."""
    return max(1, math.ceil(min([bound(), *_quotas(groups, own)])))


def memory_left(groups: Path = _GROUPS, own: Path = _OWN) -> float:
    """Bytes that the process's control group, and those above it, may still take; infinite without a limit."""
    return min([math.inf, *map(_left, _folders("memory", groups, own))])


def _quotas(groups: Path, own: Path) -> Iterator[float]:
    """CPUs' worth of time of the process's group and of those above it."""
    return map(_quota, _folders("cpu", groups, own))


def _folders(controller: str, groups: Path, own: Path) -> Iterator[Path]:
    """The process's group and those above it, by either version of control groups. In a container the group that is
    named may not be there: then the topmost one is the container's own."""
    lines = own.read_text(encoding="utf-8").splitlines() if own.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and controller not in controllers.split(","):
            continue
        top = groups / controllers
        group = top / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(top))


def _quota(folder: Path) -> float:
    try:
        if (folder / "cpu.max").is_file():
            time, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        else:
            time, period = ((folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period"))
        return int(time) / int(period) if int(time) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # none is set, or it cannot be told
        return math.inf


def _left(folder: Path) -> float:
    """What the files that are cached take does not count: they give way."""
    names = ("memory.max", "memory.current", "inactive_file")
    if not (folder / "memory.max").is_file():
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    try:
        limit, taken = (int((folder / name).read_text(encoding="ascii")) for name in names[:2])
        rows = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        return limit - taken + int(rows.get(names[2], "0"))
    except (OSError, ValueError):  # none is set, or it cannot be told
        return math.inf
