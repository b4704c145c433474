"""The autoencoder: images of line integrals to latents and back, what it is trained for, and where another comes from.

Intensities follow one fixed global scale, never the image's own: a line integral p becomes x = p / 4 - 1.
"""

import math
from collections.abc import Callable, Iterable

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from svdrr import hub
from svdrr.errors import InputError

HALF_RANGE = 4.0
"""The line integral that becomes 0; twice as much becomes 1, and more, as in some lateral views, goes on beyond."""

SMALLEST_SHRINK = 4
"""The equivariance term shrinks a view at most by this factor: as Kouzelis et al. 2025 (EQ-VAE)."""


def build(latent_channels: int, block_channels: tuple[int, ...], layers_per_block: int) -> AutoencoderKL:
    """An untrained AutoencoderKL for images [B, 1, N, N]; each block but the last halves the side.

    Raises InputError for channels that cannot be normalised in groups of about 4.
    """
    groups = min(block_channels) // 4
    if not groups or any(channels % groups for channels in block_channels):
        raise InputError(
            f"an autoencoder of block_channels={list(block_channels)} has no {max(groups, 1)} groups of at least 4 "
            f"channels in all its blocks: give multiples of {4 * max(groups, 1)}"
        )
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * len(block_channels),
        up_block_types=("UpDecoderBlock2D",) * len(block_channels),
        block_out_channels=block_channels,
        layers_per_block=layers_per_block,
        latent_channels=latent_channels,
        norm_num_groups=groups,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def load(name: str) -> AutoencoderKL:
    """A trained AutoencoderKL of one or three image channels, from a folder or from the Hub by its id.

    Raises InputError where there is none, where it is something else, or where its weights are no whole safetensors.
    """

    def read() -> tuple[AutoencoderKL, dict]:
        kind = AutoencoderKL.load_config(name, local_files_only=True).get("_class_name")
        if kind != "AutoencoderKL":
            raise InputError(f"--vae {name} is of the kind {kind}: give an AutoencoderKL of diffusers")
        return AutoencoderKL.from_pretrained(
            name, local_files_only=True, use_safetensors=True, output_loading_info=True
        )

    try:
        vae, found = hub.had(name, hub.DIFFUSERS_FILES, read)
    except hub.UNREADABLE as error:
        raise InputError(
            f"--vae {name} cannot be read ({hub.reason(error)}): give a folder with config.json and "
            "diffusion_pytorch_model.safetensors, or such a model's id on the Hub"
        ) from error
    if missing := found["missing_keys"]:
        raise InputError(f"--vae {name} lacks {len(missing)} of its weights, {missing[0]} among them: get it again")
    channels = vae.config.in_channels, vae.config.out_channels
    if not set(channels) <= {1, 3}:
        raise InputError(f"--vae {name} has {channels[0]} image channels in and {channels[1]} out: 1 or 3 are wanted")
    return vae


