"""`train_text_to_image_sdxl.py` of the Hugging Face examples: its flags in, our config and training program."""

import json
import os
import re
import secrets
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_trainer.compat.flags import FLAGS, WHERE, read
from sdxl_trainer.errors import UserError, closest

if TYPE_CHECKING:
    from sdxl_trainer.config import Config
    from sdxl_trainer.run import Start

DESCRIPTION = "Fine-tune SDXL with the flags of the Hugging Face example script (see docs/compat.md)."
PROJECT = "text2image-fine-tune-sdxl"
# Where accelerate and torchrun, or an MPI launcher, say how many processes there are.
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
PRECISIONS = {"no": "fp32", "fp16": "fp16", "bf16": "bf16", "fp8": "bf16"}
# Options that a translation below sets: what to call them in messages.
NAMES = {
    "data.0.path": "--dataset_name or --train_data_dir",
    "train.batch_size": "--train_batch_size",
    "train.epochs": "--num_train_epochs",
    "train.workers": "--dataloader_num_workers",
    "log.project": "--report_to",
    **{flag.to: flag.name for flag in FLAGS if flag.to},
}


@dataclass(frozen=True)
class Job:
    """What a command line asks for. `token` is kept apart from the config, which is written to files."""

    config: "Config"
    start: "Start"
    notes: tuple[str, ...]
    token: str | None = None


# Long captions are cut as by the script, and by the pipeline that its users draw with; the cut ones are counted.
_BEGIN: dict[str, Any] = {"data": [{}], "text": {"long_captions": "cut"}, "optimizer": {"betas": [None, None]}}


@dataclass(frozen=True)
class _Command:
    """A command line while it is being translated: `tree` grows into the config, `notes` are lines to be said."""

    flags: dict[str, Any]
    given: frozenset[str]
    environment: Mapping[str, str]
    draw_seed: Callable[[], int]
    tree: dict[str, Any] = field(default_factory=lambda: deepcopy(_BEGIN))
    notes: list[str] = field(default_factory=list)

    @property
    def processes(self) -> int:
        return _processes(self.environment)

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


def parse(argv: Sequence[str]) -> "tuple[Config, Start]":
    """The config and the way to start that a command line of the reference means."""
    job = translate(argv, os.environ, _random_seed)
    return job.config, job.start


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line of the reference; the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if _processes(os.environ) > 1:
        _join_processes_of_cpus()
    try:
        job = translate(argv, os.environ, _shared_seed)
    except UserError as error:
        _say(str(error))
        return 2
    for note in job.notes:
        _say(f"note: {note}")
    if job.token is not None:
        _hide(job.token)
    return _run(job)


def _run(job: Job) -> int:
    from sdxl_trainer.errors import Interrupted
    from sdxl_trainer.train import train

    try:
        train(job.config, job.start)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except Interrupted as stop:
        _say("interrupted: add --resume_from_checkpoint=latest to continue from the last checkpoint")
        return 128 + stop.number
    return 0


def translate(argv: Sequence[str], environment: Mapping[str, str], draw_seed: Callable[[], int]) -> Job:
    """The job of a command line in an environment; `draw_seed` is asked when no seed is given."""
    flags, given = read(argv, FLAGS, DESCRIPTION)
    command = _Command(flags, given, environment, draw_seed)
    for flag in FLAGS:
        if flag.to and flags[flag.key] is not None:
            command.put(flag.to, flags[flag.key])
    for step in _STEPS:
        step(command)
    config, start = _config(command), _start(command)
    from sdxl_trainer.compat import differences

    case = differences.Case(config, flags, given, command.processes)
    return Job(config, start, (*command.notes, *differences.lines(case)), flags["hub_token"])


def _data(command: _Command) -> None:
    name, folder = command.flags["dataset_name"], command.flags["train_data_dir"]
    if name is None and folder is None:
        raise UserError("no pictures to train on", WHERE, "give --dataset_name or --train_data_dir")
    command.put("data.0.path", folder if name is None else name)
    if name is not None and folder is not None:
        command.put("data.0.folder", folder)
    command.put("data.0.crop", "center" if command.flags["center_crop"] else "random")
    mode = command.flags["image_interpolation_mode"]
    if mode == "nearest_exact":
        command.notes.append("--image_interpolation_mode=nearest_exact is nearest: Pillow has one such filter")
        mode = "nearest"
    command.put("data.0.interpolation", mode)


