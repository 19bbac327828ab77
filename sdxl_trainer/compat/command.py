"""A command line of the reference becomes a config, by a script's flags and steps."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_trainer.compat.flags import WHERE, Flag, read
from sdxl_trainer.errors import UserError

if TYPE_CHECKING:
    from sdxl_trainer.config import Config
    from sdxl_trainer.run import Start

# Where accelerate and torchrun, or an MPI launcher, say how many processes there are.
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# Long captions are cut as by the scripts, and by the pipeline that its users draw with; the cut ones are counted.
_BEGIN: dict[str, Any] = {"data": [{}], "text": {"long_captions": "cut"}, "optimizer": {"betas": [None, None]}}


@dataclass(frozen=True)
class Job:
    """What a command line asks for. `token` is kept apart from the config, which is written to files. `flagged` makes
    a message about the config one about the flags."""

    config: "Config"
    start: "Start"
    notes: tuple[str, ...]
    token: str | None = None
    flagged: Callable[[str], str] = str


@dataclass(frozen=True)
class Script:
    """A script of the reference. `steps` translate what takes more than one flag, in this order; `names` says which
    flags set the options that they set, for messages. `project` is what trackers call its runs."""

    name: str
    description: str
    project: str
    flags: tuple[Flag, ...]
    steps: "tuple[Callable[[Command], None], ...]"
    names: Mapping[str, str]


@dataclass(frozen=True)
class Command:
    """A command line while it is being translated: `tree` grows into the config, `notes` are lines to be said."""

    script: Script
    flags: dict[str, Any]
    given: frozenset[str]
    environment: Mapping[str, str]
    draw_seed: Callable[[], int]
    tree: dict[str, Any] = field(default_factory=lambda: deepcopy(_BEGIN))
    notes: list[str] = field(default_factory=list)

    @property
    def processes(self) -> int:
        return number(self.environment, WORLD_SIZES, 1)

    def put(self, path: str, value: Any) -> None:
        node: Any = self.tree
        parts: list[Any] = [int(part) if part.isdigit() else part for part in path.split(".")]
        *parents, last = parts
        for part in parents:
            node = node[part] if isinstance(node, list) else node.setdefault(part, {})
        node[last] = value

    def drop(self, path: str) -> None:
        section, name = path.split(".")
        self.tree[section].pop(name, None)

    def flagged(self, text: str) -> str:
        """A message about the config as one about the flags; an option that no flag sets keeps its name."""
        names = {**self.script.names, **{flag.to: flag.name for flag in self.script.flags if flag.to}}
        for path, name in names.items():
            # A path without a dot is also a word, and an option only before its value.
            end = r"(?![\w.])" if "." in path else "(?= = )"
            text = re.sub(rf"(?<![\w.-]){re.escape(path)}{end}", name, text)
        return text


def translate(script: Script, argv: Sequence[str], environment: Mapping[str, str], draw_seed: Callable[[], int]) -> Job:
    """The job of a command line in an environment; `draw_seed` is asked when no seed is given."""
    flags, given = read(argv, script.flags, script.description)
    command = Command(script, flags, given, environment, draw_seed)
    for flag in script.flags:
        if flag.to and flags[flag.key] is not None:
            command.put(flag.to, flags[flag.key])
    for step in script.steps:
        step(command)
    config, start = _config(command), _start(command)
    from sdxl_trainer.compat import differences

    case = differences.Case(script.name, config, flags, given, command.processes)
    return Job(config, start, (*command.notes, *differences.lines(case)), flags["hub_token"], command.flagged)


def _config(command: Command) -> "Config":
    """The checked config, without what has no effect; messages speak of flags."""
    from pydantic import ValidationError

    from sdxl_trainer import refusals
    from sdxl_trainer.config import Config
    from sdxl_trainer.configfile import validated

    try:
        config = Config.model_validate_json(json.dumps(command.tree))
    except ValidationError:
        config = None  # validated() below says what is wrong
    if config is not None:
        for path, why in refusals.inert(config):
            section, name = path.split(".")
            if name in command.tree.get(section, {}):
                if not refusals.is_default(config, path):
                    _say_dropped(command, path, why)
                command.drop(path)
    try:
        return validated(command.tree, WHERE)
    except UserError as error:
        raise UserError(command.flagged(error.what), error.where, command.flagged(error.fix)) from None


def _say_dropped(command: Command, path: str, why: str) -> None:
    """One line when the user gave a flag that does nothing; the reference's own defaults are dropped unsaid."""
    for flag in command.script.flags:
        if flag.to == path and flag.key in command.given:
            command.notes.append(f"{flag.name} has no effect: {command.flagged(why)}")


def _start(command: Command) -> "Start":
    from sdxl_trainer.run import Start

    given = command.flags["resume_from_checkpoint"]
    if not given:
        return Start("restart")
    path, output = Path(given), Path(command.flags["output_dir"])
    if len(path.parts) > 1:
        inside = output / path.name
        if not path.exists() and inside.exists():
            given = path.name
        found = inside if given == path.name else path
        command.notes.append(f"resuming from {found}; the script looks for its last name in output_dir (D35)")
    return Start("checkpoint", given, at_least_one_step=True)


def number(environment: Mapping[str, str], names: Sequence[str], default: int) -> int:
    """The first of these variables that holds a number."""
    return next((int(environment[name]) for name in names if environment.get(name, "").isdigit()), default)
