"""From what a command line, a file of prompts and an older picture say to the pictures that are to be drawn."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from sdxl_trainer.errors import UserError
from sdxl_trainer.sampling import checkpoints, draw, metadata, models, prompts, samplers
from sdxl_trainer.sampling.grid import Axis, axis
from sdxl_trainer.sampling.request import Request, settings

_DEFAULTS: dict[str, Any] = {"seed": 0}


@dataclass(frozen=True)
class Order:
    """Named pictures, and the axes of their grids if there are any."""

    pictures: tuple[tuple[str, Request], ...]
    x: Axis | None = None
    y: Axis | None = None

    def grids(self) -> Iterator[tuple[str, list[list[str]]]]:
        """Names of the grids' files with those of their pictures, [y][x]."""
        if not (self.x or self.y):
            return
        of = {name: name.rsplit("-", 2)[0] for name, _ in self.pictures}
        for whole, names in groupby((name for name, _ in self.pictures), key=lambda name: of[name]):
            listed = list(names)
            columns = len(self.x.labels) if self.x else 1
            yield f"grid-{whole}.png", [listed[i : i + columns] for i in range(0, len(listed), columns)]


def made(
    model: str | None,
    given: Mapping[str, Any],
    texts: Sequence[str] = (),
    file: Path | None = None,
    like: Path | None = None,
    images: int = 1,
    axes: tuple[str | None, str | None] = (None, None),
) -> Order:
    """The order of a command. What is told nearer to the picture wins: its line in the file of prompts, then `given`
    on the command line, then the older picture."""
    shared = {**_DEFAULTS, **(_like(like) if like else {}), **given}
    shared |= {"model": model} if model else {}
    rows: list[dict[str, Any]] = prompts.read(file) if file else [{"prompt": text} for text in texts]
    if not rows:
        if not shared.get("prompt"):
            raise UserError("there is no prompt", "sdxl sample", "give --prompt, --prompts FILE or --like PICTURE")
        rows = [{}]
    x, y = axis(axes[0], "--x"), axis(axes[1], "--y")
    if x and y and x.name == y.name:
        raise UserError(f"both axes are '{x.name}'", "--x and --y", "give two settings")
    found: list[tuple[str, Request]] = []
    for number, row in enumerate(rows):
        for image in range(images):
            told = {**shared, **row}
            told["seed"] = int(told["seed"]) + image
            for name, own in _cells(told, x, y):
                found.append((f"{number}-{image}{name}.png", _request(own)))
    return Order(tuple(found), x, y)


def _cells(told: dict[str, Any], x: Axis | None, y: Axis | None) -> Iterator[tuple[str, dict[str, Any]]]:
    if not (x or y):
        yield "", told
        return
    for row in range(len(y.labels) if y else 1):
        below = y.applied(row, told) if y else told
        for column in range(len(x.labels) if x else 1):
            yield f"-{row}-{column}", (x.applied(column, below) if x else below)


def _like(path: Path) -> dict[str, Any]:
    """The settings of an older picture. Files that it knows by name alone are looked for beside it and here."""
    raw = metadata.read(path)
    kept = {key: value for key, value in raw.items() if key in {"model", "loras", "embeddings"}}
    found = settings({k: v for k, v in raw.items() if k not in kept}, str(path))
    for key in ("loras", "embeddings"):
        if kept.get(key):
            found[key] = tuple(_placed(str(text), path) for text in kept[key])
    return found | ({"model": kept["model"]} if kept.get("model") else {})


def _placed(text: str, beside: Path) -> str:
    name, weight = metadata.lora_file(text)
    for place in (Path(name).expanduser(), beside.parent / Path(name).name, Path("loras") / Path(name).name):
        if place.exists():
            return f"{place}:{weight:g}"
    what = f"the picture was drawn with '{Path(name).name}', which is not here"
    raise UserError(what, str(beside), f"copy it beside the picture, or give --lora FILE:{weight:g}")


def _request(told: dict[str, Any]) -> Request:
    """A request with the sizes that its model or picture has by default; refuses what contradicts itself."""
    if not told.get("model"):
        raise UserError("there is no model", "sdxl sample", "give a diffusers folder, a hub id or a .safetensors file")
    told = _with_base(told)
    found = models.find(str(told["model"]))
    sides = _sides(told, models.side(found))
    request = Request(**{**told, **sides})
    for name, side in sides.items():
        below = side // 8 * 8
        if side != below:
            raise UserError(f"--{name} {side} is not a multiple of 8", "command line", f"give {below} or {below + 8}")
    where = f"prompt '{request.prompt[:40]}'"
    if request.sampler:
        samplers.split(request.sampler)
    models.reading(request)
    models.refuse_editing([request.prompt, request.negative or ""], request.emphasis)
    draw.refuse_no_step(request)
    _refuse_contradictions(request, where)
    if found.refines and not request.image:
        what = f"'{request.model}' is a refiner: it changes pictures, and there is none"
        raise UserError(what, where, "give --image, or a base as MODEL and this as --refiner")
    if found.inpaints and not request.mask:
        what = f"'{request.model}' is a model for inpainting, and there is no mask"
        raise UserError(what, where, "give --image and --mask")
    if request.refiner and not models.find(request.refiner).refines:
        what = f"'{request.refiner}' is no refiner: it has two text encoders"
        raise UserError(what, "--refiner", "give SDXL's refiner; a second pass with a base is --image")
    return request


def _with_base(told: dict[str, Any]) -> dict[str, Any]:
    """A run of an adapter or new words as MODEL means its base with them."""
    run = checkpoints.added(Path(told["model"]).expanduser())
    if run is None:
        return told
    base, own = run
    return told | {"model": base} | {setting: (*files, *told.get(setting, ())) for setting, files in own.items()}


def _refuse_contradictions(request: Request, where: str) -> None:
    needs = (
        (request.mask and not request.image, "a mask without a picture", "give --image"),
        (request.strength is not None and not request.image, "strength without a picture", "give --image"),
        (
            (request.refine_from is not None or request.refine_strength is not None) and not request.refiner,
            "refine_from or refine_strength without a refiner",
            "give --refiner",
        ),
        (
            request.refine_from is not None and request.refine_strength is not None,
            "refine_from and refine_strength: the refiner either takes over or begins anew",
            "give one of them",
        ),
        (
            request.refine_from in {0.0, 1.0},
            f"refine_from = {request.refine_from}: one of the two models would do nothing",
            "give a number between 0 and 1, for example 0.8",
        ),
        (
            request.refiner and request.image and request.refine_strength is None,
            "a refiner that takes over from a picture's denoising",
            "give --refine-strength, for example 0.3",
        ),
    )
    for wrong, what, fix in needs:
        if wrong:
            raise UserError(what, where, fix)


def _sides(told: Mapping[str, Any], side: int) -> dict[str, int]:
    height, width = told.get("height"), told.get("width")
    if told.get("image") and not (height and width):
        size = draw.size(str(told["image"]))
        return {"height": height or size[0], "width": width or size[1]}
    return {"height": int(height or side), "width": int(width or side)}
