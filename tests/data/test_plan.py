"""The plan: every picture as often as asked, the same whatever the micro-batch and the number of processes."""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_trainer import keyed
from sdxl_trainer.data import plan
from sdxl_trainer.data.plan import Plan, Stream

GROUPS = st.lists(st.integers(0, 3), min_size=1, max_size=60)


def stream(pictures: Sequence[int], repeats: Sequence[int], count: int) -> Stream:
    return Stream(np.array(pictures), np.array(repeats), count)


def epoch(made: Plan, number: int) -> list[tuple[int, ...]]:
    steps = range(number * made.steps_per_epoch, (number + 1) * made.steps_per_epoch)
    drawn = [made.step(step) for step in steps]
    assert {epoch for epoch, _ in drawn} == {number}
    return [samples for _, samples in drawn]


@given(groups=GROUPS, batch=st.integers(1, 9), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=200, deadline=None)
def test_every_epoch_has_every_sample_once_in_full_batches(groups: list[int], batch: int, seed: int) -> None:
    made = plan.make(seed, batch, groups)
    for number in range(3):
        steps = epoch(made, number)
        assert Counter(s for samples in steps for s in samples) == Counter(range(len(groups)))
        smaller = [samples for samples in steps if len(samples) < batch]
        assert len(smaller) == (len(groups) % batch > 0), "whatever the buckets, one batch at most is not full"
        for samples in steps:
            kinds = [groups[sample] for sample in samples]
            assert len(list(groupby(kinds))) == len(set(kinds)), "samples of one group lie together"


