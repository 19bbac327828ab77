"""Running a command line of the reference, also in one of several processes."""

import os
import secrets
import sys
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from sdxl_trainer.compat.command import WORLD_SIZES, Job, Script, number, translate
from sdxl_trainer.compat.flags import WHERE
from sdxl_trainer.errors import UserError

if TYPE_CHECKING:
    from sdxl_trainer.config import Config
    from sdxl_trainer.run import Start

RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def parse(script: Script, argv: Sequence[str]) -> "tuple[Config, Start]":
    """The config and the way to start that a command line of the reference means."""
    job = translate(script, argv, os.environ, _random_seed)
    return job.config, job.start


def main(script: Script, argv: Sequence[str] | None = None) -> int:
    """Run a command line of the reference; the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if _processes() > 1:
        _join_processes_of_cpus()
    try:
        job = translate(script, argv, os.environ, _shared_seed)
    except UserError as error:
        _say(str(error))
        return 2
    for note in job.notes:
        _say(f"note: {note}")
    if job.token is not None:
        _hide(job.token)
    return _run(job)


def _run(job: Job) -> int:
    from sdxl_trainer.errors import Interrupted
    from sdxl_trainer.train import train

    try:
        train(job.config, job.start)
    except UserError as error:
        print(UserError(*map(job.flagged, (error.what, error.where, error.fix))), file=sys.stderr)
        return 2
    except Interrupted as stop:
        _say("interrupted: add --resume_from_checkpoint=latest to continue from the last checkpoint")
        return 128 + stop.number
    return 0


def _say(line: str) -> None:
    """Print a line once, however many processes there are."""
    if _is_main():
        print(line, file=sys.stderr, flush=True)


def _processes() -> int:
    return number(os.environ, WORLD_SIZES, 1)


def _is_main() -> bool:
    return number(os.environ, RANKS, 0) == 0


def _random_seed() -> int:
    return secrets.randbelow(1 << 32)


def _shared_seed() -> int:
    """A random seed that all processes of the launch agree on."""
    seed = _random_seed()
    if _processes() == 1:
        return seed
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        what = "several processes cannot choose a seed together under this launcher"
        raise UserError(what, WHERE, "give one with --seed")
    store, rank = _meeting_place()
    if rank == 0:
        store.set("sdxl-trainer/seed", str(seed))
    return int(store.get("sdxl-trainer/seed"))


@cache
def _meeting_place() -> tuple[Any, int]:
    """What the launcher's processes can write to and read from, and the number of this one. It is kept: where no
    launcher holds the store, the first process does, and it must live until the others have read."""
    from torch.distributed.rendezvous import rendezvous

    store, rank, _ = next(rendezvous("env://"))
    return store, rank


def _join_processes_of_cpus() -> None:
    """Tell accelerate that several processes without an accelerator are one run: it takes them for as many runs."""
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")


def _hide(token: str) -> None:
    """Move the token from the command line, which is recorded in files, to the environment of this process."""
    os.environ["HF_TOKEN"] = token
    sys.argv = [argument.replace(token, "***") for argument in sys.argv]
