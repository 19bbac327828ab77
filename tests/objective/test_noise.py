"""Noise: pure functions of their keys, with the moments that were asked for."""

from itertools import product

import numpy as np
import pytest
import torch

from sdxl_trainer import noise
from sdxl_trainer.config import Objective

SHAPE = (4, 8, 8)


def zeros() -> torch.Tensor:
    return torch.zeros(SHAPE)


def drawn(key: tuple[int, int, int], latents: torch.Tensor | None = None, **options: float) -> torch.Tensor:
    latents = zeros() if latents is None else latents
    return noise.draw([key], lambda row: latents, tuple(latents.shape), Objective(**options))[0]


def test_noise_does_not_depend_on_anything_but_its_key() -> None:
    for options in ({}, {"pyramid_levels": 4}, {"noise_offset": 0.1, "noise_offset_random": True}):
        one = drawn((7, 2, 11), **options)
        assert torch.equal(one, drawn((7, 2, 11), **options))
        assert all(not torch.equal(one, drawn(key, **options)) for key in ((8, 2, 11), (7, 3, 11), (7, 2, 12)))
        assert one.dtype == torch.float32


def test_the_numbers_of_a_key_are_numpy_s_own() -> None:
    """Philox with that key and counter, however it is made: cached and finished runs rest on these numbers."""
    from sdxl_trainer import keyed

    for seed, purpose, epoch, sample in ((0, "noise", 0, 0), (7, "posterior", 3, 2**63 + 5), (-1, "timestep", 9, 1)):
        key = np.array([seed % 2**64, keyed.PURPOSES[purpose]], dtype=np.uint64)
        counter = np.array([0, 0, epoch, sample], dtype=np.uint64)
        expected = np.random.Generator(np.random.Philox(key=key, counter=counter))
        found = keyed.generator(seed, purpose, epoch, sample)
        assert found.random(5).tolist() == expected.random(5).tolist()
        assert found.integers(1 << 63, size=5).tolist() == expected.integers(1 << 63, size=5).tolist()
        normals = noise.normals(purpose, [(0, 1, 2), (seed, epoch, sample)], (3, 5))
        again = np.random.Generator(np.random.Philox(key=key, counter=counter))
        assert normals[1].tolist() == again.standard_normal((3, 5), dtype=np.float32).tolist()


def test_noise_of_many_samples_is_standard_normal() -> None:
    many = np.stack([drawn((0, 0, sample), torch.zeros(4, 16, 16)).numpy() for sample in range(200)])
    assert abs(many.mean()) < 0.01
    assert abs(many.std() - 1) < 0.01
    between = np.corrcoef(many.reshape(200, -1))[np.triu_indices(200, 1)]
    assert np.abs(between).max() < 0.2


def offsets(count: int, latents: torch.Tensor | None = None, **options: float) -> torch.Tensor:
    """[count, 4]: what is added to each channel."""
    some = []
    for sample in range(count):
        added = drawn((0, 0, sample), latents, **options) - drawn((0, 0, sample))
        assert torch.allclose(added, added[:, :1, :1], atol=1e-5)
        some.append(added.mean(dim=(1, 2)))
    return torch.stack(some)


def test_offset_adds_one_number_per_channel() -> None:
    shifts = offsets(1000, noise_offset=0.1)
    assert len(set(shifts[3].tolist())) == 4
    assert shifts.std().item() == pytest.approx(0.1, rel=0.07)


def test_a_random_offset_has_a_strength_of_its_own_each_time() -> None:
    """U(0, o) times a normal number: variance o^2 / 3, and the strength is one for all channels."""
    fixed, random = offsets(1000, noise_offset=0.3), offsets(1000, noise_offset=0.3, noise_offset_random=True)
    assert random.std().item() == pytest.approx(0.3 / 3**0.5, rel=0.07)
    shares = (random * fixed).sum(dim=1) / fixed.square().sum(dim=1)
    torch.testing.assert_close(random, shares[:, None] * fixed, rtol=0, atol=1e-5)
    assert -1e-4 < shares.min()
    assert shares.max() < 1 + 1e-4
    assert shares.mean().item() == pytest.approx(0.5, abs=0.05)


def test_an_adaptive_offset_grows_with_the_picture_s_mean() -> None:
    latents = zeros() + torch.tensor([0.0, 1.0, -2.0, 0.5])[:, None, None]
    adaptive = offsets(20, latents, noise_offset=0.1, noise_offset_adaptive=0.2)
    expected = torch.tensor([1.0, 3.0, 5.0, 2.0]) * offsets(20, noise_offset=0.1)
    torch.testing.assert_close(adaptive, expected, rtol=0, atol=1e-5)


