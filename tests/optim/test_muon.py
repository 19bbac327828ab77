"""Muon against the one in PyTorch, AdamW for the rest bit by bit, and the mathematics of its iteration."""

import pytest
import torch
from torch import nn

from sdxl_trainer import optim, parameters
from sdxl_trainer.config import Learn, Optimizer, Train
from sdxl_trainer.optim.muon import Muon, orthogonalised

TRAIN = Train(steps=1, learning_rate=1e-2)


def network() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Module()
    module.conv_in = nn.Conv2d(2, 3, 3)
    module.hidden = nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 6), nn.Conv2d(3, 5, 3)])
    module.norm = nn.LayerNorm(4)
    return module


def gradients(module: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def made(module: nn.Module, options: Optimizer) -> torch.optim.Optimizer:
    return optim.make(parameters.apply_rules(module, (Learn(match=".*"),), TRAIN, options), options)


def test_matrices_move_as_by_pytorch_s_muon_and_the_rest_as_by_its_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # theirs iterates in bf16, ours in fp32 on CPUs
    ours, theirs = network(), network()
    mine = made(ours, Optimizer(name="muon", weight_decay=0.3))
    names = dict(theirs.named_parameters())
    convolution = nn.Parameter(names["hidden.3.weight"].detach().flatten(1).clone())
    matrices = [names[f"hidden.{n}.weight"] for n in range(3)] + [convolution]
    rest = [p for name, p in names.items() if p.ndim == 1 or name == "conv_in.weight"]
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.3, fused=True)
    for step in range(5):
        gradients(ours, step)
        gradients(theirs, step)
        convolution.grad = names["hidden.3.weight"].grad.flatten(1)
        for optimizer in (mine, muon, adamw):
            optimizer.step()
    found = dict(ours.named_parameters())
    for name, p in found.items():
        if p.ndim == 1 or name == "conv_in.weight":
            assert torch.equal(p, names[name]), name
        elif name != "hidden.3.weight":
            torch.testing.assert_close(p, names[name], rtol=0, atol=1e-5)
    torch.testing.assert_close(found["hidden.3.weight"].flatten(1), convolution, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 4), (3, 9), (9, 3)])
def test_the_iteration_keeps_singular_vectors_and_evens_out_singular_values(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(5, *shape) * torch.logspace(-3, 3, 5).view(5, 1, 1)
    found = orthogonalised(matrices, 5)
    for before, after in zip(matrices, found, strict=True):
        left, _, right = torch.linalg.svd(before, full_matrices=False)
        inside = left.T @ after @ right.T
        assert (inside.diagonal() > 0.5).all()
        assert (inside.diagonal() < 1.3).all()
        assert (inside - torch.diag(inside.diagonal())).abs().max() < 1e-4


def test_a_matrix_moves_alike_alone_and_beside_others_of_its_shape() -> None:
    together = [nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(4, 6))]
    alone = nn.Parameter(torch.ones(4, 6))
    torch.manual_seed(1)
    together[0].grad, together[1].grad = torch.randn(4, 6), torch.randn(4, 6)
    alone.grad = together[0].grad.clone()
    Muon([{"params": together, "names": ("a", "b")}]).step()
    Muon([{"params": [alone], "names": ("a",)}]).step()
    torch.testing.assert_close(together[0], alone, rtol=0, atol=1e-7)
