"""The view-conditioned diffusion transformer: a noisy target latent, a source latent and a pose in; a prediction out.

Two streams carry the source, as in SV-DRR (Xie et al. 2025): cross-attention to the source's tokens and the pose's,
and the source latent concatenated to the noisy one. Blocks follow PixArt-alpha (Chen et al. 2023): adaLN-single,
self-attention, cross-attention, MLP; queries and keys are RMS-normalised (Dehghani et al. 2023). Each switch of the
constructor leads one step back to the model of SV-DRR, which is a PixArt with one token to attend to.
"""

import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional

from svdrr import flow
from svdrr.errors import InputError
from svdrr.pose import POSE_FEATURES, RELATIVE_POSE_FEATURES, Views, pose_features, ray_map, relative_pose

RAY_CHANNELS = 6
TIME_FEATURES = 256
POSITION_SPAN = 32.0
"""Length of the image's side in the unit of the position code, whatever its resolution."""


class ViewTransformer(ModelMixin, ConfigMixin):
    """Predicts the velocity, or the noise, of a noisy latent, given one source view and both poses.

    The same weights work at any resolution: positions are coded by where a token lies in the image, not by its index.

    latent_channels, patch_size, num_layers, num_heads, head_dim: the shape.
    prediction: a name of flow.OBJECTIVES. preconditioned: its best linear guess is built in, and the rest is learned.
    learned_variance: of a diffusion's steps back, beside the prediction (see flow.variance_loss).
    source_scale, source_shift: the source's latent is multiplied by one and moved by the other, to undo the
        normalisation of latents where a model wants its source without.
    pooled_source: cross-attention sees one token, a linear map of a pooled source and the pose, not many and one.
    image_embedding: length of the vector that stands for the pooled source, given from outside; without, it is the
        mean of our own tokens.
    ray_maps: the rays of both views come with the latents.
    absolute_pose: `condition` is to tell the views' own azimuths; without, only how they lie to one another.
    pose_modulation: the pose sets the scales of every block together with the time.
    qk_norm, cross_norm: RMS norm of queries and keys; layer norm before cross-attention.
    pixart_positions: positions are coded as PixArt's weights know them. norm_eps: of layer norms without weights.
    learned_null: what stands for a dropped source is learned; without, it is zero.
    coarse: a coarse mean of the target's latent (see coarse.py) is to come with the source's.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 4,
        patch_size: int = 2,
        num_layers: int = 12,
        num_heads: int = 6,
        head_dim: int = 64,
        prediction: str = "velocity",
        preconditioned: bool = True,
        learned_variance: bool = False,
        source_scale: float = 1.0,
        source_shift: float = 0.0,
        pooled_source: bool = False,
        image_embedding: int | None = None,
        ray_maps: bool = True,
        absolute_pose: bool = True,
        pose_modulation: bool = True,
        qk_norm: bool = True,
        cross_norm: bool = True,
        pixart_positions: bool = False,
        norm_eps: float = 1e-5,
        learned_null: bool = True,
        coarse: bool = False,
    ) -> None:
        super().__init__()
        if prediction not in flow.OBJECTIVES:
            raise InputError(f"no prediction {prediction!r}: it is one of {', '.join(flow.OBJECTIVES)}")
        if learned_variance and prediction != "epsilon":
            raise InputError(
                f"a learned_variance is a diffusion's, and this model predicts the {prediction}: turn it off"
            )
        if image_embedding and not pooled_source:
            raise InputError("an image_embedding is one token's: it needs pooled_source")
        width, area = num_heads * head_dim, patch_size**2
        if width % 4:
            raise InputError(
                f"a model of num_heads={num_heads} and head_dim={head_dim} is {width} wide, and places need sines and "
                "cosines of rows and columns: give a multiple of 4"
            )
        ray_channels = RAY_CHANNELS if ray_maps else 0
        pose_size = POSE_FEATURES if absolute_pose else RELATIVE_POSE_FEATURES
        source_size = image_embedding or width
        self.patch = nn.Linear(area * latent_channels, width)
        # the second stream and the rays start silent, and are learned as far as they help
        beside = latent_channels + 2 * ray_channels + (latent_channels if coarse else 0)
        self.patch_condition = _zeroed(nn.Linear(area * beside, width, bias=False))
        if not image_embedding:
            self.source_stem = _perceptron(area * (latent_channels + ray_channels), width)
            self.source_norm = nn.LayerNorm(width)
        if pooled_source:
            self.pooled_token = _passing(nn.Linear(source_size + pose_size, width))
        else:
            self.pose_token = _perceptron(pose_size, width)
        if learned_null:
            self.null_token = nn.Parameter(torch.zeros(source_size))
            self.null_latent = nn.Parameter(torch.zeros(latent_channels))
        if learned_null and coarse:
            self.null_coarse = nn.Parameter(torch.zeros(latent_channels))

        self.time_embedding = _perceptron(TIME_FEATURES, width)
        if pose_modulation:
            self.pose_embedding = _perceptron(pose_size, width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(width, num_heads, qk_norm, cross_norm, norm_eps) for _ in range(num_layers))

        self.final_norm = nn.LayerNorm(width, norm_eps, elementwise_affine=False)
        self.final_modulation = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.final = _zeroed(nn.Linear(width, area * latent_channels * (2 if learned_variance else 1)))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        source_latent: Tensor,
        source_rays: Tensor,
        target_rays: Tensor,
        pose: Tensor,
        image_embedding: Tensor | None = None,
        coarse_latent: Tensor | None = None,
        drop_source: Tensor | None = None,
    ) -> Tensor:
        """The prediction [B, C, h, w] at `hidden_states` [B, C, h, w] and `timestep` [B], 0 to flow.NUM_TIMESTEPS.

        With a learned variance there are as many channels again, [B, 2 C, h, w], for that.

        source_latent: [B, C, h, w], normalised like the target's. source_rays, target_rays: [B, 6, h, w] of
        pose.ray_map. pose: [B, P], as `condition` makes it. image_embedding: [B, E], for a model that was made for it.
        coarse_latent: [B, C, h, w], likewise. drop_source: [B] bool; where true, both streams of the source, and what
        was predicted from it, are replaced by the null condition that guidance subtracts; the poses stay. Or [B, 2],
        for the first stream, and for the second with what was predicted.
        Raises InputError without an image_embedding or a coarse_latent that the model needs.
        """
        rows, columns = (side // self.config.patch_size for side in hidden_states.shape[-2:])
        width, device = self.final_modulation.shape[1], hidden_states.device
        position = position_code(rows, columns, width, device, self.config.pixart_positions)
        source_latent = source_latent * self.config.source_scale + self.config.source_shift
        if not self.config.ray_maps:
            source_rays, target_rays = source_rays[:, :0], target_rays[:, :0]

        # stream 1: tokens of the source and of the pose, for cross-attention
        if self.config.image_embedding:
            if image_embedding is None:
                raise InputError(
                    f"this model needs an image_embedding [B, {self.config.image_embedding}] of the source"
                )
            source = image_embedding[:, None]
        else:
            source = self.source_stem(self._patches(torch.cat([source_latent, source_rays], dim=1)))
            source = self.source_norm(source) + position
        if self.config.pooled_source:
            source = source.mean(dim=1, keepdim=True)
        if drop_source is not None:
            is_learned = self.config.learned_null
            drop_tokens, drop_latent = drop_source.view(len(pose), -1).expand(-1, 2).unbind(dim=1)
            drop_tokens, drop_latent = drop_tokens[:, None, None], drop_latent[:, None, None, None]
            source = torch.where(drop_tokens, self.null_token if is_learned else 0.0, source)
            null_latent = self.null_latent[:, None, None] if is_learned else 0.0
            source_latent = torch.where(drop_latent, null_latent, source_latent)
        if self.config.pooled_source:
            context = self.pooled_token(torch.cat([source, pose[:, None]], dim=2))
        else:
            context = torch.cat([source, self.pose_token(pose)[:, None]], dim=1)

        # stream 2: the source latent beside the noisy one, with the rays of both views, and the coarse mean
        beside = [source_latent, source_rays, target_rays]
        if self.config.coarse:
            if coarse_latent is None:
                raise InputError("this model needs a coarse_latent like the source's: svdrr.coarse predicts it")
            if drop_source is not None:
                null_coarse = self.null_coarse[:, None, None] if is_learned else 0.0
                coarse_latent = torch.where(drop_latent, null_coarse, coarse_latent)
            beside.append(coarse_latent)
        beside_tokens = self.patch_condition(self._patches(torch.cat(beside, dim=1)))
        tokens = self.patch(self._patches(hidden_states)) + beside_tokens + position

        # time and pose set the scales of every block
        embedding = self.time_embedding(time_code(timestep))
        if self.config.pose_modulation:
            embedding = embedding + self.pose_embedding(pose)
        modulation = self.modulation(embedding).unflatten(1, (6, -1))
        for block in self.blocks:
            tokens = block(tokens, context, modulation)

        shift, scale = (self.final_modulation + embedding[:, None]).unbind(dim=1)
        tokens = self.final(_modulated(self.final_norm(tokens), shift, scale))
        output = functional.pixel_shuffle(tokens.mT.unflatten(2, (rows, columns)), self.config.patch_size)
        if not self.config.preconditioned:
            return output

        # For data of unit variance the best linear guess from the noisy latent is known, and so is the size of what it
        # misses, which is left to the network (Karras et al. 2022, eq. 7).
        slope, spread = flow.OBJECTIVES[self.config.prediction].linear_guess(timestep[:, None, None, None])
        residual, *variance = output.split(hidden_states.shape[1], dim=1)
        return torch.cat([slope * hidden_states + spread * residual, *variance], dim=1)

    def _patches(self, image: Tensor) -> Tensor:
        """[B, C, h, w] to tokens [B, h w / patch_size^2, C patch_size^2]."""
        return functional.pixel_unshuffle(image, self.config.patch_size).flatten(2).mT


def condition(
    source_latent: Tensor, source: Views, target: Views, size: int, absolute_pose: bool = True
) -> dict[str, Tensor]:
    """What training and sampling tell the transformer besides the noisy latent: keywords of its `forward`.

    source_latent: [B, C, h, w], of images of `size` pixels; source, target: their B views. absolute_pose: as the
    model's; without it, the pose is pose.relative_pose, and rays are those of a world that is turned until the source's
    azimuth is 0.
    """
    cells, dtype = source_latent.shape[-1], source_latent.dtype
    if absolute_pose:
        pose = pose_features(source, target, size)
    else:
        pose = relative_pose(source, target)
        turn_deg = -source.azimuth_deg
        source, target = source.turned(turn_deg), target.turned(turn_deg)
    return {
        "source_latent": source_latent,
        "source_rays": ray_map(source, cells).to(dtype),
        "target_rays": ray_map(target, cells).to(dtype),
        "pose": pose.to(dtype),
    }


class Block(nn.Module):
    """Self-attention and MLP, scaled and gated by time and pose; between them, cross-attention to the source."""

    def __init__(self, width: int, num_heads: int, qk_norm: bool, cross_norm: bool, norm_eps: float) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attention_norm = nn.LayerNorm(width, norm_eps, elementwise_affine=False)
        self.attention = Attention(width, num_heads, qk_norm)
        self.cross_norm = nn.LayerNorm(width) if cross_norm else nn.Identity()
        self.cross_attention = Attention(width, num_heads, qk_norm)
        self.mlp_norm = nn.LayerNorm(width, norm_eps, elementwise_affine=False)
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
    """Multi-head attention of tokens [B, T, width] to context [B, S, width]. qk_norm: see ViewTransformer."""

    def __init__(self, width: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.query_norm = nn.RMSNorm(width // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(width // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        query = self.query(tokens).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        key, value = self.key_value(context).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(self.query_norm(query), self.key_norm(key), value)
        return self.out(mixed.transpose(1, 2).flatten(2))


def position_code(rows: int, columns: int, width: int, device: torch.device, pixart: bool = False) -> Tensor:
    """Sines and cosines of each token's place in the image, [rows * columns, width]; the same at any resolution.

    pixart: as in PixArt at its interpolation_scale of size / 512: places of corners, not centres, waves that are up
    to 100 times longer, and columns first.
    """
    longest, origin = (10000.0, 0.0) if pixart else (100.0, 0.5)
    frequency = longest ** -(torch.arange(width // 4, device=device) * 4 / width)
    row = (torch.arange(rows, device=device) + origin) / rows * POSITION_SPAN
    column = (torch.arange(columns, device=device) + origin) / columns * POSITION_SPAN
    row_phase = (row[:, None] * frequency)[:, None].expand(-1, columns, -1)
    column_phase = (column[:, None] * frequency)[None].expand(rows, -1, -1)
    first, second = (column_phase, row_phase) if pixart else (row_phase, column_phase)
    return torch.cat([first.sin(), first.cos(), second.sin(), second.cos()], dim=-1).flatten(0, 1)


def time_code(timestep: Tensor) -> Tensor:
    """Sines and cosines of the timestep (0 to 1000), [B, TIME_FEATURES] (Vaswani et al. 2017)."""
    half = TIME_FEATURES // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, device=timestep.device) / half)
    phase = timestep.float()[:, None] * frequency
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


def _modulated(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return tokens * (1 + scale[:, None]) + shift[:, None]


def _perceptron(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))


def _passing(layer: nn.Linear) -> nn.Linear:
    """Starts as the identity on as many numbers as fit."""
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _zeroed(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
