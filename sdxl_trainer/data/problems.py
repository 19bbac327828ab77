"""What is wrong with data: one error for everything that was found, or a list for a report that goes on without it."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sdxl_trainer.errors import UserError, sentence, shortened


@dataclass(frozen=True)
class Problem:
    """One thing that stops a run: its kind, what it is, where (pictures, files or rows, perhaps with a remark), and
    what to do. `place` is the data set, where that does not follow from the names."""

    kind: str
    what: str
    fix: str
    where: tuple[str, ...]
    place: str = ""


@dataclass
class Notes:
    """Collects problems in place of raising them, and counts by data set what was met and left out."""

    problems: list[Problem] = field(default_factory=list)
    harmful: list[Problem] = field(default_factory=list)  # what stops no run, and harms what it learns
    skipped: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    unusable: Counter[str] = field(default_factory=Counter)  # pictures that cannot be used, by place


# Names by kind, as a source finds them.
Found = dict[str, list[str]]


def total(found: Found) -> int:
    return sum(map(len, found.values()))


def refuse(found: Found, table: Mapping[str, tuple[str, str]], place: str, notes: Notes | None = None) -> None:
    """One error for all that was found, kind by kind in the order of the table; nothing if there is nothing. With
    `notes` they are noted instead."""
    kinds = [kind for kind in table if found.get(kind)]
    if notes is not None:
        notes.problems += [Problem(kind, table[kind][0], table[kind][1], tuple(found[kind]), place) for kind in kinds]
    elif kinds:
        what = "; ".join(f"{sentence(len(found[kind]), table[kind][0])}: {shortened(found[kind])}" for kind in kinds)
        raise UserError(what, place, "; ".join(dict.fromkeys(table[kind][1] for kind in kinds)))


def raise_all(problems: Sequence[UserError]) -> None:
    """One error for many: all of one kind are named together."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        listed = shortened((f"{p.where} ({p.what})" for p in problems), 8)
        fixes = list(dict.fromkeys(p.fix for p in problems))
        raise UserError(sentence(len(problems), "pictures cannot be used"), listed, fixes[0])
