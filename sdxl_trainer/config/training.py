"""How it learns: steps, optimizer, learning rate, averages."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ValidationInfo, field_validator

from sdxl_trainer.config.section import (
    AmountOrAuto,
    Every,
    EveryOrNever,
    Fraction,
    PathText,
    Positive,
    Section,
    Share,
    option,
)
from sdxl_trainer.errors import closest


class Train(Section):
    steps: Positive | None = option(None, "optimizer steps; or give epochs")
    epochs: Positive | None = option(None, "passes over the data; or give steps")
    batch_size: Positive = option(1, "images per optimizer step, over all processes")
    micro_batch: Positive | None = option(None, "images per forward pass; does not change the result")
    learning_rate: float = option(1e-6, "base learning rate", gt=0)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this global norm; 0: never", ge=0)
    precision: Literal["auto", "fp32", "fp16", "bf16"] = option("auto", "compute type; auto: bf16 where it is fast")
    weights: Literal["fp32", "bf16"] = option("fp32", "type in which the learning tensors are kept")
    frozen: Literal["auto", "fp32", "bf16", "fp16", "fp8", "int8", "nf4"] = option(
        "auto", "type in which the base is kept beside an adapter or new words; auto: the compute type"
    )
    gradient_checkpointing: Share = option(
        False, "recompute activations in the backward pass to save memory: of all blocks, or of a share such as 0.5"
    )
    memory: AmountOrAuto | None = option(
        None,
        "what a step may take, such as 12GB, or auto for nine tenths of what is free: the fastest of what changes only"
        " time and memory",
    )
    fused_backward: bool = option(
        False, "free each gradient once its tensor is updated, in a second pass: the same result in less memory"
    )
    tf32: bool = option(False, "TensorFloat-32 for fp32 matrix products (NVIDIA Ampere and later)")
    shard: bool = option(
        False,
        "shard weights, gradients, optimizer, averages among processes (FSDP2); does not change the result",
    )
    skip_nonfinite: int = option(
        0, "steps that may be skipped because their loss or gradient is not finite, before the run stops", ge=0
    )
    hang_timeout: float = option(3600.0, "seconds after which processes name one that hangs, and all end", gt=0)
    checkpoint_every: EveryOrNever = option(500, 'steps between checkpoints, or text such as "2 epochs"; 0: none')
    checkpoints_limit: Positive | None = option(None, "how many checkpoints to keep; default: all")
    checkpoint_mirror: PathText | None = option(
        None, "folder or fsspec address (s3://bucket/run) to which each checkpoint is copied once it is verified"
    )
    validate_every: Every | None = option(None, 'steps between validation pictures, or text such as "2 epochs"')
    workers: int | None = option(
        None,
        "threads that read cached rows ahead; default: 1, or 0 on a CPU, all of whose cores a step takes",
        ge=0,
        le=16,
    )


# Optimizers by name, with the options that each has beside weight_decay and what these are if not given.
_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": _ADAM,
    "adamw8bit": _ADAM,
    "paged_adamw8bit": _ADAM,
    "adamw_bf16": _ADAM,
    "adafactor": {},
    "came": {"betas": (0.9, 0.999, 0.9999)},
    "lion": {"betas": (0.9, 0.99)},
    "muon": _ADAM,
    "prodigy": _ADAM,
    "schedulefree": _ADAM,
    "sgd": {},
}

# Those that may step on some tensors and later on the others: what they count they count for each.
STEP_APART = ("adafactor", "adamw", "adamw8bit", "adamw_bf16", "came", "lion", "sgd")


def _optimizer(name: str) -> str:
    if name not in OPTIMIZERS and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        raise ValueError(f"the name of an optimizer ({closest(name, OPTIMIZERS)}) or module:Class")
    return name


class Optimizer(Section):
    name: Annotated[str, AfterValidator(_optimizer)] = option(
        "adamw", f"one of {', '.join(OPTIMIZERS)}; or the `module:Class` of any other (see optimizers.md)"
    )
    betas: tuple[Fraction, ...] | None = option(
        None,
        "decay of the moments; default: 0.9, 0.999 (lion: 0.9, 0.99; came: 0.9, 0.999, 0.9999)",
        validate_default=True,
    )
    eps: float | None = option(None, "added to the denominator; default: 1e-8", gt=0, validate_default=True)
    weight_decay: float = option(1e-2, "weight decay, decoupled but for sgd", ge=0)
    master: bool = option(
        False,
        "with train.weights = bf16: keep the weights in fp32 beside them, and take its steps on these in place of "
        "rounding by chance; 4 bytes more for each number",
    )
    arguments: dict[str, bool | int | float | str | list[float]] = option(
        {}, "any further keyword arguments of the optimizer's class, such as d_coef of prodigy"
    )

    @field_validator("betas", "eps")
    @classmethod
    def _filled(cls, value: Any, info: ValidationInfo) -> Any:
        """What is not given is what the named optimizer has."""
        own = OPTIMIZERS.get(info.data.get("name", ""), {})
        return own.get(str(info.field_name)) if value is None else value


class LearningRate(Section):
    name: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"] = (
        option("constant", "shape of the learning rate over the run")
    )
    warmup_steps: int = option(0, "optimizer steps of linear warm-up (not used by constant)", ge=0)
    cooldown_steps: int = option(0, "last optimizer steps, of linear descent to 0 (constant_with_warmup)", ge=0)
    cycles: Positive = option(1, "restarts of cosine_with_restarts")
    power: float = option(1.0, "exponent of polynomial", gt=0)


class Ema(Section):
    enabled: bool = option(False, "keep an exponential moving average of the learning tensors")
    decay: float = option(0.9999, "largest decay; the warm-up rule is min(decay, (1 + n) / (10 + n))", ge=0, lt=1)
