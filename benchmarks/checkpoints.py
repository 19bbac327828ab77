"""How long does a save hold the training up?

The training loop takes steps as usual and saves every few of them. A step's time is from its beginning to the next
one's, so it holds everything between: the copy of the run, waiting for the writer, what the writer takes from the
same cores. Of each save the longest of the steps around it (the one it follows and the two after) is set against the
median of all steps; as a control the same is done with groups of steps that no save was near. A machine that other
programs use has long steps without any save: only the difference to the control is the save's.

Where a GPU computes, the host has cores that nothing wants. On a CPU training with `--threads 1` on a machine of two
cores stands for that: what is measured is the copy, and the interpreter that writer and training share. With as many
threads as cores the writer, at a lower priority, takes some of the training's time.

    python benchmarks/checkpoints.py [--threads 1] [--size tiny] [--resolution 256] [--saves 30] [--every 12]
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import torch

from sdxl_trainer import blueprint, train
from sdxl_trainer.run import Job, Stop

AROUND = 3  # steps around a save


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", default="tiny", choices=sorted(blueprint.SIZES))
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--saves", type=int, default=30)
    parser.add_argument("--every", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        result = {"command": command(options), **measure(Path(folder), options)}
    common.write("checkpoints", result)
    print(
        f"step {result['median_seconds']:.3f} s; longest step around a save {result['around_a_save']:.2f} of it "
        f"(away from saves {result['away']:.2f}); checkpoint {result['checkpoint_bytes'] / 1e6:.0f} MB, "
        f"written in the foreground {result['foreground_seconds'] / result['median_seconds']:.2f} steps"
    )


def command(options: argparse.Namespace) -> str:
    given = " ".join(f"--{name} {value}" for name, value in vars(options).items())
    return f"python benchmarks/checkpoints.py {given}"


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    saving = {"checkpoint_every": options.every, "checkpoints_limit": 1}
    tree = {"ema": {"enabled": True}, "train": {"steps": options.every * (options.saves + 2), **saving}}
    job = common.job(folder, options, tree)
    began: list[float] = []
    step = train.train_step

    def timed(*arguments: Any) -> Any:
        began.append(time.perf_counter())
        return step(*arguments)

    train.train_step = timed  # type: ignore[assignment]
    train._loop(job, Stop())
    waited = foreground(job)
    job.saver.close()
    job.metrics.close()
    seconds = [after - before for before, after in itertools.pairwise(began)][options.every :]
    median = statistics.median(seconds)
    saves = range(options.every - 1, len(seconds) - AROUND, options.every)  # steps that end with a save
    away = [at + options.every // 2 for at in saves if at + options.every // 2 + AROUND < len(seconds)]
    around = [max(seconds[at : at + AROUND]) / median for at in saves]
    control = [max(seconds[at : at + AROUND]) / median for at in away]
    [path] = (folder / "run").glob("checkpoint-*")
    return {
        "median_seconds": median,
        "around_a_save": statistics.median(around),
        "around_a_save_quartiles": statistics.quantiles(around, n=4)[::2],
        "away": statistics.median(control),
        "away_quartiles": statistics.quantiles(control, n=4)[::2],
        "saves": len(around),
        "checkpoint_bytes": sum(p.stat().st_size for p in path.rglob("*") if p.is_file()),
        "foreground_seconds": waited,
    }


def foreground(job: Job) -> float:
    """Seconds of a save that the training waits for: the median of five."""
    job.saver.wait()
    taken = []
    for _ in range(5):
        before = time.perf_counter()
        train._save(job)
        job.saver.wait()
        taken.append(time.perf_counter() - before)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
