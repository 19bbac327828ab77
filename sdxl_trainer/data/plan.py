"""Which samples each optimizer step trains on: a pure function of (seed, batch size, data, step)."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from sdxl_trainer import keyed


@dataclass(frozen=True)
class Stream:
    """The pictures of one data set, each `repeats[i]` times a pass, of which every epoch takes the next `count`:
    so all are seen equally often, whatever share of a pass an epoch is."""

    pictures: tuple[int, ...]
    repeats: tuple[int, ...]
    count: int
    paired: bool = False  # spread evenly among the samples of the other streams, so that each batch has its share

    @property
    def length(self) -> int:
        """Entries of one pass."""
        return sum(self.repeats)


@dataclass(frozen=True)
class Plan:
    """A sample is a picture at one of its turns in an epoch: number = picture + turn * pictures, so that each turn
    has draws of its own. `group_of[picture]` tells which pictures may share a micro-batch (one target size each).

    An epoch shuffles each group and cuts it into batches of `batch_size` images of a step over all processes. What
    is left over of all groups fills steps of several micro-batches: only an epoch's last batch can be smaller.
    """

    seed: int
    batch_size: int
    group_of: tuple[Hashable, ...]
    streams: tuple[Stream, ...]
    _epochs: dict[int, list[tuple[int, ...]]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def samples_per_epoch(self) -> int:
        return sum(stream.count for stream in self.streams)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.samples_per_epoch // self.batch_size)

    def step(self, step: int) -> tuple[int, tuple[int, ...]]:
        """Epoch and samples of the optimizer step with this number (from 0). Samples of one group lie together."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch not in self._epochs:
            self._epochs.clear()  # of the orders of all epochs only one is in use
            self._epochs[epoch] = _epoch(self, epoch)
        return epoch, self._epochs[epoch][position]

    def group(self, sample: int) -> Hashable:
        return self.group_of[sample % len(self.group_of)]


def make(seed: int, batch_size: int, group_of: Sequence[Hashable], streams: Sequence[Stream] | None = None) -> Plan:
    """The plan of pictures 0..n-1; without `streams` each is seen once an epoch."""
    whole = Stream(tuple(range(len(group_of))), (1,) * len(group_of), len(group_of))
    return Plan(seed, batch_size, tuple(group_of), tuple(streams) if streams else (whole,))


def _epoch(plan: Plan, epoch: int) -> list[tuple[int, ...]]:
    groups: dict[Hashable, list[int]] = {group: [] for group in plan.group_of}
    paired: set[int] = set()
    for number, stream in enumerate(plan.streams):
        for sample in _chosen(plan, number, epoch):
            groups[plan.group(sample)].append(sample)
            if stream.paired:
                paired.add(sample)
    batches: list[tuple[int, ...]] = []
    left: list[list[int]] = []
    for number, group in enumerate(groups.values()):
        order = keyed.generator(plan.seed, "order", epoch, number + 1).permutation(len(group))
        shuffled = _interleaved([group[i] for i in order], paired)
        full = len(group) // plan.batch_size * plan.batch_size
        batches += _cut(shuffled[:full], plan.batch_size)
        left.append(shuffled[full:])
    order = keyed.generator(plan.seed, "leftovers", epoch).permutation(len(left))
    batches += _cut([sample for i in order for sample in left[i]], plan.batch_size)
    order = keyed.generator(plan.seed, "order", epoch, 0).permutation(len(batches))
    return [batches[i] for i in order]


def _interleaved(samples: list[int], paired: set[int]) -> list[int]:
    """Those that are paired spread evenly among the others; both in the order that they have."""
    kinds = [[s for s in samples if s not in paired], [s for s in samples if s in paired]]
    places = [((2 * i + 1) / len(kind), number, s) for number, kind in enumerate(kinds) for i, s in enumerate(kind)]
    return [sample for _, _, sample in sorted(places)]


def _chosen(plan: Plan, number: int, epoch: int) -> Iterator[int]:
    """The samples of one stream in an epoch, in the order of the pictures where that is whole passes."""
    stream, pictures = plan.streams[number], len(plan.group_of)
    first, last = epoch * stream.count, (epoch + 1) * stream.count
    turns = [0] * len(stream.pictures)
    entries = [index for index, repeats in enumerate(stream.repeats) for _ in range(repeats)]
    for run in range(first // stream.length, -(-last // stream.length)):
        start, stop = max(first - run * stream.length, 0), min(last - run * stream.length, stream.length)
        taken: Sequence[int] = entries
        if (start, stop) != (0, stream.length):
            order = keyed.generator(plan.seed, "pass", run, number).permutation(stream.length)
            taken = [entries[i] for i in sorted(order[start:stop])]
        for index in taken:
            yield stream.pictures[index] + turns[index] * pictures
            turns[index] += 1


def _cut(samples: list[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(samples[i : i + size]) for i in range(0, len(samples), size)]


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
    return [part for run in runs for part in _cut(run, micro_batch)]
