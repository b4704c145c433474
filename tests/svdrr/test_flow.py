"""The conventions of both objectives are those of the schedulers that sample them."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch.distributions import Normal, kl_divergence

from svdrr import flow
from svdrr.flow import NUM_TIMESTEPS, OBJECTIVES
from svdrr.pipeline import scheduler


def test_the_true_velocity_leads_the_scheduler_to_the_data() -> None:
    """The path is straight, so Euler's steps are exact: 1e-5 is float32's rounding over ten steps."""
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 3, 2, 8, 8, generator=generator)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0.1, 10))
    latents = noise
    for timestep in scheduler.timesteps:
        sigma = (timestep / NUM_TIMESTEPS).expand(3)
        assert torch.allclose(latents, flow.path(data, noise, sigma), atol=1e-5)
        latents = scheduler.step(noise - data, timestep, latents).prev_sample
    assert torch.allclose(latents, data, atol=1e-5)


def test_the_loss_is_zero_at_the_target_and_its_square_beside_it() -> None:
    target = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    everywhere = torch.ones(4, 8, 8)
    assert torch.equal(flow.loss(target, target, everywhere), torch.zeros(4))
    assert flow.loss(target + 3, target, everywhere) == pytest.approx(torch.full((4,), 9.0), rel=1e-5)


def test_the_loss_is_the_mean_over_the_cells_by_their_weights() -> None:
    """Errors 1, 2, 3 and 100 in a row, of weights 1, 1/2, 1/2 and 0; a sample without weight has no loss and no nan."""
    error = torch.tensor([1.0, 2.0, 3.0, 100.0]).expand(2, 3, 1, 4).clone().requires_grad_()
    weight = torch.tensor([[[1.0, 0.5, 0.5, 0.0]], [[0.0, 0.0, 0.0, 0.0]]])
    losses = flow.loss(error, torch.zeros_like(error), weight)
    assert losses.tolist() == pytest.approx([(1 + 4 / 2 + 9 / 2) / 2, 0])
    losses.sum().backward()
    assert error.grad.isfinite().all()
    assert (error.grad[0, :, 0, 3] == 0).all()
    assert (error.grad[1] == 0).all()


def test_the_variances_term_is_the_divergence_of_two_gaussians() -> None:
    """Of the true step back, by Bayes' rule from the forward one, and the model's; of the last, the data's density.

    1e-4: the levels of noise are made in single precision.
    """
    generator = torch.Generator().manual_seed(0)
    data, noise, predicted = torch.randn(3, 4, 2, 3, 3, generator=generator, dtype=torch.float64)
    variance = torch.rand(4, 2, 3, 3, generator=generator, dtype=torch.float64) * 2 - 1
    timestep, betas = torch.tensor([0, 1, 500, 999]), torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    found = flow.variance_loss(predicted - noise, variance, timestep, torch.ones(4, 3, 3))

    def step_back(data: torch.Tensor, noisy: torch.Tensor, t: int) -> Normal:
        """From x_t to x_(t-1): a Gaussian around the data, times one around what the forward step takes to x_t."""
        before = (1 - betas[:t]).prod()
        precision = 1 / (1 - before) + (1 - betas[t]) / betas[t]
        mean = (before.sqrt() * data / (1 - before) + (1 - betas[t]).sqrt() * noisy / betas[t]) / precision
        return Normal(mean, precision.rsqrt())

    for row, t in enumerate(timestep.tolist()):
        alpha, sigma = (1 - betas[: t + 1]).prod().sqrt(), (1 - (1 - betas[: t + 1]).prod()).sqrt()
        noisy = alpha * data[row] + sigma * noise[row]
        guess, smallest = (noisy - sigma * predicted[row]) / alpha, step_back(data[row], noisy, max(t, 1)).variance
        share = (variance[row] + 1) / 2
        deviation = (betas[t] ** share * smallest ** (1 - share)).sqrt()
        if t == 0:
            expected = -Normal(guess, deviation).log_prob(data[row])
        else:
            expected = kl_divergence(step_back(data[row], noisy, t), Normal(step_back(guess, noisy, t).mean, deviation))
        assert found[row].item() == pytest.approx(expected.mean().item() / math.log(2), rel=1e-4), t


def test_the_variances_term_is_zero_at_the_true_step_and_counts_cells_by_their_weights() -> None:
    """Of two cells, the one without weight is as wrong as can be."""
    error, variance = torch.zeros(2, 1, 1, 2), -torch.ones(2, 1, 1, 2)
    error[..., 1], variance[..., 1] = 10, 5
    weight = torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]]])
    losses = flow.variance_loss(error, variance, torch.tensor([500, 500]), weight)
    assert losses.tolist() == pytest.approx([0, 0], abs=1e-6)
    assert flow.variance_loss(error, variance, torch.tensor([500, 500]), torch.ones(2, 1, 2)).min() > 0.1


def test_noise_levels_are_logit_normal_and_shift_as_the_scheduler_does() -> None:
    """20000 draws: the median of a logit-normal is 1/2, and 68.3 % lie within one standard deviation."""
    quantile = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    plain = flow.velocity_timestep(quantile, 1.0) / NUM_TIMESTEPS
    assert plain.median().item() == pytest.approx(0.5, abs=0.01)
    within = (plain.logit().abs() < 1).float().mean().item()
    assert within == pytest.approx(0.683, abs=0.01)
    shifted = flow.velocity_timestep(quantile, 3.0) / NUM_TIMESTEPS
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=plain[:5].tolist())
    assert torch.allclose(scheduler.sigmas[:5], shifted[:5], atol=1e-6)


@pytest.mark.parametrize("prediction", OBJECTIVES)
def test_a_task_is_a_point_of_the_path_and_what_leads_back(prediction: str) -> None:
    """Noise alone and data alone pass through the same points: the path is linear in both."""
    data, noise = torch.randn(2, 5, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros_like(data)

    timestep = OBJECTIVES[prediction].timestep(torch.tensor([0.0, 0.1, 0.5, 0.9, 1 - 2**-24]), 2.0)
    noised = OBJECTIVES[prediction].noised
    both, of_data, of_noise = (noised(*ends, timestep) for ends in ((data, noise), (data, nothing), (nothing, noise)))
    assert torch.allclose(both.latents, of_data.latents + of_noise.latents, atol=1e-6)
    assert torch.allclose(both.target, of_data.target + of_noise.target, atol=1e-6)
    assert ((timestep >= 0) & (timestep <= NUM_TIMESTEPS)).all()
    assert timestep.tolist() == sorted(timestep.tolist())


@pytest.mark.parametrize("prediction", OBJECTIVES)
def test_the_linear_guess_is_that_of_least_squares(prediction: str) -> None:
    """Against 100,000 samples of unit variance at each of five noise levels; standard errors are about 3e-3."""
    data, noise = torch.randn(2, 5, 100_000, generator=torch.Generator().manual_seed(0))
    timestep = OBJECTIVES[prediction].timestep(torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]), 1.0)
    noised = OBJECTIVES[prediction].noised(data, noise, timestep)
    slope, spread = OBJECTIVES[prediction].linear_guess(timestep)
    x, target = noised.latents, noised.target
    assert torch.allclose(slope, (x * target).mean(1) / x.square().mean(1), atol=0.02)
    assert torch.allclose(spread, (target - slope[:, None] * x).std(1), atol=0.02)


def test_the_diffusion_is_that_of_its_scheduler() -> None:
    data, noise = torch.randn(2, 4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor([0, 1, 500, 999])
    reference = DDPMScheduler.from_config(scheduler("epsilon", shift=1.0).config)  # DPM-Solver's own wants a spacing
    expected = reference.add_noise(data, noise, timestep)
    assert torch.allclose(flow.diffused(data, noise, timestep), expected, atol=1e-6)


@pytest.mark.parametrize("prediction", OBJECTIVES)
def test_the_ideal_denoiser_of_a_gaussian_gives_the_gaussian(prediction: str) -> None:
    """Data of mean 0.7 and deviation 0.5, whose ideal predictions are linear in x. 10,000 samples, 100 steps.

    The mean is off by its standard error of 5e-3 and by what noise leaves of it: the diffusion ends at alpha = 0.006.
    """
    mean, deviation = 0.7, 0.5
    sampler = scheduler(prediction, shift=1.0)
    if prediction == "velocity":
        sampler.set_timesteps(sigmas=np.linspace(1, 0.01, 100))
    else:
        sampler.set_timesteps(100)
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    for timestep in sampler.timesteps:
        if prediction == "velocity":
            sigma = timestep / NUM_TIMESTEPS
            alpha = 1 - sigma
        else:
            alpha, sigma = flow.alpha_sigma(timestep)
        surprise = (x - alpha * mean) / (alpha**2 * deviation**2 + sigma**2)
        noise, data = sigma * surprise, mean + alpha * deviation**2 * surprise
        x = sampler.step(noise - data if prediction == "velocity" else noise, timestep, x).prev_sample
    assert x.mean().item() == pytest.approx(mean, abs=0.02)
    assert x.std().item() == pytest.approx(deviation, abs=0.02)


def test_the_diffusion_draws_every_whole_timestep_equally_often() -> None:
    """20,000 draws, of which a tenth falls into each tenth, +- 2 % of all being nine standard errors."""
    quantile = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    timestep = OBJECTIVES["epsilon"].timestep(quantile, 5.0)
    assert (timestep.dtype, timestep.min(), timestep.max()) == (torch.int64, 0, 999)
    assert torch.allclose(timestep.float().histc(10, 0, 1000) / 20_000, torch.tensor(0.1), atol=0.02)
