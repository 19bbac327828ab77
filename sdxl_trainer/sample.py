"""Pictures from a model: during training from the live modules, and from any model on disk."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_trainer import files
from sdxl_trainer.config import TextOptions
from sdxl_trainer.log import Console
from sdxl_trainer.sampling import draw as drawing
from sdxl_trainer.sampling import grid, metadata, models
from sdxl_trainer.sampling.order import Order
from sdxl_trainer.sampling.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image


def read_as(reading: TextOptions) -> dict[str, Any]:
    """How prompts are read, as settings of a request."""
    return {"emphasis": reading.emphasis, "long_prompts": reading.long_captions, "clip_skip": reading.clip_skip}


def run(order: Order, out: Path, batch: int = 1, offload: str | None = None) -> Iterator[Path]:
    """Draw an order, save its pictures with what they were made of, and its grids; gives the paths as they come."""
    with files.explained(out):
        out.mkdir(parents=True, exist_ok=True)
    known: dict[str, str] = {}
    for name, request, image in drawn(order.pictures, batch, offload):
        save(image, out / name, request, known)
        weights = " + ".join([request.model, *request.loras, *request.embeddings])
        record(out, [note(request, name, 0, weights)])
        yield out / name
    for name, cells in order.grids():
        save(grid.sheet([[_opened(out / cell) for cell in row] for row in cells], order.x, order.y), out / name)
        yield out / name


def _opened(path: Path) -> "Image":
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def drawn(
    named: Sequence[tuple[str, Request]], batch: int = 1, offload: str | None = None
) -> Iterator[tuple[str, Request, "Image"]]:
    """Draw pictures, those of one model together, with a progress bar; gives them as they come."""
    kept: dict[str, models.Loaded] = {}
    console, done = Console(), 0
    total = sum(drawing.steps_taken(request) for _, request in named)

    def step() -> None:
        nonlocal done
        done += 1
        if done <= total:  # samplers of second order take more steps than they are asked for
            console.progress(done, total, "denoising")

    # A model is loaded once, wherever it stands in a grid.
    order = {model: i for i, model in enumerate(dict.fromkeys(request.model for _, request in named))}
    try:
        for alike in _batches(sorted(named, key=lambda item: order[item[1].model]), batch):
            requests = [request for _, request in alike]
            loaded = _dressed(kept, requests[0], offload)
            refiner = _loaded(kept, requests[0].refiner, offload) if requests[0].refiner else None
            both = [_model(one, requests) if one else None for one in (loaded, refiner)]
            assert both[0] is not None
            pictures = drawing.paint(both[0], requests, both[1], step)
            yield from ((name, request, image) for (name, request), image in zip(alike, pictures, strict=True))
    finally:
        console.end()


def _batches(named: Sequence[tuple[str, Request]], size: int) -> Iterator[list[tuple[str, Request]]]:
    """Pictures that may be drawn together: all but their prompts and seeds is alike."""

    def alike(item: tuple[str, Request]) -> Request:
        return replace(item[1], prompt="", prompt_2=None, negative=None, negative_2=None, seed=0)

    for _, group in groupby(named, alike):
        members = list(group)
        yield from (members[i : i + size] for i in range(0, len(members), size))


def _dressed(kept: dict[str, models.Loaded], request: Request, offload: str | None) -> models.Loaded:
    """The request's model with its adapters and words; any other model but refiners is let go."""
    for name in [name for name, one in kept.items() if name != request.model and not one.base.refines]:
        del kept[name]
    loaded = _loaded(kept, request.model, offload)
    if not models.dress(loaded, request.loras, request.embeddings):
        del kept[request.model], loaded
        loaded = _loaded(kept, request.model, offload)
        models.dress(loaded, request.loras, request.embeddings)
    return loaded


def _loaded(kept: dict[str, models.Loaded], name: str | None, offload: str | None) -> models.Loaded:
    assert name is not None
    if name not in kept:
        kept[name] = models.load(name, offload)
    return kept[name]


def _model(loaded: models.Loaded, requests: Sequence[Request]) -> drawing.Model:
    rows = [models.conditions(loaded, request) for request in requests]
    return drawing.Model(loaded.pipeline, loaded.scheduler, drawing.together(rows))


def requests(prompts: Sequence[str], images: int, seed: int, **settings: Any) -> Iterator[tuple[str, Request]]:
    """`images` pictures per prompt, each prompt with the same seeds; named <prompt>-<image>.png."""
    for number, prompt in enumerate(prompts):
        for image in range(images):
            yield f"{number}-{image}.png", Request(prompt, seed + image, **settings)


def save(image: "Image", path: Path, request: Request | None = None, known: dict[str, str] | None = None) -> None:
    """Write a PNG, with what it was made of where that is given; `known` keeps hashes of files between pictures."""
    told: dict[str, Any] = {}
    if request is not None:
        told["pnginfo"] = metadata.info(request, metadata.hashes(request, {} if known is None else known))
    files.write_atomically(path, lambda temporary: image.save(temporary, format="PNG", **told))


def record(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Note pictures in samples.jsonl; pictures of the same file replace an older note."""
    new = {row["file"] for row in rows}
    kept = [row for row in recorded(folder) if row["file"] not in new]
    files.write_text(folder / "samples.jsonl", "".join(_lines([*kept, *rows])))


def recorded(folder: Path) -> list[dict[str, Any]]:
    """The lines of samples.jsonl, none where there is no such file."""
    path = folder / "samples.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def forget(folder: Path, after: int) -> None:
    """Take the pictures of steps later than `after` out of samples.jsonl, before the first step all: another run drew
    them. The files stay until this one draws its own."""
    if old := recorded(folder):
        kept = [row for row in old if after and row["step"] <= after]
        files.write_text(folder / "samples.jsonl", "".join(_lines(kept)))


def _lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    return (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def note(request: Request, file: str, step: int, weights: str) -> dict[str, Any]:
    """A line of samples.jsonl."""
    return {"step": step, "file": file, "weights": weights, **request.told()}
