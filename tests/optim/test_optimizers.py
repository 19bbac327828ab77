"""Every optimizer in whole runs: it learns, it is resumed bit by bit, and a broken step does not reach the weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sdxl_trainer import checkpoint, configfile, files, memory, optim, parameters
from sdxl_trainer import config as options
from sdxl_trainer.config import OPTIMIZERS, Learn, Optimizer, Train
from sdxl_trainer.errors import UserError
from sdxl_trainer.log import read_metrics
from sdxl_trainer.objective import Objective
from sdxl_trainer.optim import rounding, state
from sdxl_trainer.run import Job, Unread
from sdxl_trainer.train import train

# Every optimizer, with what it needs beside its name. Paged state needs a GPU.
CHOSEN: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw8bit": {},
    "adamw_bf16": {},
    "adafactor": {},
    "came": {},
    "lion": {},
    "muon": {},
    "prodigy": {"arguments": {"d0": 1e-3, "d_coef": 2.0}},
    "schedulefree": {},
    "sgd": {"arguments": {"momentum": 0.9, "nesterov": True}},
    "torch.optim:RAdam": {"betas": (0.8, 0.99), "arguments": {"decoupled_weight_decay": True}},
    "bitsandbytes.optim:AdEMAMix8bit": {},
}
RATES = {"prodigy": 1.0, "sgd": 0.1}


def test_both_tables_name_the_same_optimizers() -> None:
    assert set(optim.KINDS) == set(OPTIMIZERS)
    assert set(CHOSEN) >= set(OPTIMIZERS) - {"paged_adamw8bit"}


FP32, BF16 = torch.float32, torch.bfloat16
# With the type of the weights that they are for.
TYPED = [(name, BF16 if name == "adamw_bf16" else FP32) for name in CHOSEN]
TYPED += [(name, BF16) for name, kind in optim.KINDS.items() if kind.rounds and name in CHOSEN and not kind.narrow]
TYPED_KINDS = [(name, dtype) for name, dtype in TYPED if name in OPTIMIZERS]


def network(dtype: torch.dtype = FP32) -> nn.Module:
    """Large enough that 8-bit optimizers keep 8 bits; a normalisation, since its vectors are treated otherwise."""
    torch.manual_seed(0)
    module = nn.Module()
    module.unet = nn.Sequential(nn.Linear(80, 64), nn.Tanh(), nn.LayerNorm(64), nn.Linear(64, 80))
    return module.to(dtype)


def make(module: nn.Module, chosen: Optimizer) -> tuple[torch.optim.Optimizer, list[parameters.Group]]:
    rules = (Learn(match=r".*bias", weight_decay=0.0), Learn(match=".*"))
    rate = RATES.get(chosen.name, 3e-3)
    groups = parameters.apply_rules(module, rules, Train(steps=1, learning_rate=rate), chosen)
    return optim.make(groups, chosen), groups


def learn(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """Mean squared errors of learning to give the input back."""
    losses = []
    for step in steps:
        batch = torch.randn(32, 80, generator=torch.Generator().manual_seed(step)).to(next(module.parameters()).dtype)
        loss = (module.unet(batch) - batch).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("name", "dtype"), TYPED)
def test_every_optimizer_learns_and_goes_on_from_its_files_bitwise(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    chosen = Optimizer(name=name, **CHOSEN[name])
    whole = network(dtype)
    losses = learn(whole, make(whole, chosen)[0], range(30))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])

    first, second = network(dtype), network(dtype)
    optimizer, groups = make(first, chosen)
    begun = learn(first, optimizer, range(13))
    path = tmp_path / "optimizer.safetensors"
    files.save_tensors(path, state.tensors(optimizer, groups))
    files.write_json(tmp_path / "state.json", state.scalars(optimizer, groups))
    with optim.evaluating(optimizer):
        second.load_state_dict(first.state_dict())
    optimizer, groups = make(second, chosen)
    state.load(optimizer, groups, path, json.loads((tmp_path / "state.json").read_text()))
    assert begun + learn(second, optimizer, range(13, 30)) == losses
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(("name", "dtype"), TYPED_KINDS)
def test_the_memory_that_is_told_is_the_memory_that_is_taken(name: str, dtype: torch.dtype) -> None:
    module = nn.Module()
    module.unet = nn.Linear(256, 256, bias=False, dtype=dtype)
    chosen = Optimizer(name=name, **CHOSEN[name])
    optimizer = optim.make(parameters.apply_rules(module, (Learn(match=".*"),), Train(steps=1), chosen), chosen)
    module.unet.weight.grad = torch.ones_like(module.unet.weight)
    optimizer.step()
    shared = {"qmap1", "qmap2"}
    kept = [v for key, v in optimizer.state[module.unet.weight].items() if key not in shared]
    taken = sum(v.numel() * v.element_size() for v in kept if isinstance(v, torch.Tensor))
    told = optim.state_bytes(chosen, module.unet.weight.element_size()) * 256 * 256
    assert taken == pytest.approx(told, rel=0.05 if name != "adafactor" else 1.0)


@pytest.mark.parametrize("together", [1 << 25, 1 << 16])
@pytest.mark.parametrize(("name", "dtype"), TYPED_KINDS)
def test_a_step_holds_no_more_for_a_moment_than_is_told(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, together: int
) -> None:
    monkeypatch.setattr(rounding, "TOGETHER", together)
    chosen, module = Optimizer(name=name, **CHOSEN[name]), nn.Module()
    sizes = [(64, 256)] * 6 + [(256, 512)] * 2
    module.unet = nn.ModuleList(nn.Linear(*size, dtype=dtype) for size in sizes)
    optimizer = optim.make(parameters.apply_rules(module, (Learn(match=".*"),), Train(steps=1), chosen), chosen)
    learning = list(module.parameters())
    for _ in range(2):
        for parameter in learning:
            parameter.grad = torch.randn_like(parameter)
        state = [v for kept in optimizer.state.values() for v in kept.values() if isinstance(v, torch.Tensor)]
        with memory.Live([*learning, *(p.grad for p in learning if p.grad is not None), *state]) as live:
            optimizer.step()
    told = optim.workspace_bytes(chosen, [p.shape for p in learning], dtype.itemsize)
    assert live.peak <= 1.02 * told + 2**12


def sections(name: str, output: Path, **sizes: Any) -> dict[str, Any]:
    rates = {"learning_rate": RATES.get(name, 2e-3), "batch_size": 2, "checkpoint_every": 2, "steps": 4}
    rates |= {"weights": "bf16"} if name == "adamw_bf16" else {}
    return {"optimizer": {"name": name, **CHOSEN[name]}, "train": {**rates, **sizes}, "output_dir": str(output)}


@pytest.mark.parametrize(("name", "loses"), [("schedulefree", True), ("adafactor", False)])
def test_a_run_whose_small_steps_are_lost_says_so(
    config: Callable[..., Any], capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, loses: bool
) -> None:
    train(config(**sections(name, tmp_path / "run", weights="bf16", steps=1)))
    said = "schedulefree rounds bf16 weights to the nearest: small steps are lost; adamw, "
    assert (said in capsys.readouterr().err) == loses


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("adamw_bf16", {}),
        ("adamw_bf16", {"fused_backward": True}),
        ("adafactor", {"weights": "bf16"}),
        ("adafactor", {"weights": "bf16", "fused_backward": True}),
        ("adamw8bit", {"weights": "bf16"}),
        ("came", {}),
        ("muon", {}),
        ("prodigy", {}),
        ("schedulefree", {}),
    ],
)
def test_a_resumed_run_ends_bitwise_alike(
    config: Callable[..., Any], tmp_path: Path, name: str, more: dict[str, Any]
) -> None:
    whole = train(config(**sections(name, tmp_path / "whole", **more)))
    broken = tmp_path / "broken"
    train(config(**sections(name, broken, steps=2, **more)))
    train(config(**sections(name, broken, **more)))
    rows = [[row["loss"] for row in read_metrics(output / "metrics.jsonl")] for output in (whole, broken)]
    assert rows[0] == rows[1]
    for file in ("unet/diffusion_pytorch_model.safetensors", "checkpoint-4/optimizer.safetensors"):
        assert (whole / file).read_bytes() == (broken / file).read_bytes()


@pytest.mark.parametrize("name", ["adamw_bf16", "muon", "prodigy", "schedulefree"])
def test_a_step_that_is_not_finite_never_reaches_the_weights(
    config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Step 2 is broken and found out after step 3: the weights are still those of step 1."""
    loss, calls, weights = Objective.loss, [], dict[str, torch.Tensor]()

    def poisoned(self: Objective, *tensors: Any) -> torch.Tensor:
        calls.append(1)
        return loss(self, *tensors) * (float("nan") if len(calls) == 2 else 1.0)

    def seen(job: Job, unread: Unread) -> UserError:
        weights.update((name, p.detach().clone()) for name, p in job.run.sdxl.named_parameters())
        return UserError(f"stopped at {unread.row['step']}", "", "")

    monkeypatch.setattr(Objective, "loss", poisoned)
    monkeypatch.setattr("sdxl_trainer.train._diverged", seen)
    train(config(**sections(name, tmp_path / "run", checkpoint_every=1, steps=1)))
    later = sections(name, tmp_path / "run", checkpoint_every=0, steps=3)
    with pytest.raises(UserError, match="stopped at 2"):
        train(config(**later, log={"every": 3}))
    folder = tmp_path / "run/checkpoint-1"
    kept = {f"unet.{n}": tensor for n, tensor in checkpoint.read_weights(folder / "unet").items()}
    if name == "schedulefree":
        kept = {n: tensor for n, tensor in load_file(folder / "optimizer.safetensors").items() if "|training" in n}
        kept = {n.removesuffix("|training"): tensor for n, tensor in kept.items()}
    assert kept.keys() == weights.keys()
    assert all(torch.equal(kept[n], tensor) for n, tensor in weights.items())


