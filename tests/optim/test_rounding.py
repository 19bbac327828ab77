"""Stochastic rounding: right on average, exact where it can be, and what nearest rounding loses is kept."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sdxl_trainer import optim
from sdxl_trainer.config import STEP_APART, Optimizer
from sdxl_trainer.errors import UserError
from sdxl_trainer.optim import rounding, state
from sdxl_trainer.parameters import Group

MANY = 100_000
# Paged state needs a GPU, and is that of adamw8bit otherwise.
ROUNDING = [name for name, kind in optim.KINDS.items() if kind.rounds and not name.startswith("paged")]


def rounded(exact: torch.Tensor) -> torch.Tensor:
    noise = torch.randint(1 << 16, exact.shape, dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    found = exact.clone()
    rounding.stochastically([found], [noise])
    return found


@pytest.mark.parametrize("value", [1.0 + 2**-9, -1.0 - 2**-10, 3e-5, -7.123e-20, 1234.5])
def test_a_number_becomes_one_of_its_two_neighbours_with_its_own_mean(value: float) -> None:
    exact = torch.full((MANY,), value)
    found = rounded(exact)
    assert torch.equal(found, found.bfloat16().float())
    low, high = found.min().item(), found.max().item()
    assert low < exact[0] < high
    assert set(found.unique().tolist()) == {low, high}
    share = (value - low) / (high - low)
    deviation = (share * (1 - share) / MANY) ** 0.5
    assert (found == high).double().mean().item() == pytest.approx(share, abs=5 * deviation)


def test_numbers_that_bf16_holds_stay() -> None:
    exact = torch.randn(MANY).bfloat16().float()
    assert torch.equal(rounded(exact), exact)


def test_what_is_not_a_number_stays_so() -> None:
    """GPUs write it as the largest integer, which goes around to -0 if something is added to it."""
    exact = torch.tensor([0x7FFFFFFF, 0x7FC00000, -0x400000], dtype=torch.int32).view(torch.float32).repeat(100)
    assert rounded(exact).isnan().all()
    infinite = torch.tensor([float("inf"), -float("inf")]).repeat(100)
    assert torch.equal(rounded(infinite), infinite)


def make(name: str, *tensors: nn.Parameter, rate: float = 1e-3, decay: float = 0.0, **more: Any) -> Any:
    """An optimizer of tensors that are called 0, 1, ..."""
    seed, sharded = more.pop("seed", 0), more.pop("sharded", False)
    group = Group("", rate, decay, tuple(map(str, range(len(tensors)))), tensors)
    return optim.make([group], Optimizer(name=name, **more), seed, torch.device("cpu"), sharded)


def steps(optimizer: torch.optim.Optimizer, weight: nn.Parameter, gradients: list[float]) -> None:
    for gradient in gradients:
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()


@pytest.mark.parametrize("name", ["adafactor", "adamw", "adamw8bit", "adamw_bf16", "lion", "sgd"])
def test_small_steps_are_not_lost(name: str) -> None:
    """Gradients of 1 take the rate off a weight of 1: a 16th of what it is to bf16's next number."""
    weight = nn.Parameter(torch.ones(100, MANY // 100, dtype=torch.bfloat16))
    steps(make(name, weight, rate=2**-12), weight, [1.0] * 16)
    assert weight.double().mean().item() == pytest.approx(1.0 - 16 * 2**-12, abs=1e-4)
    assert set(weight.unique().tolist()) <= {1.0 - n * 2**-8 for n in range(17)}


def test_weight_decay_and_the_second_moment_are_not_lost() -> None:
    """At lr 1e-4 and weight decay 0.1 a step takes 1e-5 of a weight off: bf16's nearest number is the old one."""
    ours, nearest = (nn.Parameter(torch.ones(MANY, dtype=torch.bfloat16)) for _ in range(2))
    settings = {"lr": 1e-4, "weight_decay": 0.1, "betas": (0.0, 0.999)}
    kept = make("adamw_bf16", ours, rate=1e-4, decay=0.1, betas=(0.0, 0.999))
    lost = torch.optim.AdamW([nearest], **settings, fused=True)
    gradients = [1.0] + [0.0] * 200
    steps(kept, ours, gradients)
    steps(lost, nearest, gradients)
    expected = (1.0 - 1e-5) ** 201 - 1e-4
    assert ours.double().mean().item() == pytest.approx(expected, abs=2e-4)
    assert nearest.double().mean().item() == 1.0
    assert kept.state[ours]["exp_avg_sq"].dtype == torch.bfloat16
    assert kept.state[ours]["exp_avg_sq"].double().mean().item() == pytest.approx(1e-3 * 0.999**200, rel=1e-3)


def pair(name: str, rate: float, decay: float = 0.0) -> tuple[list[nn.Parameter], list[nn.Parameter], Any, Any]:
    """The same weights in bf16 and in fp32, and an optimizer for each that computes alike."""
    torch.manual_seed(0)
    narrow = [nn.Parameter(torch.randn(shape).bfloat16()) for shape in ((96, 64), (64,), (8, 12, 3, 3))]
    wide = [nn.Parameter(p.detach().float()) for p in narrow]
    inner = "adamw" if name == "adamw_bf16" else name
    return narrow, wide, make(name, *narrow, rate=rate, decay=decay), make(inner, *wide, rate=rate, decay=decay)


def gradients(tensors: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in tensors:
        p.grad = torch.randn(p.shape, generator=generator).bfloat16().to(p.dtype)


@pytest.mark.parametrize("name", ROUNDING)
def test_a_step_gives_a_neighbour_of_what_it_gives_in_fp32(name: str) -> None:
    narrow, wide, ours, theirs = pair(name, 1e-2, 0.1)
    gradients(narrow, 0)
    gradients(wide, 0)
    ours.step()
    theirs.step()
    for p, exact in zip(narrow, wide, strict=True):
        assert p.dtype == torch.bfloat16
        assert p.grad is not None
        assert p.grad.dtype == torch.bfloat16
        low = (exact.detach().view(torch.int32) & -(1 << 16)).view(torch.float32)
        high = ((exact.detach().view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32)
        assert ((p == low) | (p == high)).all()
        assert 0 < (p == low).sum() < p.numel() or p.numel() < 100


@pytest.mark.parametrize("name", ROUNDING)
def test_on_average_steps_are_those_on_fp32_weights(name: str) -> None:
    """Steps of a few thousandths of a weight's last bit: the mean of how far they moved along the exact way."""
    narrow, wide, ours, theirs = pair(name, 2e-5)
    begin = [p.detach().clone() for p in wide]
    for step in range(60):
        gradients(narrow, step % 2)
        gradients(wide, step % 2)
        ours.step()
        theirs.step()
    moved = torch.cat([(w - b).detach().flatten() for w, b in zip(wide, begin, strict=True)]).double()
    off = torch.cat([(p.float() - w).detach().flatten() for p, w in zip(narrow, wide, strict=True)]).double()
    way = moved.sign()
    error = off.std().item() / off.numel() ** 0.5
    assert (moved * way).mean().item() > 10 * error
    assert abs((off * way).mean().item()) < 4 * error


@pytest.mark.parametrize("name", ROUNDING)
def test_the_bits_are_a_function_of_seed_tensor_and_step(name: str) -> None:
    def run(seed: int, count: int) -> list[torch.Tensor]:
        weights = [nn.Parameter(torch.linspace(-1, 1, 1000).bfloat16()) for _ in range(2)]
        optimizer = make(name, *weights, seed=seed)
        for _ in range(count):
            for weight in weights:
                weight.grad = torch.full_like(weight, 0.1)
            optimizer.step()
        return [weight.detach() for weight in weights]

    one, other = run(1, 3)
    assert torch.equal(one, run(1, 3)[0])
    assert not torch.equal(one, run(2, 3)[0])
    assert not torch.equal(one, other)


@pytest.mark.parametrize("name", STEP_APART)
def test_which_tensors_step_together_changes_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for together in (1 << 25, 100):
        monkeypatch.setattr(rounding, "TOGETHER", together)
        narrow, _, ours, _ = pair(name, 1e-3, 0.1)
        for step in range(3):
            gradients(narrow, step)
            ours.step()
        found.append([*narrow, *(ours.state[p][key] for p in narrow for key in sorted(ours.state[p]))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_state_of_moments_in_bf16_that_were_not_rounded_is_refused(tmp_path: Path) -> None:
    """Older versions wrote it; the first step would end in an error of PyTorch's."""
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    group, path = Group("", 1e-3, 0.0, ("0",), (weight,)), tmp_path / "optimizer.safetensors"
    older = torch.optim.AdamW([weight], fused=True)
    steps(older, weight, [1.0])
    save_file(state.tensors(older, [group]), path)
    with pytest.raises(UserError, match="rounded bf16 weights otherwise"):
        state.load(make("adamw", weight), [group], path, {})


@pytest.mark.parametrize("name", ["adamw", "adamw_bf16", "sgd"])
def test_kernels_that_look_at_found_inf_leave_everything_as_it_is(name: str) -> None:
    narrow, _, ours, _ = pair(name, 1e-1)
    gradients(narrow, 0)
    ours.step()
    kept = [p.detach().clone() for p in narrow]
    state = [v.clone() for p in narrow for v in ours.state[p].values() if isinstance(v, torch.Tensor)]
    for p in narrow:
        p.grad = torch.full_like(p, float("nan"))
    ours.found_inf = torch.ones(())
    ours.step()
    after = [v for p in narrow for v in ours.state[p].values() if isinstance(v, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in itertools.chain(zip(narrow, kept), zip(after, state)))  # noqa: B905


def test_tensors_of_other_types_are_stepped_on_as_ever() -> None:
    wide = nn.Parameter(torch.ones(10))
    both = make("sgd", nn.Parameter(torch.ones(10, dtype=torch.bfloat16)), wide, rate=2**-12)
    wide.grad = torch.ones_like(wide)
    both.step()
    assert wide[0].item() == 1.0 - 2**-12


@pytest.fixture
def second_of_two() -> Iterator[Any]:
    """The mesh of a process that thinks that there is another."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", [name for name in ROUNDING if optim.KINDS[name].sharded])
def test_a_shard_takes_its_part_of_the_whole_tensor_s_bits(name: str, second_of_two: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    def sharded(tensor: torch.Tensor) -> Any:
        return distribute_tensor(tensor.detach().clone(), second_of_two, [Shard(0)], src_data_rank=None)

    whole, _, ours, _ = pair(name, 1e-2, 0.1)
    parts = [nn.Parameter(sharded(p)) for p in whole]
    theirs = make(name, *parts, rate=1e-2, decay=0.1, sharded=True)
    for step in range(3):
        gradients(whole, step)
        for p, part in zip(whole, parts, strict=True):
            assert p.grad is not None
            part.grad = sharded(p.grad)
        ours.step()
        theirs.step()
    for p, part in zip(whole, parts, strict=True):
        assert torch.equal(part.to_local(), p.detach().chunk(2)[1])
