"""Loss weights, shapes and EDM: closed forms, the formulas of other trainers, one gradient for all predictions."""

from typing import Any

import pytest
import torch

from sdxl_trainer import schedule
from sdxl_trainer.config import Objective as Options
from sdxl_trainer.objective import PREDICTIONS, WEIGHTS, Objective

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
PLAIN = schedule.from_scheduler_config(SDXL)
EVERY = torch.arange(1000)


def tensors(count: int = 1000) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(count, 4, 3, 5), torch.randn(count, 4, 3, 5)


def chosen(weighting: str) -> Options:
    return Options(weighting=weighting, snr_gamma=5.0 if "min_snr" in weighting else None, p2_gamma=0.7)


# The formulas as other trainers write them, for (SNR, gamma 5 or 0.7): factor on the error of epsilon, and of v.
FORMULAS = {
    "sample": (lambda s: 1 / s, lambda s: 1 / (s + 1)),
    "epsilon": (lambda s: s / s, lambda s: s / (s + 1)),
    "v_prediction": (lambda s: (s + 1) / s, lambda s: s / s),
    "min_snr": (lambda s: s.clamp(max=5) / s, lambda s: s.clamp(max=5) / (s + 1)),
    "soft_min_snr": (lambda s: 1 / (s * (1 / s + 1 / 5)), lambda s: 1 / ((s + 1) * (1 / s + 1 / 5))),
    "debiased": (lambda s: 1 / s.clamp(max=1000).sqrt(), lambda s: s / s.clamp(max=1000).sqrt() / (s + 1)),
    "p2": (lambda s: (1 + s) ** -0.7, lambda s: (1 + s) ** -0.7 * s / (s + 1)),
    # D = x - sigma F and D = x / (sigma^2 + 1) - sigma F / sqrt(sigma^2 + 1), both with 1 / sigma^2 at sigma^2 = 1 / s.
    "edm": (lambda s: (1 / s) * s, lambda s: (1 / s) / (1 / s + 1) * s),
}


@pytest.mark.parametrize("weighting", WEIGHTS)
def test_weights_are_the_known_formulas(weighting: str) -> None:
    snr = PLAIN.snr(EVERY).double()
    for kind, formula in zip(("epsilon", "v_prediction"), FORMULAS[weighting], strict=True):
        found = Objective(PLAIN, kind, chosen(weighting)).weight(EVERY)
        torch.testing.assert_close(found.double(), formula(snr), rtol=1e-5, atol=0)


@pytest.mark.parametrize("weighting", WEIGHTS)
def test_a_weight_gives_the_same_gradient_on_x0_whatever_is_predicted(weighting: str) -> None:
    """A guess of x_0 stated as epsilon, v or x_0 itself is pulled alike towards the truth."""
    latents, noise = tensors()
    alpha, sigma = PLAIN.scales(EVERY)
    noisy = PLAIN.add_noise(latents, noise, EVERY).double()
    found = {}
    for kind in ("sample", "epsilon", "v_prediction"):
        guess = (latents + 0.5).double().requires_grad_()
        guessed = (noisy - alpha * guess) / sigma
        stated = {"sample": guess, "epsilon": guessed, "v_prediction": alpha * guessed - sigma * guess}[kind]
        Objective(PLAIN, kind, chosen(weighting)).loss(stated, latents, noise, EVERY).sum().backward()
        found[kind] = guess.grad.flatten(1).mean(dim=1)
    torch.testing.assert_close(found["epsilon"], found["sample"], rtol=1e-3, atol=0)
    torch.testing.assert_close(found["v_prediction"], found["sample"], rtol=1e-3, atol=0)
    torch.testing.assert_close(found["sample"], WEIGHTS[weighting](PLAIN.snr(EVERY), chosen(weighting)).double() / 60)


def test_zero_terminal_snr_gives_finite_weights_and_losses_for_all_that_v_can_have() -> None:
    terminal = schedule.from_scheduler_config(SDXL, zero_terminal_snr=True)
    latents, noise = tensors()
    for weighting in WEIGHTS:
        for loss in ("l2", "huber", "smooth_l1"):
            options = chosen(weighting).model_copy(update={"loss": loss})
            found = Objective(terminal, "v_prediction", options).loss(latents + noise, latents, noise, EVERY)
            assert torch.isfinite(found).all()


def test_what_is_weighted_by_default() -> None:
    assert Objective(PLAIN, "epsilon", Options()).weighting is None
    assert Objective(PLAIN, "epsilon", Options(snr_gamma=1.0)).weighting == "min_snr"
    assert Objective(PLAIN, "epsilon", Options(weighting="prediction")).weighting is None


@pytest.mark.parametrize("kind", ["constant", "exponential", "snr"])
@pytest.mark.parametrize("loss", ["huber", "smooth_l1"])
def test_shapes_and_their_deltas_are_the_known_formulas(loss: str, kind: str) -> None:
    latents, noise = tensors()
    prediction = noise + torch.linspace(-3, 3, 1000).view(-1, 1, 1, 1)
    variance = PLAIN.alpha.double() ** 2
    deltas = {
        "constant": torch.full((1000,), 0.2, dtype=torch.float64),
        "exponential": torch.exp(torch.tensor(0.2).double().log() * EVERY / 1000),
        "snr": (1 - 0.2) / (1 + ((1 - variance) / variance).sqrt()) ** 2 + 0.2,
    }
    c = deltas[kind].view(-1, 1, 1, 1)
    distance = ((prediction - noise).double() ** 2 + c**2).sqrt() - c
    expected = (2 * distance * (c if loss == "huber" else 1)).mean(dim=(1, 2, 3))
    found = Objective(PLAIN, "epsilon", Options(loss=loss, delta=0.2, delta_schedule=kind))
    torch.testing.assert_close(found.loss(prediction, latents, noise, EVERY).double(), expected, rtol=1e-4, atol=1e-7)


