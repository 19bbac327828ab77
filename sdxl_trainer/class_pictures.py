"""Class pictures for prior preservation (Ruiz et al. 2023, section 3.2), drawn by the base before it learns.

The name of a drawn picture says which one it is and what made it: `00012-3f9a0c21.png` is number 12. Its first noise
follows from the run's seed and that number alone. So the pictures are the same whatever the batch, the number of
processes or the interruptions, and what is still to be drawn is what is not in the folder.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_trainer import distributed, files, keyed, model, sample, text
from sdxl_trainer.base import Base, weights_file
from sdxl_trainer.chunking import Prompt
from sdxl_trainer.config import Config, Data, Model
from sdxl_trainer.data import sources
from sdxl_trainer.data.cache import key
from sdxl_trainer.data.memo import Memo
from sdxl_trainer.dtypes import DTYPES
from sdxl_trainer.errors import UserError, plural, sentence, shortened
from sdxl_trainer.formats import pretrained
from sdxl_trainer.log import Console
from sdxl_trainer.sampling import draw as drawing
from sdxl_trainer.sampling.request import Request

NAME = re.compile(r"(\d{5,})-([0-9a-f]{8})\.png")


@dataclass(frozen=True)
class Order:
    """The pictures of one data set that are still to be drawn, by number, into `folder`."""

    index: int
    data: Data
    folder: Path
    mark: str  # of everything that decides the pictures
    numbers: tuple[int, ...]
    there: int
    side: int

    def file(self, number: int) -> Path:
        return self.folder / f"{number:05}-{self.mark}.png"

    def prompt(self, number: int) -> str:
        prompts = self.data.generate_prompts or (self.data.caption or "",)
        return prompts[number % len(prompts)]


def missing(config: Config, base: Base, memo: Memo) -> list[Order]:
    """What is to be drawn for each data set that asks for it and has not all of it."""
    orders = [_order(config, base, memo, index, data) for index, data in enumerate(config.data) if data.generate]
    memo.save()
    return [order for order in orders if order.numbers]


def _order(config: Config, base: Base, memo: Memo, index: int, data: Data) -> Order:
    where, folder = f"data.{index}.path = '{data.path}'", Path(data.path).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError("the path of a data set is a file, not a folder", where, "give a folder for the pictures")
    if base.refines or base.inpaints:
        kind = "a refiner" if base.refines else "an inpainting model"
        what = f"data.{index}.generate with {kind} as base, which draws nothing from words alone"
        raise UserError(what, where, "put pictures drawn by SDXL base into the folder, and set generate = 0")
    side = base.config("unet").get("sample_size", 128) * 8
    made_by: list[Any] = [base.hash(part, memo) for part in ("unet", "vae", *text.PARTS, *text.TOKENIZERS)]
    made_by += [base.config("scheduler"), data.generate_prompts or data.caption, config.seed, side]
    mark = key("class picture", *made_by, data.generate_steps, data.generate_guidance)[:8]
    drawn, foreign = dict[int, str](), 0
    for name in sources.pictures(folder, where, data.mask_suffix):
        found = NAME.fullmatch(name)
        drawn |= {int(found[1]): found[2]} if found else {}
        foreign += found is None
    if others := [number for number, other in drawn.items() if other != mark]:
        what = sentence(len(others), "pictures in the folder were drawn otherwise")
        what += ": by another base, prompt, seed or settings"
        raise UserError(what, where, "choose another folder for the new ones, delete the old ones, or set generate = 0")
    if foreign + len(drawn) > data.generate:
        there = plural(foreign + len(drawn), "picture")
        what = f"data.{index}.generate = {data.generate}, but the folder holds {there} already"
        fix = f"set generate = {foreign + len(drawn)}; max_samples = {data.generate} trains on that many of them"
        raise UserError(what, where, fix)
    left = [number for number in range(data.generate) if number not in drawn][: data.generate - foreign - len(drawn)]
    return Order(index, data, folder, mark, tuple(left), foreign + len(drawn), side)


def draw(config: Config, base: Base, orders: Sequence[Order], precision: str, accelerator: Any, say: Console) -> None:
    """Draw what is missing, shared among the processes; each picture is whole in its place as soon as it is drawn."""
    accelerator.wait_for_everyone()  # all have looked before anyone draws
    for order in orders:
        _draw(config, base, order, precision, accelerator, say)
    accelerator.wait_for_everyone()
    for order in orders:
        gone = [order.file(number).name for number in order.numbers if not order.file(number).is_file()]
        if gone:
            some = plural(
                len(gone), "class picture that another process drew is", "class pictures that others drew are"
            )
            what = f"{some} not here: {shortened(gone)}"
            raise UserError(what, str(order.folder), "give a folder that all machines share")
        if accelerator.is_main_process:
            for rest in order.folder.glob(f".*-{order.mark}.png.*.tmp"):
                files.remove(rest)  # of a process that was killed


def _draw(config: Config, base: Base, order: Order, precision: str, accelerator: Any, say: Console) -> None:
    mine = order.numbers[accelerator.process_index :: accelerator.num_processes]
    if not mine:
        return
    say.say(f"drawing {plural(len(order.numbers), 'class picture')} of '{order.prompt(0)}' into {order.folder}")
    wanted = order.data.generate_precision
    dtype = DTYPES[precision if wanted == "auto" else distributed.precision(wanted, say.say)]
    with files.explained(order.folder):
        order.folder.mkdir(parents=True, exist_ok=True)
    device = accelerator.device
    embedded = _embedded(base, [order.prompt(number) for number in mine], dtype, device)
    pipeline = _pipeline(config.model, base, dtype, device)
    done = 0
    for prompt, numbers in _batches(order, mine):
        conditions = drawing.conditions(embedded[prompt], embedded[""], zeros=base.zeros_for_empty())
        requests = [_request(config.seed, order, number) for number in numbers]
        with torch.no_grad():
            drawn = drawing.latents(pipeline, requests, conditions)
        for number, latents in zip(numbers, drawn, strict=True):
            _save(order, number, pipeline, latents[None])
        done += len(numbers)
        say.progress(done, len(mine), "class pictures")


def _embedded(base: Base, prompts: Sequence[str], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Embeddings and pooled output of each prompt and of the empty one."""
    distinct = list(dict.fromkeys([*prompts, ""]))
    encoders = text.load(base, dtype, device)
    return dict(zip(distinct, text.encode(encoders, [Prompt(p) for p in distinct], model.TEXT), strict=True))


