"""The validation loss: of held-out pictures and of a fixed part of the trained ones, moved by nothing but the weights.

Each picture is measured by itself at timesteps of its own, one in each equal part of the schedule, with noise of its
own, all drawn from its bytes: no number depends on the run's seed, its batches, its processes or other pictures. The
loss is the plain squared error of what the model predicts, whatever weights and shapes the training loss has.

Means over pictures and timesteps are geometric: what counts is by which factor an error changes. So every timestep and
every picture counts alike, where plain means follow the few that are hard for all models; and the order of models is
the same whether errors are of epsilon, v or the picture, which differ at a timestep by a factor of the schedule. It is
the likelihood of a normal error whose spread is not known (Kendall, Gal & Cipolla 2018).
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_trainer import checkpoint, distributed, finish, intervals, keyed, noise, optim
from sdxl_trainer.config import Objective, steps_of
from sdxl_trainer.data import loader
from sdxl_trainer.data.loader import Batch, Samples
from sdxl_trainer.errors import UserError
from sdxl_trainer.log import read_metrics
from sdxl_trainer.run import Job

# How the loss of each set of pictures is called in metrics.jsonl.
NAMES = {"held_out": "validation_loss", "uncaptioned": "uncaptioned_loss", "trained": "trained_loss"}


@dataclass(frozen=True)
class Measure:
    """`losses` [pictures, timesteps] of one set of pictures under one kind of weights. All means are geometric."""

    losses: Tensor

    @property
    def logs(self) -> Tensor:
        """Of the losses, fp64. A picture of which its mask leaves nothing is the same in every measure."""
        return self.losses.double().clamp(min=1e-12).log()

    @property
    def pictures(self) -> list[float]:
        """The mean loss of each picture."""
        return self.logs.mean(dim=1).exp().tolist()

    @property
    def mean(self) -> float:
        return math.exp(math.fsum(self.logs.flatten().tolist()) / self.losses.numel())

    @property
    def interval(self) -> float | None:
        """Half of the 95 % confidence interval of the mean over pictures, to first order; None for a single picture."""
        logs = self.logs.mean(dim=1).tolist()
        return self.mean * intervals.half_width(logs) if len(logs) > 1 else None

    @property
    def by_timestep(self) -> list[float]:
        """The mean over pictures in each part of the schedule."""
        return self.logs.mean(dim=0).exp().tolist()


def due(job: Job) -> bool:
    """Is it time? Before the first step, as often as `loss_every` says, and after the last."""
    every = steps_of(job.run.config.validation.loss_every, job.order.steps_per_epoch)
    if not every or not job.measured:
        return False
    return job.state.step % every == 0 or job.state.step == job.run.steps


def measured(job: Job) -> dict[str, Any]:
    """What metrics.jsonl says where it is time for it, else nothing. With EMA `validation_loss` is that of the averaged
    weights, and that of the last ones is told too. Everything goes to validation.jsonl."""
    if not due(job):
        return {}
    told: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    parts = centres(job)
    with job.watch.phase("validation loss"):
        for weights, swapped in _kinds(job):
            with swapped:
                found = {name: _measure(job, samples) for name, samples in job.measured.items()}
            judged = weights == ("ema" if job.state.ema else "raw")
            for name, measure in found.items():
                told |= _told(NAMES[name], measure, parts) if judged else {f"{NAMES[name]}_raw": measure.mean}
                rows.append(_row(job.state.step, name, weights, measure, parts))
    if "uncaptioned" in job.measured:
        told["caption_gain"] = gain(told["validation_loss"], told["uncaptioned_loss"])
    job.validation.write(rows)
    first = NAMES[next(iter(job.measured))]
    job.state.measures.append((job.state.step, told[first]))
    _say(job, told)
    columns = ["timestep", *(f"{row['set']} ({row['weights']})" for row in rows)]
    by_part = zip(parts, *(row["by_timestep"] for row in rows), strict=True)
    job.trackers.table("validation loss by timestep", columns, list(by_part), job.state.step)
    return told


def _kinds(job: Job) -> Iterator[tuple[str, AbstractContextManager[Any]]]:
    """The kinds of weights there are, each with what puts them into the model."""
    if job.state.ema is not None:
        yield "ema", finish.evaluating(job)
    yield "raw", optim.evaluating(job.run.optimizer.optimizer)


def centres(job: Job) -> list[int]:
    """The middle of each equal part of the schedule, in timesteps."""
    count, length = job.run.config.validation.loss_timesteps, len(job.run.objective.schedule)
    return [int((part + 0.5) / count * length) for part in range(count)]


def gain(captioned: float, uncaptioned: float) -> float:
    """By what share the loss with captions is below that without: of each picture and timestep, in geometric mean. What
    the two say together: Kong et al. 2024, who take their difference."""
    return 1 - captioned / uncaptioned


def _told(name: str, measure: Measure, parts: list[int]) -> dict[str, Any]:
    told: dict[str, Any] = {name: measure.mean, f"{name}_interval": measure.interval}
    return told | {f"{name}_at": dict(zip(map(str, parts), measure.by_timestep, strict=True))}


def _row(step: int, name: str, weights: str, measure: Measure, parts: list[int]) -> dict[str, Any]:
    """A line of validation.jsonl: with each picture's loss, so that two measures can be compared picture by picture."""
    return {
        "step": step,
        "set": name,
        "weights": weights,
        "loss": measure.mean,
        "interval": measure.interval,
        "timesteps": parts,
        "by_timestep": measure.by_timestep,
        "pictures": [float(f"{loss:.6g}") for loss in measure.pictures],
    }


