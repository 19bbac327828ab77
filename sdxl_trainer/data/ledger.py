"""What becomes of the pictures: how many are trained at which size, how often, and what is cut off or held out."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from sdxl_trainer.config import Config
from sdxl_trainer.data.geometry import Geometry
from sdxl_trainer.data.pictures import Picture
from sdxl_trainer.data.plan import Plan
from sdxl_trainer.data.prepare import Stock
from sdxl_trainer.errors import shortened

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
    for data, stream in zip(config.data, order.streams, strict=True):
        pictures = len({stock.pictures[i].record.name for i in stream.pictures})
        held = len({p.record.name for p in stock.held_out if p.data is data})
        parts = [f"{pictures} pictures", f"{stream.count} samples per epoch"]
        parts += ["the base's prediction as target"] if data.prior_prediction else []
        parts += [f"loss weight {data.weight:g}"] if data.weight != 1 else []
        parts += [f"{held} held out ({held / (held + pictures):.1%})"] if data.held_out else []
        found.append((data.path, ", ".join(parts)))
    return found


def _buckets(pictures: Sequence[Picture], order: Plan) -> Rows:
    groups: dict[tuple[int, int], list[Geometry]] = defaultdict(list)
    for picture in pictures:
        groups[picture.geometries[0].target].append(picture.geometries[0])
    found = []
    for (height, width), members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        lost, largest = sum(map(cut_off, members)) / len(members), max(map(enlarged, members))
        text = f"{len(members)} pictures, {lost:.1%} cut off"
        found.append((f"{width} x {height}", text + (f", enlarged up to {largest:.2f} times" if largest > 1 else "")))
    if len(groups) == 1:
        return found
    sizes = Counter(len({order.group(s) for s in order.step(step)[1]}) for step in range(order.steps_per_epoch))
    mixed = sum(count for size, count in sizes.items() if size > 1)
    text = f"none: the first epoch has {mixed} of {order.steps_per_epoch} steps with pictures of several sizes"
    return [*found, ("left over", text)]


def _exceptions(stock: Stock) -> Rows:
    upscaled = [p.name for p in stock.pictures if enlarged(p.geometries[0]) > 1]
    found = [("enlarged pictures", f"{len(upscaled)}: {shortened(upscaled, 3)}" if upscaled else "none")]
    if any(p.mask for p in stock.pictures):
        without = sum(p.mask is None for p in stock.pictures)
        found.append(("masks", f"{len(stock.pictures) - without} pictures with, {without} without"))
    doubles = len({(id(p.data), p.name) for p in stock.pictures}) - len({p.content for p in stock.pictures})
    if doubles > 0:
        found.append(("duplicates", f"{doubles} pictures have the same bytes as another"))
    return found
