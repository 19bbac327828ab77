"""Prior prediction: samples whose target is what the frozen base says of them, so that a class stays as it was.

The base is the model with its adapters switched off, or a frozen copy where the model itself learns.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdxl_trainer import adapters
from sdxl_trainer.data.loader import Batch
from sdxl_trainer.model import SDXL

# Text that samples refer to by number; everything else has a row for each sample.
_SHARED = {"tokens", "weights"}


@dataclass(frozen=True)
class Prior:
    """The base: `sdxl` without its `adapters`. `together`: its weights are sharded, so that all processes have to ask
    it for every micro-batch, also those that have nothing to ask."""

    sdxl: SDXL
    adapters: tuple[Any, ...]
    together: bool = False

    @torch.no_grad()
    def __call__(
        self, batch: Batch, noisy: Tensor, level: Tensor, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> tuple[Tensor, Tensor] | None:
        """The samples [P] of a micro-batch that are to stay as they are, and the base's prediction [P, 4, h, w] for
        them, from the x_t [B, 4, h, w] and noise levels [B] that the learning model sees; None where there are none."""
        if batch.prior is None and not self.together:
            return None
        rows = batch.timesteps.new_zeros(1) if batch.prior is None else batch.prior
        text = {name: t if name in _SHARED else t[rows] for name, t in batch.text.items()}
        with adapters.switched_off(self.adapters), autocast():
            said = self.sdxl(noisy[rows], level[rows], batch.time_ids[rows], **text)
        return None if batch.prior is None else (rows, said)


def beside(sdxl: SDXL, copy: Callable[[], SDXL], sharded: bool) -> Prior:
    """The base of a model that learns: itself if only adapters do, else a frozen `copy`, whole on each process."""
    if sdxl.added:
        return Prior(sdxl, tuple(adapters.layers(sdxl)), sharded)
    return Prior(copy().eval().requires_grad_(False), ())
