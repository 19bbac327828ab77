"""From a config to a job that is ready for its next step."""

from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sdxl_trainer import (
    adapters,
    beginning,
    checkpoint,
    class_pictures,
    disk,
    distributed,
    ema,
    files,
    guards,
    held_out,
    hub,
    kinds,
    manifest,
    memory,
    model,
    narrow,
    objective,
    optim,
    parameters,
    presets,
    resume,
    sample,
    schedule,
    text,
    timesteps,
    tokens,
    trackers,
)
from sdxl_trainer import base as bases
from sdxl_trainer import prior as priors
from sdxl_trainer.base import Base
from sdxl_trainer.checkpoint import Checkpoint
from sdxl_trainer.config import Config
from sdxl_trainer.data import plan, prepare
from sdxl_trainer.data.memo import open_memo
from sdxl_trainer.data.prepare import Stock
from sdxl_trainer.data.table import present
from sdxl_trainer.dtypes import DTYPES
from sdxl_trainer.errors import UserError, closest, plural
from sdxl_trainer.log import Console, Metrics
from sdxl_trainer.run import Job, Run, Start, State, Watch
from sdxl_trainer.sampling.checkpoints import scheduler_config
from sdxl_trainer.saver import Saver
from sdxl_trainer.validate import Validator


def prepare_job(config: Config, start: Start) -> Job | None:
    """Everything up to the first step; None if the run is already done."""
    output, watch, notes = Path(config.output_dir).expanduser(), Watch(), list[str]()
    with files.explained(output):
        output.mkdir(parents=True, exist_ok=True)
    precision = computing(config, notes)
    trackers.refuse(config.log)
    hub.refuse_name(output, config.hub)
    if config.log.trackers:
        with files.explained(output / config.log.dir):
            (output / config.log.dir).mkdir(parents=True, exist_ok=True)
    accelerator = distributed.make(config, precision)
    console = Console(accelerator.is_main_process)
    for line in notes:
        console.say(line)
    with watch.phase("reading the data"), accelerator.main_process_first():
        memo = open_memo(prepare.cache_folder(config))
        base = bases.resolve(config.model, prepare.cache_folder(config), memo)
        orders = class_pictures.missing(config, base, memo)
        stock = None if orders else prepare.take_stock(config, base, precision, memo=memo)
    kinds.refuse(config, base)
    if stock is None:
        with watch.phase("class pictures"):
            draw_class_pictures(config, base, orders, precision, accelerator, console)
        with watch.phase("reading the data"), accelerator.main_process_first():
            stock = prepare.take_stock(config, base, precision)
    order = prepare.order(config, stock)
    begin = distributed.decided(
        accelerator, lambda: resume.starting_point(config, base, start, output, stock, order, console.say)
    )
    if begin.done:
        console.say(f"already done: {plural(begin.steps, 'step')}, in {output}")
        return None
    if accelerator.num_processes == 1 and distributed.sharding(config, console.say):
        console.say("sharded weights (FSDP): there is one process, which keeps everything")
    _refuse_early(config, base, accelerator.device, accelerator.num_processes, precision)
    alone = distributed.one_pass(config, accelerator.num_processes, len(present(order.group_of)))
    groups, sdxl = learning(config, base, stock, begin.checkpoint)
    need = disk.need(config, base, stock, order, groups, sdxl, begin)
    distributed.decided(accelerator, lambda: disk.look(need, config.output_dir, console.say))
    free = min(distributed.gathered([distributed.free_memory()])) if config.train.memory == "auto" else 0.0
    config = fitted(config, groups, sdxl, stock, precision, console.say, alone, free, begin.checkpoint)
    if config.hub.push and accelerator.is_main_process:
        hub.repository(output, config.hub)
    console.say(_ahead(config, stock, order, begin.steps, groups))
    with watch.phase("encoding"):
        fill(config, base, stock, accelerator, console)
    with watch.phase("loading the model"):
        job = _assemble(config, base, stock, order, begin, accelerator, precision, console, watch, output)
    if accelerator.is_main_process:
        manifest.begin(job, stock)
        if start.mode in {"restart", "checkpoint"}:
            sample.forget(output / "samples", job.state.step)
    if config.log.trackers:
        job.trackers.start(manifest.flat(config), continues=job.state.step > 0)
    return job


def _ahead(config: Config, stock: Stock, order: plan.Plan, steps: int, groups: list[parameters.Group]) -> str:
    """What the run is: a first look for its user, as `sdxl check` gives at length."""
    shown = f"{plural(len(stock.pictures), 'picture')}, {plural(steps, 'step')} of {config.train.batch_size}"
    return f"{shown}: {order.epochs(steps)}; {sum(g.size for g in groups):,} parameters learn"


