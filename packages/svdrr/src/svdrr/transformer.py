"""The view-conditioned diffusion transformer: a noisy target latent, a source latent and a pose in; a velocity out.

Two streams carry the source, as in SV-DRR (Xie et al. 2025): cross-attention to the source's tokens and the pose's,
and the source latent concatenated to the noisy one. Blocks follow PixArt-alpha (Chen et al. 2023): adaLN-single,
self-attention, cross-attention, MLP; queries and keys are RMS-normalised (Dehghani et al. 2023).
"""

import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional

from svdrr.pose import POSE_FEATURES, Views, pose_features, ray_map

RAY_CHANNELS = 6
TIME_FEATURES = 256
NUM_TIMESTEPS = 1000
POSITION_SPAN = 32.0
"""Length of the image's side in the unit of the position code, whatever its resolution."""


class ViewTransformer(ModelMixin, ConfigMixin):
    """Predicts the velocity of the rectified flow at a noisy latent, given one source view and both poses.

    The same weights work at any resolution: positions are coded by where a token lies in the image, not by its index.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 4,
        patch_size: int = 2,
        num_layers: int = 12,
        num_heads: int = 6,
        head_dim: int = 64,
    ) -> None:
        super().__init__()
        width, area = num_heads * head_dim, patch_size**2
        self.patch = nn.Linear(area * latent_channels, width)
        # the second stream and the rays start silent, and are learned as far as they help
        self.patch_condition = _zeroed(nn.Linear(area * (latent_channels + 2 * RAY_CHANNELS), width, bias=False))
        self.source_stem = nn.Sequential(
            nn.Linear(area * (latent_channels + RAY_CHANNELS), width), nn.SiLU(), nn.Linear(width, width)
        )
        self.source_norm = nn.LayerNorm(width)
        self.pose_token = nn.Sequential(nn.Linear(POSE_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.null_token = nn.Parameter(torch.zeros(width))
        self.null_latent = nn.Parameter(torch.zeros(latent_channels))

        self.time_embedding = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.pose_embedding = nn.Sequential(nn.Linear(POSE_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(num_layers))

        self.final_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.final_modulation = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.final = _zeroed(nn.Linear(width, area * latent_channels))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        source_latent: Tensor,
        source_rays: Tensor,
        target_rays: Tensor,
        pose: Tensor,
        drop_source: Tensor | None = None,
    ) -> Tensor:
        """The velocity [B, C, h, w] at `hidden_states` [B, C, h, w] and `timestep` [B], 1000 sigma.

        source_latent: [B, C, h, w], scaled like the target's. source_rays, target_rays: [B, 6, h, w] of pose.ray_map.
        pose: [B, POSE_FEATURES]. drop_source: [B] bool; where true, both streams of the source are replaced by the
        learned null condition that guidance subtracts; the poses stay.
        """
        rows, columns = (side // self.config.patch_size for side in hidden_states.shape[-2:])
        position = position_code(rows, columns, self.null_token.shape[0], hidden_states.device)

        # stream 1: tokens of the source and of the pose, for cross-attention
        source = self.source_stem(self._patches(torch.cat([source_latent, source_rays], dim=1)))
        source = self.source_norm(source) + position
        if drop_source is not None:
            source = torch.where(drop_source[:, None, None], self.null_token, source)
            null_latent = self.null_latent[:, None, None]
            source_latent = torch.where(drop_source[:, None, None, None], null_latent, source_latent)
        context = torch.cat([source, self.pose_token(pose)[:, None]], dim=1)

        # stream 2: the source latent beside the noisy one, with the rays of both views
        beside = torch.cat([source_latent, source_rays, target_rays], dim=1)
        tokens = self.patch(self._patches(hidden_states)) + self.patch_condition(self._patches(beside)) + position

        # time and pose set the scales of every block
        embedding = self.time_embedding(time_code(timestep)) + self.pose_embedding(pose)
        modulation = self.modulation(embedding).unflatten(1, (6, -1))
        for block in self.blocks:
            tokens = block(tokens, context, modulation)

        shift, scale = (self.final_modulation + embedding[:, None]).unbind(dim=1)
        tokens = self.final(_modulated(self.final_norm(tokens), shift, scale))
        residual = functional.pixel_shuffle(tokens.mT.unflatten(2, (rows, columns)), self.config.patch_size)

        # For data of unit variance the best linear guess of the velocity from the noisy latent is known, and so is the
        # size of what it misses, which is left to the network (Karras et al. 2022, eq. 7, for the straight path).
        sigma = (timestep / NUM_TIMESTEPS)[:, None, None, None]
        variance = (1 - sigma) ** 2 + sigma**2
        return (2 * sigma - 1) / variance * hidden_states + variance**-0.5 * residual

    def _patches(self, image: Tensor) -> Tensor:
        """[B, C, h, w] to tokens [B, h w / patch_size^2, C patch_size^2]."""
        return functional.pixel_unshuffle(image, self.config.patch_size).flatten(2).mT


def condition(source_latent: Tensor, source: Views, target: Views, size: int) -> dict[str, Tensor]:
    """What training and sampling tell the transformer besides the noisy latent: keywords of its `forward`.

    source_latent: [B, C, h, w], of images of `size` pixels; source, target: their B views.
    """
    cells, dtype = source_latent.shape[-1], source_latent.dtype
    return {
        "source_latent": source_latent,
        "source_rays": ray_map(source, cells).to(dtype),
        "target_rays": ray_map(target, cells).to(dtype),
        "pose": pose_features(source, target, size).to(dtype),
    }


class Block(nn.Module):
    """Self-attention and MLP, scaled and gated by time and pose; between them, cross-attention to the source."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attention_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, num_heads)
        self.cross_norm = nn.LayerNorm(width)
        self.cross_attention = Attention(width, num_heads)
        self.mlp_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor, context: Tensor, modulation: Tensor) -> Tensor:
        """tokens: [B, T, width]; context: [B, S, width]; modulation: [B, 6, width], shared by all blocks."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (self.modulation + modulation).unbind(dim=1)
        hidden = _modulated(self.attention_norm(tokens), shift_1, scale_1)
        tokens = tokens + gate_1[:, None] * self.attention(hidden, hidden)
        tokens = tokens + self.cross_attention(self.cross_norm(tokens), context)
        hidden = _modulated(self.mlp_norm(tokens), shift_2, scale_2)
        return tokens + gate_2[:, None] * self.mlp(hidden)


class Attention(nn.Module):
    """Multi-head attention of tokens [B, T, width] to context [B, S, width], with RMS-normalised queries and keys."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.query_norm = nn.RMSNorm(width // num_heads, eps=1e-6)
        self.key_norm = nn.RMSNorm(width // num_heads, eps=1e-6)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        query = self.query(tokens).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        key, value = self.key_value(context).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(self.query_norm(query), self.key_norm(key), value)
        return self.out(mixed.transpose(1, 2).flatten(2))


def position_code(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """Sines and cosines of each token's place in the image, [rows * columns, width]; the same at any resolution."""
    frequency = 100.0 ** -(torch.arange(width // 4, device=device) * 4 / width)
    row = (torch.arange(rows, device=device) + 0.5) / rows * POSITION_SPAN
    column = (torch.arange(columns, device=device) + 0.5) / columns * POSITION_SPAN
    row_phase = (row[:, None] * frequency)[:, None].expand(-1, columns, -1)
    column_phase = (column[:, None] * frequency)[None].expand(rows, -1, -1)
    code = [row_phase.sin(), row_phase.cos(), column_phase.sin(), column_phase.cos()]
    return torch.cat(code, dim=-1).flatten(0, 1)


def time_code(timestep: Tensor) -> Tensor:
    """Sines and cosines of the timestep (0 to 1000), [B, TIME_FEATURES] (Vaswani et al. 2017)."""
    half = TIME_FEATURES // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, device=timestep.device) / half)
    phase = timestep.float()[:, None] * frequency
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


def _modulated(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return tokens * (1 + scale[:, None]) + shift[:, None]


def _zeroed(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
