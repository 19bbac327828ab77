"""Optimizers and learning rates under the names of other trainers."""

import math
from collections.abc import Mapping
from typing import Any

from sdxl_trainer.arrivals.account import Account
from sdxl_trainer.config import OPTIMIZERS as OURS
from sdxl_trainer.errors import UserError, closest, plural

# Name, lower case and without - and _, -> ours, its weight decay there if none is given, and what is different.
OPTIMIZERS: dict[str, tuple[str, float, str]] = {
    "adamw": ("adamw", 1e-2, ""),
    "adam": ("adamw", 0.0, "AdamW without weight decay is Adam; with it, the decay is decoupled here"),
    "torchadamw": ("adamw", 1e-2, ""),
    "optimiadamw": ("adamw", 1e-2, "PyTorch's, without Kahan summation"),
    "adamw8bit": ("adamw8bit", 1e-2, ""),
    "adam8bit": ("adamw8bit", 0.0, "the weight decay is decoupled here"),
    "bnbadamw8bit": ("adamw8bit", 1e-2, ""),
    "aoadamw8bit": ("adamw8bit", 1e-2, "bitsandbytes' 8-bit state in the place of torchao's"),
    "pagedadamw8bit": ("paged_adamw8bit", 1e-2, ""),
    "bnbadamw8bitpaged": ("paged_adamw8bit", 1e-2, ""),
    "pagedadamw": ("bitsandbytes.optim:PagedAdamW", 1e-2, ""),
    "pagedadamw32bit": ("bitsandbytes.optim:PagedAdamW32bit", 1e-2, ""),
    "adamwbf16": ("adamw_bf16", 1e-2, "rounds by chance in the place of Kahan summation"),
    "adamwschedulefree": ("schedulefree", 0.0, ""),
    "scheduelfreeadamw": ("schedulefree", 0.0, ""),
    "schedulefreeadamw": ("schedulefree", 0.0, ""),
    "adafactor": ("adafactor", 0.0, ""),
    "torchadafactor": ("adafactor", 0.0, ""),
    "came": ("came", 0.0, ""),
    "lion": ("lion", 0.0, ""),
    "lion8bit": ("bitsandbytes.optim:Lion8bit", 0.0, ""),
    "bnblion8bit": ("bitsandbytes.optim:Lion8bit", 0.0, ""),
    "pagedlion8bit": ("bitsandbytes.optim:PagedLion8bit", 0.0, ""),
    "ademamix8bit": ("bitsandbytes.optim:AdEMAMix8bit", 1e-2, ""),
    "pagedademamix8bit": ("bitsandbytes.optim:PagedAdEMAMix8bit", 1e-2, ""),
    "muon": ("muon", 1e-2, ""),
    "prodigy": ("prodigy", 0.0, ""),
    "prodigy8bit": ("prodigy", 0.0, "its state is in full precision here"),
    "prodigyplusschedulefree": ("prodigy", 0.0, "Prodigy without the schedule-free averages"),
    "dadaptation": ("prodigy", 0.0, "Prodigy grew out of D-Adaptation and finds the rate in its stead"),
    "dadaptadam": ("prodigy", 0.0, "Prodigy grew out of D-Adaptation and finds the rate in its stead"),
    "dadaptadampreprint": ("prodigy", 0.0, "Prodigy grew out of D-Adaptation and finds the rate in its stead"),
    "dadaptationadam": ("prodigy", 0.0, "Prodigy grew out of D-Adaptation and finds the rate in its stead"),
    "sgd": ("sgd", 0.0, ""),
    "torchsgd": ("sgd", 0.0, ""),
    "sgdnesterov": ("sgd", 0.0, ""),
}
SCHEDULES: dict[str, tuple[str, str]] = {
    "constant": ("constant", ""),
    "constant_with_warmup": ("constant_with_warmup", ""),
    "linear": ("linear", ""),
    "cosine": ("cosine", ""),
    "cosine_with_restarts": ("cosine_with_restarts", ""),
    "polynomial": ("polynomial", ""),
    "cosine_with_min_lr": ("cosine", "it ends at 0 and not at a lowest rate"),
    "cosine_annealing": ("cosine", ""),
    "cosine_with_hard_restarts": ("cosine_with_restarts", ""),
    "cosine_annealing_hard_restarts": ("cosine_with_restarts", ""),
    "warmup_stable_decay": ("constant_with_warmup", "with schedule.cooldown_steps"),
    "inverse_sqrt": ("constant_with_warmup", "the rate does not fall with the square root of the steps"),
    "rex": ("cosine", "falls by half a cosine and not by Rex' curve"),
    "sine": ("cosine", "falls once and does not come back"),
    "step": ("constant", "the rate does not fall in steps"),
    "piecewise_constant": ("constant", "the rate does not change in steps"),
}
# A rank that makes no layer's factor smaller, as users of LyCORIS give it for whole ones.
WHOLE = 100_000
_ATTENTION = ("attention", r"unet\..*\.attn[12]\..*")
# Sides of SDXL's widest layers.
_WIDEST, _WIDEST_OF_ATTENTION, _WIDEST_CONVOLUTION = 10240, 2048, 2560
# How optimizers take what the config has options for.
_OWN = {"weight_decay": "optimizer.weight_decay", "eps": "optimizer.eps"}
# Of transformers' Adafactor, which finds steps relative to the weights; PyTorch's takes the rate as it is.
_ADAFACTOR = {"scale_parameter", "relative_step", "warmup_init", "decay_rate", "clip_threshold", "beta1", "eps"}