def test_pyramid_noise_has_unit_variance_and_is_coarse() -> None:
    latents = torch.zeros(4, 32, 48)
    many = torch.stack([drawn((0, 0, s), latents, pyramid_levels=6, pyramid_discount=0.6) for s in range(100)])
    assert many.std(dim=(1, 2, 3), correction=0).numpy() == pytest.approx(1.0, abs=1e-5)
    plain = torch.stack([drawn((0, 0, s), latents) for s in range(100)])

    def coarse(values: torch.Tensor) -> float:
        return torch.nn.functional.avg_pool2d(values, 8).var().item()

    assert coarse(plain) == pytest.approx(1 / 64, rel=0.15)
    assert coarse(many) > 4 * coarse(plain)


def multires_noise(count: int, side: int, iterations: int, discount: float) -> torch.Tensor:
    """sd-scripts' multi-resolution noise for batches of one, all in fresh draws: [count, 4, side, side]."""
    made = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        total = torch.randn(1, 4, side, side, generator=generator)
        for i in range(iterations):
            small = max(1, int(side / float(torch.rand((), generator=generator) * 2 + 2) ** i))
            level = torch.randn(1, 4, small, small, generator=generator)
            total += discount**i * torch.nn.Upsample(size=(side, side), mode="bilinear")(level)
            if small == 1:
                break
        made.append(total / total.std())
    return torch.cat(made)


def power(values: torch.Tensor) -> np.ndarray:
    """Mean power by distance from the mean: the covariance of stationary noise. [rings]"""
    spectrum = (torch.fft.fft2(values).abs() ** 2 / values.shape[-1] ** 2).mean(dim=(0, 1)).numpy()
    away = np.minimum(np.arange(values.shape[-1]), values.shape[-1] - np.arange(values.shape[-1]))
    ring = np.hypot(away[:, None], away[None]).round().astype(int)
    return np.array([spectrum[ring == number].mean() for number in range(6)])


@pytest.mark.parametrize(("levels", "discount"), [(6, 0.3), (10, 0.8), (2, 0.5)])
def test_pyramid_noise_has_the_spectrum_of_sd_scripts_multires_noise(levels: int, discount: float) -> None:
    latents = torch.zeros(4, 16, 16)
    ours = torch.stack(
        [drawn((0, 0, s), latents, pyramid_levels=levels, pyramid_discount=discount) for s in range(1500)]
    )
    theirs = multires_noise(1500, 16, levels, discount)
    assert ours.var().item() == pytest.approx(theirs.var().item(), rel=0.01)
    assert power(ours) == pytest.approx(power(theirs), rel=0.08), "the mean's is of 6,000 numbers: 2 % by chance"


def test_a_pyramid_of_two_levels_is_the_formula() -> None:
    from sdxl_trainer import keyed

    latents = torch.zeros(4, 24, 16)
    generator = keyed.generator(1, "pyramid", 2, 3)
    scale = generator.uniform(2.0, 4.0)
    sizes = (int(24 / scale), int(16 / scale))
    coarse = torch.from_numpy(generator.standard_normal((1, 4, *sizes), dtype=np.float32))
    larger = torch.nn.Upsample((24, 16), mode="bilinear")(coarse)[0]
    expected = 2**0.5 * drawn((1, 2, 3), latents) + 0.3 * larger
    found = drawn((1, 2, 3), latents, pyramid_levels=2)
    torch.testing.assert_close(found, expected / expected.std(correction=0))


def test_a_perturbation_is_other_noise_of_its_strength() -> None:
    assert noise.perturbation([(0, 0, 0)], SHAPE, Objective()) is None
    fixed, random = (
        torch.stack(
            [
                noise.perturbation([(0, 0, s)], SHAPE, Objective(input_perturbation=0.1, input_perturbation_random=on))[
                    0
                ]
                for s in range(500)
            ]
        )
        for on in (False, True)
    )
    assert fixed.std().item() == pytest.approx(0.1, rel=0.02)
    assert random.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.1)
    plain = torch.stack([drawn((0, 0, s)) for s in range(500)])
    assert abs((plain * fixed).mean().item()) < 0.001
    for one, two in product(range(3), range(3)):
        assert (one == two) or not torch.equal(fixed[one], fixed[two])
