"""What a transformer can be trained to predict: the velocity of a rectified flow, or the noise of a diffusion.

Both take data to noise along a path, alpha(t) data + sigma(t) noise, and number its points by a timestep between 0
(data) and NUM_TIMESTEPS (noise). OBJECTIVES holds what differs.

- velocity: straight paths (Liu et al. 2022, "Flow Straight and Fast"), with the time sampling of Esser et al. 2024
  (Stable Diffusion 3). The conventions are those of diffusers' FlowMatchEulerDiscreteScheduler: sigma runs from 0 to
  1, the timestep is 1000 sigma, and a step follows the velocity d x / d sigma.
- epsilon: the noise itself, over the linear betas of Ho et al. 2020 (DDPM), which PixArt and SV-DRR use. Timesteps are
  the whole numbers 0 to 999 of diffusers' schedulers. Beside it, the variance of a step back can be learned: see
  `variance_loss`.
"""

import math
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
    return _weighted((prediction - target).square(), weight)


def variance_loss(error: Tensor, variance: Tensor, timestep: Tensor, weight: Tensor) -> Tensor:
    """The term of the variational bound at the timestep [B], in bits per number (Nichol & Dhariwal 2021, eq. 4 to 7).

    It is learned with a variance [B, C, h, w] that says where between beta_t's logarithm (1) and that of the true
    step's (-1) the step's lies (eq. 15). error: the predicted noise less the true one, [B, C, h, w], without a
    gradient: the mean is the squared error's business. weight and result: as of `loss`. Their factor of 0.001 on the
    sum over 1000 timesteps (eq. 16) is 1 on one of them.

    The last step ends in the data, which are no 8-bit images here: its term is the density, and may be negative.
    """
    betas = torch.linspace(*BETA_RANGE, NUM_TIMESTEPS, device=error.device, dtype=torch.float64)
    signal = (1 - betas).cumprod(dim=0)
    before = torch.cat([signal.new_ones(1), signal[:-1]])
    true_variance = betas * (1 - before) / (1 - signal)
    true_variance[0] = true_variance[1]  # the last step's is 0, which has no logarithm
    mean_per_error = betas / ((1 - betas) * (1 - signal)).sqrt()

    def at(values: Tensor) -> Tensor:
        return _beside(values[timestep.long()], error).to(error.dtype)

    share = (variance.to(error.dtype) + 1) / 2
    log_true = at(true_variance.log())
    log_variance = share * at(betas.log()) + (1 - share) * log_true
    squared = (at(mean_per_error) * error).square() * torch.exp(-log_variance)
    divergence = (log_variance - log_true + torch.exp(log_true - log_variance) - 1 + squared) / 2
    density = (math.log(2 * math.pi) + log_variance + squared) / 2
    return _weighted(torch.where(_beside(timestep, error) == 0, density, divergence) / math.log(2), weight)


def _weighted(values: Tensor, weight: Tensor) -> Tensor:
    of_cells = values.mean(dim=1)
    least = torch.finfo(of_cells.dtype).tiny
    return (of_cells * weight).sum(dim=(1, 2)) / weight.sum(dim=(1, 2)).clamp(min=least)


def _beside(levels: Tensor, data: Tensor) -> Tensor:
    return levels.view(-1, *[1] * (data.ndim - 1))
