"""What of objective, optimizer and exports contradicts itself or does nothing, told before anything is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdxl_trainer.config import OPTIMIZERS, STEP_APART, Config
from sdxl_trainer.errors import UserError


def _lacks(option: str) -> Callable[[Config], bool]:
    return lambda config: option not in OPTIMIZERS.get(config.optimizer.name, {option: None})


def _another_density(density: str) -> Callable[[Config], bool]:
    return lambda config: config.timesteps.density != density


# Rows of configfile.INERT.
INERT: list[tuple[str, Callable[[Config], bool], str]] = [
    ("optimizer.betas", _lacks("betas"), "this optimizer has no betas"),
    ("optimizer.eps", _lacks("eps"), "this optimizer has no eps, or its own under other names"),
    (
        "objective.snr_gamma",
        lambda c: c.objective.weighting not in {None, "min_snr", "soft_min_snr"},
        "objective.weighting is neither 'min_snr' nor 'soft_min_snr'",
    ),
    ("objective.p2_gamma", lambda c: c.objective.weighting != "p2", "objective.weighting is not 'p2'"),
    ("objective.delta", lambda c: c.objective.loss == "l2", "objective.loss is 'l2'"),
    ("objective.delta_schedule", lambda c: c.objective.loss == "l2", "objective.loss is 'l2'"),
    ("objective.noise_offset_random", lambda c: not c.objective.noise_offset, "objective.noise_offset is 0"),
    ("objective.noise_offset_adaptive", lambda c: not c.objective.noise_offset, "objective.noise_offset is 0"),
    ("objective.pyramid_discount", lambda c: not c.objective.pyramid_levels, "objective.pyramid_levels is 0"),
    (
        "objective.input_perturbation_random",
        lambda c: not c.objective.input_perturbation,
        "objective.input_perturbation is 0",
    ),
    *(
        (f"timesteps.{name}", _another_density(density), f"timesteps.density is not '{density}'")
        for density, names in {
            "logit_normal": ("location", "scale"),
            "sigmoid": ("slope", "midpoint"),
            "beta": ("alpha", "beta"),
        }.items()
        for name in names
    ),
    (
        "timesteps.importance",
        lambda c: c.timesteps.density == "uniform" and c.timesteps.bias == "none",
        "all timesteps are drawn equally often",
    ),
    (
        "timesteps.sampling",
        lambda c: c.timesteps.sampling == "stratified" and c.train.batch_size == 1,
        "train.batch_size is 1 ('sobol' spreads over steps)",
    ),
]

# What an optimizer is given by other options of the config.
ELSEWHERE = {
    "lr": "train.learning_rate",
    "betas": "optimizer.betas",
    "eps": "optimizer.eps",
    "weight_decay": "optimizer.weight_decay",
    "params": "learn",
    "seed": "seed",
}


def measured(config: Config, where: str) -> None:
    """Refuse a data set that would be neither trained nor measured."""
    for index, data in enumerate(config.data):
        if data.held_out == 1 and config.validation.loss_every is None:
            what = f"data.{index}.held_out = 1 has no effect: validation.loss_every is not given"
            raise UserError(what, where, f"set validation.loss_every = 100, or remove data.{index}")


def objective(config: Config, where: str) -> None:
    """Refuse contradictions of the objective and the timesteps with themselves."""
    options = config.objective
    if options.weighting in {"min_snr", "soft_min_snr"} and options.snr_gamma is None:
        raise UserError(f"objective.weighting = '{options.weighting}' without snr_gamma", where, "set snr_gamma = 5.0")
    if options.loss != "l2" and options.delta_schedule != "constant" and options.delta >= 1.0:
        what = f"objective.delta = {options.delta:g}: the schedule '{options.delta_schedule}' goes from 1 down to it"
        raise UserError(what, where, 'give less than 1, or delta_schedule = "constant"')
    if config.timesteps.density == "sigmoid" and config.timesteps.slope == 0.0:
        raise UserError("timesteps.slope = 0 makes the density uniform", where, "remove timesteps.density")


def optimizer(config: Config, where: str) -> None:
    """Refuse contradictions of the optimizer with itself, the rates and the weights' type."""
    options = config.optimizer
    for name in options.arguments.keys() & ELSEWHERE.keys():
        raise UserError(f"optimizer.arguments.{name} is not given there", where, f"set {ELSEWHERE[name]}")
    expected = OPTIMIZERS.get(options.name, {}).get("betas")
    if options.betas is not None and expected is not None and len(options.betas) != len(expected):
        what = f"optimizer.betas has {len(options.betas)} numbers; {options.name} takes {len(expected)}"
        raise UserError(what, where, f"for example {list(expected)}")
    refuse = _REFUSALS.get(options.name)
    if refuse is not None:
        refuse(config, where)


