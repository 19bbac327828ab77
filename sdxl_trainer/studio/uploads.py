"""Pictures, captions and archives that the page sends: into a folder of uploads, and nowhere else."""

import shutil
import uuid
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sdxl_trainer.data.sources.tree import METADATA, PICTURES, SIDECARS
from sdxl_trainer.errors import UserError
from sdxl_trainer.studio.workspace import Workspace, checked_name

UNPACKED = 20 << 30  # bytes that an archive may unpack to


def place(workspace: Workspace, sent: Mapping[str, Any]) -> tuple[Path, Path]:
    """Where an uploaded file goes, and the temporary file beside it. UserError for names that are not for data."""
    folder = workspace.folder / "pictures" / checked_name(sent.get("folder"))
    name = PurePosixPath(str(sent.get("name") or "").replace("\\", "/")).name
    if not (_for_data(name) or name.lower().endswith(".zip")) or len(name.encode("utf-8", "replace")) > 200:
        raise UserError(f"'{name[:80]}' is no picture, caption or archive", "upload", "leave it out")
    folder.mkdir(parents=True, exist_ok=True)
    return _free(folder / name), folder / f".{uuid.uuid4().hex}.tmp"


def done(target: Path, partial: Path) -> dict[str, Any]:
    """Put an uploaded file in its place, or unpack it there; says how many files came and which were left out."""
    if target.suffix.lower() != ".zip":
        partial.replace(target)
        return {"added": 1, "left_out": []}
    with zipfile.ZipFile(partial) as archive:
        entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        if sum(entry.file_size for entry in entries) > UNPACKED:
            raise UserError("the archive unpacks to more than 20 GB", target.name, "copy the folder here instead")
        parts = {entry.filename: PurePosixPath(entry.filename.replace("\\", "/")).parts for entry in entries}
        wanted = {
            name: _free(target.parent.joinpath(*at))
            for name, at in parts.items()
            if all(map(_plain, at)) and _for_data("".join(at[-1:]))
        }
        for name, place in wanted.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, place.open("wb") as file:
                shutil.copyfileobj(source, file)
    return {"added": len(wanted), "left_out": [name for name in parts if name not in wanted]}


def _for_data(name: str) -> bool:
    suffix = PurePosixPath(name).suffix.lower()
    return _plain(name) and (suffix in PICTURES or suffix in SIDECARS or name.lower() in METADATA)


def _plain(part: str) -> bool:
    """Whether a part of a path is the name of something that is looked at: not hidden, not .. nor the root."""
    return not part.startswith((".", "__", "/")) and "\0" not in part and ":" not in part


def _free(path: Path) -> Path:
    if path.exists():
        raise UserError(f"there is a file '{path.name}' already", path.parent.name, "choose another folder")
    return path