def cell(vae: AutoencoderKL) -> int:
    """The side, in pixels, of what one place of the latents stands for."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def loss(
    vae: AutoencoderKL,
    line_integrals: Tensor,
    kl_weight: float,
    gradient_weight: float,
    equivariance_weight: float,
    generator: torch.Generator,
    batch: int,
    rows: slice,
) -> Tensor:
    """What an autoencoder of our own is trained for, per image [B]: see `image_error`, `equivariance`; KL is small.

    A weight of 0 leaves its term out. vae: of one image channel. batch, rows: the images are these B rows of a batch of
    this size, for the whole of which noise is drawn, so that a row has the same whoever computes it.
    """
    images = line_integrals / HALF_RANGE - 1
    posterior = vae.encode(images).latent_dist
    noise = torch.randn(batch, *posterior.mean.shape[1:], generator=generator)[rows].to(images.device)
    latents = posterior.mean + posterior.std * noise

    def decode(latents: Tensor) -> Tensor:
        return vae.decode(latents).sample

    total = image_error(decode(latents), images, gradient_weight) + kl_weight * posterior.kl() / images[0].numel()
    if equivariance_weight:
        total = total + equivariance_weight * equivariance(decode, latents, images, gradient_weight, generator)
    return total


def image_error(images: Tensor, truth: Tensor, gradient_weight: float) -> Tensor:
    """Mean absolute error of images [B, 1, N, N], plus that of their differences along rows and columns: [B]."""
    error = images - truth
    total = error.abs().flatten(1).mean(dim=1)
    if gradient_weight:
        for along in (-1, -2):
            total = total + gradient_weight * error.diff(dim=along).abs().flatten(1).mean(dim=1)
    return total


def equivariance(
    decode: Callable[[Tensor], Tensor],
    latents: Tensor,
    images: Tensor,
    gradient_weight: float,
    generator: torch.Generator,
) -> Tensor:
    """The error of decoding turned and shrunk latents [B, C, h, h] against images [B, 1, N, N] changed alike: [B].

    Quarter turns and scales only, as EQ-VAE has them. A mirrored latent would do no harm, as the autoencoder knows
    no sides, but quarter turns already tie both axes, and nothing after it may ever meet a mirrored patient.
    """
    side = latents.shape[-1]
    smallest = -(-side // SMALLEST_SHRINK)
    new_side = int(torch.randint(smallest, side + 1, (), generator=generator))
    quarter_turns = int(torch.randint(4, (), generator=generator))
    truth = changed(images, quarter_turns, images.shape[-1] // side * new_side)
    return image_error(decode(changed(latents, quarter_turns, new_side)), truth, gradient_weight)


def changed(images: Tensor, quarter_turns: int, side: int) -> Tensor:
    """Images [B, C, N, N] turned, and shrunk to [B, C, side, side] by exact averages: a detector of larger pixels."""
    before = images.shape[-1]
    edges = torch.linspace(0, before, side + 1, device=images.device)[:, None]
    first = torch.arange(before, device=images.device)
    covered = (torch.minimum(edges[1:], first + 1) - torch.maximum(edges[:-1], first)).clamp(min=0) * (side / before)
    with torch.autocast(images.device.type, enabled=False):  # what others are compared with is not to be rounded
        return covered @ images.float().rot90(quarter_turns, dims=(-2, -1)) @ covered.T


def measure_latents(vae: AutoencoderKL, batches: Iterable[Tensor]) -> None:
    """Sets shift and scaling so that the latents of these line integrals have mean 0 and standard deviation 1.

    Raises InputError where they are no numbers, or all the same.
    """
    latents = torch.cat([_mode(vae, batch) for batch in batches])
    deviation = latents.std().item()
    if not 0 < deviation < math.inf:
        raise InputError(f"the autoencoder's latents have a standard deviation of {deviation:g}: use another")
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / deviation)


def encode(vae: AutoencoderKL, line_integrals: Tensor) -> Tensor:
    """Line integrals [B, 1, N, N] to normalised latents [B, C, h, w]; the posterior's mean, so always the same."""
    return (_mode(vae, line_integrals) - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def _mode(vae: AutoencoderKL, line_integrals: Tensor) -> Tensor:
    """Latents on the autoencoder's own scale; where it takes colours, all channels are the same grey."""
    images = (line_integrals / HALF_RANGE - 1).expand(-1, vae.config.in_channels, -1, -1)
    return vae.encode(images).latent_dist.mode()


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Normalised latents [B, C, h, w] to line integrals [B, 1, N, N], never below 0."""
    images = vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).sample.mean(
        dim=1, keepdim=True
    )
    return ((images + 1) * HALF_RANGE).clamp(min=0)


def digest(vae: AutoencoderKL) -> str:
    """SHA-256 of everything that decides the latents: weights and normalisation."""
    return hub.digest((vae.config.shift_factor, vae.config.scaling_factor), vae)
