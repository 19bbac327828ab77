"""The plan: every sample once per epoch, the same whatever the micro-batch and the number of processes."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_trainer.data import plan

GROUPS = st.lists(st.integers(0, 3), min_size=1, max_size=60)


@given(groups=GROUPS, batch=st.integers(1, 9), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=200, deadline=None)
def test_every_epoch_has_every_sample_once(groups: list[int], batch: int, seed: int) -> None:
    made = plan.make(seed, batch, groups)
    for number in range(3):
        steps = range(number * made.steps_per_epoch, (number + 1) * made.steps_per_epoch)
        drawn = [made.step(step) for step in steps]
        assert {epoch for epoch, _ in drawn} == {number}
        assert Counter(s for _, samples in drawn for s in samples) == Counter(range(len(groups)))
        for _, samples in drawn:
            assert len({groups[sample] for sample in samples}) == 1
            assert 1 <= len(samples) <= batch


def test_any_step_can_be_asked_alone_and_in_any_order() -> None:
    groups = [0] * 10 + [1] * 7
    forward = [plan.make(3, 4, groups).step(step) for step in range(20)]
    assert [plan.make(3, 4, groups).step(step) for step in reversed(range(20))] == forward[::-1]


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    made = plan.make(0, 50, [0] * 50)
    assert made.step(0)[1] != made.step(1)[1]
    assert made.step(0)[1] != plan.make(1, 50, [0] * 50).step(0)[1]


@given(
    samples=st.lists(st.integers(0, 999), min_size=1, max_size=40, unique=True),
    micro=st.integers(1, 9),
    processes=st.integers(1, 8),
)
@settings(max_examples=300, deadline=None)
def test_shares_hold_every_sample_once_and_are_equally_long(samples: list[int], micro: int, processes: int) -> None:
    shares = [plan.share(tuple(samples), micro, rank, processes) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    assert {tuple(len(part) for part in share) for share in shares} == {tuple(len(part) for part in shares[0])}
    counted = [sample for share in shares for part in share for sample, counts in part if counts]
    assert sorted(counted) == sorted(samples)
    assert all(len(part) <= micro for share in shares for part in share)
