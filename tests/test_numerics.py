"""Schedule and objective: closed forms, and parity with diffusers."""

from itertools import pairwise

import pytest
import torch

from sdxl_trainer import schedule
from sdxl_trainer.config import Objective as Options
from sdxl_trainer.objective import PREDICTIONS, Objective

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


@pytest.fixture
def plain() -> schedule.Schedule:
    return schedule.from_scheduler_config(SDXL)


@pytest.fixture
def terminal() -> schedule.Schedule:
    return schedule.from_scheduler_config(SDXL, zero_terminal_snr=True)


def tensors(count: int = 1000) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(count, 4, 3, 5), torch.randn(count, 4, 3, 5), torch.arange(count)


def test_add_noise_and_velocity_are_those_of_diffusers(plain: schedule.Schedule) -> None:
    from diffusers import DDPMScheduler

    reference = DDPMScheduler(**SDXL)
    latents, eps, t = tensors()
    assert torch.equal(plain.add_noise(latents, eps, t), reference.add_noise(latents, eps, t))
    velocity = PREDICTIONS["v_prediction"][0](latents, eps, *plain.scales(t), 1.0)
    assert torch.equal(velocity, reference.get_velocity(latents, eps, t))


def test_snr_is_that_of_diffusers(plain: schedule.Schedule) -> None:
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    t = torch.arange(1000)
    assert torch.equal(plain.snr(t), compute_snr(DDPMScheduler(**SDXL), t))


def test_terminal_snr_is_zero_and_the_rest_is_that_of_diffusers(terminal: schedule.Schedule) -> None:
    from diffusers import DDPMScheduler

    reference = DDPMScheduler(**SDXL, rescale_betas_zero_snr=True).alphas_cumprod
    assert terminal.alpha[-1] == 0.0
    assert terminal.snr(torch.tensor([999])) == 0.0
    torch.testing.assert_close(terminal.alpha.square(), reference, rtol=2e-4, atol=1e-6)
    assert terminal.alpha[0] == schedule.from_scheduler_config(SDXL).alpha[0]
    assert all(a > b for a, b in pairwise(terminal.alpha.tolist()))


def test_a_scheduler_that_is_rescaled_already_is_taken_as_it_is(terminal: schedule.Schedule) -> None:
    made = schedule.from_scheduler_config({**SDXL, "rescale_betas_zero_snr": True})
    assert torch.equal(made.alpha, terminal.alpha)
    assert made.zero_terminal_snr


@pytest.mark.parametrize("gamma", [None, 5.0, 0.5])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_loss_is_the_reference_formula(plain: schedule.Schedule, kind: str, gamma: float | None) -> None:
    latents, eps, t = tensors()
    prediction = torch.randn(latents.shape)
    target = {
        "epsilon": eps,
        "v_prediction": plain.scales(t)[0] * eps - plain.scales(t)[1] * latents,
        "sample": latents,
    }[kind]
    snr = plain.snr(t).double()
    expected = ((prediction - target).double() ** 2).mean(dim=(1, 2, 3))
    if gamma is not None:
        capped = torch.minimum(snr, torch.tensor(gamma).double())
        expected *= {"epsilon": capped / snr, "v_prediction": capped / (snr + 1), "sample": capped}[kind]
    loss = Objective(plain, kind, Options(snr_gamma=gamma)).loss(prediction, latents, eps, t)
    assert loss.shape == (1000,)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.double().mean(), expected.mean(), rtol=1e-6, atol=0)


def test_all_predictions_weigh_the_same_error_of_the_picture_alike(plain: schedule.Schedule) -> None:
    """A model that errs by d in x_0 errs by alpha/sigma d in epsilon and by d/sigma in v: one loss for all three."""
    latents, eps, t = tensors()
    alpha, sigma = plain.scales(t)
    error = 0.1 * torch.randn(latents.shape)
    noisy = plain.add_noise(latents, eps, t)
    guess = latents + error
    guessed_noise = (noisy - alpha * guess) / sigma
    predictions = {"sample": guess, "epsilon": guessed_noise, "v_prediction": alpha * guessed_noise - sigma * guess}
    losses = {k: Objective(plain, k, Options(snr_gamma=5.0)).loss(p, latents, eps, t) for k, p in predictions.items()}
    torch.testing.assert_close(losses["epsilon"], losses["sample"], rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(losses["v_prediction"], losses["sample"], rtol=2e-3, atol=1e-6)


def test_zero_terminal_snr_gives_finite_v_losses(terminal: schedule.Schedule) -> None:
    latents, eps, t = tensors()
    loss = Objective(terminal, "v_prediction", Options(snr_gamma=5.0)).loss(torch.randn(latents.shape), latents, eps, t)
    assert torch.isfinite(loss).all()