def fitted(
    config: Config,
    groups: list[parameters.Group],
    sdxl: model.SDXL,
    stock: Stock,
    precision: str,
    say: Callable[[str], None],
    alone: bool = True,
    free: float = 0.0,
    at: Checkpoint | None = None,
) -> Config:
    """The config with what fits into `train.memory`, if it says how much there is. `alone`: each step is a pass."""
    if config.train.memory is None:
        return config
    before = {name: at.state()["config"]["train"][name] for name in presets.PLANNED} if at else None
    step = memory.step(config, shapes(stock), precision, distributed.device_type())
    return memory.fit(config, sdxl, groups, step, say, alone, free, before)


def shapes(stock: Stock) -> set[tuple[int, int]]:
    """Heights and widths of the pictures that are trained on."""
    return {stock.pictures.targets[number] for number in present(stock.pictures.rows["target"])}


def learning(
    config: Config, base: Base, stock: Stock, at: Checkpoint | None
) -> tuple[list[parameters.Group], model.SDXL]:
    """The rules' groups on a model without weights, and the model."""
    sdxl = model.skeleton(base, stock.text_learns, config.text)
    inject(sdxl, config, base, at)
    groups = parameters.apply_rules(sdxl, parameters.rules(config), config.train, config.optimizer, sdxl.closed())
    return groups, sdxl


def draw_class_pictures(
    config: Config, base: Base, orders: list[class_pictures.Order], precision: str, accelerator: Any, console: Console
) -> None:
    """Draw the class pictures that are missing, once all other data is known to be in order."""
    noise_schedule(config, base)
    optim.refuse(config.optimizer, config.train, accelerator.device)
    others = complete(config, orders)
    if others.data:
        with accelerator.main_process_first():
            prepare.take_stock(others, base, precision)
    class_pictures.draw(config, base, orders, precision, accelerator, console)


def complete(config: Config, orders: list[class_pictures.Order]) -> Config:
    """The config without the data sets that lack class pictures."""
    lacking = {order.index for order in orders}
    kept = [data for index, data in enumerate(config.data) if index not in lacking]
    return config.model_copy(update={"data": tuple(kept)})


def fill(config: Config, base: Base, stock: Stock, accelerator: Any, console: Console) -> None:
    """Encode what is missing, shared among the processes."""
    prepare.fill(
        config,
        base,
        stock,
        accelerator.device,
        console.progress,
        console.say,
        accelerator.process_index,
        accelerator.num_processes,
        distributed.gathered,
    )


def _refuse_early(config: Config, base: Base, device: torch.device, processes: int, precision: str) -> None:
    """What could only fail after the encoding, which may take hours, is looked at before it."""
    noise_schedule(config, base)
    optim.refuse(config.optimizer, config.train, device)
    if processes > 1 and distributed.sharding(config, lambda line: None):
        refuse_sharded(config, precision)


def refuse_sharded(config: Config, precision: str) -> None:
    """Refuse what does not work where each process has a part of every tensor."""
    optim.refuse_sharded(config.optimizer)
    if precision == "fp16":
        what = "fp16 with sharded weights: the processes would scale their losses differently"
        raise UserError(what, "train.precision", "use bf16 or fp32; or train without sharding (DDP)")
    if precision == "fp32" and config.train.weights == "bf16":
        what = "bf16 weights that compute in fp32 cannot be sharded"
        raise UserError(what, "train.weights", 'set train.weights = "fp32", or train without sharding (DDP)')
    if config.train.memory is not None:
        what = "train.memory with sharded weights: what a process takes of a sharded model is not counted"
        raise UserError(what, "train.memory", "remove it and set train.micro_batch, or train without sharding (DDP)")


def inject(sdxl: model.SDXL, config: Config, base: Base, at: Checkpoint | None) -> None:
    """Put beside the model what learns in its stead, as it is at the checkpoint or at the beginning."""
    if config.adapter:
        adapters.inject(sdxl, config.adapter, config.seed)
    tokens.inject(sdxl, config.token, base, config.seed)
    if sdxl.added and at:
        checkpoint.load_added(at, sdxl)
    elif config.adapter and config.adapter.start:
        beginning.load(sdxl, config.adapter.start)


