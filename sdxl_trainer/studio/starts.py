"""Ways to start: presets, as `sdxl train FOLDER --preset NAME` makes whole configs of them."""

import shlex
from collections.abc import Mapping
from typing import Any

from sdxl_trainer import from_folder
from sdxl_trainer import presets as known
from sdxl_trainer.from_folder import Wish
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


def _text(value: object) -> str | None:
    return str(value).strip() or None if value else None
