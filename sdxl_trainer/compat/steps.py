"""Translations that several scripts share, each of flags that mean something only together."""

import tomllib
from importlib.util import find_spec
from pathlib import Path

from sdxl_trainer.compat.command import Command
from sdxl_trainer.compat.flags import WHERE
from sdxl_trainer.errors import UserError, closest

TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
PRECISIONS = {"no": "fp32", "fp16": "fp16", "bf16": "bf16", "fp8": "bf16"}
# Options that these set: what to call them in messages.
NAMES = {
    "train.batch_size": "--train_batch_size",
    "train.epochs": "--num_train_epochs",
    "train.workers": "--dataloader_num_workers",
    "log.project": "--report_to",
    "validation.prompts": "--validation_prompt",
}


def pictures(command: Command) -> None:
    """Pictures with captions: a dataset, a folder, or a folder within a dataset."""
    name, folder = command.flags["dataset_name"], command.flags["train_data_dir"]
    if name is None and folder is None:
        raise UserError("no pictures to train on", WHERE, "give --dataset_name or --train_data_dir")
    command.put("data.0.path", folder if name is None else name)
    if name is not None and folder is not None:
        command.put("data.0.folder", folder)


def crops(command: Command) -> None:
    """How pictures are cut and resized."""
    command.put("data.0.crop", "center" if command.flags["center_crop"] else "random")
    mode = command.flags["image_interpolation_mode"]
    if mode == "nearest_exact":
        command.notes.append("--image_interpolation_mode=nearest_exact is nearest: Pillow has one such filter")
        mode = "nearest"
    command.put("data.0.interpolation", mode)


def batch(command: Command) -> None:
    """Pictures of a step, over all processes."""
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


def length(command: Command) -> None:
    """How long it trains."""
    if command.flags["max_train_steps"] is None:
        command.put("train.epochs", command.flags["num_train_epochs"])
    elif "num_train_epochs" in command.given:
        command.notes.append("--num_train_epochs has no effect: --max_train_steps decides")


def workers(command: Command) -> None:
    """Threads that read ahead."""
    # Not given, the default of our config stays: threads that read ahead change the speed, nothing else.
    if "dataloader_num_workers" in command.given:
        command.put("train.workers", min(command.flags["dataloader_num_workers"], 16))


def computing(command: Command) -> None:
    """Type, attention kernel and optimizer."""
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
        if command.flags.get(flag):
            command.put("model.attention", kernel)
    command.put("optimizer.name", "adamw8bit" if command.flags["use_8bit_adam"] else "adamw")


def validation(command: Command) -> None:
    """Pictures of the prompt."""
    prompt, images = command.flags["validation_prompt"], command.flags["num_validation_images"]
    if images == 0:
        command.drop("validation.images")
        if prompt:
            command.notes.append("no validation pictures: --num_validation_images is 0")
    elif prompt:
        command.put("validation.prompts", [prompt])


def trackers(command: Command) -> None:
    """Those that are asked for and installed."""
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
        command.put("log.project", command.script.project)
    if "wandb" in kept and command.flags["hub_token"] is not None:
        fix = "log in with `hf auth login`, or set HF_TOKEN, and leave out --hub_token"
        raise UserError("--hub_token with wandb: the token would be sent along with the command line", WHERE, fix)


def seed(command: Command) -> None:
    """One is chosen and said where none is given."""
    if command.flags["seed"] is not None:
        return
    before = _recorded_seed(Path(command.flags["output_dir"])) if command.flags["resume_from_checkpoint"] else None
    seed = command.draw_seed() if before is None else before
    why = "chosen at random" if before is None else "of the run that is resumed"
    command.put("seed", seed)
    command.notes.append(f"--seed={seed}, {why}: give it to repeat this run")


def _recorded_seed(output_dir: Path) -> int | None:
    """The seed of the run whose records lie in the folder."""
    try:
        return tomllib.loads((output_dir / "config.toml").read_text(encoding="utf-8")).get("seed")
    except (FileNotFoundError, NotADirectoryError, tomllib.TOMLDecodeError):
        return None


SHARED = (crops, batch, length, workers, computing, validation, trackers, seed)
