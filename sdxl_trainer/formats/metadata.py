"""What a file says of itself: `modelspec.*` (Stability-AI/ModelSpec 1.0.1), and the `ss_*` entries that A1111, Forge
and the managers of models look for in adapters. All values are text."""

import json
import struct
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from sdxl_trainer.formats import stream

ARCHITECTURE = "stable-diffusion-xl-v1-base"
REFINER = "stable-diffusion-xl-v1-refiner"
IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"
HASH = "modelspec.hash_sha256"
WORDS = "words"  # of an embedding: [word, vectors] in the order of the rows
SD_HASH, LEGACY_HASH = "sshs_model_hash", "sshs_legacy_hash"
# Without the first A1111 takes an adapter for one of SD 1 and hides it when an SDXL is loaded.
SDXL_ADAPTER = {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"}
_UNFILLED = {HASH: "0x" + "0" * 64, SD_HASH: "0" * 64, LEGACY_HASH: "0" * 8}
# Entries that say how a file is to be read, and nothing of the data or of the machine it was made on.
MINIMAL = (
    *SDXL_ADAPTER,
    "ss_output_name",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
    *(
        f"modelspec.{name}"
        for name in ("sai_model_spec", "architecture", "implementation", "title", "resolution", "prediction_type")
    ),
    "modelspec.trigger_phrase",
    "modelspec.license",
    *_UNFILLED,
)
LEGACY_AT, LEGACY_SIZE = 0x100000, 0x10000


def modelspec(
    title: str,
    *,
    resolution: tuple[int, int] = (1024, 1024),
    v_prediction: bool = False,
    kind: str = "",
    architecture: str = ARCHITECTURE,
    date: datetime | None = None,
    **more: str,
) -> dict[str, str]:
    """The entries for one model. `kind` is 'lora' or 'textual-inversion' for what is not a whole model.

    `resolution` is width and height in pixels. Further entries (author, description, license, tags, ...) are given
    by their names without the prefix. The hash is a place that is filled once the file is written.
    """
    entries = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{architecture}/{kind}" if kind else architecture,
        "implementation": IMPLEMENTATION,
        "title": title,
        "resolution": "{}x{}".format(*resolution),
        "date": (date or datetime.now(UTC)).isoformat(timespec="seconds"),
        "prediction_type": "v" if v_prediction else "epsilon",
        **more,
    }
    return {f"modelspec.{name}": value for name, value in entries.items()} | {HASH: _UNFILLED[HASH]}


def with_places(metadata: Mapping[str, str]) -> dict[str, str]:
    """The entries with places for the hashes that other tools know files by, to be filled as the file is written."""
    return {**metadata, **_UNFILLED}


def reduced(metadata: Mapping[str, str], mode: str) -> dict[str, str]:
    """The entries to keep: 'full' all, 'minimal' what readers need to use the file, 'none' nothing."""
    if mode == "full":
        return dict(metadata)
    return {name: text for name, text in metadata.items() if name in MINIMAL} if mode == "minimal" else {}


def fill_hashes(path: Path, digest: str) -> None:
    """Fill the places left for hashes in a file's header. `digest` is the SHA-256 of all bytes after the header."""
    with path.open("rb+") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        text = file.read(length)
        values = {HASH: f"0x{digest}", SD_HASH: digest}
        if f'"{LEGACY_HASH}":"{_UNFILLED[LEGACY_HASH]}"'.encode() in text:
            values[LEGACY_HASH] = _legacy(path, text, 8 + length)
        for name, value in values.items():
            at = text.find(f'"{name}":"{_UNFILLED[name]}"'.encode())
            if at >= 0:
                file.seek(8 + at)
                file.write(f'"{name}":"{value}"'.encode())


def _legacy(path: Path, header: bytes, start: int) -> str:
    """kohya's short hash: of 64 kB at 1 MB in the file as it would be with its `ss_*` entries alone."""
    import hashlib

    tree = json.loads(header)
    ours = tree.pop("__metadata__", {})
    own = {name: value for name, value in ours.items() if name.startswith("ss_")}
    front = stream.header_bytes({**({"__metadata__": own} if own else {}), **tree})
    head = front[LEGACY_AT : LEGACY_AT + LEGACY_SIZE]
    with path.open("rb") as file:
        file.seek(start + max(0, LEGACY_AT - len(front)))
        return hashlib.sha256(head + file.read(LEGACY_SIZE - len(head))).hexdigest()[:8]
