"""What becomes of the pictures: how many are trained at which size, how often, and what is cut off or held out."""

from collections import Counter

import numpy as np

from sdxl_trainer.config import Config
from sdxl_trainer.data.buckets import Size
from sdxl_trainer.data.geometry import Geometry
from sdxl_trainer.data.pictures import Pictures
from sdxl_trainer.data.plan import Plan
from sdxl_trainer.data.prepare import Stock
from sdxl_trainer.errors import plural, sentence

Rows = list[tuple[str, str]]


def cut_off(geometry: Geometry) -> float:
    """The share of a picture that lies outside of its crop."""
    (rows, columns), (height, width) = geometry.resized, geometry.target
    return 1 - height * width / (rows * columns)


def enlarged(geometry: Geometry) -> float:
    """How many times as long a side is as in the original."""
    return max(new / old for new, old in zip(geometry.resized, geometry.original, strict=True))


def rows(config: Config, stock: Stock, order: Plan) -> Rows:
    """Lines of a report: (what it is about, text)."""
    return [*_sets(config, stock, order), *_buckets(stock.pictures, order), *_exceptions(stock)]


def _sets(config: Config, stock: Stock, order: Plan) -> Rows:
    if len(config.data) == 1 and config.data[0].repeats == 1 and not stock.held_out:
        return []
    found = []
    for number, (data, stream) in enumerate(zip(config.data, order.streams, strict=True)):
        pictures = len(np.unique(stock.pictures.rows["record"][stream.pictures]))
        held = len(np.unique(stock.held_out.rows["record"][stock.held_out.of(number)]))
        if data.held_out == 1:
            found.append((data.path, f"{plural(held, 'picture')}, for validation alone"))
            continue
        parts = [plural(pictures, "picture"), f"{plural(stream.count, 'sample')} per epoch"]
        parts += ["the base's prediction as target"] if data.prior_prediction else []
        parts += [f"loss weight {data.weight:g}"] if data.weight != 1 else []
        parts += [f"{held} held out ({held / (held + pictures):.1%})"] if data.held_out else []
        found.append((data.path, ", ".join(parts)))
    return found


def by_size(pictures: Pictures) -> list[tuple[Size, int, float, float]]:
    """(target size, pictures, mean share cut off, largest enlargement) of every size that is trained."""
    target, lost, scale = pictures.rows["target"], pictures.measured(cut_off), pictures.measured(enlarged)
    groups = {kind: target == kind for kind in np.unique(target).tolist()}
    return [
        (pictures.targets[kind], int(of.sum()), float(lost[of].mean()), float(scale[of].max()))
        for kind, of in groups.items()
    ]


def _buckets(pictures: Pictures, order: Plan) -> Rows:
    found = []
    groups = by_size(pictures)
    for (height, width), count, lost, largest in sorted(groups, key=lambda row: (-row[1], row[0])):
        text = f"{plural(count, 'picture')}, {lost:.1%} cut off"
        found.append((f"{width} x {height}", text + (f", enlarged up to {largest:.2f} times" if largest > 1 else "")))
    if len(groups) == 1:
        return found
    sizes = Counter(len({order.group(s) for s in order.step(step)[1]}) for step in range(order.steps_per_epoch))
    mixed = sum(count for size, count in sizes.items() if size > 1)
    text = (
        f"none: the first epoch has {mixed} of {plural(order.steps_per_epoch, 'step')} with pictures of several sizes"
    )
    return [*found, ("left over", text)]


def _exceptions(stock: Stock) -> Rows:
    pictures = stock.pictures
    upscaled = np.flatnonzero(pictures.measured(enlarged) > 1)
    names = [pictures[int(i)].name for i in upscaled[:3]]
    more = f" and {len(upscaled) - 3} more" if len(upscaled) > 3 else ""
    found = [("enlarged pictures", f"{len(upscaled)}: {', '.join(names)}{more}" if names else "none")]
    masks = [source.masks for source in pictures.sources]
    if any(masks):
        having = sum(bool(m and m[r]) for m, r in ((masks[s], r) for s, r in pictures.rows[["source", "record"]]))
        found.append(("masks", f"{plural(having, 'picture')} with, {len(pictures) - having} without"))
    each = pictures.take(pictures.distinct())
    doubles = len(each) - len(each.different())
    if doubles > 0:
        found.append(("duplicates", sentence(doubles, "pictures have the same bytes as another")))
    return found
