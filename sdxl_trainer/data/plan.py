"""Which samples each optimizer step trains on: a pure function of (seed, batch size, data, step)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from sdxl_trainer import keyed


@dataclass(frozen=True)
class Stream:
    """The pictures of one data set (integers [n]), each `repeats[i]` times a pass, of which every epoch takes the next
    `count`: so all are seen equally often, whatever share of a pass an epoch is."""

    pictures: np.ndarray
    repeats: np.ndarray
    count: int
    paired: bool = False  # spread evenly among the samples of the other streams, so that each batch has its share

    @property
    def length(self) -> int:
        """Entries of one pass."""
        return int(self.repeats.sum())


@dataclass(frozen=True)
class Order:
    """The samples of one epoch in the order in which they are trained, and where its batches begin and end."""

    samples: np.ndarray
    bounds: np.ndarray

    def batch(self, number: int) -> tuple[int, ...]:
        return tuple(self.samples[self.bounds[number, 0] : self.bounds[number, 1]].tolist())


@dataclass(frozen=True)
class Plan:
    """A sample is a picture at one of its turns in an epoch: number = picture + turn * pictures, so that each turn
    has draws of its own. `group_of[picture]` tells which pictures may share a micro-batch (one target size each).

    An epoch shuffles each group and cuts it into batches of `batch_size` images of a step over all processes. What
    is left over of all groups fills steps of several micro-batches: only an epoch's last batch can be smaller.
    """

    seed: int
    batch_size: int
    group_of: np.ndarray  # integers [pictures]
    streams: tuple[Stream, ...]
    _epochs: dict[int, Order] = field(default_factory=dict, compare=False, repr=False)

    @property
    def samples_per_epoch(self) -> int:
        return sum(stream.count for stream in self.streams)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.samples_per_epoch // self.batch_size)

    def epochs(self, steps: int) -> str:
        """How many so many steps are, in words: `1 epoch`, `1.33 epochs`."""
        count = f"{steps / self.steps_per_epoch:.3g}"
        return f"{count} epoch{'s' * (count != '1')}"

    def step(self, step: int) -> tuple[int, tuple[int, ...]]:
        """Epoch and samples of the optimizer step with this number (from 0). Samples of one group lie together."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch not in self._epochs:
            self._epochs.clear()  # of the orders of all epochs only one is in use
            self._epochs[epoch] = _epoch(self, epoch)
        return epoch, self._epochs[epoch].batch(position)

    def group(self, sample: int) -> int:
        return int(self.group_of[sample % len(self.group_of)])


def make(
    seed: int, batch_size: int, group_of: Sequence[int] | np.ndarray, streams: Sequence[Stream] | None = None
) -> Plan:
    """The plan of pictures 0..n-1; without `streams` each is seen once an epoch."""
    groups = np.asarray(group_of)
    whole = Stream(np.arange(len(groups)), np.ones(len(groups), dtype=np.int64), len(groups))
    return Plan(seed, batch_size, groups, tuple(streams) if streams else (whole,))


def least(pictures: int, turns: int) -> type[np.signedinteger]:
    """The smallest integers that hold the numbers of all samples: of many millions each byte counts."""
    return np.int32 if pictures * turns < 1 << 31 else np.int64


