"""The studio's folder: configs and runs below `runs/`, uploads below `pictures/`, and what was chosen."""

import json
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_trainer import files
from sdxl_trainer.errors import UserError

NAME = re.compile(r"[A-Za-z0-9\u0080-\uffff][\w.-]{0,79}")
# Names that Windows keeps for devices; a folder may be shared with it.
DEVICES = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.IGNORECASE)


def checked_name(name: object) -> str:
    """A name for a run or a folder of uploads, as one part of a path."""
    text = str(name).strip()
    if not NAME.fullmatch(text) or ".." in text or text.endswith(".") or DEVICES.fullmatch(text):
        what = f"'{text[:80]}' cannot be a name"
        raise UserError(what, "name", "use letters, digits, - and _ ; at most 80 of them")
    return text


def inside(folder: Path, name: object) -> Path:
    """The file of that name below a folder. UserError for whatever is not there, or only by way of .. or a link."""
    refusal = UserError(f"there is no file '{str(name)[:120]}' here", folder.name, "choose one that is listed")
    if not isinstance(name, str) or not name or "\0" in name:
        raise refusal
    try:
        root = folder.resolve()
        file = (root / name).resolve()
        if file.is_relative_to(root) and file.is_file():
            return file
    except (OSError, ValueError):
        raise refusal from None
    raise refusal


@dataclass(frozen=True)
class Workspace:
    """Where everything is. Paths in configs and commands are relative to `folder`, in which commands are run."""

    folder: Path

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def state(self) -> Path:
        return self.runs / ".studio"

    def config(self, name: object) -> Path:
        return self.runs / f"{checked_name(name)}.toml"

    def run(self, name: object) -> Path:
        return self.runs / checked_name(name)

    def shown(self, path: Path) -> str:
        """A path as commands name it."""
        return path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else str(path)

    def names(self) -> list[str]:
        """Names of configs and runs, the ones that changed last first."""
        if not self.runs.is_dir():
            return []
        found: dict[str, float] = {}
        for path in self.runs.iterdir():
            is_run = path.is_dir() and (path / "config.toml").is_file()
            name = path.name if is_run else path.stem if path.suffix == ".toml" and path.is_file() else ""
            if NAME.fullmatch(name):
                marks = [p for p in (path, path / "metrics.jsonl") if p.exists()]
                found[name] = max(found.get(name, 0.0), *(p.stat().st_mtime for p in marks))
        return sorted(found, key=lambda name: -found[name])

    def token(self) -> str:
        """The token of this folder's studio, made once: pages that are open outlive a restart."""
        path = self.state / "token"
        if not path.is_file() or len(path.read_text(encoding="ascii", errors="replace")) < 32:
            with files.explained(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch(mode=0o600)
                path.chmod(0o600)
                path.write_text(secrets.token_urlsafe(32), encoding="ascii")
        return path.read_text(encoding="ascii")

    def chosen(self) -> list[Path]:
        """The folders of pictures that were chosen, the latest first, as far as they are there."""
        try:
            names = json.loads((self.state / "folders.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        return [Path(name) for name in names if isinstance(name, str) and Path(name).is_dir()]

    def choose(self, text: object) -> Path:
        """Open a folder of pictures: from now on what is in it may be seen and its captions changed."""
        path = self._folder(text)
        found = [path, *(other for other in self.chosen() if other != path)]
        files.write_json(self.state / "folders.json", [str(p) for p in found[:50]])
        return path

    def opened(self, text: object) -> Path:
        """A folder that was chosen before. UserError for every other one."""
        for path in self.chosen():
            if str(path) == text:
                return path
        raise UserError("this folder was not chosen", str(text)[:200], "choose it first")

    def _folder(self, text: object) -> Path:
        where = str(text)[:200]
        if not isinstance(text, str) or not text.strip() or "\0" in text:
            raise UserError("no folder is named", where, "give the path of a folder of pictures")
        try:
            path = (self.folder / Path(text.strip()).expanduser()).resolve()
            if path.is_dir():
                return path
            kind = "is a file" if path.exists() else "does not exist"
        except (OSError, RuntimeError, ValueError):
            kind = "is not a path"
        raise UserError(f"'{where}' {kind}", "folder", "give the path of a folder of pictures, or browse to it")

    def below(self, text: object) -> dict[str, Any]:
        """What is needed to walk through folders: this one, the one above, and names of those in it."""
        path = self._folder(text) if text else self.folder
        try:
            entries = sorted((p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")), key=str)
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}", str(path), "choose another folder") from None
        return {"path": str(path), "parent": str(path.parent), "folders": [p.name for p in entries[:2000]]}
