"""What of the optimizer contradicts itself or does nothing, told before anything is loaded."""

from collections.abc import Callable
from typing import Any

from sdxl_trainer.config import OPTIMIZERS, Config
from sdxl_trainer.errors import UserError


def _lacks(option: str) -> Callable[[Config], bool]:
    return lambda config: option not in OPTIMIZERS.get(config.optimizer.name, {option: None})


# Rows of configfile.INERT.
INERT: list[tuple[str, Callable[[Config], bool], str]] = [
    ("optimizer.betas", _lacks("betas"), "this optimizer has no betas"),
    ("optimizer.eps", _lacks("eps"), "this optimizer has no eps, or its own under other names"),
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
