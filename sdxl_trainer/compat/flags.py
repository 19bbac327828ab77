"""The flags of the Hugging Face SDXL fine-tuning script, and what each of them sets in our config.

One table: name, type, default and choices are the reference's, so that its commands work unchanged; the help is
ours. `to` is the config option that takes the value as it is; flags without it are translated beside the table's
user, because they need another flag or the environment.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from sdxl_trainer.errors import UserError, closest

WHERE = "command line"
INTERPOLATIONS = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "nearest_exact")


@dataclass(frozen=True)
class Flag:
    """One flag of the reference. Type bool is a switch, which takes no value."""

    name: str
    type: type
    default: Any
    help: str
    to: str = ""
    choices: tuple[str, ...] | None = None
    required: bool = False

    @property
    def key(self) -> str:
        return self.name.removeprefix("--")


FLAGS: tuple[Flag, ...] = (
    # The base model
    Flag(
        "--pretrained_model_name_or_path",
        str,
        None,
        "base model: hub id, diffusers folder or one .safetensors file",
        "model.path",
        required=True,
    ),
    Flag(
        "--pretrained_vae_model_name_or_path",
        str,
        None,
        "another VAE: hub id or folder, such as madebyollin/sdxl-vae-fp16-fix",
        "model.vae",
    ),
    Flag("--revision", str, None, "branch, tag or commit of the base model's repository", "model.revision"),
    Flag("--variant", str, None, "file variant of the base model, such as fp16", "model.variant"),
    # Pictures and captions
    Flag("--dataset_name", str, None, "hub dataset or local dataset folder"),
    Flag("--dataset_config_name", str, None, "configuration of a hub dataset", "data.0.name"),
    Flag("--train_data_dir", str, None, "folder of pictures; with --dataset_name: a folder inside that dataset"),
    Flag("--image_column", str, "image", "column that holds the picture", "data.0.image_column"),
    Flag("--caption_column", str, "text", "column that holds a caption or a list of them", "data.0.caption_column"),
    Flag("--max_train_samples", int, None, "train on this many pictures, drawn with the seed", "data.0.max_samples"),
    Flag(
        "--proportion_empty_prompts", float, 0, "how often a caption is left out, from 0 to 1", "data.0.caption_dropout"
    ),
    Flag("--resolution", int, 1024, "pixels of the shorter side, and of the square crop", "data.0.resolution"),
    Flag("--center_crop", bool, False, "crop in the middle; otherwise anywhere"),
    Flag("--random_flip", bool, False, "mirror half of the time", "data.0.flip"),
    Flag("--image_interpolation_mode", str, "lanczos", "filter that resizes pictures", choices=INTERPOLATIONS),
    Flag("--cache_dir", str, None, "where hub datasets are kept", "cache.datasets_dir"),
    Flag("--dataloader_num_workers", int, 0, "how many workers read the data ahead"),
    # Validation pictures
    Flag("--validation_prompt", str, None, "prompt of the validation pictures"),
    Flag("--num_validation_images", int, 4, "validation pictures at a time", "validation.images"),
    Flag("--validation_epochs", int, 1, "epochs between validation pictures", "validation.every_epochs"),
    # The run
    Flag("--output_dir", str, "sdxl-model-finetuned", "where everything is written", "output_dir"),
    Flag("--seed", int, None, "seed of every draw; not given: one is chosen and shown", "seed"),
    Flag("--train_batch_size", int, 16, "pictures per forward pass and process", "train.micro_batch"),
    Flag("--gradient_accumulation_steps", int, 1, "forward passes per optimizer step"),
    Flag("--num_train_epochs", int, 100, "passes over the data, unless --max_train_steps is given"),
    Flag("--max_train_steps", int, None, "optimizer steps", "train.steps"),
    Flag("--checkpointing_steps", int, 500, "optimizer steps between checkpoints", "train.checkpoint_every"),
    Flag("--checkpoints_total_limit", int, None, "how many checkpoints to keep", "train.checkpoints_limit"),
    Flag("--resume_from_checkpoint", str, None, "a checkpoint's name or path, or 'latest'"),
    Flag(
        "--gradient_checkpointing",
        bool,
        False,
        "save memory by computing activations twice",
        "train.gradient_checkpointing",
    ),
    Flag(
        "--mixed_precision",
        str,
        None,
        "compute type; not given: what accelerate is configured to",
        choices=("no", "fp16", "bf16"),
    ),
    Flag("--allow_tf32", bool, False, "TensorFloat-32 for fp32 matrix products on NVIDIA", "train.tf32"),
    Flag("--enable_xformers_memory_efficient_attention", bool, False, "attention by xFormers"),
    Flag("--enable_npu_flash_attention", bool, False, "attention by the flash kernel of Ascend NPUs"),
    Flag("--local_rank", int, -1, "set by launchers; the environment decides"),
    # Optimizer and learning rate
    Flag("--learning_rate", float, 1e-4, "base learning rate", "train.learning_rate"),
    Flag("--scale_lr", bool, False, "multiply the learning rate by batch size, accumulation and processes"),
    Flag(
        "--lr_scheduler",
        str,
        "constant",
        "constant, constant_with_warmup, linear, cosine, cosine_with_restarts or polynomial",
        "schedule.name",
    ),
    Flag("--lr_warmup_steps", int, 500, "optimizer steps of warm-up", "schedule.warmup_steps"),
    Flag("--use_8bit_adam", bool, False, "AdamW with 8-bit state (needs bitsandbytes)"),
    Flag("--adam_beta1", float, 0.9, "decay of AdamW's first moment", "optimizer.betas.0"),
    Flag("--adam_beta2", float, 0.999, "decay of AdamW's second moment", "optimizer.betas.1"),
    Flag("--adam_weight_decay", float, 1e-2, "decoupled weight decay", "optimizer.weight_decay"),
    Flag("--adam_epsilon", float, 1e-08, "added to AdamW's denominator", "optimizer.eps"),
    Flag("--max_grad_norm", float, 1.0, "longest gradient, over all tensors", "train.max_grad_norm"),
    Flag("--use_ema", bool, False, "keep a moving average of the weights", "ema.enabled"),
    # The objective
    Flag(
        "--prediction_type",
        str,
        None,
        "epsilon, v_prediction or sample; not given: the base model's",
        "objective.prediction",
    ),
    Flag("--snr_gamma", float, None, "Min-SNR gamma; 5.0 is usual", "objective.snr_gamma"),
    Flag("--noise_offset", float, 0, "constant added to the noise of each channel", "objective.noise_offset"),
    Flag(
        "--timestep_bias_strategy",
        str,
        "none",
        "which timesteps are drawn more often",
        "timesteps.bias",
        choices=("earlier", "later", "range", "none"),
    ),
    Flag("--timestep_bias_multiplier", float, 1.0, "how much more often", "timesteps.multiplier"),
    Flag("--timestep_bias_begin", int, 0, "first timestep of range", "timesteps.begin"),
    Flag("--timestep_bias_end", int, 1000, "timestep after the last of range", "timesteps.end"),
    Flag("--timestep_bias_portion", float, 0.25, "share that earlier and later favour", "timesteps.portion"),
    # Where results go
    Flag("--logging_dir", str, "logs", "folder of the trackers, in output_dir", "log.dir"),
    Flag("--report_to", str, "tensorboard", "trackers: tensorboard, wandb, ..., all, none, or a list with commas"),
    Flag("--push_to_hub", bool, False, "upload the result to the Hugging Face hub", "hub.push"),
    Flag("--hub_token", str, None, "token for the upload; kept out of every file"),
    Flag("--hub_model_id", str, None, "repository of the upload; not given: the name of output_dir", "hub.id"),
)


class _Parser(argparse.ArgumentParser):
    """argparse, except that mistakes are user errors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, WHERE, "--help lists every flag")


