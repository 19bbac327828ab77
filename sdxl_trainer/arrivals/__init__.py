"""`sdxl convert OTHER ours.toml`: configs of other trainers, and what of each option was kept, changed and dropped.

Every option of the source is accounted for: what nothing here knows is listed as such. The result is a valid config.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_trainer import configfile, files, refusals
from sdxl_trainer.arrivals import aitoolkit, diffusers, kohya, kohya_gui, onetrainer, reading, simpletuner
from sdxl_trainer.arrivals.account import Account
from sdxl_trainer.arrivals.reading import Command
from sdxl_trainer.config import Config
from sdxl_trainer.errors import UserError, closest, shortened

NAMES = {
    "kohya": "kohya's sd-scripts",
    "kohya-gui": "kohya_ss",
    "diffusers": "diffusers' scripts",
    "onetrainer": "OneTrainer",
    "simpletuner": "SimpleTuner",
    "ai-toolkit": "ai-toolkit",
}


@dataclass(frozen=True)
class Source:
    """A config file of another trainer: its data, or the command in it."""

    path: Path
    trainer: str
    tree: dict[str, Any]
    command: Command | None = None


def convert(path: Path, target: Path, trainer: str | None, data: Path | None, overwrite: bool) -> list[str]:
    """Write a config, and give the lines that account for every option of the source."""
    if target.exists() and not overwrite:
        raise UserError("DST exists", str(target), "name another file, or replace it with --overwrite")
    source = identify(path, trainer)
    account, config = understood(source, data)
    missing = [d.path for d in config.data if not Path(d.path).expanduser().exists() and d.path.count("/") != 1]
    with files.explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(target, head(source, account) + configfile.written(account.tree))
    lines = [f"{path}: a config of {NAMES[source.trainer]}", *account.lines(), "", account.counts()]
    lines += (
        [f"not here: {shortened(dict.fromkeys(missing))}; paths start at the folder that you run in"] if missing else []
    )
    return [*lines, f"wrote {target}; look at it with: sdxl check {target}"]


def understood(source: Source, data: Path | None) -> tuple[Account, Config]:
    """What a config means here. UserError for what cannot be read, and for what would train something else."""
    try:
        account = _FILL[source.trainer](source, data)
        _without_effect(account)
        return account, configfile.validated(account.tree, f"{source.path}, as a config of ours")
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        # A table where a number should be, words where a list should be: other people's files hold anything.
        what = f"a value in it is not of the kind that {NAMES[source.trainer]} takes there: {error}"
        raise UserError(what, str(source.path), "correct it there") from None


def identify(path: Path, trainer: str | None) -> Source:
    """What a file is. UserError if it is nobody's config, or ours."""
    if not path.is_file():
        raise UserError("there is no such file", str(path), "give the config of another trainer")
    if trainer is not None and trainer not in NAMES:
        raise UserError(f"there is no trainer '{trainer}'", "--from", closest(trainer, NAMES))
    if path.suffix.lower() not in reading.STRUCTURED:
        command = reading.command(path)
        return Source(path, trainer or _by_script(command, path), {}, command)
    tree = reading.tree(path)
    if "output_dir" in tree and isinstance(tree.get("data"), list) and isinstance(tree.get("train"), dict):
        raise UserError("this is a config of ours already", str(path), f"sdxl train {path}")
    if "job_config" in tree or set(tree) <= {"datasets", "general"}:
        fix = "give the config of the training, and this file by --data"
        raise UserError("this is only the part that names the pictures", str(path), fix)
    return Source(path, trainer or _by_options(tree, path), tree)


def _by_script(command: Command, path: Path) -> str:
    if command.script in kohya.SCRIPTS:
        return "kohya"
    if command.script in diffusers.SCRIPTS:
        return "diffusers"
    if "model_family" in command.flags or "data_backend_config" in command.flags:
        return "simpletuner"
    known = [*kohya.SCRIPTS, *diffusers.SCRIPTS]
    what = f"'{command.script}' is not a script that trains SDXL, as far as is known here"
    raise UserError(what, str(path), f"known are {', '.join(known)}; --from TRAINER says which one it is like")