def optimizer(account: Account, option: str, given: str, arguments: dict[str, Any], argument_place: str) -> str:
    """Put an optimizer and its arguments into the account; the name of ours. `argument_place` is how the source calls
    its arguments."""
    key = given.lower().replace("-", "").replace("_", "")
    name, decay, why = OPTIMIZERS.get(key, ("", 0.0, ""))
    if not name and "." in given:
        module, _, found = given.rpartition(".")
        name, decay = f"{module}:{found}", 0.0
    if not name:
        known = sorted(OPTIMIZERS)
        raise UserError(f"the optimizer '{given}' is not known here", account.where, closest(key, known))
    if option not in account.options:
        account.assumed("optimizer.name", name, f"the default there, {given}")
    elif why or name.partition(":")[2].lower() not in ("", key):
        account.changed(option, "optimizer.name", name, why or "by the name of its class")
    else:
        account.kept(option, "optimizer.name", name)
    inner = account.inner(arguments, argument_place)
    if name == "adafactor":
        _adafactor(inner, account)
    if not inner.has("weight_decay"):
        inner.options.pop("weight_decay", None)
        if decay != 1e-2:
            inner.assumed("optimizer.weight_decay", decay, "none is given, and that is the optimizer's own")
    if "betas" in inner.options and name in OURS:
        inner.kept("betas", "optimizer.betas", [float(beta) for beta in inner.look("betas")])
    inner.keep_all({"weight_decay": "optimizer.weight_decay"})
    if name not in OURS or "eps" in OURS[name]:
        inner.keep_all({"eps": "optimizer.eps"})
    _further(inner, name)
    return name


def _further(inner: Account, name: str) -> None:
    """What the class takes under its own names; arguments that ours sets otherwise when they are not given."""
    arguments: dict[str, Any] = {}
    if name == "prodigy":
        arguments = {"use_bias_correction": False, "safeguard_warmup": False}
    for argument in list(inner.options):
        value = inner.look(argument)
        if argument in {"fused", "foreach", "decouple", "growth_rate"} and name in {"adamw", "prodigy"}:
            inner.do_anyway({argument: "decided here"})
        elif isinstance(value, bool | int | float | str):
            arguments[argument] = value
            inner.kept(argument, f"optimizer.arguments.{argument}", value)
        else:
            inner.finish()
    given = inner.tree.get("optimizer", {}).get("arguments", {})
    for argument, value in arguments.items():
        if argument not in given:
            inner.assumed(f"optimizer.arguments.{argument}", value, "the optimizer's own default, which is not ours")


def _adafactor(inner: Account, account: Account) -> None:
    relative = inner.look("relative_step", True)
    if relative and "relative_step" in inner.options:
        inner.dropped("relative_step", "steps are not relative to the weights here: the learning rate is used as it is")
    for argument in sorted(_ADAFACTOR & inner.options.keys()):
        inner.dropped(argument, "PyTorch's Adafactor takes the learning rate as it is, with its own defaults")


def learning_rate(account: Account, option: str, rate: float, name: str) -> None:
    """The base rate; Prodigy's is 1, since it multiplies what Prodigy finds."""
    if name == "prodigy" and rate < 0.1:
        account.changed(option, "train.learning_rate", 1.0, "it multiplies the rate that Prodigy finds")
    elif option in account.options:
        account.kept(option, "train.learning_rate", float(rate))
    else:
        account.assumed("train.learning_rate", float(rate), "the default there")


