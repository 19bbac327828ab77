"""The run: set up, step, loop. A run is a value: what step k trains on depends on (config, data, k) alone."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from time import sleep
from typing import Any

import torch
from torch import Tensor

from sdxl_trainer import (
    checkpoint,
    distributed,
    files,
    finish,
    guards,
    held_out,
    lock,
    optim,
    parameters,
    resume,
    setup,
    wishes,
)
from sdxl_trainer.config import Config, steps_of
from sdxl_trainer.data import loader
from sdxl_trainer.data.loader import Batch
from sdxl_trainer.errors import Interrupted, UserError, shortened
from sdxl_trainer.formats import pretrained
from sdxl_trainer.log import figure
from sdxl_trainer.optim import backward
from sdxl_trainer.run import CONTINUE, Job, Run, Start, State, Stop, Unread, stopping
from sdxl_trainer.threads import keep_freed_memory

BETWEEN_LOOKS = 0.5  # seconds in which a paused run asks whether it may go on
LITTLE = 1_000_000  # bytes: what is noted of some thousand pictures


def train_step(run: Run, state: State, batches: list[Batch], images: int) -> tuple[Tensor, Tensor]:
    """One optimizer step on this process's micro-batches of a step with `images` images over all processes.

    Gives this process's part of the mean loss, and the gradient norm. Fused optimizers make it wait for nothing on the
    device; for the others the host looks whether the step is finite, and some wait more.
    """
    limit, passes = run.config.train.max_grad_norm or None, partial(_passes, run, state, batches, images)
    learning = [p for g in run.groups for p in g.parameters]
    optim.set_learning_rates(run.optimizer, optim.factor(run.config.schedule, state.step, run.steps))
    if run.config.train.fused_backward:
        scaler = run.accelerator.scaler
        share = 1.0 / scaler.get_scale() if scaler else None
        total, norm = backward.norm(learning, passes, share)
        if _may_step(run, state, total, norm) and (scaler is None or bool(torch.isfinite(norm))):
            backward.step(run.optimizer.optimizer, learning, norm, limit, passes, share)
        if scaler:
            backward.adjust(scaler, norm)
    else:
        total = passes()
        parameters.settle(run.groups, state.step / run.steps)
        run.accelerator.unscale_gradients()
        norm = optim.clip(run.optimizer.optimizer, learning, limit)
        if _may_step(run, state, total, norm):
            run.optimizer.step()
    run.optimizer.zero_grad()
    if state.ema is not None:
        state.ema.update()
    state.step += 1
    return total, norm


def _passes(run: Run, state: State, batches: list[Batch], images: int) -> Tensor:
    """Forward and backward through the model with each micro-batch: gradients, and this process's part of the loss."""
    accelerator, total = run.accelerator, torch.zeros((), device=run.accelerator.device)
    state.each.clear()
    for number, batch in enumerate(batches):
        batch = batch.to(accelerator.device, run.dtype)
        last = number == len(batches) - 1
        with nullcontext() if last else accelerator.no_sync(run.model):
            latents = run.scale.sample(batch.mean, batch.std, batch.posterior_noise)
            noisy = batch.entering(run.objective.schedule.add_noise(latents, batch.seen_noise, batch.timesteps))
            level = run.objective.schedule.level(batch.timesteps)
            kept = run.prior(batch, noisy.to(run.dtype), level, accelerator.autocast) if run.prior else None
            prediction = run.model(noisy.to(run.dtype), level, batch.time_ids, dropout=batch.dropout, **batch.text)
            loss = run.objective.loss(prediction, latents, batch.noise, batch.timesteps, batch.mask, kept)  # [B]
            state.each.append(loss.detach())
            loss = (loss * batch.weight).sum() / images
            # Processes average their gradients; the loss is already divided by the images of all of them.
            accelerator.backward(loss * accelerator.num_processes)
        total += loss.detach()
    return total


