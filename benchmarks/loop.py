"""How much of the training loop is the work itself?

The whole loop (cached rows read, random numbers drawn, noise added, step, metrics written) against four bare calls on
tensors that lie in memory: UNet, loss, backward, optimizer. Both alternate in one process on the same model; the share
is the median of the rounds'.

    python benchmarks/loop.py [--data FOLDER] [--resolution 256] [--batch 4] [--rounds 15] [--steps 40]
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import torch

from sdxl_trainer import blueprint, train
from sdxl_trainer.run import Job, Stop


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--data", type=Path, help="image folder; default: drawn pictures")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--size", default="tiny", choices=sorted(blueprint.SIZES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        job = common.job(Path(folder), options, {"train": {"steps": 1, "checkpoint_every": 0}}, options.data)
        result = measure(job, options)
    common.write("loop", result)
    low, high = result["share_quartiles"]
    print(
        f"loop {result['loop_seconds']:.4f} s/step, bare {result['bare_seconds']:.4f} s/step: {result['share']:.1%} "
        f"of the loop is the work itself (quartiles of the rounds: {low:.1%}, {high:.1%})"
    )


def measure(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds per step of the loop and of the bare calls, round by round."""
    loop, bare = list[float](), list[float]()
    for number in range(options.rounds + 1):
        # Each begins every other round; the first warms up.
        for timed, found in ((timed_loop, loop), (timed_bare, bare))[:: 1 if number % 2 else -1]:
            seconds = timed(job, options.steps)
            if number:
                found.append(seconds)
    shares = [b / a for a, b in zip(loop, bare, strict=True)]
    job.metrics.close()
    return {
        "command": f"python benchmarks/loop.py --resolution {options.resolution} --batch {options.batch} "
        f"--size {options.size} --rounds {options.rounds} --steps {options.steps}",
        "loop_seconds": statistics.median(loop),
        "bare_seconds": statistics.median(bare),
        "share": statistics.median(shares),
        "share_quartiles": statistics.quantiles(shares, n=4)[::2],
    }


def timed_loop(job: Job, steps: int) -> float:
    further = replace(job, run=replace(job.run, steps=job.state.step + steps))
    began = time.perf_counter()
    train._loop(further, Stop())
    return (time.perf_counter() - began) / steps


def timed_bare(job: Job, steps: int) -> float:
    """UNet, loss, backward and optimizer on tensors made before the clock starts."""
    run, generator = job.run, torch.Generator().manual_seed(0)
    batch, side = run.config.train.batch_size, run.config.data[0].resolution // 8
    text = {n: t.expand(batch, *t.shape).contiguous() for n, t in job.samples.dropped.items()}
    latents, noise = (torch.randn(batch, 4, side, side, generator=generator) for _ in range(2))
    timesteps = torch.randint(0, 1000, (batch,), generator=generator)
    noisy = run.objective.schedule.add_noise(latents, noise, timesteps)
    time_ids = torch.full((batch, 6), 256)
    began = time.perf_counter()
    for _ in range(steps):
        prediction = run.model(noisy, timesteps, time_ids, **text)
        loss = run.objective.loss(prediction, latents, noise, timesteps)
        loss.mean().backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    return (time.perf_counter() - began) / steps


if __name__ == "__main__":
    main()
