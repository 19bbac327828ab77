"""Buckets, repeats and masks in training: the sums come out the same however a step is cut up."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_trainer import setup
from sdxl_trainer.data import loader, plan
from sdxl_trainer.log import read_metrics
from sdxl_trainer.run import CONTINUE, Job
from sdxl_trainer.train import train

BUCKETS = {"buckets": "area", "bucket_step": 8, "bucket_min": 24}


def gradient(job: Job, step: int, micro: int, processes: int) -> tuple[float, torch.Tensor, set[tuple[int, ...]]]:
    """Loss and gradient of a step as that many processes would add them up, and the latents' sizes that it met."""
    run, sizes = job.run, set()
    epoch, chosen = job.order.step(step)
    total = 0.0
    run.sdxl.zero_grad()
    for rank in range(processes):
        for part in plan.share(job.order, chosen, micro, rank, processes):
            batch = loader.batch(job.samples, epoch, part)
            sizes.add(tuple(batch.mean.shape[2:]))
            latents = run.scale.sample(batch.mean, batch.std, batch.posterior_noise)
            noisy = run.objective.schedule.add_noise(latents, batch.noise, batch.timesteps)
            prediction = run.sdxl(noisy, batch.timesteps, batch.time_ids, **batch.text)
            loss = run.objective.loss(prediction, latents, batch.noise, batch.timesteps, batch.mask)
            loss = (loss * batch.weight).sum() / len(chosen)
            loss.backward()
            total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in run.sdxl.parameters() if p.grad is not None]), sizes


def test_loss_and_gradient_do_not_depend_on_micro_batch_or_processes(
    config: Callable[..., Any], pictures: Path, tmp_path: Path
) -> None:
    """Every step of an epoch with full, mixed and partial batches, two weights and masks."""
    folder = tmp_path / "alpha"
    folder.mkdir()
    for index, (height, width) in enumerate([(80, 100), (100, 80), (90, 90)]):
        image = Image.fromarray(np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8))
        alpha = Image.new("L", (width, height))
        alpha.paste(255, (20, 20, 60 + index, 70))
        image.putalpha(alpha)
        image.save(folder / f"{index}.png")
    sets = [
        {**BUCKETS, "repeats": 2},
        {**BUCKETS, "path": str(folder), "caption": "a red circle", "mask": "alpha", "weight": 0.5},
    ]
    made = config(data=sets, train={"batch_size": 4}, cache={"path": str(tmp_path / "cache")})
    job = setup.prepare_job(made, CONTINUE)
    assert job is not None
    job.run.sdxl.eval()
    assert job.order.steps_per_epoch == 4
    mixed = 0
    for step in range(4):
        loss, expected, sizes = gradient(job, step, 4, 1)
        mixed += len(sizes) > 1
        for micro, processes in ((1, 1), (3, 1), (2, 2), (4, 3), (4, 7)):
            other, got, seen = gradient(job, step, micro, processes)
            assert other == pytest.approx(loss, rel=1e-5)
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())
            assert seen == sizes
    assert mixed
    job.metrics.close()


def test_micro_batches_do_not_change_a_run_with_buckets(config: Callable[..., Any], tmp_path: Path) -> None:
    losses = []
    for micro in (4, 1, 3):
        sizes = {"batch_size": 4, "micro_batch": micro, "epochs": 2, "steps": None, "learning_rate": 1e-4}
        output = train(config(data=[BUCKETS], train=sizes, output_dir=str(tmp_path / f"micro{micro}")))
        rows = read_metrics(output / "metrics.jsonl")
        assert [row["images"] for row in rows] in ([4, 2, 4, 2], [2, 4, 2, 4], [4, 2, 2, 4], [2, 4, 4, 2])
        losses.append([row["loss"] for row in rows])
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-6)