def test_shapes_grow_with_the_error_as_they_should() -> None:
    """Huber is the square of small errors; smooth L1 is twice the size of large ones."""
    latents, noise = tensors(1)
    options = {"delta": 0.1, "delta_schedule": "constant"}

    def loss(kind: str, error: float) -> float:
        made = Objective(PLAIN, "epsilon", Options(loss=kind, **options))
        return made.loss(noise + error, latents, noise, torch.tensor([500])).item()

    assert loss("huber", 1e-3) == pytest.approx(1e-6, rel=2e-2)
    assert loss("smooth_l1", 1e-3) == pytest.approx(1e-5, rel=2e-2)
    assert loss("smooth_l1", 100.0) == pytest.approx(200.0, rel=2e-3)
    assert loss("huber", 100.0) == pytest.approx(20.0, rel=2e-3)


EDM = {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_max": 80.0, "sigma_min": 0.002, "sigma_data": 0.5}


@pytest.mark.parametrize("sigma_schedule", ["karras", "exponential"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_training_a_base_of_edm_is_that_of_diffusers(prediction: str, sigma_schedule: str) -> None:
    """Input, what the UNet is told of the noise, and loss as `--do_edm_style_training` has them for such bases."""
    from diffusers import EDMEulerScheduler

    config: dict[str, Any] = {**EDM, "prediction_type": prediction, "sigma_schedule": sigma_schedule}
    made = schedule.from_scheduler_config(config)
    latents, noise = tensors()
    latents *= 0.5
    output = torch.randn(latents.shape)
    # The script takes the Euler scheduler, whichever of the two the base names.
    reference = EDMEulerScheduler.from_config(config)
    levels = reference.timesteps[:1000].flip(0)
    sigmas = reference.sigmas[:1000].flip(0).view(-1, 1, 1, 1)
    torch.testing.assert_close(made.level(EVERY), levels.float(), rtol=1e-5, atol=1e-5)
    noisy = latents + sigmas * noise
    ours = made.add_noise(latents, noise, EVERY)
    torch.testing.assert_close(ours, reference.precondition_inputs(noisy, sigmas).float(), rtol=1e-4, atol=1e-5)
    denoised = reference.precondition_outputs(noisy, output, sigmas)
    plain = (denoised - latents).double().square().mean(dim=(1, 2, 3))
    loss = Objective(made, prediction, Options()).loss(output, latents, noise, EVERY)
    torch.testing.assert_close(loss.double(), plain, rtol=2e-3, atol=1e-7)
    # Karras et al. weigh by 1 / c_out^2: the plain error of what the network itself gives.
    c_out = (sigmas * 0.5 / (sigmas**2 + 0.25).sqrt()).flatten().double()
    flat = Objective(made, prediction, Options(weighting="prediction")).loss(output, latents, noise, EVERY)
    torch.testing.assert_close(flat.double() * c_out**2, plain, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_style_training_of_another_base_is_the_weighting_epsilon(prediction: str) -> None:
    """The script divides x_t by sqrt(1 + sigma^2), denoises, and weighs the error of x_0 by sigma^-2."""
    latents, noise = tensors()
    output = torch.randn(latents.shape)
    sigma = (PLAIN.sigma / PLAIN.alpha).double().view(-1, 1, 1, 1)
    noisy = latents.double() + sigma * noise
    torch.testing.assert_close(
        PLAIN.add_noise(latents, noise, EVERY).double(), noisy / (sigma**2 + 1).sqrt(), rtol=1e-4, atol=1e-5
    )
    denoised = {
        "epsilon": noisy - sigma * output,
        "v_prediction": -sigma / (sigma**2 + 1).sqrt() * output + noisy / (sigma**2 + 1),
    }[prediction]
    expected = (sigma**-2 * (denoised - latents) ** 2).mean(dim=(1, 2, 3))
    loss = Objective(PLAIN, prediction, Options(weighting="epsilon")).loss(output, latents, noise, EVERY)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=1e-6)


def test_every_prediction_says_where_x0_is() -> None:
    """Targets are those with which the input and the prediction together give the latents back."""
    latents, noise = tensors()
    for made, kinds in ((PLAIN, ("epsilon", "v_prediction")), (schedule.from_scheduler_config(EDM), ("edm",))):
        alpha, sigma = made.scales(EVERY)
        noisy = made.add_noise(latents, noise, EVERY)
        for kind in kinds:
            target = PREDICTIONS[kind][0](latents, noise, alpha, sigma, made.data)
            back = {
                "epsilon": (noisy - sigma * target) / alpha,
                "v_prediction": alpha * noisy - sigma * target,
                "edm": made.data * (made.data * alpha * noisy + sigma * target),
            }[kind]
            torch.testing.assert_close(back, latents, rtol=1e-3, atol=2e-4)
