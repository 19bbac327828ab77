"""The noise schedule: how much of the picture is left at each timestep. fp32 throughout."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sdxl_trainer.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """x_t = alpha_t x_0 + sigma_t noise with alpha_t^2 + sigma_t^2 = 1 (Ho et al. 2020, eq. 4).

    `alpha`, `sigma`: [T] fp32; `zero_terminal_snr` tells whether alpha ends at exactly 0. For bases of EDM (Karras et
    al. 2022) x_t is the preconditioned input: alpha = c_in, sigma = c_in * EDM's sigma, and alpha^2 * `data`^2 +
    sigma^2 = 1, `data` being the standard deviation of x_0. `levels`: [T] fp32, what the UNet is told of each
    timestep; None: its number.
    """

    alpha: Tensor
    sigma: Tensor
    zero_terminal_snr: bool
    data: float = 1.0
    levels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.alpha)

    def to(self, device: torch.device) -> "Schedule":
        levels = None if self.levels is None else self.levels.to(device)
        return replace(self, alpha=self.alpha.to(device), sigma=self.sigma.to(device), levels=levels)

    def level(self, timesteps: Tensor) -> Tensor:
        """What the UNet is told of timesteps [B]."""
        return timesteps if self.levels is None else self.levels[timesteps]

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
    if is_edm(config):
        if zero_terminal_snr:
            what = "objective.zero_terminal_snr has no effect on a base of EDM"
            raise UserError(what, "objective.zero_terminal_snr", "remove it")
        return _edm(config)
    zero = zero_terminal_snr or bool(config.get("rescale_betas_zero_snr", False))
    alpha_bar = torch.cumprod(1.0 - _betas(config), dim=0)
    alpha = _rescaled(alpha_bar.sqrt()) if zero else alpha_bar.sqrt()
    return Schedule(alpha, (1.0 - alpha**2).sqrt() if zero else (1.0 - alpha_bar).sqrt(), zero)


def is_edm(config: dict[str, Any]) -> bool:
    """Whether it is one of the schedulers of diffusers with EDM's noise levels (Playground 2.5)."""
    return "EDM" in config.get("_class_name", "")


def _edm(config: dict[str, Any]) -> Schedule:
    """EDM's noise levels from the lowest (Karras et al. 2022, eq. 5), as diffusers' EDMEulerScheduler has them: of one
    more than there are timesteps the very lowest is left out."""
    low, high = config.get("sigma_min", 0.002), config.get("sigma_max", 80.0)
    data, count = config.get("sigma_data", 0.5), config.get("num_train_timesteps", 1000)
    kind, rho = config.get("sigma_schedule", "karras"), config.get("rho", 7.0)
    if kind not in {"karras", "exponential"}:
        raise UserError(f"sigma_schedule '{kind}' is not known", "scheduler_config.json", "use karras or exponential")
    ramp = torch.arange(count + 1, dtype=torch.float64).flip(0)[1:] / count
    if kind == "karras":
        sigmas = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    else:
        sigmas = torch.exp(math.log(high) + ramp * (math.log(low) - math.log(high)))
    alpha = (sigmas**2 + data**2) ** -0.5
    return Schedule(alpha.float(), (alpha * sigmas).float(), False, data, (0.25 * sigmas.log()).float())


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
