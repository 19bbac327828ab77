"""Learning rates, rules over names, averages: closed forms and parity with diffusers."""

import pytest
import torch
from torch import nn

from sdxl_trainer import ema, memory, optim, parameters
from sdxl_trainer.config import Learn, LearningRate, Optimizer, Train
from sdxl_trainer.errors import UserError
from sdxl_trainer.optim import rounding

TRAIN = Train(steps=1, learning_rate=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        LearningRate(name="constant"),
        LearningRate(name="constant_with_warmup", warmup_steps=7),
        LearningRate(name="linear", warmup_steps=5),
        LearningRate(name="cosine", warmup_steps=3),
        LearningRate(name="cosine"),
        LearningRate(name="cosine_with_restarts", warmup_steps=4, cycles=3),
        LearningRate(name="polynomial", warmup_steps=2, power=2.0),
    ],
    ids=lambda options: f"{options.name}-{options.warmup_steps}",
)
def test_learning_rates_are_those_of_diffusers(options: LearningRate) -> None:
    from diffusers.optimization import get_scheduler

    # A rate so high that the absolute end of diffusers' polynomial (1e-7) does not show.
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e3)
    reference = get_scheduler(
        options.name,
        optimizer,
        num_warmup_steps=options.warmup_steps,
        num_training_steps=50,
        num_cycles=options.cycles,
        power=options.power,
    )
    for step in range(50):
        assert optim.factor(options, step, 50) * 1e3 == pytest.approx(reference.get_last_lr()[0], abs=1e-6)
        optimizer.step()
        reference.step()


def test_a_cooldown_ends_at_zero_and_a_longer_run_begins_like_a_shorter_one() -> None:
    options = LearningRate(name="constant_with_warmup", warmup_steps=4, cooldown_steps=10)
    short = [optim.factor(options, step, 50) for step in range(51)]
    assert short[4:41] == [1.0] * 37
    assert short[40:] == pytest.approx([1 - k / 10 for k in range(11)])
    assert [optim.factor(options, step, 90) for step in range(41)] == short[:41]


def network() -> nn.Module:
    module = nn.Module()
    module.unet = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    module.other = nn.Linear(2, 2)
    return module


def test_the_first_rule_that_matches_decides() -> None:
    rules = (
        Learn(match=r"unet\.0\.bias", learning_rate=0.0),
        Learn(match=r"unet\.0\..*", learning_rate=5e-4),
        Learn(match=r"unet\..*", weight_decay=0.5),
    )
    module = network()
    groups = parameters.apply_rules(module, rules, TRAIN, Optimizer())
    assert [(g.names, g.learning_rate, g.weight_decay) for g in groups] == [
        (("unet.0.weight",), 5e-4, 1e-2),
        (("unet.1.weight", "unet.1.bias"), 1e-3, 0.5),
    ]
    learning = {name for name, p in module.named_parameters() if p.requires_grad}
    assert learning == {"unet.0.weight", "unet.1.weight", "unet.1.bias"}
    made = optim.make(groups, Optimizer())
    optim.set_learning_rates(made, 0.5)
    assert [g["lr"] for g in made.param_groups] == [2.5e-4, 5e-4]


@pytest.mark.parametrize(
    ("rules", "what"),
    [
        ((Learn(match="unett.*"),), "decides nothing"),
        ((Learn(match=".*"), Learn(match="unet.*")), "decides nothing"),
        ((Learn(match="unet"),), "decides nothing"),
        ((Learn(match="(unet"),), "not a regular expression"),
        ((Learn(match=".*", learning_rate=0.0),), "nothing learns"),
    ],
)
def test_rules_without_effect_are_refused(rules: tuple[Learn, ...], what: str) -> None:
    with pytest.raises(UserError, match=what):
        parameters.apply_rules(network(), rules, TRAIN, Optimizer())


def test_averages_are_those_of_diffusers() -> None:
    from diffusers.training_utils import EMAModel

    module = network()
    groups = parameters.apply_rules(module, (Learn(match=".*"),), TRAIN, Optimizer())
    ours, reference = ema.make(groups, 0.9), EMAModel(module.parameters(), decay=0.9)
    for _ in range(40):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p))
        ours.update()
        reference.step(module.parameters())
        assert ours.decay_now() == pytest.approx(reference.cur_decay_value)
    for average, expected in zip(ours.averages, reference.shadow_params, strict=True):
        torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-6)


def test_averages_of_narrow_weights_copy_few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of all of them in fp32 would be as large as two of what learns."""
    module = nn.Sequential(*(nn.Linear(100, 10) for _ in range(20))).bfloat16()
    groups = parameters.apply_rules(module, (Learn(match=".*"),), TRAIN, Optimizer(name="adamw_bf16"))
    averages = ema.make(groups, 0.9)
    averages.update()
    monkeypatch.setattr(rounding, "TOGETHER", 2020)
    before = [p.detach().double() for p in module.parameters()]
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1.0)
    with memory.Live([]) as live:
        averages.update()
    assert 0 < live.peak <= 4 * 2020
    decay = averages.decay_now()
    for p, was, average in zip(module.parameters(), before, averages.averages, strict=True):
        torch.testing.assert_close(average.double(), decay * was + (1 - decay) * p.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("narrow", [False, True])
def test_swapping_averages_in_leaves_the_weights_bitwise(narrow: bool) -> None:
    """Nothing but one tensor at a time is held twice, unless weights are narrower than averages."""
    module = nn.Sequential(*(nn.Linear(100, 10) for _ in range(20)))
    module = module.bfloat16() if narrow else module
    groups = parameters.apply_rules(module, (Learn(match=".*"),), TRAIN, Optimizer())
    averages = ema.make(groups, 0.9)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1.0)
    before, means = [p.clone() for p in module.parameters()], [a.clone() for a in averages.averages]
    rounded = [a.to(p) for p, a in zip(module.parameters(), means, strict=True)]
    with memory.Live([*module.parameters(), *averages.averages]) as live, averages.swapped_in():
        assert all(torch.equal(p, a) for p, a in zip(module.parameters(), rounded, strict=True))
    assert live.peak == (2 * 20 * 1010 if narrow else 4 * 1010), "a tensor and the one before it"
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))
    assert all(torch.equal(a, m) for a, m in zip(averages.averages, means, strict=True))