def computing(config: Config, notes: list[str]) -> str:
    """The compute type: fp32, fp16 or bf16."""
    wanted, bf16 = config.train.precision, config.train.weights == "bf16"
    if bf16 and wanted not in {"auto", "bf16"}:
        what = f"train.weights = 'bf16' with train.precision = '{wanted}'"
        raise UserError(what, "train.precision", "bf16 weights compute in bf16: remove train.precision")
    found = distributed.precision("bf16" if bf16 else wanted, notes.append)
    if bf16 and found == "fp16":
        raise UserError("bf16 weights on a GPU that has no bf16", "train.weights", 'set train.weights = "fp32"')
    return found


def noise_schedule(config: Config, base: Base) -> tuple[schedule.Schedule, str]:
    """The final schedule, and what the UNet predicts."""
    scheduler = base.config("scheduler")
    prediction = config.objective.prediction or scheduler.get("prediction_type", "epsilon")
    if prediction not in objective.PREDICTIONS:
        what, fix = f"the base predicts '{prediction}'", closest(prediction, objective.PREDICTIONS)
        raise UserError(what, "scheduler_config.json", f"set objective.prediction; {fix}")
    try:
        made = schedule.from_scheduler_config(scheduler, config.objective.zero_terminal_snr)
    except (TypeError, ValueError, RuntimeError, OverflowError, KeyError) as error:
        what = f"the noise schedule cannot be made: {error}"
        raise UserError(what, "scheduler_config.json", "copy or download this part of the model again") from error
    if made.levels is not None:
        _refuse_with_edm(config, prediction)
    if made.zero_terminal_snr and prediction == "epsilon":
        what = "zero terminal SNR with prediction 'epsilon': at its end the input says nothing of the picture"
        raise UserError(what, "objective.prediction", 'set objective.prediction = "v_prediction"')
    if any(data.prior_prediction for data in config.data):
        _refuse_other_base(config, scheduler, prediction)
    timesteps.refuse(config.timesteps, len(made))
    return made, prediction


def _refuse_other_base(config: Config, scheduler: dict[str, Any], prediction: str) -> None:
    """The base's prediction is a target only for a model that is asked the same."""
    own = scheduler.get("prediction_type", "epsilon")
    if prediction != own:
        what = f"prior_prediction with objective.prediction = '{prediction}', and the base predicts '{own}'"
        raise UserError(what, "objective.prediction", f'set objective.prediction = "{own}", or use class pictures')
    if config.objective.zero_terminal_snr and not scheduler.get("rescale_betas_zero_snr"):
        what = "prior_prediction with objective.zero_terminal_snr: the base knows other noise at each timestep"
        raise UserError(what, "objective.zero_terminal_snr", "remove it, or use class pictures")


def _refuse_with_edm(config: Config, prediction: str) -> None:
    weighting = config.objective.weighting or ("min_snr" if config.objective.snr_gamma else "sample")
    if weighting not in {"prediction", "sample", "edm"}:
        what = f"the weighting {weighting} with a base of EDM, for whose noise levels it is not defined"
        raise UserError(what, "objective.weighting", 'choose "sample" or "prediction" (Karras et al. 2022)')
    if prediction == "sample":
        raise UserError("prediction 'sample' with a base of EDM", "objective.prediction", "remove it")


def _assemble(
    config: Config,
    base: Base,
    stock: Stock,
    order: plan.Plan,
    begin: resume.Begin,
    accelerator: Any,
    precision: str,
    console: Console,
    watch: Watch,
    output: Path,
) -> Job:
    noise, prediction = noise_schedule(config, base)
    scheduler = scheduler_config(base.config("scheduler"), prediction, noise.zero_terminal_snr)
    samples = prepare.samples(config, base, stock, len(noise))
    measures = output / "validation.jsonl"
    run, state = _model(
        config,
        base,
        begin,
        accelerator,
        precision,
        console,
        noise.to(accelerator.device),
        prediction,
        stock,
    )
    folder, main = output / config.log.dir, accelerator.is_main_process
    told = trackers.Trackers(config.log.trackers, config.log.project, folder, console.say, main)
    state.measures += held_out.history(measures, state.step, config.ema.enabled)
    return Job(
        run=run,
        state=state,
        base=base,
        samples=samples,
        measured=prepare.measured_samples(config, base, stock, len(noise)),
        order=order,
        validator=Validator(config, accelerator, base, samples, scheduler, run.dtype, console.say, told),
        scheduler=scheduler,
        pulse=guards.Pulse(accelerator, config.train.hang_timeout),
        saver=Saver(config, output, console.say, accelerator.is_main_process),
        metrics=Metrics(output / "metrics.jsonl", state.step, accelerator.is_main_process),
        validation=Metrics(measures, state.step or -1, main and config.validation.loss_every is not None),
        trackers=told,
        console=console,
        watch=watch,
        output=output,
        data_hash=begin.data_hash,
    )


