"""Command lines of the Hugging Face example scripts: the flags that the scripts here take, as a config."""

from pathlib import Path

from sdxl_trainer.arrivals.account import Account, Entry, plain
from sdxl_trainer.arrivals.reading import Command
from sdxl_trainer.compat import (
    train_dreambooth_lora_sdxl,
    train_dreambooth_lora_sdxl_advanced,
    train_text_to_image_lora_sdxl,
    train_text_to_image_sdxl,
)
from sdxl_trainer.compat.command import translate
from sdxl_trainer.errors import UserError

_SCRIPTS = (
    train_text_to_image_sdxl.SCRIPT,
    train_text_to_image_lora_sdxl.SCRIPT,
    train_dreambooth_lora_sdxl.SCRIPT,
    train_dreambooth_lora_sdxl_advanced.SCRIPT,
)
SCRIPTS = {f"{script.name}.py": script for script in _SCRIPTS}
_TOGETHER = {
    "train_batch_size": "train.batch_size and train.micro_batch",
    "gradient_accumulation_steps": "train.batch_size, beside train.micro_batch",
}


def account(path: Path, command: Command | None) -> Account:
    """Account for a command's flags. UserError as the script here would give it."""
    if command is None or command.script not in SCRIPTS:
        fix = f"give a shell script with a command of {', '.join(SCRIPTS)}"
        raise UserError("this is no command of a script of diffusers that is here too", str(path), fix)
    script = SCRIPTS[command.script]
    environment = {"WORLD_SIZE": str(plain(command.launcher.get("num_processes", 1)))}
    if isinstance(command.launcher.get("mixed_precision"), str):
        environment["ACCELERATE_MIXED_PRECISION"] = str(command.launcher["mixed_precision"])
    job = translate(script, command.words, environment, lambda: 0)
    made = Account(dict(command.flags), str(path))
    made.tree = job.config.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
    whole = job.config.model_dump(mode="json")
    for flag in script.flags:
        if flag.key not in made.options:
            continue
        given = made.options[flag.key]
        became = _value(whole, flag.to) if flag.to else None
        if became is not None and became == plain(given):
            made.options.pop(flag.key)
            made.entries.append(Entry("kept", flag.key, given, flag.to, became))
        elif became is not None:
            made.options.pop(flag.key)
            made.entries.append(Entry("changed", flag.key, given, flag.to, became, "as the script here does"))
        else:
            made.part(flag.key, _TOGETHER.get(flag.key, "the config, together with other flags"))
    if "seed" not in command.flags:
        made.assumed("seed", 0, "the script draws one at random")
    for line in job.notes:
        if not line.startswith("--seed="):
            made.note(line)
    launcher = made.inner(command.launcher, "accelerate")
    launcher.do_anyway(dict.fromkeys(list(launcher.options), "accelerate launch takes it here too"))
    made.finish()
    return made


def _value(tree: object, to: str) -> object:
    """The option at a dotted place of a config's plain data; None if there is none."""
    for part in to.split("."):
        if isinstance(tree, list):
            tree = tree[int(part)] if int(part) < len(tree) else None
        else:
            tree = tree.get(part) if isinstance(tree, dict) else None
    return tree