def _pipeline(options: Model, base: Base, dtype: torch.dtype, device: torch.device) -> Any:
    from diffusers import AutoencoderKL

    unet = model.load(options, base, None, dtype, checkpointing=False, text_learns=False).unet
    vae = pretrained.load(AutoencoderKL, base.vae, weights_file(base, "vae"), torch_dtype=torch.float32)
    return drawing.live_pipeline(unet.eval().to(device), vae.to(device), base.config("scheduler"))


def _batches(order: Order, numbers: Sequence[int]) -> Iterator[tuple[str, list[int]]]:
    """Numbers of one prompt each, as many as go into a forward pass."""
    for prompt, run in groupby(sorted(numbers, key=order.prompt), key=order.prompt):
        same, size = sorted(run), order.data.generate_batch
        yield from ((prompt, same[i : i + size]) for i in range(0, len(same), size))


def _request(seed: int, order: Order, number: int) -> Request:
    own = int(keyed.generator(seed, "class", 0, number).integers(1 << 63))
    data, side = order.data, order.side
    return Request(order.prompt(number), own, None, data.generate_steps, data.generate_guidance, side, side)


def _save(order: Order, number: int, pipeline: Any, latents: Tensor) -> None:
    path = order.file(number)
    if not bool(torch.isfinite(latents).all()):
        what = f"class picture {number} is not finite: the UNet overflows in {pipeline.unet.dtype}"
        raise UserError(what, f"data.{order.index}.generate_precision", 'set generate_precision = "fp32"')
    if order.data.generate_prompts:
        # Before its picture, which would be one without a caption while this is missing.
        files.write_text(path.with_suffix(".txt"), order.prompt(number) + "\n")
    sample.save(drawing.decoded(pipeline, latents), path)
