"""The flow's conventions are those of the scheduler that samples it."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from svdrr import flow
from svdrr.transformer import NUM_TIMESTEPS


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


def test_the_loss_is_zero_at_the_true_velocity_and_its_square_beside_it() -> None:
    data, noise = torch.randn(2, 4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(flow.loss(noise - data, data, noise), torch.zeros(4))
    assert flow.loss(noise - data + 3, data, noise) == pytest.approx(torch.full((4,), 9.0), rel=1e-5)


def test_noise_levels_are_logit_normal_and_shift_as_the_scheduler_does() -> None:
    """20000 draws: the median of a logit-normal is 1/2, and 68.3 % lie within one standard deviation."""
    plain = flow.draw_sigmas(20000, 1.0, torch.Generator().manual_seed(0))
    assert plain.median().item() == pytest.approx(0.5, abs=0.01)
    within = (plain.logit().abs() < 1).float().mean().item()
    assert within == pytest.approx(0.683, abs=0.01)
    shifted = flow.draw_sigmas(20000, 3.0, torch.Generator().manual_seed(0))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=plain[:5].tolist())
    assert torch.allclose(scheduler.sigmas[:5], shifted[:5], atol=1e-6)