def read(argv: Sequence[str], flags: Sequence[Flag], description: str) -> tuple[dict[str, Any], frozenset[str]]:
    """Every flag's value by its key (the default where it is not given), and the keys that were given."""
    parser = _Parser(description=description, formatter_class=partial(argparse.HelpFormatter, max_help_position=32))
    for flag in flags:
        _add(parser, flag)
    found, rest = parser.parse_known_args(argv)
    if rest:
        names = [flag.name for flag in flags]
        name = rest[0].partition("=")[0]  # without the value, which may be a secret
        what = f"unknown flag {name}" if name.startswith("-") else f"'{name}' belongs to no flag"
        raise UserError(what, WHERE, closest(name, names) if name.startswith("--") else "--help lists every flag")
    given = vars(found)
    for flag in flags:
        if flag.required and flag.key not in given:
            raise UserError(f"{flag.name} is missing", WHERE, f"add {flag.name}=... ({flag.help})")
    return {flag.key: given.get(flag.key, flag.default) for flag in flags}, frozenset(given)


def _add(parser: argparse.ArgumentParser, flag: Flag) -> None:
    # Suppressed, so that the namespace holds only what was given.
    common: dict[str, Any] = {"default": argparse.SUPPRESS}
    if flag.type is bool:
        parser.add_argument(flag.name, action="store_true", help=flag.help, **common)
        return
    default = " (required)" if flag.required else f" (default: {flag.default})" if flag.default is not None else ""
    text = f"{flag.help}{default}".replace("%", "%%")
    metavar = None if flag.choices else flag.type.__name__.upper()
    parser.add_argument(
        flag.name, type=partial(_value, flag), choices=flag.choices, help=text, metavar=metavar, **common
    )


def _value(flag: Flag, text: str) -> Any:
    try:
        value = flag.type(text)
    except ValueError:
        kind = {int: "a whole number", float: "a number"}[flag.type]
        raise UserError(f"{flag.name} = {text} is not {kind}", WHERE, f"default: {flag.default}") from None
    if flag.choices and value not in flag.choices:
        fix = f"{closest(value, flag.choices)} (allowed: {', '.join(flag.choices)})"
        raise UserError(f"{flag.name} = {text} is not allowed", WHERE, fix)
    return value