def schedule(account: Account, option: str, given: str, warmup: tuple[str, float | None], steps: int | None) -> None:
    """The shape of the learning rate. `warmup`: its option, and steps or a share below 1 of them."""
    key = given.lower().replace("-", "_")
    name, why = SCHEDULES.get(key, ("", ""))
    if not name and key.startswith("adafactor"):
        name, why = "constant", "steps are not relative to the weights here"
    if not name:
        raise UserError(f"the schedule '{given}' is not known here", account.where, closest(key, SCHEDULES))
    place, amount = warmup
    count = amount or 0
    if 0 < count < 1:
        count = round(count * steps) if steps else 0
    if name == "constant" and count:
        why = "constant has no warm-up here, and it has there"
        if option in account.options:
            account.changed(option, "schedule.name", "constant_with_warmup", why)
        else:
            account.assumed("schedule.name", "constant_with_warmup", why)
    elif option not in account.options:
        if name != "constant":
            account.assumed("schedule.name", name, "the default there")
    elif why or name != key:
        account.changed(option, "schedule.name", name, why or "the same under another name")
    else:
        account.kept(option, "schedule.name", name)
    if not account.has(place):
        return
    if count and count == amount:
        account.kept(place, "schedule.warmup_steps", int(count))
    elif count:
        account.changed(place, "schedule.warmup_steps", int(count), f"that share of {steps} steps")
    else:
        account.dropped(place, "a share of a number of steps that the data decide: set schedule.warmup_steps yourself")


def left_out_captions(account: Account) -> None:
    """What a caption that is left out becomes: in other trainers the empty one, whose embedding is not the zeros of
    SDXL's own pipeline, and so of ours."""
    if any(data.get("caption_dropout") or data.get("tag_dropout") for data in account.tree["data"]):
        why = "what is left of a caption that is left out is encoded there: '' and not zeros"
        account.assumed("text.dropped_caption", "empty", why)


def pyramid(account: Account) -> None:
    """Multi-resolution noise."""
    name, levels = "multires_noise_iterations", int(account.number("multires_noise_iterations", 0) or 0)
    if levels > 1:
        account.kept(name, "objective.pyramid_levels", levels)
    elif levels:
        account.dropped(name, "one level is of full size, and changes nothing")


def kronecker(account: Account, options: Account, factor: str = "factor", whole: str = "full_matrix") -> None:
    """LoKr's factor, a second factor that is whole, and no alpha that would do nothing; once rank, alpha and targets
    are known. `options` are those that hold `factor` and `whole`."""
    adapter = account.tree["adapter"]
    if options.number(factor, -1) > 0:
        options.kept(factor, "adapter.factor", int(options.number(factor)))
    options.part(factor, "adapter.factor, which is not given: near the square root of a side, as there")
    if options.look(whole):
        for option in ("rank", "alpha", "conv_rank", "conv_alpha"):
            _taken_out(account, option, f"{whole} has the last word")
        options.kept(whole, "adapter.rank", WHOLE)
    widest = _WIDEST_OF_ATTENTION if adapter["targets"] in _ATTENTION else _WIDEST
    why = "the rank makes the second factor of no layer smaller: these are whole, and have no alpha there either"
    for rank, alpha, side in (("rank", "alpha", widest), ("conv_rank", "conv_alpha", _WIDEST_CONVOLUTION)):
        if alpha in adapter and adapter[rank] >= _second(side, adapter.get("factor")) / 2:
            _taken_out(account, alpha, why)


def _taken_out(account: Account, option: str, why: str) -> None:
    account.tree["adapter"].pop(option, None)
    account.undone(f"adapter.{option}", why)


def _second(side: int, factor: int | None) -> int:
    """The part of a side that LoKr's second factor has."""
    return side // max(n for n in range(1, min(side, factor or math.isqrt(side)) + 1) if side % n == 0)


def interval(account: Account, to: str, names: Mapping[str, bool]) -> None:
    """How often something is done, where several options may say so, each in epochs or not: the first that is given
    decides."""
    first = next((name for name in names if account.has(name)), "")
    if first:
        every = int(account.number(first))
        account.kept(first, to, plural(every, "epoch") if names[first] else every)
    account.drop_all(dict.fromkeys(names, f"{first} decides: {to} is one interval"))
