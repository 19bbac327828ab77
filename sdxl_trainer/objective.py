"""What the UNet should have said, and how much it matters. The loss is one number per sample (law 4).

Every loss weight is written once, as a weight on the squared error of x_0, and derived for the other predictions:
for the same x_0 the error of epsilon is SNR times, and that of v is SNR + 1 times, the error of x_0
(Hang et al. 2023, section 3.3; Salimans & Ho 2022, appendix D).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdxl_trainer.config import Objective as Options
from sdxl_trainer.schedule import Schedule


def epsilon(latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, data: float) -> Tensor:
    """The noise itself (Ho et al. 2020)."""
    return noise


def v_prediction(latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, data: float) -> Tensor:
    """v = alpha noise - sigma x_0 (Salimans & Ho 2022, section 4), for x_0 of standard deviation `data`."""
    return alpha * data * noise - sigma * (latents / data)


def sample(latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, data: float) -> Tensor:
    """The clean latents."""
    return latents


def edm(latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, data: float) -> Tensor:
    """F of D = c_skip x + c_out F (Karras et al. 2022, eq. 7 and table 1): v with the other sign."""
    return -v_prediction(latents, noise, alpha, sigma, data)


Target = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
# prediction -> (target, squared error of the prediction / that of x_0 as a function of SNR and the data's deviation)
PREDICTIONS: dict[str, tuple[Target, Callable[[Tensor, float], Tensor]]] = {
    "epsilon": (epsilon, lambda snr, data: snr),
    "v_prediction": (v_prediction, lambda snr, data: snr + data**-2),
    "sample": (sample, lambda snr, data: torch.ones_like(snr)),
    "edm": (edm, lambda snr, data: snr + data**-2),
}


def min_snr(snr: Tensor, options: Options) -> Tensor:
    """min(SNR, gamma) (Hang et al. 2023, eq. 8)."""
    return snr.clamp(max=options.snr_gamma)


def soft_min_snr(snr: Tensor, options: Options) -> Tensor:
    """SNR gamma / (SNR + gamma), Min-SNR without the corner (Crowson et al. 2024, section 3.4)."""
    assert options.snr_gamma is not None
    return snr * options.snr_gamma / (snr + options.snr_gamma)


def debiased(snr: Tensor, options: Options) -> Tensor:
    """1 / sqrt(SNR) on epsilon, no less than at SNR 1000 (Yu et al. 2024)."""
    return snr.sqrt() * (snr / 1000.0).clamp(min=1.0).sqrt()


def p2(snr: Tensor, options: Options) -> Tensor:
    """1 / (1 + SNR)^gamma on epsilon (Choi et al. 2022, eq. 8, k = 1)."""
    return snr / (1.0 + snr) ** options.p2_gamma


def edm_style(snr: Tensor, options: Options) -> Tensor:
    """1 / sigma^2 at the noise level sigma over a signal of 1, which is SNR (the reference's EDM-style training)."""
    return snr


# Weight on the squared x_0 error as a function of SNR; the first three make it the plain error of that prediction.
WEIGHTS: dict[str, Callable[[Tensor, Options], Tensor]] = {
    "sample": lambda snr, options: torch.ones_like(snr),
    "epsilon": lambda snr, options: snr,
    "v_prediction": lambda snr, options: snr + 1.0,
    "min_snr": min_snr,
    "soft_min_snr": soft_min_snr,
    "debiased": debiased,
    "p2": p2,
    "edm": edm_style,
}

# Loss of errors [B, C, h, w] with deltas [B, 1, 1, 1]; all are the square where the error is small.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": lambda error, delta: error.square(),
    "huber": lambda error, delta: 2.0 * delta * ((error.square() + delta**2).sqrt() - delta),
    "smooth_l1": lambda error, delta: 2.0 * ((error.square() + delta**2).sqrt() - delta),
}

# delta as a function of (delta of the config, share of the schedule that is over, sigma / alpha).
DELTAS: dict[str, Callable[[float, Tensor, Tensor], Tensor]] = {
    "constant": lambda delta, share, ratio: torch.full_like(share, delta),
    "exponential": lambda delta, share, ratio: delta**share,
    "snr": lambda delta, share, ratio: (1.0 - delta) / (1.0 + ratio) ** 2 + delta,
}


@dataclass(frozen=True)
class Objective:
    """What is predicted, how far off it may be, and how timesteps are weighted."""

    schedule: Schedule
    prediction: str
    options: Options

    @property
    def kind(self) -> str:
        """A row of PREDICTIONS. What diffusers' EDM schedulers call epsilon is EDM's own F."""
        return "edm" if self.schedule.levels is not None and self.prediction == "epsilon" else self.prediction

    @property
    def weighting(self) -> str | None:
        """A row of WEIGHTS; None: the plain error of what is predicted. On bases of EDM the plain error of x_0, as
        the reference's script has it."""
        if self.options.weighting == "prediction":
            return None
        if self.options.weighting == "edm" and self.schedule.levels is not None:
            return "sample"
        by_default = None if self.schedule.levels is None else "sample"
        return self.options.weighting or ("min_snr" if self.options.snr_gamma else by_default)

    @property
    def neglected(self) -> str | None:
        """What to say of a weighting that leaves out the timestep at which drawing begins."""
        last = torch.tensor([len(self.schedule) - 1], device=self.schedule.alpha.device)
        if not self.schedule.zero_terminal_snr or float(self.weight(last)) > 0:
            return None
        what = f"weighted by {self.weighting} the last timestep, where drawing begins, counts for nothing"
        return (
            f'zero terminal SNR: {what}, and those before it for next to nothing; weighting = "prediction" counts all'
        )

    def loss(
        self,
        prediction: Tensor,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        mask: Tensor | None = None,
        kept: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Weighted mean loss of each sample, [B] fp32, from [B, C, h, w] tensors and timesteps [B]; `mask`
        [B, 1, h, w] is a factor on the loss of each latent cell. `kept`: the samples [P] whose target is another
        prediction [P, C, h, w] in place of their own."""
        wanted, _ = PREDICTIONS[self.kind]
        target = wanted(latents, noise, *self.schedule.scales(timesteps), self.schedule.data)
        if kept is not None:
            target = target.index_copy(0, kept[0], kept[1].float())
        error = prediction.float() - target
        each = LOSSES[self.options.loss](error, self.delta(timesteps))
        return (each if mask is None else each * mask).mean(dim=(1, 2, 3)) * self.weight(timesteps)

    def delta(self, timesteps: Tensor) -> Tensor:
        """Size of error from which on the loss grows no faster than the error, [B, 1, 1, 1]."""
        alpha, sigma = self.schedule.scales(timesteps)
        share = (timesteps / len(self.schedule)).view(-1, 1, 1, 1)
        return DELTAS[self.options.delta_schedule](self.options.delta, share, sigma / alpha)

    def weight(self, timesteps: Tensor) -> Tensor:
        """Factor on each sample's mean loss, [B]."""
        snr = self.schedule.snr(timesteps)
        if self.weighting is None:
            return torch.ones_like(snr)
        _, relative_error = PREDICTIONS[self.kind]
        return WEIGHTS[self.weighting](snr, self.options) / relative_error(snr, self.schedule.data)
