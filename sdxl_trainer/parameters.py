"""What learns is decided by rules over parameter names: the first rule that matches decides (law 5)."""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from sdxl_trainer.config import Config, Learn, Optimizer, Train
from sdxl_trainer.errors import UserError


@dataclass(frozen=True)
class Group:
    """Tensors that learn alike: one rule's."""

    rule: str
    learning_rate: float
    weight_decay: float
    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    until: float = 1.0

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.parameters)


def rules(config: Config) -> tuple[Learn, ...]:
    """The config's rules; by default everything of an adapter and new words, else the whole UNet."""
    return config.learn or (Learn(match=r".*" if config.adapter or config.token else r"unet\..*"),)


def text_learns(config: Config, names: Iterable[str]) -> bool:
    """Whether something of the text encoders learns; `names` are those of their parameters."""
    if config.adapter is not None or config.token:
        parts = config.adapter.parts if config.adapter else ()
        return bool(config.token) or any(part != "unet" for part in parts)
    return bool(config.learn) and named(config.learn, names)  # by default the UNet alone learns


def named(rules: Sequence[Learn], names: Iterable[str]) -> bool:
    """Whether a rule lets any of these names learn."""
    patterns = [_compiled(rule, index) for index, rule in enumerate(rules)]
    for name in names:
        first = next((rule for rule, p in zip(rules, patterns, strict=True) if p.fullmatch(name)), None)
        if first is not None and first.learning_rate != 0:
            return True
    return False


def apply_rules(
    model: nn.Module, rules: Sequence[Learn], train: Train, optimizer: Optimizer, closed: Collection[str] = ()
) -> list[Group]:
    """Freeze everything, then let learn what a rule names, but for parameters that are `closed`. A rule that decides
    nothing is an error."""
    chosen: dict[int, dict[str, nn.Parameter]] = {index: {} for index in range(len(rules))}
    patterns = [_compiled(rule, index) for index, rule in enumerate(rules)]
    for name, parameter in model.named_parameters():
        matching = (i for i, pattern in enumerate(patterns) if pattern.fullmatch(name))
        index = None if name in closed else next(matching, None)
        learns = index is not None and _rate(rules[index], train) > 0
        parameter.requires_grad_(learns)
        if index is not None:
            chosen[index][name] = parameter
    groups = []
    for index, rule in enumerate(rules):
        if not chosen[index]:
            some = next(name for name, _ in model.named_parameters() if name not in closed)
            what = f"the rule '{rule.match}' decides nothing: no parameter name matches it that no earlier rule took"
            raise UserError(what, f"learn.{index}.match", f"names look like {some}; the whole name must match")
        if _rate(rule, train) > 0:
            decay = optimizer.weight_decay if rule.weight_decay is None else rule.weight_decay
            members = chosen[index]
            groups.append(
                Group(rule.match, _rate(rule, train), decay, tuple(members), tuple(members.values()), rule.until)
            )
    if not groups:
        raise UserError("nothing learns: every rule has learning rate 0", "learn", "give a rule a positive rate")
    if all(group.until < 1 for group in groups):
        last = max(group.until for group in groups)
        what = f"nothing learns after {last:g} of the run: every rule ends before"
        raise UserError(what, "learn.until", "let one rule learn to the end, or set fewer steps")
    return groups


def rebound(groups: Sequence[Group], model: nn.Module) -> list[Group]:
    """The groups with the model's parameters as they are now: sharding puts others in their place."""
    now = dict(model.named_parameters())
    return [replace(group, parameters=tuple(now[name] for name in group.names)) for group in groups]


def settle(groups: Sequence[Group], progress: float) -> None:
    """Forget the gradients of tensors that have learned for their share of the run: they stay as they are."""
    for group in groups:
        if progress >= group.until:
            for parameter in group.parameters:
                parameter.grad = None


def rates(groups: Sequence[Group], factor: float, progress: float) -> dict[str, float]:
    """The learning rate of each rule at that share of the run; 0 for what stays as it is from there on."""
    return {group.rule: group.learning_rate * factor if progress < group.until else 0.0 for group in groups}


def _rate(rule: Learn, train: Train) -> float:
    return train.learning_rate if rule.learning_rate is None else rule.learning_rate


def _compiled(rule: Learn, index: int) -> re.Pattern[str]:
    try:
        return re.compile(rule.match)
    except re.error as error:
        what = f"'{rule.match}' is not a regular expression: {error}"
        raise UserError(
            what, f"learn.{index}.match", r"for example 'unet\..*attn.*' for all attention layers"
        ) from None
