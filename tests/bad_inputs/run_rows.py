"""Bad inputs: the output folder, the disk, checkpoints and the cache."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from sdxl_trainer.formats import stream
from tests.bad_inputs.place import Bad, Place

SHARD_FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


def refuse_writes(place: Place, code: int, below: str) -> None:
    """The system refuses to make files and folders below a folder, as a read-only file system does."""
    top = str(place.root / below)

    def refuse(path: Any) -> None:
        if str(Path(path).absolute()).startswith(top):
            raise OSError(code, os.strerror(code), str(path))

    for name in ("mkdir", "write_bytes", "touch", "rename", "replace"):
        place.patch.setattr(Path, name, _checked(getattr(Path, name), refuse))


def _checked(function: Callable[..., Any], refuse: Callable[[Any], None]) -> Callable[..., Any]:
    def checked(path: Path, *arguments: Any, **options: Any) -> Any:
        if not (function.__name__ == "mkdir" and path.is_dir()):
            refuse(path)
        return function(path, *arguments, **options)

    return checked


def full(place: Place, wanted: str) -> None:
    """The disk is full when a safetensors file is written whose path holds a text."""
    save = safetensors.torch.serialize_file

    def refusing(tensors: Any, path: Any, *arguments: Any, **options: Any) -> Any:
        if wanted in str(path):
            Path(path).write_bytes(b"half")
            raise SafetensorError(SHARD_FULL)
        return save(tensors, path, *arguments, **options)

    place.patch.setattr(safetensors.torch, "serialize_file", refusing)
    write = stream.write

    def refusing_too(path: Path, *arguments: Any, **options: Any) -> str:
        if wanted in str(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, *arguments, **options)

    place.patch.setattr(stream, "write", refusing_too)


def full_for_metrics(place: Place) -> None:
    from sdxl_trainer.log import Metrics

    class Full:
        name = "metrics.jsonl"

        def __init__(self, file: Any) -> None:
            self.fileno, self.close = file.fileno, file.close

        def write(self, rows: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    start = Metrics.__init__

    def starting(self: Any, *arguments: Any) -> None:
        start(self, *arguments)
        if self._file is not None:
            self._file = Full(self._file)

    place.patch.setattr(Metrics, "__init__", starting)


def shard(place: Place, kind: str) -> str:
    path = next((place / "cache" / kind).glob("*.safetensors"))
    return str(path.relative_to(place.root))


CHECKPOINT = "run/checkpoint-2"
WEIGHTS = f"{CHECKPOINT}/unet/diffusion_pytorch_model.safetensors"
STATE = f"{CHECKPOINT}/state.json"
ROWS = [
    Bad("logs outside of the output", "is not allowed", "below output_dir", options={"log.dir": "../../logs"}),
    Bad(
        "output_dir is a file",
        "cannot write: file exists",
        "this path is a file",
        "config.toml",
        make=lambda p: p.set("output_dir", "config.toml"),
    ),
    Bad(
        "output_dir below a file",
        "cannot write: not a directory",
        "is a file",
        make=lambda p: p.set("output_dir", "config.toml/run"),
    ),
    Bad(
        "output_dir of a symlink loop",
        "symbolic links",
        "choose another",
        make=lambda p: ((p / "loop").symlink_to("loop"), p.set("output_dir", "loop/run")),
    ),
    Bad("output_dir's name too long", "name too long", "shorter", options={"output_dir": "x" * 300}),
    Bad("cache.path's name too long", "name too long", "shorter", options={"cache.path": "x" * 300}),
    Bad(
        "output on a read-only disk",
        "read-only file system",
        "can be written",
        "new",
        make=lambda p: (p.set("output_dir", "new"), refuse_writes(p, errno.EROFS, "new")),
    ),
    Bad(
        "output without rights",
        "permission denied",
        "may write",
        "new",
        make=lambda p: (p.set("output_dir", "new"), refuse_writes(p, errno.EACCES, "new")),
    ),
    Bad("cache is a file", "cannot write", "is a file", make=lambda p: p.set("cache.path", "config.toml")),
    Bad(
        "read-only cache",
        "read-only file system",
        "can be written",
        "cold",
        make=lambda p: (p.set("cache.path", "cold"), refuse_writes(p, errno.EROFS, "cold")),
    ),
    Bad(
        "disk full at the cache",
        "no space left",
        "free some space",
        "cold",
        make=lambda p: (p.set("cache.path", "cold"), full(p, "cold")),
    ),
    Bad(
        "disk full at a checkpoint",
        "no space left",
        "free some space",
        "checkpoint-4",
        make=lambda p: full(p, "checkpoint-4"),
        begins=True,
    ),
    Bad(
        "disk full at the pipeline",
        "no space left",
        "free some space",
        "unet",
        make=lambda p: full(p, ".unet."),
        begins=True,
    ),
    Bad(
        "disk full at the metrics",
        "no space left",
        "free some space",
        "metrics.jsonl",
        make=full_for_metrics,
        begins=True,
    ),
    Bad("checkpoint cut short", "is damaged", "delete this folder", "checkpoint-2", make=lambda p: p.cut(WEIGHTS)),
    Bad(
        "checkpoint with a changed byte",
        "is damaged",
        "delete this folder",
        "checkpoint-2",
        make=lambda p: p.flip(WEIGHTS),
    ),
    Bad(
        "checkpoint lacks a file",
        "lacks optimizer.safetensors",
        "delete this folder",
        make=lambda p: p.remove(f"{CHECKPOINT}/optimizer.safetensors"),
    ),
    Bad(
        "checkpoint without manifest",
        "no readable manifest",
        "delete this folder",
        make=lambda p: p.remove(f"{CHECKPOINT}/manifest.json"),
    ),
    Bad(
        "checkpoint's manifest is a list",
        "no readable manifest",
        "delete this folder",
        make=lambda p: p.put(f"{CHECKPOINT}/manifest.json", "[]"),
    ),
    Bad(
        "checkpoint's manifest is empty",
        "does not name",
        "delete this folder",
        make=lambda p: (p.put(f"{CHECKPOINT}/manifest.json", '{"files": {}}'), p.remove(STATE)),
    ),
    Bad(
        "resume at another rate",
        "train.learning_rate = 0.001, not 0.002",
        "set train.learning_rate back",
        "checkpoint-2",
        options={"train.learning_rate": 2e-3},
    ),
    Bad("resume with another seed", "seed = 0, not 1", "set seed back", options={"seed": 1}),
    Bad(
        "resume with other captions",
        "pictures, captions, VAE or text encoders changed",
        "another output_dir",
        make=lambda p: p.put(
            "pictures/metadata.jsonl", (p / "pictures/metadata.jsonl").read_text().replace("green", "blue")
        ),
    ),
    Bad("finished with another seed", "seed = 0, not 1", "set seed back", options={"seed": 1, "train.steps": 2}),
    Bad(
        "fresh in a used folder",
        "already holds a run",
        "another output_dir",
        command=("train", "config.toml", "--fresh"),
    ),
    Bad(
        "manifest is no JSON",
        "not the record of a run",
        "delete it",
        "run/manifest.json",
        make=lambda p: p.put("run/manifest.json", "{"),
    ),
    Bad(
        "manifest of another program",
        "not the record of a run",
        "delete it",
        "run/manifest.json",
        make=lambda p: p.put("run/manifest.json", "[1]"),
    ),
    Bad(
        "metrics damaged",
        "line 1 is damaged",
        "correct or remove that line",
        "run/metrics.jsonl",
        make=lambda p: p.put("run/metrics.jsonl", '"text"\n' + (p / "run/metrics.jsonl").read_text()),
    ),
    Bad(
        "empty cache shard",
        "cut short or damaged",
        "delete it",
        "latents",
        make=lambda p: p.put("cache/latents/none.safetensors", b""),
    ),
    Bad(
        "cache header of another kind",
        "cut short or damaged",
        "delete it",
        "latents",
        make=lambda p: p.put("cache/latents/odd.safetensors", b"\x0f" + b"\0" * 7 + b'{"a":{"b":"c"}}'),
    ),
    Bad(
        "cache header without rows",
        "cut short or damaged",
        "delete it",
        "latents",
        make=lambda p: p.put("cache/latents/odd.safetensors", b"\x02" + b"\0" * 7 + b"{}x"),
    ),
    Bad(
        "verify finds a changed byte",
        "1 of 2 cache files are damaged",
        "delete them",
        "latents",
        make=lambda p: p.flip(shard(p, "latents")),
        command=("cache", "config.toml", "--verify"),
    ),
    Bad(
        "verify finds a short file",
        "1 of 2 cache files are damaged",
        "delete them",
        "texts",
        make=lambda p: p.cut(shard(p, "texts")),
        command=("cache", "config.toml", "--verify"),
    ),
    Bad(
        "verify without a cache",
        "no cache",
        "sdxl cache",
        "cold",
        make=lambda p: p.set("cache.path", "cold"),
        command=("cache", "config.toml", "--verify"),
    ),
]
