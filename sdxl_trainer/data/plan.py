"""Which samples each optimizer step trains on: a pure function of (seed, batch size, data, step)."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from sdxl_trainer import keyed


@dataclass(frozen=True)
class Plan:
    """`groups` are the samples that may share a batch (one target size each), by index. In an epoch each sample
    is trained on once: every group is shuffled and cut into batches, a group's last batch may be smaller, and the
    batches of all groups are shuffled. `batch_size` counts the images of a step over all processes.
    """

    seed: int
    batch_size: int
    groups: tuple[tuple[int, ...], ...]
    _epochs: dict[int, list[tuple[int, ...]]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def steps_per_epoch(self) -> int:
        return sum(-(-len(group) // self.batch_size) for group in self.groups)

    def step(self, step: int) -> tuple[int, tuple[int, ...]]:
        """Epoch and samples of the optimizer step with this number (from 0)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch not in self._epochs:
            self._epochs.clear()  # of the orders of all epochs only one is in use
            self._epochs[epoch] = _epoch(self, epoch)
        return epoch, self._epochs[epoch][position]


def make(seed: int, batch_size: int, group_of: Sequence[Hashable]) -> Plan:
    """The plan of samples 0..n-1, where `group_of[i]` tells which samples may share a batch."""
    groups: dict[Hashable, list[int]] = {}
    for sample, group in enumerate(group_of):
        groups.setdefault(group, []).append(sample)
    return Plan(seed, batch_size, tuple(tuple(group) for group in groups.values()))


def _epoch(plan: Plan, epoch: int) -> list[tuple[int, ...]]:
    batches: list[tuple[int, ...]] = []
    for number, group in enumerate(plan.groups):
        order = keyed.generator(plan.seed, "order", epoch, number + 1).permutation(len(group))
        shuffled = [group[i] for i in order]
        batches += [tuple(shuffled[i : i + plan.batch_size]) for i in range(0, len(shuffled), plan.batch_size)]
    order = keyed.generator(plan.seed, "order", epoch, 0).permutation(len(batches))
    return [batches[i] for i in order]


def share(samples: tuple[int, ...], micro_batch: int, rank: int, processes: int) -> list[list[tuple[int, bool]]]:
    """This process's micro-batches of a step: lists of (sample, counts).

    All processes get equally many micro-batches, since they meet in every backward pass; where samples run out,
    one is repeated with `counts` False, to be given weight 0.
    """
    mine = samples[rank::processes]
    longest = len(samples[0::processes])
    padded = [(sample, True) for sample in mine] + [(samples[0], False)] * (longest - len(mine))
    return [padded[i : i + micro_batch] for i in range(0, longest, micro_batch)]
