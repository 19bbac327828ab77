"""What is predicted, how errors are weighted, and which timesteps and noise are drawn."""

from typing import Literal

from sdxl_trainer.config.section import Section, option


class Objective(Section):
    prediction: Literal["epsilon", "v_prediction", "sample"] | None = option(
        None, "what the UNet predicts; default: what the base model predicts"
    )
    snr_gamma: float | None = option(
        None, "gamma of min_snr (Hang et al. 2023; 5.0 is usual) and soft_min_snr; given alone it means min_snr", gt=0
    )
    zero_terminal_snr: bool = option(False, "rescale the schedule to pure noise at its end (Lin et al. 2024)")
    weighting: (
        Literal["prediction", "sample", "epsilon", "v_prediction", "min_snr", "soft_min_snr", "debiased", "p2", "edm"]
        | None
    ) = option(None, "how timesteps are weighted, whatever is predicted; default: as the plain error of the prediction")
    p2_gamma: float = option(1.0, "exponent of p2 (Choi et al. 2022)", gt=0)
    loss: Literal["l2", "huber", "smooth_l1"] = option("l2", "shape of the loss; huber and smooth_l1 forgive outliers")
    delta: float = option(0.1, "error from which on huber and smooth_l1 are no longer squares", gt=0)
    delta_schedule: Literal["constant", "exponential", "snr"] = option(
        "snr", "how delta changes over the timesteps: not, from 1 to delta, or by the noise from 1 to delta"
    )
    noise_offset: float = option(0.0, "strength of a constant added to the noise of each channel", ge=0)
    noise_offset_random: bool = option(False, "draw the strength anew each time, from 0 to noise_offset")
    noise_offset_adaptive: float = option(
        0.0, "noise_offset grows by this times the size of the channel's mean in the picture", ge=0
    )
    pyramid_levels: int = option(
        0, "levels of coarser and coarser noise, the first of full size (multi-resolution noise); 6 is usual", ge=0
    )
    pyramid_discount: float = option(0.3, "strength of each level, relative to the one before", gt=0, lt=1)
    input_perturbation: float = option(
        0.0, "noise added to the input and not to the target (Ning et al. 2023); 0.1 is usual", ge=0
    )
    input_perturbation_random: bool = option(False, "draw its strength anew each time, from 0 to input_perturbation")


class Timesteps(Section):
    density: Literal["uniform", "logit_normal", "sigmoid", "beta", "cubic", "cubic_earlier"] = option(
        "uniform", "how often timesteps are drawn; 0 is the clean end"
    )
    location: float = option(0.0, "of logit_normal: mean before the logistic function; above 0 for more noise")
    scale: float = option(1.0, "of logit_normal: standard deviation before the logistic function", gt=0)
    slope: float = option(8.0, "of sigmoid: how steeply it rises; negative: falls")
    midpoint: float = option(0.5, "of sigmoid: share of the schedule at which it is half its largest")
    alpha: float = option(2.0, "of beta: above 1 the clean end is spared", gt=0)
    beta: float = option(2.0, "of beta: above 1 the noisy end is spared", gt=0)
    sampling: Literal["independent", "stratified", "sobol"] = option(
        "independent", "how a step's timesteps are spread: not, one in each of batch_size parts, or a Sobol sequence"
    )
    importance: bool = option(False, "divide the loss by how much more often than evenly its timestep is drawn")
    bias: Literal["none", "earlier", "later", "range"] = option("none", "which timesteps are drawn more often")
    multiplier: float = option(1.0, "how much more often", gt=0)
    portion: float = option(0.25, "share of the timesteps that earlier and later favour", gt=0, le=1)
    begin: int = option(0, "first timestep of range", ge=0)
    end: int = option(1000, "timestep after the last of range", gt=0)
