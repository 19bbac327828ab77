"""The loss on pictures that are not trained: at fixed timesteps, with fixed noise, so that only the weights move it."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch

from sdxl_trainer import finish, noise
from sdxl_trainer.data import loader
from sdxl_trainer.data.loader import Batch, Samples
from sdxl_trainer.run import Job


def measured(job: Job) -> dict[str, Any]:
    """{"validation_loss": mean over pictures and timesteps} where it is time for it, else nothing. With EMA it is
    that of the averaged weights."""
    options, run, state = job.run.config.validation, job.run, job.state
    if job.held_out is None or not options.loss_every or state.step % options.loss_every:
        return {}
    accelerator = run.accelerator
    with job.watch.phase("validation loss"), finish.evaluating(job):
        sums = torch.zeros(2, device=accelerator.device)
        training = run.sdxl.training
        run.sdxl.eval()
        for batch in _batches(job, job.held_out):
            loss = _loss(job, batch.to(accelerator.device, run.dtype))
            sums += torch.stack([loss.sum(), torch.tensor(float(len(loss)), device=loss.device)])
        run.sdxl.train(training)
        total, count = accelerator.reduce(sums, "sum").tolist()
    return {"validation_loss": total / count}


@torch.no_grad()
def _loss(job: Job, batch: Batch) -> torch.Tensor:
    """As in the training step: [B]."""
    run = job.run
    latents = run.scale.sample(batch.mean, batch.std, batch.posterior_noise)
    noisy = run.objective.schedule.add_noise(latents, batch.noise, batch.timesteps)
    level = run.objective.schedule.level(batch.timesteps)
    with run.accelerator.autocast():
        prediction = run.sdxl(noisy.to(run.dtype), level, batch.time_ids, **batch.text)
    return run.objective.loss(prediction, latents, batch.noise, batch.timesteps, batch.mask)


def _batches(job: Job, samples: Samples) -> Iterator[Batch]:
    """This process's share of every held-out picture at every timestep, each batch of one size."""
    config, accelerator = job.run.config, job.run.accelerator
    count, micro = config.validation.loss_timesteps, config.train.micro_batch or config.train.batch_size
    order = sorted(range(len(samples.pictures)), key=lambda i: samples.pictures[i].geometries[0].target)
    parts = []
    for turn in range(count):
        for _, run in groupby(order, key=lambda i: samples.pictures[i].geometries[0].target):
            same = list(run)
            parts += [(turn, same[i : i + micro]) for i in range(0, len(same), micro)]
    for turn, part in parts[accelerator.process_index :: accelerator.num_processes]:
        timestep = int((turn + 0.5) / count * len(job.run.objective.schedule))
        yield _fixed(loader.batch(samples, turn, [(i, True) for i in part]), samples, turn, part, timestep)


def _fixed(batch: Batch, samples: Samples, turn: int, part: list[int], timestep: int) -> Batch:
    """The batch with noise that belongs to each picture's bytes, whatever the run's seed and the other pictures."""
    drawn = [
        noise.normal(0, "validation", turn, int(samples.pictures[i].content[:16], 16), tuple(batch.mean.shape[1:]))
        for i in part
    ]
    return replace(
        batch,
        posterior_noise=torch.zeros_like(batch.posterior_noise),
        noise=torch.stack([torch.from_numpy(values) for values in drawn]),
        timesteps=torch.full_like(batch.timesteps, timestep),
    )