def _epoch(plan: Plan, epoch: int) -> Order:
    # Groups in the order in which the pictures begin them.
    kinds, first = np.unique(plan.group_of, return_index=True)
    chosen = [_chosen(plan, number, epoch) for number in range(len(plan.streams))]
    samples = chosen[0] if len(chosen) == 1 else np.concatenate(chosen)
    paired = np.repeat([stream.paired for stream in plan.streams], [len(part) for part in chosen])
    del chosen  # of many millions of samples each array counts
    groups = plan.group_of[samples % len(plan.group_of)]
    full: list[np.ndarray] = []
    left: list[np.ndarray] = []
    for number, kind in enumerate(kinds[np.argsort(first)]):
        shuffled = np.flatnonzero(groups == kind).astype(samples.dtype)
        keyed.generator(plan.seed, "order", epoch, number + 1).shuffle(shuffled)
        laid = _interleaved(samples[shuffled], paired[shuffled])
        whole = len(laid) // plan.batch_size * plan.batch_size
        full.append(laid[:whole])
        left.append(laid[whole:])
        del shuffled, laid
    del samples, groups, paired
    order = keyed.generator(plan.seed, "leftovers", epoch).permutation(len(left))
    laid = np.concatenate([*full, *(left[i] for i in order)])
    starts = np.arange(0, len(laid), plan.batch_size)
    bounds = np.stack([starts, np.minimum(starts + plan.batch_size, len(laid))], axis=1)
    return Order(laid, bounds[keyed.generator(plan.seed, "order", epoch, 0).permutation(len(bounds))])


def _interleaved(samples: np.ndarray, paired: np.ndarray) -> np.ndarray:
    """Those that are paired spread evenly among the others; both in the order that they have."""
    if not paired.any():
        return samples
    places = np.empty(len(samples))
    for kind in (paired, ~paired):
        places[kind] = (2 * np.arange(kind.sum()) + 1) / max(kind.sum(), 1)
    return samples[np.lexsort((samples, paired, places))]


def _chosen(plan: Plan, number: int, epoch: int) -> np.ndarray:
    """The samples of one stream in an epoch, in the order of the pictures where that is whole passes."""
    stream, pictures = plan.streams[number], len(plan.group_of)
    first, last, length = epoch * stream.count, (epoch + 1) * stream.count, stream.length
    most = (stream.count // max(length, 1) + 2) * int(stream.repeats.max(initial=0))
    own = stream.pictures.astype(least(pictures, most), copy=False)
    turns = np.zeros_like(own)
    once = bool((stream.repeats == 1).all())
    found = []
    for run in range(first // length, -(-last // length)) if length else ():
        start, stop = max(first - run * length, 0), min(last - run * length, length)
        if once and (start, stop) == (0, length):
            found.append(own + turns * pictures)
            turns += 1
            continue
        entries = np.arange(length)
        if (start, stop) != (0, length):
            order = keyed.generator(plan.seed, "pass", run, number).permutation(length)
            entries = np.sort(order[start:stop])
        index = np.searchsorted(np.cumsum(stream.repeats), entries, side="right")  # whose entries; ascending
        before = np.searchsorted(index, index)  # where the entries of the same picture begin
        nth = turns[index] + (np.arange(len(index)) - before).astype(own.dtype)
        found.append(own[index] + nth * pictures)
        turns += np.bincount(index, minlength=len(turns)).astype(own.dtype)
    return found[0] if len(found) == 1 else np.concatenate([own[:0], *found])


def share(
    plan: Plan, samples: Sequence[int], micro_batch: int, rank: int, processes: int
) -> list[list[tuple[int, bool]]]:
    """This process's micro-batches of a step, each of one group: lists of (sample, counts).

    All processes get equally many micro-batches, since they meet in every backward pass; where one has fewer, it
    gets a sample with `counts` False in addition, to be given weight 0.
    """
    parts = [_micro_batches(plan, _part(samples, r, processes), micro_batch) for r in range(processes)]
    missing = max(map(len, parts)) - len(parts[rank])
    counted = [[(sample, True) for sample in part] for part in parts[rank]]
    return counted + [[(samples[0], False)]] * missing


def _part(samples: Sequence[int], rank: int, processes: int) -> Sequence[int]:
    """Neighbours, that there be few groups in each part; sizes differ by one at most."""
    size, more = divmod(len(samples), processes)
    start = rank * size + min(rank, more)
    return samples[start : start + size + (rank < more)]


def _micro_batches(plan: Plan, samples: Sequence[int], micro_batch: int) -> list[tuple[int, ...]]:
    runs = [list(run) for _, run in groupby(samples, plan.group)]
    return [tuple(run[i : i + micro_batch]) for run in runs for i in range(0, len(run), micro_batch)]