def _may_step(run: Run, state: State, loss: Tensor, norm: Tensor) -> bool:
    """Keep a step that is not finite from the weights. Fused optimizers look at `found_inf` on the device; for the
    others the host has to look. Under fp16 the loss scaler skips such steps itself."""
    if run.accelerator.scaler is not None:
        return True
    broken = ~(torch.isfinite(loss) & torch.isfinite(norm))
    # From the first such step on none touches the weights, unless some may be skipped.
    state.broken = broken if run.config.train.skip_nonfinite else state.broken | broken
    optimizer = run.optimizer.optimizer
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = state.broken.float()
        return True
    return not bool(state.broken)


def train(config: Config, start: Start = CONTINUE) -> Path:
    """Train, or continue to train, what the config describes; gives the output folder.

    Raises UserError for what the user can fix and Interrupted after a signal, when everything is saved.
    """
    output = Path(config.output_dir).expanduser()
    with files.explained(output):
        new = not output.exists()
    with (
        stopping() as stop,
        lock.held(output, distributed.leads()),
        guards.memory_explained(config),
        guards.others_explained(),
    ):
        if distributed.leads():
            wishes.forget(output)  # those of an earlier run, which ended before it saw them
        keep_freed_memory()
        with _leaving_little(output, new):
            job = setup.prepare_job(config, start)
        if job is None:
            return output
        stop.gently = True
        try:
            distributed.decided(job.run.accelerator, lambda: held_out.refuse_lost(job))
            job.saver.prune(job.state.step, job.to_keep)  # an interruption may have come before that
            job.pulse.begin()
            _loop(job, stop)
        finally:
            job.pulse.close()
            job.console.end()
            if distributed.leads():
                wishes.forget(output)
            try:
                job.saver.close()
            finally:
                job.metrics.close()
                job.validation.close()
        stop.gently = False
        if stop.signal:
            job.trackers.close(5.0)
            raise Interrupted(stop.signal)
        finish.conclude(job)
    return job.output


@contextmanager
def _leaving_little(output: Path, new: bool) -> Iterator[None]:
    """A run that is refused takes its `new` folder away again, where there is little and nothing but a cache in it."""
    try:
        yield
    except UserError:
        there = [path for path in output.rglob("*") if path.is_file() and path.name != lock.NAME]
        little = sum(path.stat().st_size for path in there) < LITTLE
        if new and distributed.leads() and little and all(output / "cache" in path.parents for path in there):
            files.remove(output)
        raise


def _loop(job: Job, stop: Stop) -> None:
    """Steps, and between them what is due: reading losses, checkpoints, pictures."""
    run, state, config, accelerator = job.run, job.state, job.run.config, job.run.accelerator
    read_every = config.log.every or (1 if accelerator.device.type == "cpu" else 10)
    save_every = steps_of(config.train.checkpoint_every, job.order.steps_per_epoch)
    micro_batch = config.train.micro_batch or config.train.batch_size
    batches = loader.steps(
        job.samples,
        job.order,
        state.step,
        run.steps,
        micro_batch,
        accelerator.process_index,
        accelerator.num_processes,
        _readers(job),
        pin=accelerator.device.type == "cuda",
    )
    if _pictures_are_missing(job):
        with job.watch.phase("validation pictures"):
            finish.draw_validation(job)
    if state.step == 0:
        held_out.measured(job)
    if held_out.enough(job):
        return
    job.console.progress(state.step, run.steps, "steps")
    job.watch.lap()
    for epoch, images, micro_batches in batches:
        job.pulse.beat(state.step)
        loss, norm = train_step(run, state, micro_batches, images)
        # A sample that fills up a process's share has no weight, and no name.
        weights = [weight for batch in micro_batches for weight in batch.weight.tolist()]
        whole = [name for batch in micro_batches for name in batch.names]
        names = [name if weight else "" for name, weight in zip(whole, weights, strict=True)]
        row = {"step": state.step, "epoch": epoch, **_rates(run, state.step - 1), "images": images}
        row |= (measured := held_out.measured(job))
        state.unread.append(Unread(row, loss, norm, names, torch.cat(state.each)))
        done = state.step == run.steps or held_out.enough(job)
        asked = _asked(job, stop) if state.step % read_every == 0 or done else set[str]()
        saving = bool(asked & {"stop", "save", "pause"}) or held_out.new_best(job)
        saving = saving or bool(save_every and state.step % save_every == 0)
        if saving or done or state.step % read_every == 0:
            _read(job)
            job.saver.check()
        if saving:
            _save(job)
        if "stop" in asked or done:
            return
        drawing = "sample" in asked or job.validator.due(state.step, run.steps, job.order.steps_per_epoch)
        if drawing:
            with job.watch.phase("validation pictures"):
                finish.draw_validation(job)
        if drawing or measured:
            finish.write_report(job)
        if "pause" in asked and _held(job, stop):
            return