def _batch(command: _Command) -> None:
    accumulation = command.flags["gradient_accumulation_steps"]
    if accumulation < 1:
        what = f"--gradient_accumulation_steps = {accumulation} is not allowed"
        raise UserError(what, WHERE, "it should be 1 or more")
    factor = accumulation * command.processes
    command.put("train.batch_size", command.flags["train_batch_size"] * factor)
    if command.flags["scale_lr"]:
        scaled = command.flags["learning_rate"] * command.flags["train_batch_size"] * factor
        command.put("train.learning_rate", scaled)
        command.notes.append(f"--scale_lr: the learning rate is {scaled:g}")


def _length(command: _Command) -> None:
    if command.flags["max_train_steps"] is None:
        command.put("train.epochs", command.flags["num_train_epochs"])
    elif "num_train_epochs" in command.given:
        command.notes.append("--num_train_epochs has no effect: --max_train_steps decides")


def _workers(command: _Command) -> None:
    # Not given, the default of our config stays: threads that read ahead change the speed, nothing else.
    if "dataloader_num_workers" in command.given:
        command.put("train.workers", min(command.flags["dataloader_num_workers"], 16))


def _computing(command: _Command) -> None:
    asked = command.flags["mixed_precision"] or command.environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in PRECISIONS:
        fix = f"allowed: {', '.join(PRECISIONS)}"
        raise UserError(f"ACCELERATE_MIXED_PRECISION = {asked} is not allowed", "environment", fix)
    if asked == "fp8":
        command.notes.append("accelerate is configured to fp8, which is not available here: bf16 is used")
    command.put("train.precision", PRECISIONS[asked])
    for flag, kernel in [
        ("enable_npu_flash_attention", "npu"),
        ("enable_xformers_memory_efficient_attention", "xformers"),
    ]:
        if command.flags[flag]:
            command.put("model.attention", kernel)
    command.put("optimizer.name", "adamw8bit" if command.flags["use_8bit_adam"] else "adamw")


def _validation(command: _Command) -> None:
    prompt, images = command.flags["validation_prompt"], command.flags["num_validation_images"]
    if images == 0:
        command.drop("validation.images")
        if prompt:
            command.notes.append("no validation pictures: --num_validation_images is 0")
    elif prompt:
        command.put("validation.prompts", [prompt])


def _trackers(command: _Command) -> None:
    names = [name.strip() for name in command.flags["report_to"].split(",") if name.strip()]
    for name in names:
        if name not in (*TRACKERS, "all", "none"):
            fix = closest(name, (*TRACKERS, "all", "none"))
            raise UserError(f"--report_to = {name} is not allowed", WHERE, fix)
    if "all" in names:
        names = [name for name in TRACKERS if find_spec(name)]
    kept = []
    for name in dict.fromkeys(name for name in names if name != "none"):
        if find_spec(name):
            kept.append(name)
        elif name == "wandb":
            raise UserError("--report_to=wandb: wandb is not installed", WHERE, "pip install wandb")
        else:
            command.notes.append(f"{name} is not installed (pip install {name}): the numbers go to metrics.jsonl alone")
    if kept:
        command.put("log.trackers", kept)
        command.put("log.project", PROJECT)
    if "wandb" in kept and command.flags["hub_token"] is not None:
        fix = "log in with `hf auth login`, or set HF_TOKEN, and leave out --hub_token"
        raise UserError("--hub_token with wandb: the token would be sent along with the command line", WHERE, fix)


def _seed(command: _Command) -> None:
    if command.flags["seed"] is not None:
        return
    before = _recorded_seed(Path(command.flags["output_dir"])) if command.flags["resume_from_checkpoint"] else None
    seed = command.draw_seed() if before is None else before
    why = "chosen at random" if before is None else "of the run that is resumed"
    command.put("seed", seed)
    command.notes.append(f"--seed={seed}, {why}: give it to repeat this run")


