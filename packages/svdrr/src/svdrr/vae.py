"""The autoencoder: 1-channel images of line integrals to latents and back, and what it is trained for.

Intensities follow one fixed global scale, never the image's own: a line integral p becomes x = p / 4 - 1.
"""

import hashlib
from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL
from torch import Tensor

HALF_RANGE = 4.0
"""The line integral that becomes 0; twice as much becomes 1, and more, as in some lateral views, goes on beyond."""


def build(latent_channels: int, block_channels: tuple[int, ...], layers_per_block: int) -> AutoencoderKL:
    """An untrained AutoencoderKL for images [B, 1, N, N]; each block but the last halves the side."""
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * len(block_channels),
        up_block_types=("UpDecoderBlock2D",) * len(block_channels),
        block_out_channels=block_channels,
        layers_per_block=layers_per_block,
        latent_channels=latent_channels,
        norm_num_groups=min(block_channels) // 4,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def loss(vae: AutoencoderKL, line_integrals: Tensor, kl_weight: float, generator: torch.Generator) -> Tensor:
    """Absolute error of the image and of its finite differences, plus a small KL term, per image: [B]."""
    images = line_integrals / HALF_RANGE - 1
    posterior = vae.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(images.device)
    error = vae.decode(posterior.mean + posterior.std * noise).sample - images
    across, down = error.diff(dim=-1), error.diff(dim=-2)
    pixels = sum(part.abs().flatten(1).mean(dim=1) for part in (error, across, down))
    return pixels + kl_weight * posterior.kl() / images[0].numel()


def measure_latents(vae: AutoencoderKL, batches: Sequence[Tensor]) -> None:
    """Sets shift and scaling so that the latents of these line integrals have mean 0 and standard deviation 1."""
    latents = torch.cat([vae.encode(batch / HALF_RANGE - 1).latent_dist.mean for batch in batches])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


def encode(vae: AutoencoderKL, line_integrals: Tensor) -> Tensor:
    """Line integrals [B, 1, N, N] to normalised latents [B, C, h, w]; the posterior's mean, so always the same."""
    latents = vae.encode(line_integrals / HALF_RANGE - 1).latent_dist.mean
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Normalised latents [B, C, h, w] to line integrals [B, 1, N, N], never below 0."""
    images = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    return ((images + 1) * HALF_RANGE).clamp(min=0)


def digest(vae: AutoencoderKL) -> str:
    """SHA-256 of everything that decides the latents: weights and normalisation."""
    total = hashlib.sha256(repr((vae.config.shift_factor, vae.config.scaling_factor)).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        total.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()