def _pictures_are_missing(job: Job) -> bool:
    """Whether those of the step to begin after are due: before the first, and where a run ended between its checkpoint
    and its pictures. Those after the last step are drawn with the result."""
    step, steps = job.state.step, job.run.steps
    due = step < steps and job.validator.due(step, steps, job.order.steps_per_epoch)
    return due and (step == 0 or not job.validator.drawn(step))


def _rates(run: Run, before: int) -> dict[str, Any]:
    """The learning rate of the step after `before` steps: the first rule's, and where rules differ that of each."""
    factor = optim.factor(run.config.schedule, before, run.steps)
    rates = parameters.rates(run.groups, factor, before / run.steps)
    several = {"learning_rates": rates} if len(set(rates.values())) > 1 else {}
    return {"learning_rate": next(iter(rates.values())), **several}


def _readers(job: Job) -> int:
    """Threads that read rows ahead: by default one, and none where it would compete with the step for a CPU. Rows that
    come from afar are always waited for beside it."""
    if job.run.config.train.workers is not None:
        return job.run.config.train.workers
    near = job.samples.latents.AT_ONCE == 1
    return 0 if near and job.run.accelerator.device.type == "cpu" else 1


def _asked(job: Job, stop: Stop) -> set[str]:
    """What any process was told since the last look: to stop by a signal, to save, sample or pause by a wish. All do it
    after the same step."""
    asked = _told(job, stop)
    if wished := sorted(asked - {"stop"}):
        job.console.say(f"step {job.state.step}: asked to {' and '.join(wished)} now")
    return asked


def _told(job: Job, stop: Stop) -> set[str]:
    """The same on all processes."""
    accelerator = job.run.accelerator
    wished = wishes.granted(job.output) if accelerator.is_main_process else set[str]()
    if accelerator.num_processes > 1:
        told = torch.tensor([[stop.signal, *(name in wished for name in wishes.WISHES)]], device=accelerator.device)
        stop.signal, *given = accelerator.gather(told).amax(0).tolist()
        wished = {name for name, some in zip(wishes.WISHES, given, strict=True) if some}
    if not job.run.config.validation.prompts:
        wished.discard("sample")
    return wished | ({"stop"} if stop.signal else set())


def _held(job: Job, stop: Stop) -> bool:
    """Hold for as long as the run is asked to pause, its step saved; whether it was told to stop meanwhile. Pictures
    that are asked for are drawn."""
    state, accelerator = job.state, job.run.accelerator
    job.saver.wait()
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    job.console.end()
    job.console.say(f"paused after step {state.step}, which is saved; 'sdxl now {job.output} continue' goes on")
    while "pause" in (told := _told(job, stop)) and "stop" not in told:
        if "sample" in told:
            with job.watch.phase("validation pictures"):
                finish.draw_validation(job)
            finish.write_report(job)
        job.pulse.beat(state.step)
        with job.watch.phase("paused"):
            sleep(BETWEEN_LOOKS)
    job.console.say("goes on")
    job.console.progress(state.step, job.run.steps, "steps")
    return "stop" in told


