"""Muon: momentum whose singular values are all made about 1 (Jordan et al. 2024), for matrices; AdamW for the rest."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

# Quintic Newton-Schulz iteration x -> a x + b x^3 + c x^5 on the singular values (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Elements of matrices of one shape that are iterated together: many small products become few large ones.
TOGETHER = 1 << 26


class Muon(torch.optim.Optimizer):
    """Matrices, and convolutions flattened to [out, in * h * w], by Muon; vectors, and what the regular expression
    `adamw` names (a whole name of the group's `names`), by AdamW with the same rate, `betas` and `eps`.

    A matrix moves by lr * 0.2 sqrt(max(rows, columns)) times its orthogonalised momentum, so that its entries
    change as much as under AdamW and the same rates suit both (Liu et al. 2025, arXiv:2502.16982, eq. 4).
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        momentum: float = 0.95,
        nesterov: bool = True,
        iterations: int = 5,
        adamw: str = r".*(embedding|conv_in|conv_out).*",
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"momentum": momentum, "nesterov": nesterov, "iterations": iterations}
        super().__init__(params, defaults)
        pattern = re.compile(adamw)
        self._matrices = {
            name
            for group in self.param_groups
            for name, parameter in zip(group["names"], group["params"], strict=True)
            if parameter.ndim >= 2 and not pattern.fullmatch(name)
        }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            learning = [
                (n in self._matrices, p)
                for n, p in zip(group["names"], group["params"], strict=True)
                if p.grad is not None
            ]
            self._orthogonal([p for matrix, p in learning if matrix], group)
            self._adamw([p for matrix, p in learning if not matrix], group)

    def _orthogonal(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        for some in _alike(matrices):
            for p in some:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            updates = orthogonalised(self._aims(some, group), group["iterations"])
            scale = 0.2 * math.sqrt(max(updates.shape[1:]))
            torch._foreach_mul_(some, 1.0 - group["lr"] * group["weight_decay"])
            flat = [u.view(p.shape).to(p.dtype) for u, p in zip(updates, some, strict=True)]
            torch._foreach_add_(some, flat, alpha=-group["lr"] * scale)

    def _aims(self, some: list[Tensor], group: dict[str, Any]) -> Tensor:
        """Where the momentum points now, of tensors of one flattened shape: [n, rows, columns]."""
        momenta = [self.state[p]["momentum"] for p in some]
        gradients = [_gradient(p) for p in some]
        torch._foreach_lerp_(momenta, gradients, 1.0 - group["momentum"])
        aims = torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta
        return torch.stack([t.flatten(1) for t in aims])

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for p in parameters:
            if not self.state[p]:
                zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                self.state[p] = {"step": torch.zeros((), device=p.device), **zeros}
        states = [self.state[p] for p in parameters]
        first, second = group["betas"]
        adamw(
            parameters,
            [_gradient(p) for p in parameters],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            amsgrad=False,
            beta1=first,
            beta2=second,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalised(matrices: Tensor, iterations: int) -> Tensor:
    """[n, rows, columns] with singular values brought near 1 (0.7 to 1.2 after 5 iterations), singular vectors kept.
    In bf16 on GPUs, as published; CPUs are faster, and exacter, in fp32."""
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    del matrices  # they may be the largest there are
    a, b, c = COEFFICIENTS
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT.contiguous() if tall else x


def _alike(matrices: list[Tensor]) -> Iterator[list[Tensor]]:
    """Lists of tensors of one flattened shape, type and device, of at most TOGETHER elements."""
    kinds: dict[Any, list[Tensor]] = {}
    for p in matrices:
        kinds.setdefault((p.shape[0], p.shape[1:].numel(), p.dtype, p.device), []).append(p)
    for (rows, columns, _, _), members in kinds.items():
        count = max(1, TOGETHER // (rows * columns))
        yield from (members[i : i + count] for i in range(0, len(members), count))


def workspace(shapes: Sequence[torch.Size]) -> int:
    """Numbers that a step holds for a moment: the largest of what is iterated together, before and after a product, and
    two squares of its smaller side."""
    kinds = Counter((shape[0], shape[1:].numel()) for shape in shapes if len(shape) > 1)
    most = 0
    for (rows, columns), members in kinds.items():
        together = min(members, max(1, TOGETHER // (rows * columns)))
        most = max(most, together * (3 * rows * columns + 2 * min(rows, columns) ** 2))
    return most


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