_STEPS: tuple[Callable[[_Command], None], ...] = (
    _data,
    _batch,
    _length,
    _workers,
    _computing,
    _validation,
    _trackers,
    _seed,
)


def _config(command: _Command) -> "Config":
    """The checked config, without what has no effect; messages speak of flags."""
    from pydantic import ValidationError

    from sdxl_trainer.config import Config
    from sdxl_trainer.configfile import INERT, validated

    try:
        config = Config.model_validate_json(json.dumps(command.tree))
    except ValidationError:
        config = None  # validated() below says what is wrong
    if config is not None:
        for path, inert, why in INERT:
            section, name = path.split(".")
            if name in command.tree.get(section, {}) and inert(config):
                options = getattr(config, section)
                if getattr(options, name) != type(options).model_fields[name].default:
                    _say_dropped(command, path, why)
                command.drop(path)
    try:
        return validated(command.tree, WHERE)
    except UserError as error:
        raise UserError(_flagged(error.what), error.where, _flagged(error.fix)) from None


def _say_dropped(command: _Command, path: str, why: str) -> None:
    """One line when the user gave a flag that does nothing; the reference's own defaults are dropped unsaid."""
    for flag in FLAGS:
        if flag.to == path and flag.key in command.given:
            command.notes.append(f"{flag.name} has no effect: {_flagged(why)}")


def _flagged(text: str) -> str:
    """A message about the config as one about the flags."""
    for path, name in NAMES.items():
        # A path without a dot is also a word, and an option only before its value.
        text = re.sub(rf"(?<![\w.-]){re.escape(path)}" + (r"(?![\w.])" if "." in path else "(?= = )"), name, text)
    return text


def _start(command: _Command) -> "Start":
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


def _number(environment: Mapping[str, str], names: Sequence[str], default: int) -> int:
    return next((int(environment[name]) for name in names if environment.get(name, "").isdigit()), default)


def _say(line: str) -> None:
    """Print a line once, however many processes there are."""
    if _is_main():
        print(line, file=sys.stderr, flush=True)


def _processes(environment: Mapping[str, str]) -> int:
    return _number(environment, WORLD_SIZES, 1)


def _is_main() -> bool:
    return _number(os.environ, RANKS, 0) == 0


def _random_seed() -> int:
    return secrets.randbelow(1 << 32)


def _shared_seed() -> int:
    """A random seed that all processes of the launch agree on."""
    seed = _random_seed()
    if _processes(os.environ) == 1:
        return seed
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        what = "several processes cannot choose a seed together under this launcher"
        raise UserError(what, WHERE, "give one with --seed")
    store, rank = _meeting_place()
    if rank == 0:
        store.set("sdxl-trainer/seed", str(seed))
    return int(store.get("sdxl-trainer/seed"))


@cache
def _meeting_place() -> tuple[Any, int]:
    """What the launcher's processes can write to and read from, and the number of this one. It is kept: where no
    launcher holds the store, the first process does, and it must live until the others have read."""
    from torch.distributed.rendezvous import rendezvous

    store, rank, _ = next(rendezvous("env://"))
    return store, rank


def _join_processes_of_cpus() -> None:
    """Tell accelerate that several processes without an accelerator are one run: it takes them for as many runs."""
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")


def _recorded_seed(output_dir: Path) -> int | None:
    """The seed of the run whose records lie in the folder."""
    try:
        return tomllib.loads((output_dir / "config.toml").read_text(encoding="utf-8")).get("seed")
    except (FileNotFoundError, NotADirectoryError, tomllib.TOMLDecodeError):
        return None


def _hide(token: str) -> None:
    """Move the token from the command line, which is recorded in files, to the environment of this process."""
    os.environ["HF_TOKEN"] = token
    sys.argv = [argument.replace(token, "***") for argument in sys.argv]


if __name__ == "__main__":
    sys.exit(main())