def _by_options(tree: dict[str, Any], path: Path) -> str:
    names = {str(name).removeprefix("--") for name in tree}
    if path.suffix.lower() in {".yaml", ".yml"} or {"job", "config"} <= names:
        return "ai-toolkit"
    if {"training_method", "concept_file_name", "base_model_name"} & names:
        return "onetrainer"
    if {"data_backend_config", "model_family"} & names:
        return "simpletuner"
    if path.suffix.lower() == ".json" and {"LoRA_type", "max_resolution", "epoch", "lr_warmup"} & names:
        return "kohya-gui"
    if {"pretrained_model_name_or_path", "model_arguments", "network_module"} & names or path.suffix == ".toml":
        return "kohya"
    what = f"this is no config that is known here (its options begin with {shortened(sorted(names), 4)})"
    raise UserError(what, str(path), f"--from says whose it is: {', '.join(NAMES)}")


def _kohya(source: Source, data: Path | None) -> Account:
    if source.command:
        options, launcher, script = source.command.flags, source.command.launcher, source.command.script
        named = options.pop("config_file", None)
        if isinstance(named, str):
            options = {**_flat(reading.tree(beside(source.path, named, "config_file"))), **options}
    else:
        options, launcher, script = _flat(source.tree), {}, ""
    account = Account(dict(options), str(source.path))
    named = account.options.pop("dataset_config", None)
    if named and data is None:
        data = beside(source.path, str(named), "dataset_config")
    kohya.fill(account, reading.tree(data) if data else None, script, launcher)
    return account


def _gui(source: Source, data: Path | None) -> Account:
    options, launcher, unused = kohya_gui.options(source.tree, str(source.path))
    account = Account(options, str(source.path), off=unused)
    named = account.options.pop("dataset_config", None)
    if named and data is None:
        data = beside(source.path, str(named), "dataset_config")
    kohya.fill(account, reading.tree(data) if data else None, "", launcher)
    return account


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    """sd-scripts ignores the sections of its config."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def beside(path: Path, named: str, option: str) -> Path:
    """A file that a config names: as it is named, or beside the config."""
    suffixed = named if Path(named).suffix else f"{named}.toml"
    for found in (Path(suffixed).expanduser(), path.parent / suffixed, path.parent / Path(suffixed).name):
        if found.is_file():
            return found
    fix = "give it by --data FILE" if option != "config_file" else "put it beside the script"
    raise UserError(f"{option} names '{named}', and there is no such file", str(path), fix)


_FILL: dict[str, Callable[[Source, Path | None], Account]] = {
    "kohya": _kohya,
    "kohya-gui": _gui,
    "diffusers": lambda source, data: diffusers.account(source.path, source.command),
    "onetrainer": lambda source, data: onetrainer.account(source.path, source.tree, data),
    "simpletuner": lambda source, data: simpletuner.account(source.path, source.tree, source.command, data),
    "ai-toolkit": lambda source, data: aitoolkit.account(source.path, source.tree),
}


def _without_effect(account: Account) -> None:
    """Options that would do nothing here, which a config of ours must not hold."""
    from pydantic import ValidationError

    try:
        config = Config.model_validate_json(json.dumps(account.tree, default=str))
    except ValidationError:
        return  # what is wrong is told when it is validated
    for option, why in refusals.inert(config):
        section, name = option.split(".")
        if name in (account.tree.get(section) or {}):
            del account.tree[section][name]
            account.undone(option, f"has no effect here: {why}")


def head(source: Source, account: Account) -> str:
    """Comments above a config: where it is from, and what was not simply kept."""
    told = [line for line in account.lines() if not line.startswith(("kept", "off"))]
    lines = [f"# From {source.path.name}, a config of {NAMES[source.trainer]}, by `sdxl convert`."]
    return "\n".join([*lines, *(f"# {line}" for line in told)]) + "\n"