def _model(
    config: Config,
    base: Base,
    begin: resume.Begin,
    accelerator: Any,
    precision: str,
    console: Console,
    noise: schedule.Schedule,
    prediction: str,
    stock: Stock,
) -> tuple[Run, State]:
    """The model, its optimizer and averages, as they are at the step to begin with."""
    at: Checkpoint | None = begin.checkpoint
    weights = DTYPES[config.train.weights]
    folder = at.path if at and not (config.adapter or config.token) else None  # where the whole model lies
    in_step = not (stock.text_learns or stock.text_cached)
    frozen = text.load(base, DTYPES[stock.keys.text_precision], accelerator.device) if in_step else None
    checkpointing, learns, seed = config.train.gradient_checkpointing, stock.text_learns, config.seed
    sdxl = model.load(config.model, base, folder, weights, checkpointing, learns, config.text, frozen, seed)
    if config.adapter or config.token:
        narrow.pack(sdxl, precision if config.train.frozen == "auto" else config.train.frozen, DTYPES[precision])
    inject(sdxl, config, base, at)
    goal = objective.Objective(noise, prediction, config.objective)
    for line in (model.use_attention(sdxl, config.model.attention, accelerator.device), goal.neglected):
        if line:
            console.say(line)
    groups = parameters.apply_rules(sdxl, parameters.rules(config), config.train, config.optimizer, sdxl.closed())
    if not optim.rounds(config.optimizer) and any(p.dtype == torch.bfloat16 for g in groups for p in g.parameters):
        what = f"{config.optimizer.name} rounds bf16 weights to the nearest: small steps are lost"
        console.say(f"{what}; {', '.join(name for name, kind in optim.KINDS.items() if kind.rounds)} keep them")
    sdxl.train()
    if precision == "fp32" and weights != torch.float32:
        model.compute_in_fp32(sdxl)
    split = distributed.sharding(config, console.say) if accelerator.num_processes > 1 else None
    prepared = distributed.wrapped(accelerator, sdxl, split)
    groups = parameters.rebound(groups, sdxl)
    optimizer = accelerator.prepare(optim.make(groups, config.optimizer, config.seed, accelerator.device, bool(split)))
    averages = ema.make(groups, config.ema.decay) if config.ema.enabled else None
    saved = at.state() if at is not None else {}
    if at is not None:
        checkpoint.load_training_state(at, sdxl, optimizer.optimizer, groups, averages)
        if accelerator.scaler is not None and saved["scaler"]:
            accelerator.scaler.load_state_dict(saved["scaler"])
        console.say(f"continuing after step {at.step} ({at.path})")
    scale = model.latent_scale(base.config("vae")).to(accelerator.device)
    # Under autocast the inputs stay fp32 and each layer casts; bf16 weights want bf16 inputs.
    inputs = torch.float32 if precision == "fp32" else weights
    prior = None
    if any(data.prior_prediction for data in config.data):
        copy = partial(_frozen_copy, config, base, accelerator, precision, stock, frozen)
        prior = priors.beside(sdxl, copy, bool(split))
    run = Run(config, accelerator, sdxl, prepared, optimizer, groups, goal, scale, inputs, begin.steps, prior)
    broken = torch.zeros((), dtype=torch.bool, device=accelerator.device)
    spikes = guards.Spikes(deque(saved.get("losses", ()), guards.WINDOW))
    return run, State(at.step if at else 0, averages, broken, saved.get("skipped", 0), spikes=spikes)


def _frozen_copy(
    config: Config, base: Base, accelerator: Any, precision: str, stock: Stock, frozen: text.TextEncoders | None
) -> model.SDXL:
    """The base as it was, to be asked for its predictions, kept as narrow as train.frozen says."""
    own = DTYPES[config.train.weights]
    copy = model.load(config.model, base, None, own, False, stock.text_learns, config.text, frozen)
    narrow.pack(copy, precision if config.train.frozen == "auto" else config.train.frozen, DTYPES[precision])
    model.use_attention(copy, config.model.attention, accelerator.device)
    if precision == "fp32" and own != torch.float32:
        model.compute_in_fp32(copy)  # what is not packed, as in the model that learns
    return copy.to(accelerator.device)