@given(
    sets=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=9), min_size=1, max_size=3),
    passes=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    batch=st.integers(1, 5),
    processes=st.sampled_from([1, 2, 3, 7]),
    micro=st.integers(1, 5),
)
@settings(max_examples=200, deadline=None)
def test_repeats_are_exact_on_any_number_of_processes(
    sets: list[list[int]], passes: list[int], batch: int, processes: int, micro: int
) -> None:
    """Each picture exactly repeats times an epoch, every time as a sample of its own."""
    streams, first = [], 0
    for repeats, times in zip(sets, passes, strict=False):
        pictures = range(first, first + len(repeats))
        streams.append(stream(pictures, repeats, times * sum(repeats)))
        first += len(repeats)
    made = plan.make(0, batch, [picture % 3 for picture in range(first)], streams)
    wanted = Counter({p: n * s.count // s.length for s in streams for p, n in zip(s.pictures, s.repeats, strict=True)})
    for number in range(2):
        trained = [
            sample
            for samples in epoch(made, number)
            for rank in range(processes)
            for part in plan.share(made, samples, micro, rank, processes)
            for sample, counts in part
            if counts
        ]
        assert Counter(sample % first for sample in trained) == wanted
        assert len(trained) == len(set(trained)) == made.samples_per_epoch


@pytest.mark.parametrize("count", [1, 3, 7, 10, 13, 25])
def test_part_of_a_pass_goes_on_in_the_next_epoch(count: int) -> None:
    """10 pictures, any number of samples an epoch: after any number of epochs all were seen equally often, but one."""
    made = plan.make(5, 4, [0] * 6 + [1] * 4, [stream(range(10), [1] * 10, count)])
    seen: Counter[int] = Counter(dict.fromkeys(range(10), 0))
    for number in range(12):
        samples = [s for batch in epoch(made, number) for s in batch]
        assert len(samples) == len(set(samples)) == count
        seen.update(sample % 10 for sample in samples)
        assert max(seen.values()) - min(seen.values()) <= 1


def test_any_step_can_be_asked_alone_and_in_any_order() -> None:
    groups = [0] * 10 + [1] * 7
    for streams in (None, [stream(range(17), [2] * 17, 23)]):
        forward = [plan.make(3, 4, groups, streams).step(step) for step in range(20)]
        assert [plan.make(3, 4, groups, streams).step(step) for step in reversed(range(20))] == forward[::-1]


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    made = plan.make(0, 50, [0] * 50)
    assert made.step(0)[1] != made.step(1)[1]
    assert made.step(0)[1] != plan.make(1, 50, [0] * 50).step(0)[1]


def test_leftovers_of_buckets_meet_others_in_each_epoch() -> None:
    """Five groups of five, batches of four: the five that are left over are not always together in the same way."""
    made = plan.make(0, 4, [picture // 5 for picture in range(25)])
    mixed = {
        frozenset(made.group(s) for s in samples)
        for number in range(20)
        for samples in epoch(made, number)
        if len({made.group(s) for s in samples}) > 1
    }
    assert len(mixed) > 3


@given(
    samples=st.lists(st.integers(0, 999), min_size=1, max_size=40, unique=True),
    micro=st.integers(1, 9),
    processes=st.integers(1, 8),
)
@settings(max_examples=300, deadline=None)
def test_shares_hold_every_sample_once_and_are_equally_long(samples: list[int], micro: int, processes: int) -> None:
    made = plan.make(0, 40, [picture // 250 for picture in range(1000)])
    samples = sorted(samples)
    shares = [plan.share(made, samples, micro, rank, processes) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    counted = [sample for share in shares for part in share for sample, counts in part if counts]
    assert sorted(counted) == samples
    for share in shares:
        assert all(1 <= len(part) <= micro for part in share)
        assert all(len({made.group(sample) for sample, _ in part}) == 1 for part in share), "latents of one size"
    sizes = [sum(counts for part in share for _, counts in part) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def simple_epoch(made: Plan, epoch: int) -> list[tuple[int, ...]]:
    """The batches of an epoch, written plainly: lists of single samples in place of arrays."""
    pictures, samples, paired = len(made.group_of), list[int](), list[bool]()
    for number, stream in enumerate(made.streams):
        entries = [p for p, times in zip(stream.pictures, stream.repeats, strict=True) for _ in range(times)]
        turns: Counter[int] = Counter()
        for run in range(epoch * stream.count // len(entries), -(-(epoch + 1) * stream.count // len(entries))):
            start = max(epoch * stream.count - run * len(entries), 0)
            stop = min((epoch + 1) * stream.count - run * len(entries), len(entries))
            chosen: Sequence[int] = range(len(entries))
            if stop - start < len(entries):
                chosen = sorted(keyed.generator(made.seed, "pass", run, number).permutation(len(entries))[start:stop])
            for entry in chosen:
                samples.append(int(entries[entry]) + turns[entries[entry]] * pictures)
                paired.append(stream.paired)
                turns[entries[entry]] += 1
    full, left = list[int](), list[list[int]]()
    for number, kind in enumerate(dict.fromkeys(made.group_of.tolist())):
        of = [i for i, sample in enumerate(samples) if made.group(sample) == kind]
        order = keyed.generator(made.seed, "order", epoch, number + 1).permutation(len(of))
        mixed = [of[i] for i in order]
        parts = [[samples[i] for i in mixed if paired[i] == which] for which in (False, True)]
        if all(parts):
            places = [((2 * i + 1) / len(part), which, i) for which, part in enumerate(parts) for i in range(len(part))]
            parts = [[parts[which][i] for _, which, i in sorted(places)]]
        laid = [sample for part in parts for sample in part]
        whole = len(laid) // made.batch_size * made.batch_size
        full += laid[:whole]
        left.append(laid[whole:])
    full += [s for i in keyed.generator(made.seed, "leftovers", epoch).permutation(len(left)) for s in left[i]]
    batches = [tuple(full[i : i + made.batch_size]) for i in range(0, len(full), made.batch_size)]
    return [batches[i] for i in keyed.generator(made.seed, "order", epoch, 0).permutation(len(batches))]


@given(
    groups=st.lists(st.integers(0, 2), min_size=2, max_size=40),
    share=st.floats(0.1, 3.0),
    repeats=st.sampled_from([(1, 1), (2, 1), (1, 3)]),
    batch=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=100, deadline=None)
def test_the_order_is_that_of_a_plain_program(
    groups: list[int], share: float, repeats: tuple[int, int], batch: int, seed: int
) -> None:
    half = len(groups) // 2
    first = stream(range(half), [repeats[0]] * half, max(1, round(share * half)))
    rest = len(groups) - half
    second = Stream(np.arange(half, len(groups)), np.full(rest, repeats[1]), rest * repeats[1], paired=seed % 2 == 1)
    made = plan.make(seed, batch, groups, [first, second])
    for number in range(3):
        assert epoch(made, number) == simple_epoch(made, number)
