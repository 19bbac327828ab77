"""The facts of `sdxl check` about a data set as plain data, from which the page and the JSON are made."""

from dataclasses import asdict
from typing import Any

import numpy as np

from sdxl_trainer import pace
from sdxl_trainer.base import Base
from sdxl_trainer.config import Config
from sdxl_trainer.data import findings, images, picture_findings
from sdxl_trainer.data.ledger import cut_off, enlarged
from sdxl_trainer.data.pictures import Picture, Pictures
from sdxl_trainer.data.plan import Plan
from sdxl_trainer.data.prepare import Stock
from sdxl_trainer.data.problems import Notes
from sdxl_trainer.data.survey import Survey, near_copies, survey, thumbnails
from sdxl_trainer.dtypes import DTYPES
from sdxl_trainer.log import Console
from sdxl_trainer.model import SDXL

# Pictures shown as a sample of the set, and at the worst ends of crop and size.
SAMPLE, WORST = 18, 6


def facts(
    config: Config,
    base: Base,
    stock: Stock,
    order: Plan,
    steps: int,
    sdxl: SDXL,
    words: findings.Captions,
    notes: Notes,
) -> dict[str, Any]:
    """JSON-able facts: what is wrong, what becomes of the pictures, what it costs. `thumbnails` are JPEG data URLs by
    number of the picture."""
    pictures = stock.pictures
    seen = survey(pictures, Console().progress)
    found = picture_findings.ranked(picture_findings.pictures(config, pictures, notes, seen), words)
    groups = _groups(pictures, seen)
    small = thumbnails(pictures, [number for numbers in groups.values() for number in numbers])
    samples = steps * config.train.batch_size
    sides = np.array(pictures.targets)[pictures.rows["target"]] / 8
    area = float(sides.prod(axis=1).mean())
    seconds, source = pace.estimate(config, base, sdxl, samples, area, DTYPES[stock.keys.text_precision])
    latents = stock.missing_latents()
    return {
        "name": config.data[0].path.rstrip("/").rsplit("/", 1)[-1] if len(config.data) == 1 else config.output_dir,
        "findings": [asdict(finding) for finding in found],
        "counts": picture_findings.counted(config, pictures, stock.held_out, notes),
        "looked_at": {"pictures": seen.looked_at, "of": len(pictures.different())},
        "buckets": picture_findings.histogram(pictures),
        "steps": {"all": steps, "epoch": order.steps_per_epoch, "batch_size": config.train.batch_size},
        "samples_per_epoch": order.samples_per_epoch,
        "to_encode": {
            "latents": len(latents),
            "bytes": latents.cells() * 16,
            "captions": len(stock.missing_texts()),
        },
        "time": {"seconds": seconds, "from": source},
        "shown": {name: [_shown(pictures[number], number) for number in numbers] for name, numbers in groups.items()},
        "thumbnails": {number: images.data_url(image, quality=80, optimize=True) for number, image in small.items()},
    }


def _groups(pictures: Pictures, seen: Survey) -> dict[str, list[int]]:
    """Which pictures are shown, and where."""
    each = sorted(seen.looks)
    cut = [n for n, share in picture_findings.ordered(pictures, cut_off) if share > 0.01][:WORST]
    large = [n for n, scale in picture_findings.ordered(pictures, enlarged) if scale > 1][:WORST]
    return {
        "sample": [each[i * len(each) // SAMPLE] for i in range(SAMPLE)] if len(each) > SAMPLE else each,
        "cut off most": cut,
        "enlarged most": large,
        **{
            f"near copies {i}": members[: picture_findings.MEMBERS]
            for i, members in enumerate(near_copies(seen.looks)[: picture_findings.GROUPS], start=1)
        },
    }


def _shown(picture: Picture, number: int) -> dict[str, Any]:
    geometry = picture.geometries[0]
    return {
        "number": number,
        "name": picture.name,
        "captions": list(picture.captions[:3]),
        "size": [geometry.original[1], geometry.original[0]],
        "target": [geometry.target[1], geometry.target[0]],
        "crop": [round(share, 4) for share in picture_findings.rectangle(geometry)],
        "crops": len(picture.geometries),
        "cut_off": cut_off(geometry),
        "enlarged": enlarged(geometry),
    }
