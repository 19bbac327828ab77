"""AdamW of one kernel, and clipping that happens inside of it, against PyTorch's own."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from sdxl_trainer import optim
from sdxl_trainer.optim import backward
from sdxl_trainer.optim.fused import AdamW

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95)}


def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    return made, copy.deepcopy(made)


def differentiate(network: nn.Module, seed: int) -> None:
    given = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
    network.zero_grad()
    (network(given).square().sum() * 10**seed).backward()


def test_it_steps_as_pytorch_s_does_bit_by_bit() -> None:
    ours, theirs = networks()
    mine = AdamW(ours.parameters(), fused=True, **SETTINGS)
    other = torch.optim.AdamW(theirs.parameters(), fused=True, **SETTINGS)
    for seed in range(3):
        for network, optimizer in ((ours, mine), (theirs, other)):
            differentiate(network, seed)
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
        assert all(torch.equal(mine.state[a][key], other.state[b][key]) for key in ("exp_avg", "exp_avg_sq", "step"))


@pytest.mark.parametrize("kind", ["adamw", "sgd", "plain"])
@pytest.mark.parametrize("limit", [0.5, 1e9, None])
def test_clipping_is_that_of_pytorch(kind: str, limit: float | None) -> None:
    """In the optimizer's kernel (adamw, sgd) or before it: the norm and the weights after some steps."""
    makers = {
        "adamw": lambda p: AdamW(p, fused=True, **SETTINGS),
        "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, fused=True),
        "plain": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    }
    ours, theirs = networks()
    mine, other = makers[kind](ours.parameters()), makers[kind](theirs.parameters())
    for seed in range(3):
        differentiate(ours, seed)
        differentiate(theirs, seed)
        norm = optim.clip(mine, list(ours.parameters()), limit)
        wanted = nn.utils.clip_grad_norm_(theirs.parameters(), limit or float("inf"))
        torch.testing.assert_close(norm, wanted, rtol=1e-5, atol=0)
        mine.step()
        other.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_exact_whatever_the_gradients_type(dtype: torch.dtype) -> None:
    parameters = [nn.Parameter(torch.zeros(n, dtype=dtype)) for n in (1000, 10, 3000)]
    gradients = [torch.randn_like(p) for p in parameters]

    def passes() -> torch.Tensor:
        loss = torch.stack([(p * g).sum() for p, g in zip(parameters, gradients, strict=True)]).sum()
        loss.backward()
        return loss

    _, measured = backward.norm(parameters, passes)
    passes()
    norm = optim.clip(torch.optim.SGD(parameters), parameters, None)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(torch.cat(gradients).double().norm().item(), rel=1e-5)
    assert torch.equal(measured, norm)


def test_a_step_that_is_not_finite_leaves_everything_as_it_is() -> None:
    network, _ = networks()
    optimizer = AdamW(network.parameters(), fused=True, **SETTINGS)
    differentiate(network, 0)
    optimizer.step()
    before = copy.deepcopy((network.state_dict(), optimizer.state_dict()["state"]))
    differentiate(network, 1)
    next(network.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]
    norm = optim.clip(optimizer, list(network.parameters()), 1.0)
    assert not torch.isfinite(norm)
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    torch.testing.assert_close((network.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)


def test_a_step_does_not_import_the_compiler() -> None:
    code = (
        "import sys, torch; from sdxl_trainer.optim.fused import AdamW; p = torch.nn.Parameter(torch.ones(3));"
        "o = AdamW([p], fused=True); p.sum().backward(); o.step(); o.zero_grad(); o.load_state_dict(o.state_dict());"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
