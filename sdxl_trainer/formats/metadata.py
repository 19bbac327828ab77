"""What a model file says of itself: the `modelspec.*` entries (Stability-AI/ModelSpec 1.0.1)."""

import hashlib
import struct
from datetime import UTC, datetime
from pathlib import Path

ARCHITECTURE = "stable-diffusion-xl-v1-base"
IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"
HASH = "modelspec.hash_sha256"
_UNFILLED = "0x" + "0" * 64


def modelspec(
    title: str,
    *,
    resolution: tuple[int, int] = (1024, 1024),
    v_prediction: bool = False,
    kind: str = "",
    implementation: str = IMPLEMENTATION,
    date: datetime | None = None,
    **more: str,
) -> dict[str, str]:
    """The entries for one model. `kind` is 'lora' or 'textual-inversion' for what is not a whole model.

    `resolution` is width and height in pixels. Further entries (author, description, license, tags, ...) are given
    by their names without the prefix. The hash is a place that `fill_hash` fills once the file is written.
    """
    entries = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{ARCHITECTURE}/{kind}" if kind else ARCHITECTURE,
        "implementation": implementation,
        "title": title,
        "resolution": "{}x{}".format(*resolution),
        "date": (date or datetime.now(UTC)).isoformat(timespec="seconds"),
        "prediction_type": "v" if v_prediction else "epsilon",
        **more,
    }
    return {f"modelspec.{name}": value for name, value in entries.items()} | {HASH: _UNFILLED}


def fill_hash(path: Path) -> None:
    """Put the SHA-256 of a file's tensors (all bytes after the header) into the place left for it in its header."""
    place = f'"{HASH}":"{_UNFILLED}"'.encode()
    with path.open("rb+") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        at = file.read(length).find(place)
        if at >= 0:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(8 + at)
            file.write(place.replace(_UNFILLED.encode(), f"0x{digest}".encode()))
