"""Adafactor (Shazeer & Stern 2018) that does not wait for the device."""

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from sdxl_trainer.optim.rounding import together

# Elements that are updated together: few launches, and no more memory than the largest tensors of SDXL take alone.
TOGETHER = 1 << 24


class Adafactor(torch.optim.Adafactor):
    """PyTorch's: its state, its arguments and its steps, but for the order of sums. That one reads two norms of each
    tensor back to the host, which waits 3,360 times a step for the device with SDXL's tensors; here they stay there.
    `foreach` True: all tensors of a group together, False: one by one."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lists: list[list[Any]] = [[] for _ in range(6)]
            self._init_group(group, *lists)
            most = {None: TOGETHER, True: math.inf, False: 0}[group["foreach"]]
            rows = list(zip(*lists, strict=True))
            for factored in (True, False):
                alike = iter(own := [row for row in rows if (row[1].dim() > 1) is factored])
                for some in together([row[0] for row in own], most):
                    _update([list(column) for column in zip(*islice(alike, len(some)), strict=True)], group)


def _update(lists: list[list[Any]], group: dict[str, Any]) -> None:
    parameters, gradients, rows, columns, variances, steps = lists
    eps1, eps2 = group["eps"]
    eps1 = torch.finfo(parameters[0].dtype).eps if eps1 is None else eps1
    gradients = list(torch._foreach_neg(gradients)) if group["maximize"] else gradients
    torch._foreach_add_(steps, 1.0)
    counts = [step.item() for step in steps]  # these the host keeps
    fresh = [count ** group["beta2_decay"] for count in counts]
    rates = [min(group["lr"], count**-0.5) for count in counts]
    roots = [math.sqrt(p.numel()) for p in parameters]
    scales = torch._foreach_div(torch._foreach_norm(parameters), roots)
    torch._foreach_clamp_min_(scales, eps2)
    torch._foreach_mul_(scales, rates)
    if group["weight_decay"]:
        torch._foreach_mul_(parameters, 1.0 - group["lr"] * group["weight_decay"])
    if gradients[0].dim() > 1:
        updates = _factored(gradients, rows, columns, fresh, eps1)
    else:
        torch._foreach_lerp_(variances, torch._foreach_mul(gradients, gradients), fresh)
        updates = [variance.clone() for variance in variances]
    torch._foreach_clamp_min_(updates, eps1**2)
    torch._foreach_rsqrt_(updates)
    torch._foreach_mul_(updates, gradients)
    sizes = torch._foreach_div(torch._foreach_norm(updates), [root * group["d"] for root in roots])
    torch._foreach_clamp_min_(sizes, 1.0)
    torch._foreach_div_(scales, sizes)
    for p, update, scale in zip(parameters, updates, scales, strict=True):
        p.addcmul_(update, scale, value=-1.0)


def _factored(
    gradients: Sequence[Tensor], rows: list[Tensor], columns: list[Tensor], fresh: list[float], eps: float
) -> list[Tensor]:
    """Estimates of the second moments from those of rows and columns, which they bring up to date."""
    for factors, dim in ((rows, -1), (columns, -2)):
        means = [g.norm(dim=dim, keepdim=True) for g in gradients]
        torch._foreach_mul_(means, means)
        torch._foreach_div_(means, [float(g.size(dim)) for g in gradients])
        torch._foreach_lerp_(factors, means, fresh)
    # Of one number each, these products need no matrix product: of a convolution they are a million small ones.
    made = [row * column for row, column in zip(rows, columns, strict=True)]
    for estimate, row in zip(made, rows, strict=True):
        estimate.div_(row.mean(dim=-2, keepdim=True).clamp_(min=eps))
    return made


def workspace(shapes: Sequence[torch.Size]) -> int:
    """Numbers that a step holds for a moment: the updates of what is updated together."""
    sizes = [shape.numel() for shape in shapes]
    return min(sum(sizes), max(TOGETHER, *sizes)) if sizes else 0