def _read(job: Job) -> None:
    """Bring the losses since the last reading from the device: the one place where training waits for it."""
    state, accelerator = job.state, job.run.accelerator
    losses = accelerator.reduce(torch.stack([u.loss for u in state.unread]), "sum").tolist()
    norms = torch.stack([u.norm for u in state.unread]).tolist()
    seconds = job.watch.lap() / len(state.unread)
    memory, rows = distributed.memory_gb(accelerator.device), list[dict[str, Any]]()
    for unread, loss, norm in zip(state.unread, losses, norms, strict=True):
        row = {**unread.row, "loss": loss, "grad_norm": norm if math.isfinite(norm) else None}
        if not math.isfinite(loss) or (accelerator.scaler is None and not math.isfinite(norm)):
            row |= {"loss": loss if math.isfinite(loss) else None, "skipped": True}
            _count_skipped(job, unread, rows)
        else:
            height = state.spikes.height(loss)
            if height is not None:
                row["spike"] = height
                names = shortened(_pictures(unread))
                job.console.say(f"step {row['step']}: loss {loss:.4f}, {height:.3g} times the usual: {names}")
        if job.run.config.log.pictures:
            own = [[name, found] for name, found in zip(unread.names, unread.each.tolist(), strict=True) if name]
            row["pictures"] = distributed.gathered(own)
        more = {"samples_per_second": unread.row["images"] / seconds, "memory_gb": round(memory, 3)}
        rows.append(row | more)
    state.unread.clear()
    if accelerator.is_main_process:
        job.metrics.write(rows)
        for row in rows if job.trackers.workers else []:
            job.trackers.scalars(_tracked(row), row["step"])
    last = rows[-1]
    rate = f"{figure(last['samples_per_second'])} images/s"
    rates = last.get("learning_rates", {"": last["learning_rate"]}).values()
    span = " to ".join(f"{value:.3g}" for value in dict.fromkeys([min(rates), max(rates)]))
    job.console.progress(last["step"], job.run.steps, "steps", f"loss {losses[-1]:.4f}  lr {span}  {rate}")


def _tracked(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the metrics as trackers are given it."""
    left_out = {"step", "images", "pictures", "learning_rates"}
    told = {k: v for k, v in row.items() if k not in left_out and v is not None}
    told |= {f"learning_rate/{rule}": rate for rule, rate in row.get("learning_rates", {}).items()}
    return told | {f"loss_for_{Path(name).name}": found for name, found in row.get("pictures", [])}


def _count_skipped(job: Job, unread: Unread, rows: list[dict[str, Any]]) -> None:
    """A step that is not finite has not touched the weights. As many as the config allows are named and passed over."""
    job.state.skipped += 1
    if job.state.skipped > job.run.config.train.skip_nonfinite:
        job.metrics.write(rows)
        raise _diverged(job, unread)
    names = shortened(_pictures(unread))
    job.console.say(f"step {unread.row['step']} is skipped, its loss or gradient is not finite: {names}")


def _pictures(unread: Unread) -> list[str]:
    """The pictures of a step on all processes, which all have to ask: those with losses that are not finite, or all."""
    own = [(name, loss) for name, loss in zip(unread.names, unread.each.tolist(), strict=True) if name]
    found = distributed.gathered(own)
    return [name for name, loss in found if not math.isfinite(loss)] or [name for name, _ in found]


def _diverged(job: Job, unread: Unread) -> UserError:
    broken = pretrained.broken_weights(job.run.sdxl)
    if broken:
        what = f"the model's weights hold values that are not finite: {shortened(broken, 3)}"
        return UserError(what, job.run.config.model.path, "use an undamaged base or an earlier checkpoint")
    what = f"the loss or gradient of step {unread.row['step']} is not finite; the weights were not touched"
    fix = "look at these pictures and captions; a lower train.learning_rate or precision fp32 may help"
    return UserError(what, shortened(_pictures(unread)), fix)


def _save(job: Job) -> None:
    run, state = job.run, job.state
    with job.watch.phase("checkpoints"):
        record = {
            "ema_updates": state.ema.updates if state.ema else 0,
            "scaler": run.accelerator.scaler.state_dict() if run.accelerator.scaler else None,
            "config": run.config.model_dump(mode="json"),
            "data": job.data_hash,
            "unet": resume.unet_beside(run.config, job.base),
            "skipped": state.skipped,
            "losses": list(state.spikes.recent),
        }
        optimizer = run.optimizer.optimizer
        contents = checkpoint.contents(state.step, run.sdxl, state.ema, optimizer, run.groups, record)
        job.saver.save(contents, job.sync, job.to_keep)
