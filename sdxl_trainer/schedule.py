"""The noise schedule: how much of the picture is left at each timestep. fp32 throughout."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdxl_trainer.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """x_t = alpha_t x_0 + sigma_t noise with alpha_t^2 + sigma_t^2 = 1 (Ho et al. 2020, eq. 4).

    `alpha`, `sigma`: [T] fp32; `zero_terminal_snr` tells whether alpha ends at exactly 0.
    """

    alpha: Tensor
    sigma: Tensor
    zero_terminal_snr: bool

    def __len__(self) -> int:
        return len(self.alpha)

    def to(self, device: torch.device) -> "Schedule":
        return Schedule(self.alpha.to(device), self.sigma.to(device), self.zero_terminal_snr)

    def scales(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of each sample, [B, 1, 1, 1]."""
        return self.alpha[timesteps].view(-1, 1, 1, 1), self.sigma[timesteps].view(-1, 1, 1, 1)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t [B, C, h, w] from x_0 and noise of that shape and timesteps [B]."""
        alpha, sigma = self.scales(timesteps)
        return alpha * latents + sigma * noise

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2 of each sample, [B]."""
        return (self.alpha[timesteps] / self.sigma[timesteps]) ** 2


def from_scheduler_config(config: dict[str, Any], zero_terminal_snr: bool = False) -> Schedule:
    """The schedule of a diffusers scheduler config, rescaled if it or the caller says so."""
    zero = zero_terminal_snr or bool(config.get("rescale_betas_zero_snr", False))
    alpha_bar = torch.cumprod(1.0 - _betas(config), dim=0)
    alpha = _rescaled(alpha_bar.sqrt()) if zero else alpha_bar.sqrt()
    return Schedule(alpha, (1.0 - alpha**2).sqrt() if zero else (1.0 - alpha_bar).sqrt(), zero)


def _betas(config: dict[str, Any]) -> Tensor:
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    count, kind = config.get("num_train_timesteps", 1000), config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float32)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
    if kind == "linear":
        return torch.linspace(start, end, count, dtype=torch.float32)
    raise UserError(f"beta_schedule '{kind}' is not known", "scheduler_config.json", "use scaled_linear or linear")


def _rescaled(alpha: Tensor) -> Tensor:
    """Shift and scale so that the last alpha is 0 and the first stays (Lin et al. 2024, algorithm 1)."""
    first, last = alpha[0], alpha[-1]
    return (alpha - last) * (first / (first - last))
