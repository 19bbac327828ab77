"""What a run will write onto its disk, and whether there is room: told before anything is spent."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sdxl_trainer import checkpoint, files, finish, optim, text
from sdxl_trainer.base import Base
from sdxl_trainer.config import OPTIMIZERS, Config, steps_of
from sdxl_trainer.data import prepare
from sdxl_trainer.data.plan import Plan
from sdxl_trainer.data.prepare import Stock
from sdxl_trainer.dtypes import DTYPES
from sdxl_trainer.errors import UserError, plural
from sdxl_trainer.model import SDXL
from sdxl_trainer.parameters import Group
from sdxl_trainer.report.dataset import size
from sdxl_trainer.resume import Begin

# Bytes of a latent cell in the cache: mean and deviation of four channels, in fp16.
LATENT = 16
FIX = "free some space, choose another output_dir, or set train.checkpoints_limit"


@dataclass(frozen=True)
class Need:
    """Bytes of a `checkpoint`, of which `most` lie there at once, of the `result`, and of the `rows` of the cache that
    are still to be encoded onto this disk. `together` they take at most so much beyond what is there already, and the
    run cannot do without what is `certain`, whatever is deleted meanwhile. `free` is what the disk has."""

    checkpoint: float
    most: int
    result: float
    rows: float
    together: float
    certain: float
    free: float

    def told(self) -> str:
        """What takes the room, in words."""
        parts = [f"{plural(self.most, 'checkpoint')} of {size(self.checkpoint)}"] * bool(self.most)
        parts += [f"the result of {size(self.result)}"]
        return ", ".join(parts + [f"encoded pictures and captions of {size(self.rows)}"] * bool(self.rows))


def need(config: Config, base: Base, stock: Stock, order: Plan, groups: list[Group], sdxl: SDXL, begin: Begin) -> Need:
    """What a run writes from where it begins to its end."""
    one, result = sizes(config, base, groups, sdxl)
    output, step = Path(config.output_dir).expanduser(), begin.checkpoint.step if begin.checkpoint else 0
    limit, every = config.train.checkpoints_limit, steps_of(config.train.checkpoint_every, order.steps_per_epoch)
    there, new = len(checkpoint.found(output)), begin.steps // every - step // every if every else 0
    # An older checkpoint goes once a newer one is verified; the best one stays beside them.
    kept = there + new if limit is None else min(there + new, limit + config.validation.keep_best)
    most = min(there + new, kept + bool(new))
    rows = to_encode(base, stock) if _disk(prepare.cache_folder(config)) == _disk(output) else 0.0
    together = rows + max(0.0, max(most * one, kept * one + result) - there * one)
    # How much an optimizer of other people keeps is a guess.
    certain = max(one if new and config.optimizer.name in OPTIMIZERS else 0.0, result)
    return Need(one, most, result, rows, together, certain, free(output))


def look(wanted: Need, output: str, say: Callable[[str], None]) -> None:
    """Say that there may be too little room; UserError if there is too little for what the run cannot do without."""
    if wanted.free < wanted.certain:
        what = f"a checkpoint takes {size(wanted.checkpoint)}, the result {size(wanted.result)}"
        raise UserError(f"{what}, and the disk has {size(wanted.free)} free", output, FIX)
    if wanted.free < wanted.together:
        say(f"the disk may not do: {size(wanted.free)} free of {size(wanted.together)} for {wanted.told()}; {FIX}")


def sizes(config: Config, base: Base, groups: list[Group], sdxl: SDXL) -> tuple[float, float]:
    """Bytes of a checkpoint and of the result with its exports, but for headers."""
    beside = bool(config.adapter or config.token)
    weight = 4 if beside else DTYPES[config.train.weights].itemsize
    learns = sum(group.size for group in groups)
    saved = [sdxl.get_parameter(name) for name in sdxl.added] if beside else sdxl.parameters()
    weights = weight * sum(parameter.numel() for parameter in saved)
    averages = weights + learns * (4 - weight) if config.ema.enabled else 0
    final = averages or weights
    # Schedule-free keeps the tensors that train beside those to be used.
    state = optim.state_bytes(config.optimizer, weight) + weight * (config.optimizer.name == "schedulefree")
    one = weights + averages + learns * state + final * beside  # an adapter's file for others lies there too
    copied = 0 if beside else sum(path.stat().st_size for path in finish.copied(base, sdxl))
    width = 4 if averages else weight
    share = DTYPES[config.export.dtype].itemsize / width if config.export.dtype else 1.0
    return one, weights + averages + copied + len(config.export.formats) * (final + copied) * share


def to_encode(base: Base, stock: Stock) -> float:
    """Bytes of the rows of the cache that are missing; captions as of one chunk each."""
    return stock.missing_latents().cells() * LATENT + len(stock.missing_texts()) * chunk(base, stock)


def chunk(base: Base, stock: Stock) -> int:
    """Bytes of the embeddings of 75 tokens."""
    widths = [base.config(part)["hidden_size"] for part in base.encoders]
    pooled = base.config(text.PARTS[1]).get("projection_dim", widths[-1])
    return (77 * sum(widths) + pooled) * DTYPES[stock.keys.text_precision].itemsize


def free(path: Path) -> float:
    """Free bytes where a folder is or will be."""
    with files.explained(path):
        return shutil.disk_usage(_existing(path)).free


def _disk(path: Path) -> int:
    return _existing(path).stat().st_dev


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())
