"""What of a config contradicts itself or does nothing, told before anything is loaded (law 7)."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sdxl_trainer.config import OPTIMIZERS, STEP_APART, Config
from sdxl_trainer.data import options
from sdxl_trainer.errors import UserError, shown
from sdxl_trainer.formats import ADAPTER_FILE


def _kind(config: Config) -> str | None:
    return config.adapter.kind if config.adapter else None


def _lacks(option: str) -> Callable[[Config], bool]:
    return lambda config: option not in OPTIMIZERS.get(config.optimizer.name, {option: None})


def _another_density(density: str) -> Callable[[Config], bool]:
    return lambda config: config.timesteps.density != density


# (option, when it does nothing, why)
_INERT: list[tuple[str, Callable[[Config], bool], str]] = [
    ("timesteps.multiplier", lambda c: c.timesteps.bias == "none", "timesteps.bias is 'none'"),
    (
        "timesteps.portion",
        lambda c: c.timesteps.bias not in {"earlier", "later"},
        "timesteps.bias is not 'earlier' or 'later'",
    ),
    ("timesteps.begin", lambda c: c.timesteps.bias != "range", "timesteps.bias is not 'range'"),
    ("timesteps.end", lambda c: c.timesteps.bias != "range", "timesteps.bias is not 'range'"),
    ("schedule.warmup_steps", lambda c: c.schedule.name == "constant", "schedule.name is 'constant'"),
    (
        "schedule.cooldown_steps",
        lambda c: c.schedule.name != "constant_with_warmup",
        "schedule.name is not 'constant_with_warmup'",
    ),
    (
        "schedule.cycles",
        lambda c: c.schedule.name != "cosine_with_restarts",
        "schedule.name is not 'cosine_with_restarts'",
    ),
    ("schedule.power", lambda c: c.schedule.name != "polynomial", "schedule.name is not 'polynomial'"),
    ("ema.decay", lambda c: not c.ema.enabled, "ema.enabled is false"),
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
    ("objective.pyramid_levels", lambda c: c.objective.pyramid_levels == 1, "one level is the plain noise"),
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
    *(
        (f"adapter.{name}", lambda c: _kind(c) not in {"lora", "dora"}, "it is of kind 'lora' and 'dora'")
        for name in ("dropout", "rslora", "init")
    ),
    *(
        (f"adapter.{name}", lambda c: _kind(c) in {"oft", "boft"}, "oft and boft rotate blocks of block_size")
        for name in ("rank", "alpha", "conv_rank", "conv_alpha", "ranks", "alphas")
    ),
    ("adapter.factor", lambda c: _kind(c) != "lokr", "it is of kind 'lokr'"),
    ("adapter.block_size", lambda c: _kind(c) not in {"oft", "boft"}, "it is of kind 'oft' and 'boft'"),
    *(
        (f"export.{name}", lambda c: not (c.export.formats or c.adapter or c.token), "export.formats is empty")
        for name in ("metadata", "trigger", "author", "description", "license")
    ),
    *(
        (f"export.{name}", lambda c: c.export.metadata == "none", "export.metadata is 'none'")
        for name in ("author", "description", "license")
    ),
    *((f"export.{name}", lambda c: not c.export.formats, "export.formats is empty") for name in ("name", "dtype")),
    (
        "train.frozen",
        lambda c: not (c.adapter or c.token or any(d.prior_prediction for d in c.data)),
        "nothing is frozen without [adapter], [[token]] or prior_prediction",
    ),
    ("hub.id", lambda c: not c.hub.push, "hub.push is false"),
    ("hub.private", lambda c: not c.hub.push, "hub.push is false"),
    ("model.unet", lambda c: c.model.init == "pretrained", "model.init is 'pretrained'"),
    ("model.vae_revision", lambda c: c.model.vae is None, "model.vae is not given"),
    ("log.project", lambda c: not c.log.trackers, "log.trackers is empty"),
    ("train.validate_every", lambda c: not c.validation.prompts, "validation.prompts is empty"),
    ("validation.every_epochs", lambda c: not c.validation.prompts, "validation.prompts is empty"),
    (
        "validation.loss_every",
        lambda c: not (c.validation.trained_pictures or any(d.held_out for d in c.data)),
        "no data set has held_out pictures, and validation.trained_pictures is 0",
    ),
    *(
        (f"validation.{name}", lambda c: c.validation.loss_every is None, "validation.loss_every is not given")
        for name in ("loss_timesteps", "trained_pictures", "caption_gain", "keep_best", "stop_after")
    ),
    (
        "validation.caption_gain",
        lambda c: not any(d.held_out for d in c.data),
        "no data set has held_out pictures",
    ),
    *(
        (f"validation.{name}", lambda c: not c.validation.prompts, "validation.prompts is empty")
        for name in ("image", "mask")
    ),
    ("validation.strength", lambda c: c.validation.image is None, "validation.image is not given"),
    ("validation.negative", lambda c: not c.validation.prompts, "validation.prompts is empty"),
    ("text.max_chunks", lambda c: c.text.long_captions == "cut", "text.long_captions is 'cut'"),
    ("train.checkpoint_mirror", lambda c: c.train.checkpoint_every == 0, "train.checkpoint_every is 0"),
    ("train.checkpoints_limit", lambda c: c.train.checkpoint_every == 0, "train.checkpoint_every is 0"),
]
# What an optimizer is given by other options of the config.
_ELSEWHERE = {
    "lr": "train.learning_rate",
    "betas": "optimizer.betas",
    "eps": "optimizer.eps",
    "weight_decay": "optimizer.weight_decay",
    "params": "learn",
    "seed": "seed",
}


def inert(config: Config) -> Iterator[tuple[str, str]]:
    """(option, why) of the options that do nothing in this config, whatever their values."""
    return ((option, why) for option, nothing, why in _INERT if nothing(config))


def is_default(config: Config, option: str) -> bool:
    """Whether an option, by its dotted name, has its default, or its section is not there."""
    section, name = option.split(".")
    given = getattr(config, section)
    return given is None or getattr(given, name) == type(given).model_fields[name].default


def refuse(config: Config, where: str) -> None:
    """UserError for the first thing in a config that contradicts another, or does nothing."""
    _length(config, where)
    for option, why in inert(config):
        if not is_default(config, option):
            section, name = option.split(".")
            value = shown(getattr(getattr(config, section), name))
            raise UserError(f"{option} = {value} has no effect: {why}", where, f"remove {option}")
    options.refuse(config, where)
    for check in (
        _measured,
        _overwriting,
        _beside,
        _prior,
        _objective,
        _timesteps,
        _optimizer,
        _fused_backward,
        _export,
    ):
        check(config, where)


def _length(config: Config, where: str) -> None:
    """Refuse a run without a length or with two, and passes larger than their step."""
    train = config.train
    if (train.steps is None) == (train.epochs is None):
        both = train.steps is not None
        what = (
            "train.steps and train.epochs are both given" if both else "neither train.steps nor train.epochs is given"
        )
        fix = "give exactly one of them under [train]"
        raise UserError(what, where, f"{fix}: remove train.epochs, or train.steps" if both else fix)
    if train.micro_batch is not None and train.micro_batch > train.batch_size:
        what = f"train.micro_batch = {train.micro_batch} is more than train.batch_size = {train.batch_size}"
        counts = "batch_size counts the images of an optimizer step, micro_batch those of a pass"
        raise UserError(what, where, f"{counts}; set train.micro_batch = {train.batch_size}")


def _overwriting(config: Config, where: str) -> None:
    """Refuse an output folder that holds the base, or lies among the pictures."""
    output = Path(config.output_dir).expanduser().absolute()
    for key, path in (("model.path", config.model.path), ("model.vae", config.model.vae)):
        if path and Path(path).expanduser().absolute() == output:
            what = f"output_dir and {key} are one folder, '{path}': the base would be overwritten"
            raise UserError(what, where, "choose another output_dir")
    for index, data in enumerate(config.data):
        folder = Path(data.path).expanduser().absolute()
        if folder.is_dir() and output.is_relative_to(folder):
            what = f"output_dir lies in data.{index}.path, '{data.path}': the run's pictures would become data"
            raise UserError(what, where, "choose an output_dir outside of the data")


def _measured(config: Config, where: str) -> None:
    """Refuse a data set that would be neither trained nor measured."""
    for index, data in enumerate(config.data):
        if data.held_out == 1 and config.validation.loss_every is None:
            what = f"data.{index}.held_out = 1 has no effect: validation.loss_every is not given"
            raise UserError(what, where, f"set validation.loss_every = 100, or remove data.{index}")


def _objective(config: Config, where: str) -> None:
    """Refuse contradictions of the objective with itself."""
    objective = config.objective
    if objective.zero_terminal_snr and objective.prediction == "epsilon":
        what = (
            "objective.zero_terminal_snr with prediction 'epsilon': at zero SNR the input says nothing of the picture"
        )
        raise UserError(what, where, 'set objective.prediction = "v_prediction"')
    if objective.weighting in {"min_snr", "soft_min_snr"} and objective.snr_gamma is None:
        what = f"objective.weighting = '{objective.weighting}' without snr_gamma"
        raise UserError(what, where, "set snr_gamma = 5.0")
    if objective.loss != "l2" and objective.delta_schedule != "constant" and objective.delta >= 1.0:
        schedule = objective.delta_schedule
        what = f"objective.delta = {objective.delta:g}: the schedule '{schedule}' goes from 1 down to it"
        raise UserError(what, where, 'give less than 1, or delta_schedule = "constant"')


def _timesteps(config: Config, where: str) -> None:
    """Refuse timesteps of which none is left, or of which the density is none."""
    timesteps = config.timesteps
    if timesteps.bias == "range" and timesteps.begin >= timesteps.end:
        what = f"timesteps.begin = {timesteps.begin} is not before timesteps.end = {timesteps.end}"
        raise UserError(what, where, "begin is the first timestep, end the one after the last")
    if timesteps.density == "sigmoid" and timesteps.slope == 0.0:
        raise UserError("timesteps.slope = 0 makes the density uniform", where, "remove timesteps.density")


def _optimizer(config: Config, where: str) -> None:
    """Refuse contradictions of the optimizer with itself, the rates and the weights' type."""
    options = config.optimizer
    for name in options.arguments.keys() & _ELSEWHERE.keys():
        raise UserError(f"optimizer.arguments.{name} is not given there", where, f"set {_ELSEWHERE[name]}")
    expected = OPTIMIZERS.get(options.name, {}).get("betas")
    if options.betas is not None and expected is not None and len(options.betas) != len(expected):
        what = f"optimizer.betas has {len(options.betas)} numbers; {options.name} takes {len(expected)}"
        raise UserError(what, where, f"for example {list(expected)}")
    refuse = _REFUSALS.get(options.name)
    if refuse is not None:
        refuse(config, where)
    if options.master:
        _master(config, where)


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