@pytest.mark.parametrize(
    ("chosen", "what", "fix"),
    [
        (Optimizer(name="paged_adamw8bit"), "no such GPU", "adamw8bit"),
        (Optimizer(name="no_such_module:Thing"), "no_such_module", "pip install no_such_module"),
        (Optimizer(name="torch.optim:RAdamm"), "has no 'RAdamm'", "'RAdam'"),
        (Optimizer(name="torch.nn:Linear"), "not an optimizer", "subclass"),
        (Optimizer(name="torch.optim:RMSprop", betas=(0.9, 0.9)), "takes no 'betas'", "did you mean"),
        (Optimizer(name="torch.optim:LBFGS", weight_decay=0.1), "takes no 'weight_decay'", "remove"),
        (Optimizer(name="muon", arguments={"momentun": 0.9}), "takes no 'momentun'", "'momentum'"),
        (Optimizer(name="came", arguments={"cautious": True}), "takes no 'cautious'", "allowed"),
        (Optimizer(name="sgd", arguments={"nesterov": True}), "cannot be made", "options"),
        (Optimizer(name="adamw_bf16"), "bf16", "options"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_cannot_be_made_is_told(chosen: Optimizer, what: str, fix: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        make(network(), chosen)
    assert fix in caught.value.fix


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for kind in {kind.package: kind for kind in optim.KINDS.values() if kind.package}.values():
        module = kind.place.partition(":")[0]
        monkeypatch.setitem(sys.modules, module, None)
        name = next(n for n, k in optim.KINDS.items() if k is kind)
        with pytest.raises(UserError, match=f"needs {kind.package}") as caught:
            make(network(), Optimizer(name=name.removeprefix("paged_")))
        assert f"pip install {kind.package}" in caught.value.fix


@pytest.mark.parametrize(
    ("changes", "what", "fix"),
    [
        ({"optimizer": {"name": "adafactor", "betas": [0.9, 0.99]}}, "betas = .* has no effect", "remove"),
        ({"optimizer": {"name": "lion", "eps": 1e-6}}, "eps = 1e-06 has no effect", "remove"),
        ({"optimizer": {"name": "came", "betas": [0.9, 0.99]}}, "2 numbers; came takes 3", "0.9999"),
        ({"optimizer": {"name": "adamw_bf16"}}, "fp32 weights", "adamw"),
        ({"optimizer": {"name": "prodigy"}}, "with prodigy", "1.0"),
        (
            {
                "optimizer": {"name": "prodigy"},
                "train": {"learning_rate": 1.0},
                "learn": [{"match": r".*attn.*", "learning_rate": 0.5}, {"match": ".*"}],
            },
            "one rate for all",
            "same",
        ),
        ({"optimizer": {"name": "schedulefree"}, "schedule": {"name": "cosine"}}, "schedule.name", "constant"),
        ({"optimizer": {"name": "schedulefree"}, "ema": {"enabled": True}}, "averages the weights itself", "ema"),
        ({"optimizer": {"arguments": {"lr": 1.0}}}, "lr is not given there", "train.learning_rate"),
        ({"optimizer": {"name": "adam:"}}, 'optimizer.name = "adam:"', "adamw"),
    ],
    ids=str,
)
def test_contradictions_are_refused(tree: Callable[..., Any], changes: dict[str, Any], what: str, fix: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        configfile.validated(tree(**changes), "test.toml")
    assert fix in caught.value.fix


def test_arguments_of_a_class_survive_the_written_config(config: Callable[..., Any], tmp_path: Path) -> None:
    arguments = {"d_coef": 0.5, "growth_rate": 1.02, "decouple": False, "slice_p": 11}
    made = config(optimizer={"name": "prodigy", "arguments": arguments}, train={"learning_rate": 1.0})
    path = tmp_path / "written.toml"
    path.write_text(configfile.dumps(made), encoding="utf-8")
    again = configfile.load(path, ["optimizer.arguments.d_coef=2.0"])
    assert again.optimizer.arguments == {**arguments, "d_coef": 2.0}
    assert type(again.optimizer.arguments["slice_p"]) is int
    optimizer, _ = make(network(), again.optimizer)
    assert optimizer.param_groups[0]["d_coef"] == 2.0
    assert optimizer.param_groups[0]["safeguard_warmup"] is True


def test_named_defaults_are_written_out() -> None:
    assert options.Optimizer().betas == (0.9, 0.999)
    assert options.Optimizer(name="lion").betas == (0.9, 0.99)
    assert options.Optimizer(name="lion").eps is None


def test_state_that_no_file_can_hold_is_an_error(tmp_path: Path) -> None:
    optimizer, groups = make(network(), Optimizer())
    optimizer.state[groups[0].parameters[0]]["history"] = [1, 2]
    with pytest.raises(UserError, match="keeps 'history' as list"):
        state.scalars(optimizer, groups)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("pytorch_optimizer:SOAP", "keeps 'GG' as list"),
        ("torch.optim:LBFGS", "cannot take a step: .*closure"),
        ("torch.optim:SparseAdam", "cannot take a step: .*dense gradients"),
    ],
)
def test_classes_that_could_not_train_or_be_resumed_are_refused_early(
    config: Callable[..., Any], name: str, what: str
) -> None:
    with pytest.raises(UserError, match=what):
        train(config(optimizer={"name": name}))


def test_a_schedule_free_run_leaves_its_average(config: Callable[..., Any], tmp_path: Path) -> None:
    """The weights to use are x = z + (y - z) / beta1; the checkpoint holds x, and beside it y and z to go on from."""
    run = train(config(**sections("schedulefree", tmp_path / "run")))
    found = load_file(run / "checkpoint-4/optimizer.safetensors")
    numbers = json.loads((run / "checkpoint-4/state.json").read_text())["optimizer"]
    assert numbers["#0"]["k"] == 4
    assert numbers["#0"]["train_mode"] is True
    final, kept = checkpoint.read_weights(run / "unet"), checkpoint.read_weights(run / "checkpoint-4/unet")
    apart = 0
    for name, x in final.items():
        assert torch.equal(x, kept[name])
        y, z = found[f"unet.{name}|training"], found[f"unet.{name}|z"]
        torch.testing.assert_close(x, z + (y - z) / 0.9, rtol=1e-5, atol=1e-7)
        apart += not torch.equal(x, y)
    assert apart > 0.9 * len(final)
