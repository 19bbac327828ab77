"""Steps on bf16 weights that are those on fp32 ones: the optimizer keeps exact weights beside them, and takes its steps
on these (Micikevicius et al. 2018). Passes then need no autocast, which casts each weight in each of them."""

from typing import Any

import torch
from torch import Tensor

from sdxl_trainer.optim.rounding import Wide, lent, local, together

# Key in a tensor's state: its exact weights.
MASTER = "master"


def kept(inner: Any) -> Any:
    """The class of optimizers `inner`, whose steps on bf16 weights are those on their masters in fp32, to which the
    weights are the nearest."""

    class Kept(inner):
        param_groups: list[dict[str, Any]]

        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            for group in self.param_groups:
                names = dict(zip(group["params"], group["names"], strict=True))
                for some in together([p for p in names if p.grad is not None]):
                    self._step(group, some, [names[p] for p in some])

        def _step(self, group: dict[str, Any], some: list[Tensor], names: list[str]) -> None:
            before = [self.state.pop(p, None) or {MASTER: p.detach().float()} for p in some]
            masters = [own.pop(MASTER) for own in before]
            gradients = Wide.of([p.grad for p in some if p.grad is not None]).copies
            for master, gradient, own in zip(masters, gradients, before, strict=True):
                master.grad = gradient
                if own:
                    self.state[master] = own
            with lent(self, group, masters, names):
                super().step()
            for p, master in zip(some, masters, strict=True):
                master.grad = None
                self.state[p] = {**self.state.pop(master, {}), MASTER: master}
            torch._foreach_copy_(local(some), local(masters))

    Kept.__name__ = inner.__name__
    return Kept
