"""Command lines of the Hugging Face example scripts: the flags that the scripts here take, as a config."""

from pathlib import Path

from sdxl_trainer.arrivals.account import Account, Entry, plain
from sdxl_trainer.arrivals.reading import Command
from sdxl_trainer.compat import train_text_to_image_sdxl as text_to_image
from sdxl_trainer.compat.flags import FLAGS
from sdxl_trainer.errors import UserError

SCRIPTS = ("train_text_to_image_sdxl.py",)


def account(path: Path, command: Command | None) -> Account:
    """Account for a command's flags. UserError as the script here would give it."""
    if command is None:
        raise UserError("diffusers' scripts have no config file", str(path), "give the shell script with the command")
    processes = str(plain(command.launcher.get("num_processes", 1)))
    environment = {"WORLD_SIZE": processes}
    if isinstance(command.launcher.get("mixed_precision"), str):
        environment["ACCELERATE_MIXED_PRECISION"] = str(command.launcher["mixed_precision"])
    job = text_to_image.translate(command.words, environment, lambda: 0)
    made = Account(dict(command.flags), str(path))
    made.tree = job.config.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
    whole = job.config.model_dump(mode="json")
    for flag in FLAGS:
        if flag.key in made.options:
            given = made.options[flag.key]
            became, found = _value(whole, flag.to) if flag.to else (None, False)
            if found and became == (True if flag.type is bool else plain(given)):
                made.options.pop(flag.key)
                made.entries.append(Entry("kept", flag.key, given, flag.to, became))
            elif found:
                made.changed(flag.key, flag.to, became, "see docs/compat.md")
            else:
                made.part(flag.key, _meaning(flag.key))
    if "seed" not in command.flags:
        made.assumed("seed", 0, "the script draws one at random")
    for line in job.notes:
        if not line.startswith("--seed="):
            made.note(line)
    launcher = made.inner(command.launcher, "accelerate")
    launcher.do_anyway(dict.fromkeys(list(launcher.options), "accelerate launch takes it here too"))
    made.finish()
    return made


def _meaning(key: str) -> str:
    return {
        "train_batch_size": "train.batch_size and train.micro_batch",
        "gradient_accumulation_steps": "train.batch_size, beside train.micro_batch",
    }.get(key, "the config, together with other flags")


def _value(tree: dict, to: str) -> tuple[object, bool]:
    node: object = tree
    for part in to.split("."):
        if isinstance(node, list):
            node = node[int(part)] if int(part) < len(node) else None
        elif isinstance(node, dict):
            node = node.get(part)
        if node is None:
            return None, False
    return node, True