def _master(config: Config, where: str) -> None:
    able = [name for name in (*STEP_APART, "muon") if name != "adamw_bf16"]
    if config.train.weights != "bf16":
        what = "optimizer.master with fp32 weights, which are exact by themselves"
        raise UserError(what, where, 'set train.weights = "bf16", or remove it')
    if config.optimizer.name.removeprefix("paged_") not in able:
        what = f"optimizer.master with {config.optimizer.name}, which cannot take its steps on copies"
        raise UserError(what, where, f"use {', '.join(able)}; or remove it")


_REFUSALS: dict[str, Callable[[Config, str], Any]] = {
    "schedulefree": _schedulefree,
    "prodigy": _prodigy,
    "adamw_bf16": _adamw_bf16,
}


def _fused_backward(config: Config, where: str) -> None:
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


def _export(config: Config, where: str) -> None:
    """What a run is to leave for other programs: the layouts of what it trains, under a name of a file."""
    formats, name = config.export.formats, config.export.name
    if "kohya" in formats and config.adapter is None:
        what = "export.formats has 'kohya', the layout of adapters, and a whole model is trained"
        raise UserError(what, where, 'write formats = ["single"], or add an [adapter]')
    if "single" in formats and (config.adapter or config.token):
        what = "export.formats has 'single', a whole model, and an adapter or new words are trained"
        raise UserError(what, where, 'write formats = ["kohya"]; sdxl convert BASE DST --lora ADAPTER merges it')
    if "embeddings" in formats and not config.token:
        what = "export.formats has 'embeddings', the layout of new words, and there are none"
        raise UserError(what, where, "remove it, or add a [[token]]")
    if name is not None and (not name.strip() or Path(name).name != name or name == Path(ADAPTER_FILE).stem):
        what = f"export.name = '{name}' cannot be the name of a file here"
        raise UserError(what, where, "give a name without folders, such as my-style")


def _prior(config: Config, where: str) -> None:
    """What has no meaning where the base draws or predicts."""
    for index, data in enumerate(config.data):
        option = "prior_prediction" if data.prior_prediction else "generate" if data.generate else ""
        if option and config.model.init == "random":
            what = f"data.{index}.{option} with model.init = 'random': such a base knows nothing"
            raise UserError(what, where, f"remove {option}, or model.init")
        if data.prior_prediction and config.token and not config.adapter:
            what = f"data.{index}.prior_prediction has no effect: beside new words the model stays as it is"
            raise UserError(what, where, "remove it, or add an [adapter]")


def _beside(config: Config, where: str) -> None:
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
    called = [name.lower() for word in config.token for name in (word.name, word.placeholder) if name]
    if len(set(called)) < len(called):
        what = f"two new words or their placeholders are called alike: {', '.join(called)}"
        raise UserError(what, where, "give each a name and a placeholder of its own")
    for index, name in enumerate(names):
        others = names[:index] + names[index + 1 :]
        if any(other.lower().startswith(name.lower()) for other in others):
            what = f"the new words {', '.join(names)} cannot be told apart: one begins with '{name}', in whatever case"
            raise UserError(what, where, "choose words of which none begins with another, such as <a> and <b>")
