"""Steps that the backward pass takes itself, so that gradients are freed as soon as they are there.

All gradients together take as much memory as the weights. Here a first pass only measures their norm, and a second one
on the same batch updates each tensor once its gradient is complete: clipping is by the norm of all gradients, exactly
as if all were at hand, at the price of the second pass. (To clip each tensor by its own norm would need none, and
is another method: the proportions among the tensors are lost.)
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sdxl_trainer.optim.clipping import length, shorten

# Gradients are kept until they are this part of all of them, so that optimizers have few tensors to go through often.
PARTS = 32


def norm(
    parameters: Sequence[nn.Parameter], passes: Callable[[], Tensor], share: float | None = None
) -> tuple[Tensor, Tensor]:
    """What `passes` gives, which goes forward and backward through the model, and the norm, [], of all gradients, of
    which none is kept. `share`: what they are multiplied by first, where the loss was scaled."""
    norms: dict[int, Tensor] = {}

    def measure(number: int, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        assert number not in norms, "gradients of several passes add up"
        norms[number] = length([parameter.grad])
        parameter.grad = None

    with _complete(parameters, share, measure):
        found = passes()
    # In the parameters' order, as where all gradients are at hand: the sum is the same bits.
    return found, torch.linalg.vector_norm(torch.stack([norms[number] for number in sorted(norms)]))


def step(
    optimizer: Any,
    parameters: Sequence[nn.Parameter],
    total: Tensor,
    limit: float | None,
    passes: Callable[[], Any],
    share: float | None = None,
) -> None:
    """Update all parameters during `passes`, their gradients scaled as their `total` norm and its limit ask for, after
    `share` as in `norm`."""
    room = sum(p.numel() * p.element_size() for p in parameters) // PARTS
    waiting: list[nn.Parameter] = []

    def flush() -> None:
        shorten(optimizer, waiting, limit, total)
        optimizer.step()
        for parameter in waiting:
            parameter.grad = None
        waiting.clear()

    def collect(_: int, parameter: nn.Parameter) -> None:
        waiting.append(parameter)
        if sum(p.numel() * p.element_size() for p in waiting) >= room:
            flush()

    with _complete(parameters, share, collect):
        passes()
    flush()


def adjust(scaler: torch.amp.GradScaler, total: Tensor) -> None:
    """Let the loss scaler raise or lower its scale by whether the norm of all gradients is finite."""
    witness = nn.Parameter(torch.zeros_like(total))
    witness.grad = total.clone()
    optimizer = torch.optim.SGD([witness], lr=0.0)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


@contextmanager
def _complete(
    parameters: Sequence[nn.Parameter], share: float | None, use: Callable[[int, nn.Parameter], None]
) -> Iterator[None]:
    """Hand each parameter, with its number, to `use` as soon as a backward pass has completed its gradient, which is
    multiplied by `share`."""

    def shared(number: int, parameter: nn.Parameter) -> None:
        if share is not None and parameter.grad is not None:
            parameter.grad.mul_(share)
        use(number, parameter)

    hooks = [p.register_post_accumulate_grad_hook(partial(shared, number)) for number, p in enumerate(parameters)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
