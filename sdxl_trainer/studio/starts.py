"""Ways to start: presets, as `sdxl train FOLDER --preset NAME` makes whole configs of them, and configs of other
trainers, as `sdxl convert` does."""

import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from sdxl_trainer import arrivals, from_folder
from sdxl_trainer import presets as known
from sdxl_trainer.errors import UserError
from sdxl_trainer.from_folder import Wish
from sdxl_trainer.studio import settings
from sdxl_trainer.studio.workspace import Workspace


def presets() -> list[dict[str, Any]]:
    """All presets: what each is for, and for how many pictures."""
    found = [known.read(name) for name in known.names()]
    return [{"name": p.name, "what": p.what, "pictures": p.pictures, "steps": p.steps} for p in found]


def begun(workspace: Workspace, sent: Mapping[str, Any], name: str) -> tuple[dict[str, Any], dict[str, str], str]:
    """A new config's values and notes, and the command that would write and train the same."""
    folder = workspace.opened(sent.get("folder"))
    model = "micro" if sent.get("micro") else _text(sent.get("model"))
    wish = Wish(_text(sent.get("trigger")), _text(sent.get("preset")), model, name)
    tree, notes = from_folder.begun(folder, wish, name)
    given = {"--trigger": wish.trigger, "--preset": wish.preset, "--model": wish.model, "--name": name}
    options = [part for flag, value in given.items() if value for part in (flag, value)]
    return tree, notes, shlex.join(["sdxl", "train", workspace.shown(folder), *options])


def arrived(workspace: Workspace, sent: Mapping[str, Any], name: str) -> list[str]:
    """Write a config of another trainer, {"file": name, "text": ...}, as one of ours; what became of each option, what
    was not simply kept first."""
    file = PurePosixPath(str(sent.get("file") or "").replace("\\", "/"))
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"config{file.suffix[:8]}"
            path.write_text(str(sent.get("text") or ""), encoding="utf-8", errors="replace")
            source = arrivals.identify(path, None)
            account, _ = arrivals.understood(source, None)
    except UserError as error:
        fix = (
            f"sdxl convert {file.name} runs/{name}.toml --data FILE, in a terminal"
            if "--data" in error.fix
            else error.fix
        )
        raise UserError(error.what, file.name[:120], fix) from None
    source = replace(source, path=Path(file.name))
    settings.create(workspace, name, account.tree, head=arrivals.head(source, account))
    lines = account.lines()
    return [account.counts(), *sorted(lines, key=lambda line: line.startswith(("kept", "off")))]


def _text(value: object) -> str | None:
    return str(value).strip() or None if value else None
