"""Translations of the DreamBooth script: subject and class, rates, optimizer, objective."""

from pathlib import Path

from sdxl_trainer.compat.command import Command
from sdxl_trainer.compat.flags import WHERE
from sdxl_trainer.errors import UserError, closest

# Options that these set: what to call them in messages.
NAMES = {
    "data.0.path": "--instance_data_dir or --dataset_name",
    "data.0.repeats": "--repeats",
    "data.0.caption_only": "--instance_prompt",
    "data.1.path": "--class_data_dir",
    "data.1.caption": "--class_prompt",
    "data.1.weight": "--prior_loss_weight",
    "data.1.generate": "--num_class_images",
    "data.1.max_samples": "--num_class_images",
    "data.1.generate_batch": "--sample_batch_size",
    "data.1.generate_precision": "--prior_generation_precision",
    "learn.1.learning_rate": "--text_encoder_lr",
    "learn.1.weight_decay": "--adam_weight_decay_text_encoder",
}
# Flags that mean something only with class pictures.
_OF_CLASS = (
    "class_data_dir",
    "class_prompt",
    "prior_loss_weight",
    "num_class_images",
    "sample_batch_size",
    "prior_generation_precision",
)
_OF_PRODIGY = ("prodigy_beta3", "prodigy_decouple", "prodigy_use_bias_correction", "prodigy_safeguard_warmup")
OPTIMIZERS = {"adamw": "AdamW", "prodigy": "prodigy"}


def subject(command: Command) -> None:
    """Pictures of the subject; captions of their own only where a column is named."""
    name, folder, column = (command.flags[k] for k in ("dataset_name", "instance_data_dir", "caption_column"))
    if (name is None) == (folder is None):
        what = "no pictures to train on" if name is None else "--dataset_name and --instance_data_dir are both given"
        raise UserError(what, WHERE, "give --instance_data_dir or --dataset_name, one of them")
    command.put("data.0.path", folder if name is None else name)
    command.put("data.0.repeats", float(command.flags["repeats"]))
    if name is None or column is None:
        command.put("data.0.caption_only", True)
    for flag in ("caption_column", "image_column", "dataset_config_name") if name is None else ():
        command.tree["data"][0].pop(flag if flag != "dataset_config_name" else "name", None)
        say_idle(command, flag, "--instance_data_dir is a folder of pictures")


def prior(command: Command) -> None:
    """Class pictures: as many in each batch as of the subject. The script adds the means of both losses; the loss here
    is one mean over all, in which each counts twice."""
    flags = command.flags
    if not flags["with_prior_preservation"]:
        for flag in _OF_CLASS:
            say_idle(command, flag, "--with_prior_preservation is not given")
        return
    for flag, fix in (("class_data_dir", "a folder for them"), ("class_prompt", "their caption: a photo of a dog")):
        if not flags[flag]:
            what = f"--with_prior_preservation without --{flag}"
            raise UserError(what, WHERE, f"give --{flag}, {fix}; or leave out --with_prior_preservation")
    first, wanted = command.tree["data"][0], flags["num_class_images"]
    command.put("data.0.weight", 2.0)
    same = {name: first[name] for name in ("resolution", "crop", "interpolation", "mask") if name in first}
    second = {**same, "path": flags["class_data_dir"], "caption": flags["class_prompt"], "caption_only": True}
    second |= {"regularisation": True, "weight": 2.0 * flags["prior_loss_weight"]}
    there = count(flags["class_data_dir"])
    if there > wanted > 0:
        second["max_samples"] = wanted
        command.notes.append(f"--num_class_images={wanted} of the {there} pictures in --class_data_dir are used")
    else:
        precision = flags["prior_generation_precision"]
        second |= {"generate": wanted, "generate_batch": flags["sample_batch_size"]}
        second["generate_precision"] = "auto" if precision in {None, "no"} else precision
    command.tree["data"].append(second)
    for name in ("batch_size", "micro_batch"):
        command.put(f"train.{name}", 2 * command.tree["train"][name])
    _lengthen(command, wanted)


def _lengthen(command: Command, wanted: int) -> None:
    """An epoch of the script goes through the larger of the two sets."""
    shown = count(command.tree["data"][0]["path"])
    if shown == 0:
        command.notes.append("an epoch is a pass over the subject's pictures, however many class pictures there are")
    elif wanted > shown * command.flags["repeats"]:
        command.put("data.0.repeats", wanted / shown)


def count(folder: str) -> int:
    from sdxl_trainer.config import Data
    from sdxl_trainer.data import sources

    return len(sources.pictures(Path(folder).expanduser(), folder, Data.model_fields["mask_suffix"].default))


def rates(command: Command) -> None:
    """The text encoders' own learning rate and weight decay."""
    flags = command.flags
    if not (flags["train_text_encoder"] or flags.get("train_text_encoder_ti")):
        for flag in ("text_encoder_lr", "adam_weight_decay_text_encoder"):
            say_idle(command, flag, "--train_text_encoder is not given")
        return
    decay = flags["adam_weight_decay_text_encoder"]
    rule = {"match": r"text_encoder.*", "weight_decay": flags["adam_weight_decay"] if decay is None else decay}
    if _optimizer(command) == "prodigy":
        say_idle(command, "text_encoder_lr", "prodigy finds one rate for all")
    elif flags["text_encoder_lr"]:
        rule["learning_rate"] = flags["text_encoder_lr"]
    # The UNet's first: the learning rate that is shown and recorded is the first rule's.
    command.tree["learn"] = [{"match": r"unet\..*"}, rule]


def optimizer(command: Command) -> None:
    """AdamW or prodigy with its own arguments."""
    flags = command.flags
    if _optimizer(command) == "adamw":
        for flag in _OF_PRODIGY:
            say_idle(command, flag, "--optimizer is not prodigy")
        return
    say_idle(command, "use_8bit_adam", "--optimizer is prodigy")
    command.put("optimizer.name", "prodigy")
    chosen = {flag.removeprefix("prodigy_"): flags[flag] for flag in _OF_PRODIGY}
    command.put("optimizer.arguments", {name: value for name, value in chosen.items() if value is not None})


def _optimizer(command: Command) -> str:
    name = command.flags["optimizer"].lower()
    if name not in OPTIMIZERS:
        fix = f"{closest(name, OPTIMIZERS.values())}; other optimizers: docs/optimizers.md, with a config file"
        raise UserError(f"--optimizer = {command.flags['optimizer']} is not allowed", WHERE, fix)
    return name


def objective(command: Command) -> None:
    """EDM's weighting."""
    if command.flags["do_edm_style_training"]:
        if command.flags["snr_gamma"] is not None:
            what = "--do_edm_style_training and --snr_gamma are two weightings of the timesteps"
            raise UserError(what, WHERE, "give one of them")
        command.put("objective.weighting", "edm")


def kohya(command: Command) -> None:
    """The second file, under the script's name for it."""
    if command.flags["output_kohya_format"]:
        command.put("export.formats", ["kohya"])
        command.put("export.name", "pytorch_lora_weights_kohya")


def say_idle(command: Command, flag: str, why: str) -> None:
    if flag in command.given:
        command.notes.append(f"--{flag} has no effect: {why}")
