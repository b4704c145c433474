"""Rectified flow: straight paths from data to noise, the velocity along them, and the loss.

Liu et al. 2022 ("Flow Straight and Fast"), with the time sampling of Esser et al. 2024 (Stable Diffusion 3). The
conventions are those of diffusers' FlowMatchEulerDiscreteScheduler: sigma runs from 0 (data) to 1 (noise), the model's
timestep is 1000 sigma, and a step follows the velocity d x / d sigma.
"""

import torch
from torch import Tensor


def draw_sigmas(count: int, shift: float, generator: torch.Generator) -> Tensor:
    """[count] in (0, 1): logit-normal (Esser et al., eq. 19, m = 0 and s = 1), then shifted to the noise (eq. 23).

    A larger image needs more noise to be hidden equally well; their rule for `shift` is the square root of the ratio
    of token counts.
    """
    sigma = torch.randn(count, generator=generator).sigmoid()
    return shift * sigma / (1 + (shift - 1) * sigma)


def path(data: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The point at sigma [B] on the straight line from data to noise, both [B, ...]."""
    sigma = sigma.view(-1, *[1] * (data.ndim - 1))
    return (1 - sigma) * data + sigma * noise


def loss(velocity: Tensor, data: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error to the path's velocity, noise - data, per sample: [B]."""
    return (velocity - (noise - data)).square().flatten(1).mean(dim=1)
