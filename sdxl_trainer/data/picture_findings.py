"""What is worth knowing about the pictures before a training, worst first: damaged, doubled, cut, enlarged."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from sdxl_trainer.config import Config
from sdxl_trainer.data.findings import EXAMPLES, LEVELS, Captions, Finding
from sdxl_trainer.data.geometry import Geometry
from sdxl_trainer.data.ledger import by_size, cut_off, enlarged
from sdxl_trainer.data.pictures import Picture, Pictures
from sdxl_trainer.data.problems import Notes, Problem
from sdxl_trainer.data.survey import Survey, flat, near_copies
from sdxl_trainer.data.table import grouped

# What of a picture may be cut off, and how far it may be enlarged, before it is worth a look.
MUCH_CUT, MUCH_ENLARGED = 0.25, 1.25
# Groups of copies that are shown, and pictures of each.
GROUPS, MEMBERS = 8, 4


def pictures(config: Config, found: Pictures, notes: Notes, seen: Survey) -> list[Finding]:
    """Findings about pictures and their files."""
    several = len(config.data) > 1
    stops = [
        Finding(problem.kind, _placed(problem, several), len(problem.where), problem.fix, _split(problem.where), level)
        for level, found_there in (("stops", notes.problems), ("harms", notes.harmful))
        for problem in found_there
    ]
    if seen.broken:
        shown = tuple((error.where, error.what) for error in list(seen.broken.values())[:EXAMPLES])
        fix = next(iter(seen.broken.values())).fix
        stops.append(Finding("damaged", "pictures are damaged", len(seen.broken), fix, shown, "stops"))
    made = [_doubles(found), _near(found, seen), _cut(config, found), _enlarged(config, found), _flat(found, seen)]
    made.append(_moving(found, seen))
    return [*stops, *(finding for finding in made if finding is not None)]


def _placed(problem: Problem, several: bool) -> str:
    return f"{problem.what} ({problem.place})" if several and problem.place else problem.what


def ranked(about_pictures: Iterable[Finding], captions: Captions | None) -> list[Finding]:
    """All findings: what stops the run, then what harms, then the rest; the most frequent first."""
    found = [*about_pictures, *(captions.findings if captions else ())]
    return sorted(found, key=lambda finding: (LEVELS.index(finding.level), -finding.count))


def copies(found: Pictures) -> list[list[int]]:
    """Groups of pictures with the same bytes, by number; a picture in several resolutions is one."""
    numbers = found.distinct()
    order, begins = grouped(found.take(numbers).column("content").view("<i8"))
    bounds = np.append(np.flatnonzero(begins), len(order))
    several = np.flatnonzero(np.diff(bounds) > 1)
    return [numbers[order[bounds[i] : bounds[i + 1]]].tolist() for i in several]


def _split(where: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """`name: what` or `name (what)` as pairs."""
    pairs = []
    for text in where[:EXAMPLES]:
        name, colon, what = text.partition(": ")
        pairs.append((name, what) if colon else (text, ""))
    return tuple(pairs)


def _listed(found: Pictures, groups: Sequence[Sequence[int]]) -> tuple[tuple[str, str], ...]:
    return tuple(
        (found[members[0]].name, "same as " + ", ".join(found[n].name for n in members[1:MEMBERS]))
        for members in groups[:GROUPS]
    )


def _doubles(found: Pictures) -> Finding | None:
    groups = copies(found)
    if not groups:
        return None
    extra = sum(len(members) - 1 for members in groups)
    captions = sum(len({found[n].captions for n in members}) > 1 for members in groups)
    what = "pictures have the same bytes as another, and weigh more than the rest"
    what += f"; {captions} of them under other captions" if captions else ""
    return Finding("copies", what, extra, "keep one of each, or set repeats if that is meant", _listed(found, groups))


def _near(found: Pictures, seen: Survey) -> Finding | None:
    groups = near_copies(seen.looks)
    if not groups:
        return None
    extra = sum(len(members) - 1 for members in groups)
    shown = _listed(found, groups)
    return Finding("near copies", "pictures look like another one", extra, "keep the best of each", shown)


def _cut(config: Config, found: Pictures) -> Finding | None:
    worst = [(number, share) for number, share in ordered(found, cut_off) if share > MUCH_CUT]
    if not worst:
        return None
    fix = 'set buckets = "area"' if any(d.buckets == "none" for d in config.data) else "add buckets of their shape"
    shown = tuple((found[n].name, f"{share:.0%} is cut off") for n, share in worst[:EXAMPLES])
    return Finding("cut off", f"pictures lose more than {MUCH_CUT:.0%} to the crop", len(worst), fix, shown)


def _enlarged(config: Config, found: Pictures) -> Finding | None:
    worst = [(number, scale) for number, scale in ordered(found, enlarged) if scale > MUCH_ENLARGED]
    if not worst:
        return None
    shown = tuple((found[n].name, f"{_size(found[n])} pixels, enlarged {scale:.2f} times") for n, scale in worst)
    what = f"pictures are enlarged more than {MUCH_ENLARGED:g} times: blur is learned"
    fix = "use larger originals, a lower resolution, or no_upscale = true with buckets"
    return Finding("enlarged", what, len(worst), fix, shown[:EXAMPLES], "harms")


def _moving(found: Pictures, seen: Survey) -> Finding | None:
    numbers = [number for number, one in seen.looks.items() if one.moving]
    if not numbers:
        return None
    shown = tuple((found[n].name, "") for n in numbers[:EXAMPLES])
    fix = "save the frames that shall be trained as pictures, if others than the first are meant"
    return Finding("animations", "pictures are animations: the first frame is trained", len(numbers), fix, shown)


def _flat(found: Pictures, seen: Survey) -> Finding | None:
    numbers = flat(seen.looks)
    if not numbers:
        return None
    shown = tuple((found[n].name, "") for n in numbers[:EXAMPLES])
    return Finding("empty", "pictures are of nearly one colour", len(numbers), "take them out", shown, "harms")


def _size(picture: Picture) -> str:
    height, width = picture.geometries[0].original
    return f"{width} x {height}"


def ordered(found: Pictures, measure: Callable[[Geometry], float]) -> list[tuple[int, float]]:
    """(number, measure of its first geometry) of each picture, largest first, each name once."""
    values = found.measured(measure)
    order = np.argsort(-values, kind="stable")
    first = np.sort(np.unique(found.rows[["source", "record"]][order], return_index=True)[1])
    return [(int(number), float(values[number])) for number in order[first]]


def rectangle(geometry: Geometry) -> tuple[float, float, float, float]:
    """Left, top, width and height of the crop in shares of the upright picture."""
    (rows, columns), (top, left), (height, width) = geometry.resized, geometry.crop, geometry.target
    if geometry.flip:
        left = columns - left - width
    return left / columns, top / rows, width / columns, height / rows


def histogram(found: Pictures) -> list[dict[str, object]]:
    """One row per size that is trained: width, height, pictures, mean share cut off, largest enlargement."""
    return [
        {"width": width, "height": height, "pictures": count, "cut_off": lost, "enlarged": scale}
        for (height, width), count, lost, scale in sorted(by_size(found), key=lambda row: row[0][1] / row[0][0])
    ]


def counted(config: Config, trained: Pictures, held: Pictures, notes: Notes) -> list[dict[str, Any]]:
    """Per data set what became of every file or row that was met: the counts add up to them."""

    def names(pictures: Pictures) -> list[int]:
        return [len(np.unique(pictures.rows["record"][pictures.of(number)])) for number in range(len(config.data))]

    use, out = names(trained), names(held)
    return [
        {
            "path": data.path,
            "trained": use[i],
            "held_out": out[i],
            "unusable": sum(n for place, n in notes.unusable.items() if place.startswith(f"data.{i}.path")),
            "skipped": dict(
                sum((c for place, c in notes.skipped.items() if place.startswith(f"data.{i}.path")), Counter[str]())
            ),
        }
        for i, data in enumerate(config.data)
    ]
