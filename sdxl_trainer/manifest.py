"""manifest.json: what a run was made of, so that somebody else can tell or repeat it."""

import json
import os
import platform
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sdxl_trainer import configfile, cpus, files
from sdxl_trainer.config import Config
from sdxl_trainer.data import ledger
from sdxl_trainer.data.prepare import Stock
from sdxl_trainer.run import Job

_PACKAGES = (
    "sdxl-trainer",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "numpy",
    "pillow",
    "bitsandbytes",
)
_SECRETS = ("token", "key", "secret", "password")


def begin(job: Job, stock: Stock) -> None:
    """Write manifest.json and the resolved config.toml."""
    config, groups = job.run.config, job.run.groups
    learning = sum(group.size for group in groups)
    parameters = sum(p.numel() for p in job.run.model.parameters())
    files.write_text(job.output / "config.toml", configfile.dumps(config))
    files.write_json(
        job.output / "manifest.json",
        {
            "versions": {"python": platform.python_version(), **{n: v for n in _PACKAGES if (v := _version(n))}},
            "command": command(sys.argv),
            "hardware": hardware(job.run.accelerator),
            "started": _now(),
            "finished": None,
            "seconds": None,
            "steps": job.run.steps,
            "base": {
                "path": config.model.path,
                "hashes": {part: job.base.hash(part, stock.memo) for part in ("vae", *job.base.encoders)},
            },
            "data": {
                "ledger": ledger.rows(config, stock, job.order),
                "pictures": len(stock.pictures),
                "captions": stock.pictures.distinct_captions(),
                "sets": [
                    {"path": d.path, "pictures": len(stock.pictures.of(i)), "resolution": d.resolution}
                    for i, d in enumerate(config.data)
                ],
            },
            "data_hash": job.data_hash,
            "parameters": {
                "learning": learning,
                "frozen": parameters - learning,
                "rules": [
                    {"match": g.rule, "tensors": len(g.names), "parameters": g.size, "learning_rate": g.learning_rate}
                    for g in groups
                ],
            },
            "config": config.model_dump(mode="json"),
            "timings": {},
        },
    )
    stock.memo.save()


def end(job: Job) -> None:
    """Note that the run is finished, and where its time went."""
    path = job.output / "manifest.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    seconds = time.monotonic() - job.watch.began
    phases = {name: round(spent, 6) for name, spent in job.watch.phases.items()}
    whole |= {"finished": _now(), "seconds": round(seconds, 3), "timings": phases}
    whole["steps_taken"] = job.state.step
    files.write_json(path, whole)


def command(argv: list[str]) -> list[str]:
    """The command line without values of options that look like secrets."""
    own = {"sdxl", "__main__.py"}  # however Python was started, the program has one name
    hidden, shown = False, []
    for word in ["sdxl" if Path(argv[0]).name in own else argv[0], *argv[1:]] if argv else []:
        name, equals, _ = word.partition("=")
        secret = name.startswith("-") and any(part in name.lower() for part in _SECRETS)
        shown.append("***" if hidden else f"{name}=***" if secret and equals else word)
        hidden = secret and not equals
    return shown


def hardware(accelerator: Any) -> dict[str, Any]:
    """What the run computed on."""
    device = accelerator.device
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        import torch

        name = torch.cuda.get_device_name(device)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {
        "device": f"{device.type} ({name})",
        "cores": cpus.allowed(),
        "memory_gb": round(memory, 1),
        "processes": accelerator.num_processes,
    }


def flat(config: Config) -> dict[str, Any]:
    """The config as trackers want it: one level of plain values."""
    rows: dict[str, Any] = {}
    for name, value in config.model_dump(mode="json").items():
        if isinstance(value, dict):
            rows |= {f"{name}.{key}": _plain(inner) for key, inner in value.items()}
        else:
            rows[name] = _plain(value)
    return rows


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | bool) else json.dumps(value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
