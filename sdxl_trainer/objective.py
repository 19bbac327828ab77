"""What the UNet should have said, and how much it matters. The loss is one number per sample (law 4).

Every loss weight is written once, as a weight on the squared error of x_0, and derived for the other predictions:
for the same x_0 the error of epsilon is SNR times, and that of v is SNR + 1 times, the error of x_0
(Hang et al. 2023, section 3.3; Salimans & Ho 2022, appendix D).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdxl_trainer.schedule import Schedule


def epsilon(latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise itself (Ho et al. 2020)."""
    return noise


def v_prediction(latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """v = alpha noise - sigma x_0 (Salimans & Ho 2022, section 4)."""
    return alpha * noise - sigma * latents


def sample(latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The clean latents."""
    return latents


# prediction -> (target, error of the prediction / error of x_0 as a function of SNR)
PREDICTIONS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "epsilon": (epsilon, lambda snr: snr),
    "v_prediction": (v_prediction, lambda snr: snr + 1.0),
    "sample": (sample, lambda snr: torch.ones_like(snr)),
}


def min_snr(snr: Tensor, gamma: float) -> Tensor:
    """Weight on the x_0 error: min(SNR, gamma) (Hang et al. 2023, eq. 8)."""
    return snr.clamp(max=gamma)


@dataclass(frozen=True)
class Objective:
    """What is predicted and how timesteps are weighted. `snr_gamma` None: the plain mean squared error."""

    schedule: Schedule
    prediction: str
    snr_gamma: float | None

    def loss(
        self, prediction: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Weighted mean squared error of each sample, [B] fp32, from [B, C, h, w] tensors and timesteps [B]; `mask`
        [B, 1, h, w] is a factor on the error of each latent cell."""
        target, _ = PREDICTIONS[self.prediction]
        error = prediction.float() - target(latents, noise, *self.schedule.scales(timesteps))
        squared = error.square() if mask is None else error.square() * mask
        return squared.mean(dim=(1, 2, 3)) * self.weight(timesteps)

    def weight(self, timesteps: Tensor) -> Tensor:
        """Factor on each sample's mean squared error, [B]."""
        snr = self.schedule.snr(timesteps)
        if self.snr_gamma is None:
            return torch.ones_like(snr)
        _, relative_error = PREDICTIONS[self.prediction]
        return min_snr(snr, self.snr_gamma) / relative_error(snr)