def _schedulefree(config: Config, where: str) -> None:
    if config.schedule.name not in {"constant", "constant_with_warmup"}:
        what = f"schedule.name = '{config.schedule.name}' with schedulefree, whose averaging stands for the decay"
        raise UserError(what, where, "use constant or constant_with_warmup")
    if config.ema.enabled:
        what = "ema.enabled with schedulefree, which averages the weights itself"
        raise UserError(what, where, "remove ema.enabled")


def _prodigy(config: Config, where: str) -> None:
    given = [config.train.learning_rate if rule.learning_rate is None else rule.learning_rate for rule in config.learn]
    rates = {rate for rate in given or [config.train.learning_rate] if rate > 0}
    if len(rates) > 1:
        what = f"prodigy finds one rate for all tensors, but the rules ask for {sorted(rates)}"
        raise UserError(what, where, "give all rules the same learning_rate, or 0 for what should not learn")
    if min(rates, default=1.0) < 0.1:
        what = f"train.learning_rate = {min(rates):g} with prodigy: it multiplies the rate that prodigy finds by itself"
        raise UserError(what, where, "set train.learning_rate = 1.0")


def _adamw_bf16(config: Config, where: str) -> None:
    if config.train.weights != "bf16":
        what = "optimizer.name = 'adamw_bf16' with fp32 weights, which need no stochastic rounding"
        raise UserError(what, where, 'set train.weights = "bf16", or optimizer.name = "adamw"')


_REFUSALS: dict[str, Callable[[Config, str], Any]] = {
    "schedulefree": _schedulefree,
    "prodigy": _prodigy,
    "adamw_bf16": _adamw_bf16,
}


def fused_backward(config: Config, where: str) -> None:
    """What needs the gradients of a step together."""
    train = config.train
    if not train.fused_backward:
        return
    if config.adapter or config.token:
        what = "train.fused_backward with an adapter or new words, whose gradients take next to no memory"
        raise UserError(what, where, "remove train.fused_backward")
    if config.optimizer.name not in STEP_APART:
        what = f"{config.optimizer.name} steps on all tensors at once, train.fused_backward on some after the others"
        raise UserError(what, where, f"use {', '.join(STEP_APART)}; or remove train.fused_backward")
    if train.micro_batch is not None and train.micro_batch < train.batch_size:
        what = f"train.fused_backward with {train.micro_batch} of {train.batch_size} images per pass: gradients add up"
        fix = "remove train.micro_batch (train.gradient_checkpointing saves activations), or train.fused_backward"
        raise UserError(what, where, fix)
    if any(rule.until < 1 for rule in config.learn):
        raise UserError("train.fused_backward with learn.until", where, "remove one of them")


def export(config: Config, where: str) -> None:
    """What a run is to leave for other programs: the layouts of what it trains, under a name of a file."""
    formats, name = config.export.formats, config.export.name
    if "kohya" in formats and config.adapter is None:
        what = "export.formats has 'kohya', the layout of adapters, and a whole model is trained"
        raise UserError(what, where, 'write formats = ["single"], or add an [adapter]')
    if "single" in formats and (config.adapter or config.token):
        what = "export.formats has 'single', a whole model, and an adapter or new words are trained"
        raise UserError(what, where, 'write formats = ["kohya"]; sdxl convert BASE DST --lora ADAPTER merges it')
    if name is not None and (not name.strip() or Path(name).name != name or name == "pytorch_lora_weights"):
        what = f"export.name = '{name}' cannot be the name of a file here"
        raise UserError(what, where, "give a name without folders, such as my-style")


def prior(config: Config, where: str) -> None:
    """What has no meaning where the base draws or predicts."""
    for index, data in enumerate(config.data):
        option = "prior_prediction" if data.prior_prediction else "generate" if data.generate else ""
        if option and config.model.init == "random":
            what = f"data.{index}.{option} with model.init = 'random': such a base knows nothing"
            raise UserError(what, where, f"remove {option}, or model.init")
        if data.prior_prediction and config.token and not config.adapter:
            what = f"data.{index}.prior_prediction has no effect: beside new words the model stays as it is"
            raise UserError(what, where, "remove it, or add an [adapter]")


def beside(config: Config, where: str) -> None:
    """What does not go with an adapter or new words."""
    if not (config.adapter or config.token):
        return
    if config.train.weights != "fp32":
        what = f"train.weights = '{config.train.weights}' with an adapter or new words: these are always fp32"
        raise UserError(what, where, f'for the base beside them set train.frozen = "{config.train.weights}"')
    if config.model.init == "random":
        what = "model.init = 'random' with an adapter or new words: nobody else has this base"
        raise UserError(what, where, "remove model.init")
    names = [word.name for word in config.token]
    for name in names:
        if names.count(name) > 1 or any(other != name and other.startswith(name) for other in names):
            what = f"the new words {', '.join(names)} cannot be told apart: one begins with '{name}'"
            raise UserError(what, where, "choose words of which none begins with another, such as <a> and <b>")
