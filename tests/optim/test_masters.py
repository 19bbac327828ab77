"""Exact weights beside bf16 ones: the steps are those of fp32 weights, bit by bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdxl_trainer import optim
from sdxl_trainer import train as module
from sdxl_trainer.config import Config, Optimizer
from sdxl_trainer.errors import UserError
from sdxl_trainer.log import read_metrics
from sdxl_trainer.optim import rounding, state
from sdxl_trainer.optim.masters import MASTER
from sdxl_trainer.parameters import Group

ABLE = ["adafactor", "adamw", "adamw8bit", "came", "lion", "muon", "sgd"]
SHAPES = ((64, 8, 3, 3), (64,), (128, 64), (), (4, 4097))


def weights(dtype: torch.dtype) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw).bfloat16().to(dtype)) for shape in SHAPES]


def make(name: str, tensors: list[nn.Parameter], master: bool) -> tuple[Any, list[Group]]:
    names = tuple(map(str, range(len(tensors))))
    groups = [Group("", 1e-3, 0.1, names[:2], tuple(tensors[:2])), Group("", 1e-4, 0.0, names[2:], tuple(tensors[2:]))]
    return optim.make(groups, Optimizer(name=name, master=master), 0, torch.device("cpu")), groups


def stepped(optimizer: Any, tensors: list[nn.Parameter], seeds: range, limit: float = 1.0) -> None:
    for seed in seeds:
        draw = torch.Generator().manual_seed(seed)
        for tensor in tensors:
            tensor.grad = torch.randn(tensor.shape, generator=draw).bfloat16().to(tensor.dtype)
        optim.clip(optimizer, tensors, limit)
        optimizer.step()


def masters(optimizer: Any, tensors: list[nn.Parameter]) -> list[Tensor]:
    return [optimizer.state[tensor][MASTER] for tensor in tensors]


@pytest.mark.parametrize("name", ABLE)
def test_steps_are_those_of_fp32_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "TOGETHER", 10_000)
    narrow, exact = weights(torch.bfloat16), weights(torch.float32)
    optimizer, reference = make(name, narrow, True)[0], make(name, exact, False)[0]
    for seed in range(6):
        for own, tensors in ((optimizer, narrow), (reference, exact)):
            stepped(own, tensors, range(seed, seed + 1), limit=1e9)  # gradients of both are the same bits
    for tensor, master, other in zip(narrow, masters(optimizer, narrow), exact, strict=True):
        assert torch.equal(master, other)
        assert torch.equal(tensor, other.bfloat16())
        assert tensor.grad is not None
        assert tensor.grad.dtype == torch.bfloat16


def test_clipping_takes_part_in_the_kernel() -> None:
    narrow, exact = weights(torch.bfloat16), weights(torch.float32)
    optimizer, reference = make("adamw", narrow, True)[0], make("adamw", exact, False)[0]
    stepped(optimizer, narrow, range(3), limit=0.5)
    stepped(reference, exact, range(3), limit=0.5)
    for master, other in zip(masters(optimizer, narrow), exact, strict=True):
        torch.testing.assert_close(master, other)


def test_a_step_that_is_not_finite_touches_nothing() -> None:
    narrow = weights(torch.bfloat16)
    optimizer, _ = make("adamw", narrow, True)
    stepped(optimizer, narrow, range(1))
    before = [t.detach().clone() for t in (*narrow, *masters(optimizer, narrow))]
    optimizer.found_inf = torch.tensor(1.0)
    stepped(optimizer, narrow, range(1, 2))
    for one, other in zip(before, (*narrow, *masters(optimizer, narrow)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "adamw8bit"])
def test_they_go_on_from_what_was_written(name: str, tmp_path: Path) -> None:
    narrow, again = weights(torch.bfloat16), weights(torch.bfloat16)
    optimizer, groups = make(name, narrow, True)
    stepped(optimizer, narrow, range(3))
    save_file(state.tensors(optimizer, groups), tmp_path / "state.safetensors")
    other, members = make(name, again, True)
    for one, tensor in zip(again, narrow, strict=True):
        one.data.copy_(tensor)
    state.load(other, members, tmp_path / "state.safetensors", state.scalars(optimizer, groups))
    for own, tensors in ((optimizer, narrow), (other, again)):
        stepped(own, tensors, range(3, 6))
    for one, tensor in zip(masters(optimizer, narrow), masters(other, again), strict=True):
        assert torch.equal(one, tensor)


def test_a_run_resumes_bit_by_bit_and_what_it_takes_is_counted(config: Callable[..., Config], tmp_path: Path) -> None:
    def made(folder: str, steps: int) -> Config:
        train = {"steps": steps, "weights": "bf16", "checkpoint_every": 2}
        own = {"output_dir": str(tmp_path / folder), "cache": {"path": str(tmp_path / "cache")}}
        return config(train=train, optimizer={"name": "adamw", "master": True}, ema={"enabled": True}, **own)

    whole = module.train(made("whole", 4))
    module.train(made("parts", 2))
    parts = module.train(made("parts", 4))
    losses = [[row["loss"] for row in read_metrics(folder / "metrics.jsonl")] for folder in (whole, parts)]
    assert losses[0] == losses[1]
    for name in ("unet/diffusion_pytorch_model.safetensors", "optimizer.safetensors"):
        one, other = (load_file(folder / "checkpoint-4" / name) for folder in (whole, parts))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    kept = load_file(whole / "checkpoint-4" / "optimizer.safetensors")
    learning = sum(t.numel() for key, t in kept.items() if key.endswith(f"|{MASTER}"))
    held = sum(t.numel() * t.element_size() for key, t in kept.items() if not key.endswith("|step"))
    assert held == learning * optim.state_bytes(Optimizer(name="adamw", master=True), 2)


REFUSED: dict[str, dict[str, Any]] = {
    "exact by themselves": {"optimizer": {"name": "adamw", "master": True}},
    "with adamw_bf16": {"optimizer": {"name": "adamw_bf16", "master": True}, "train": {"weights": "bf16"}},
    "with prodigy": {
        "optimizer": {"name": "prodigy", "master": True}, "train": {"weights": "bf16", "learning_rate": 1.0},
    },
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_where_they_have_no_effect_they_are_refused(config: Callable[..., Config], what: str) -> None:
    with pytest.raises(UserError, match=what):
        config(**REFUSED[what])
