"""What a transformer can be trained to predict: the velocity of a rectified flow, or the noise of a diffusion.

Both take data to noise along a path, alpha(t) data + sigma(t) noise, and number its points by a timestep between 0
(data) and NUM_TIMESTEPS (noise). OBJECTIVES holds what differs.

- velocity: straight paths (Liu et al. 2022, "Flow Straight and Fast"), with the time sampling of Esser et al. 2024
  (Stable Diffusion 3). The conventions are those of diffusers' FlowMatchEulerDiscreteScheduler: sigma runs from 0 to
  1, the timestep is 1000 sigma, and a step follows the velocity d x / d sigma.
- epsilon: the noise itself, over the linear betas of Ho et al. 2020 (DDPM), which PixArt and SV-DRR use. Timesteps are
  the whole numbers 0 to 999 of diffusers' schedulers.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000
BETA_RANGE = (1e-4, 0.02)


class Noised(NamedTuple):
    """A training task: points [B, ...] of B paths, and the [B, ...] that is to be predicted there."""

    latents: Tensor
    target: Tensor


class Objective(NamedTuple):
    """timestep: (quantile [B] in 0 to 1, shift) to the timesteps [B] below which this share of training takes place.

    noised: (data, noise, timestep) to a training task.

    linear_guess: timesteps to (slope, spread), each as they are shaped: for data of unit variance, slope x is the best
    linear guess of the target from the point x, and spread is the standard deviation of what it misses.
    """

    timestep: Callable[[Tensor, float], Tensor]
    noised: Callable[[Tensor, Tensor, Tensor], Noised]
    linear_guess: Callable[[Tensor], tuple[Tensor, Tensor]]


def velocity_timestep(quantile: Tensor, shift: float) -> Tensor:
    """Of sigmas that are logit-normal (Esser et al., eq. 19, m = 0 and s = 1), then shifted to the noise (eq. 23).

    A larger image needs more noise to be hidden equally well; their rule for `shift` is the square root of the ratio
    of token counts.
    """
    sigma = torch.special.ndtri(quantile).sigmoid()
    return NUM_TIMESTEPS * shift * sigma / (1 + (shift - 1) * sigma)


def path(data: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The point at sigma [B] on the straight line from data to noise, both [B, ...]."""
    sigma = _beside(sigma, data)
    return (1 - sigma) * data + sigma * noise


def velocity_noised(data: Tensor, noise: Tensor, timestep: Tensor) -> Noised:
    """Points of straight paths; the target is noise - data."""
    return Noised(path(data, noise, timestep / NUM_TIMESTEPS), noise - data)


def velocity_guess(timestep: Tensor) -> tuple[Tensor, Tensor]:
    """See Objective."""
    sigma = timestep / NUM_TIMESTEPS
    variance = (1 - sigma) ** 2 + sigma**2
    return (2 * sigma - 1) / variance, variance**-0.5


def alpha_sigma(timestep: Tensor) -> tuple[Tensor, Tensor]:
    """How much of data and of noise is left at whole timesteps of the diffusion; alpha^2 + sigma^2 = 1."""
    betas = torch.linspace(*BETA_RANGE, NUM_TIMESTEPS, device=timestep.device)
    signal = (1 - betas).cumprod(dim=0)[timestep.long()]
    return signal.sqrt(), (1 - signal).sqrt()


def diffused(data: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """The point at the timestep [B] on the diffusion's path from data to noise, both [B, ...]."""
    alpha, sigma = alpha_sigma(_beside(timestep, data))
    return alpha * data + sigma * noise


def epsilon_timestep(quantile: Tensor, shift: float) -> Tensor:
    """Uniform whole timesteps, which the betas already spread: `shift` is the flow's alone."""
    return (quantile * NUM_TIMESTEPS).long().clamp(max=NUM_TIMESTEPS - 1)


def epsilon_noised(data: Tensor, noise: Tensor, timestep: Tensor) -> Noised:
    """Points of the diffusion; the target is the noise."""
    return Noised(diffused(data, noise, timestep), noise)


def epsilon_guess(timestep: Tensor) -> tuple[Tensor, Tensor]:
    """See Objective."""
    alpha, sigma = alpha_sigma(timestep)
    return sigma, alpha


OBJECTIVES = {
    "velocity": Objective(velocity_timestep, velocity_noised, velocity_guess),
    "epsilon": Objective(epsilon_timestep, epsilon_noised, epsilon_guess),
}


def loss(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean squared error of [B, C, h, w] per sample, its cells weighted by [B, h, w]: [B]; 0 where no cell counts."""
    error = (prediction - target).square().mean(dim=1)
    least = torch.finfo(error.dtype).tiny
    return (error * weight).sum(dim=(1, 2)) / weight.sum(dim=(1, 2)).clamp(min=least)


def _beside(levels: Tensor, data: Tensor) -> Tensor:
    return levels.view(-1, *[1] * (data.ndim - 1))