def _say(job: Job, told: dict[str, Any]) -> None:
    said = []
    for name, words in (("validation_loss", "held-out pictures"), ("trained_loss", "trained pictures")):
        if name in told:
            wide = told[f"{name}_interval"]
            said.append(f"{told[name]:.5f}{f' ± {wide:.5f}' if wide is not None else ''} on {words}")
    if "caption_gain" in told:
        said.insert(1, f"{told['caption_gain']:.1%} below that without captions")
    job.console.say(f"step {job.state.step}: loss {', '.join(said)}")


def _measure(job: Job, samples: Samples) -> Measure:
    """Every picture at every timestep, shared among the processes."""
    run, count = job.run, job.run.config.validation.loss_timesteps
    accelerator, pictures = run.accelerator, len(samples.pictures)
    # Each entry is of one process and zero on the others, so that the sum over processes is exact.
    losses = torch.zeros(pictures, count, device=accelerator.device)
    training = run.sdxl.training
    run.sdxl.eval()
    for index, counts in distributed.turns(accelerator, pictures):
        batch = fixed(samples, index, count, len(run.objective.schedule))
        losses[index] = _loss(job, batch.to(accelerator.device, run.dtype)) * counts
    run.sdxl.train(training)
    return Measure(accelerator.reduce(losses, "sum").cpu())


@torch.no_grad()
def _loss(job: Job, batch: Batch) -> Tensor:
    """As in the training step, but without weights: [B]."""
    run = job.run
    plain = replace(run.objective, options=Objective(weighting="prediction"))
    latents = run.scale.sample(batch.mean, batch.std, batch.posterior_noise)
    noisy = batch.entering(plain.schedule.add_noise(latents, batch.noise, batch.timesteps))
    with run.accelerator.autocast():
        prediction = run.sdxl(noisy.to(run.dtype), plain.schedule.level(batch.timesteps), batch.time_ids, **batch.text)
    return plain.loss(prediction, latents, batch.noise, batch.timesteps, batch.mask)


def fixed(samples: Samples, index: int, count: int, length: int) -> Batch:
    """One picture `count` times, at a timestep in each equal part of a schedule of that length, with noise that belongs
    to the picture's bytes."""
    batch = loader.batch(samples, 0, [(index, True)] * count)
    key, shape = int(samples.pictures[index].content[:16], 16), tuple(batch.mean.shape[1:])
    drawn = [noise.normal(0, "validation", part, key, shape) for part in range(count)]
    within = [keyed.generator(0, "strata", part, key).random() for part in range(count)]
    extra = batch.extra
    if samples.holes:
        picture, masks = samples.pictures[index], samples.holes.masks_per_image
        seen, keys = [(picture, picture.geometries[0])] * count, [(0, part, key) for part in range(count)]
        extra = samples.beside(seen, [part % masks for part in range(count)], keys)
    return replace(
        batch,
        extra=extra,
        posterior_noise=torch.zeros_like(batch.posterior_noise),
        noise=torch.stack([torch.from_numpy(values) for values in drawn]),
        timesteps=torch.tensor([int((part + share) / count * length) for part, share in enumerate(within)]),
    )


def history(path: Path, step: int, averaged: bool) -> list[tuple[int, float]]:
    """The validation losses up to a step, as an earlier part of the run wrote them."""
    rows = [row for row in read_metrics(path, step) if row["step"] <= step] if step else []
    kind = "ema" if averaged else "raw"
    sets = [name for name in NAMES if any(row["set"] == name for row in rows)]
    return [(row["step"], row["loss"]) for row in rows if row["weights"] == kind and row["set"] == sets[0]]


def refuse_lost(job: Job) -> None:
    """UserError if the best model so far, which would be the result, was not kept: `keep_best` came later."""
    if job.run.config.validation.keep_best and job.state.best is not None:
        kept = job.output / f"{checkpoint.PREFIX}{job.state.best}"
        if not kept.is_dir():
            what = f"validation.keep_best: the loss was lowest after step {job.state.best}, which has no checkpoint"
            raise UserError(what, str(kept), "remove keep_best, or begin a new run with it in another output_dir")


def new_best(job: Job) -> bool:
    """Whether this step's weights are the best so far and are to be kept."""
    return job.run.config.validation.keep_best and due(job) and job.state.best == job.state.step


def enough(job: Job) -> bool:
    """Whether the loss has not fallen for as many measures as `stop_after` says."""
    patience, lowest = job.run.config.validation.stop_after, job.state.best
    if patience is None or lowest is None:
        return False
    return len([step for step, _ in job.state.measures if step > lowest]) >= patience
