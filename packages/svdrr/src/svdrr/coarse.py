"""A coarse mean of the target view's latent, given one source view and both poses: regression, trained by plain L2.

What L2 learns is the mean of all the views that a patient may have, blurred where they differ. A transformer that is
given it has the outline and the large organs to begin with, and the sampler can start from it (Mardani et al. 2023,
"CorrDiff"). KINDS holds two networks of about the same cost, which differ in what they know of geometry.
"""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional

from svdrr.errors import InputError
from svdrr.pose import POSE_FEATURES, Views, pose_features, projection, ray_map, source_from_isocentre_mm

RAY_CHANNELS = 6
REACH_MM = 230.0
"""How far before and behind the isocentre a ray passes through the lifted volume: half of a wide patient's width is
200 mm, and an oblique ray needs more."""

NORM_GROUPS = 4


class CoarseMean(ModelMixin, ConfigMixin):
    """Predicts the latent of the target view, without noise.

    kind: a name of KINDS. cells: side of the grid that it works on, a multiple of 4, whatever the latents' resolution:
    the first layer and the last two work at that. width: channels, a multiple of 8. volume_channels: of the lifted
    volume, of `lift` alone, a multiple of 4. Raises InputError where they are not, or there is no such kind.
    """

    @register_to_config
    def __init__(
        self,
        kind: str = "regression",
        latent_channels: int = 4,
        cells: int = 16,
        width: int = 32,
        volume_channels: int = 8,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise InputError(f"no coarse branch {kind!r}: its kind is one of {', '.join(KINDS)}")
        for name, value, unit in (("cells", cells, 4), ("width", width, 8), ("volume_channels", volume_channels, 4)):
            if value % unit:
                raise InputError(f"a coarse branch of {name}={value}: give a multiple of {unit}")
        # Not the latents are averaged and interpolated, which are not smooth, but features that are learned for it.
        self.stem = nn.Sequential(nn.Conv2d(latent_channels, width, 3, padding=1), nn.SiLU())
        self.network = KINDS[kind](cells, width, volume_channels)
        self.head = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, latent_channels, 3, padding=1)
        )

    def forward(self, source_latent: Tensor, source: Views, target: Views) -> Tensor:
        """The mean [B, C, h, w] of the target's latents, given the source's [B, C, h, w] and both B views.

        Both latents are normalised, and of the same resolution.
        """
        sides, cells = source_latent.shape[-2:], (self.config.cells, self.config.cells)
        pose = pose_features(source, target, sides[-1]).to(source_latent.dtype)
        coarse = functional.interpolate(self.stem(source_latent), cells, mode="area")
        predicted: Tensor = self.network(coarse, source, target, pose)
        return self.head(functional.interpolate(predicted, sides, mode="bilinear"))


class Regression(nn.Module):
    """A U-Net on the source's features beside the rays of both views; the pose scales and moves its own."""

    def __init__(self, cells: int, width: int, volume_channels: int) -> None:
        super().__init__()
        self.cells = cells
        self.unet = UNet(width + 2 * RAY_CHANNELS, width, width, POSE_FEATURES)

    def forward(self, features: Tensor, source: Views, target: Views, pose: Tensor) -> Tensor:
        """features: [B, width, cells, cells]; pose: [B, POSE_FEATURES]. Returns the target's, shaped alike."""
        rays = [ray_map(views, self.cells).to(features.dtype) for views in (source, target)]
        return self.unet(torch.cat([features, *rays], dim=1), pose)


class Lift(nn.Module):
    """Writes a volume on the source's rays, and casts it along the target's, as X-rays cast a body.

    The volume's channels are densities of something that the network chooses: their line integrals are what a view is
    told of a body, and are linear in it, which latents are not. So a last U-Net turns them to features of the latent.
    """

    def __init__(self, cells: int, width: int, volume_channels: int) -> None:
        super().__init__()
        self.cells = cells
        self.write = UNet(width + RAY_CHANNELS, volume_channels * cells, width)
        self.mix = nn.Sequential(
            _convolution_3d(volume_channels, 2 * volume_channels), _convolution_3d(2 * volume_channels, volume_channels)
        )
        self.read = UNet(volume_channels + RAY_CHANNELS, width, width // 2, POSE_FEATURES)

    def forward(self, features: Tensor, source: Views, target: Views, pose: Tensor) -> Tensor:
        """As Regression's."""
        source_rays, target_rays = (ray_map(views, self.cells).to(features.dtype) for views in (source, target))
        written = self.write(torch.cat([features, source_rays], dim=1)).unflatten(1, (-1, self.cells))
        # at half the resolution, which is an eighth of the work
        mixed = self.mix(functional.interpolate(written, scale_factor=0.5, mode="area"))
        volume = written + functional.interpolate(mixed, scale_factor=2, mode="trilinear")
        return self.read(torch.cat([cast(volume, source, target).to(target_rays), target_rays], dim=1), pose)


KINDS = {"regression": Regression, "lift": Lift}


def frustum_mm(views: Views, depth: int, cells: int) -> Tensor:
    """Centres of the voxels of each view's frustum, [B, depth, cells, cells, 3], LPS mm relative to the isocentre.

    Its columns are the rays of a detector of cells x cells; its slices lie across the central ray, evenly from
    -REACH_MM before the isocentre to REACH_MM behind it.
    """
    source = source_from_isocentre_mm(views)[:, None, None, None]
    direction = ray_map(views, cells)[:, :3].permute(0, 2, 3, 1)[:, None]
    depth_mm = REACH_MM * ((torch.arange(depth, device=source.device) + 0.5) / depth * 2 - 1)
    from_source_mm = views.sod_mm[:, None] + depth_mm
    return source + (from_source_mm[:, :, None, None] / _cosine(views, cells)[:, None])[..., None] * direction


def cast(volume: Tensor, source: Views, target: Views) -> Tensor:
    """Line integrals [B, F, cells, cells] along the target's rays through a volume, in units of REACH_MM.

    volume: [B, F, depth, cells, cells] on the source's frustum, see frustum_mm; beyond it there is nothing. A ray is
    sampled as often as the volume has slices, where the target's own frustum has its voxels.
    """
    depth, cells = volume.shape[2], volume.shape[-1]
    with torch.autocast(volume.device.type, enabled=False):  # places are not to be rounded to 8 bits
        points = frustum_mm(target, depth, cells)
        seen = torch.einsum("bij,b...j->b...i", projection(source, 1)[:, :, :3], points)
        seen = seen + projection(source, 1)[:, None, None, None, :, 3]
        from_source_mm = seen[..., 2:]
        # a detector of one pixel reaches from -1/2 to 1/2; of grid_sample, from -1 to 1
        behind = (from_source_mm - source.sod_mm.view(-1, 1, 1, 1, 1)) / REACH_MM
        place = torch.cat([2 * seen[..., :2] / from_source_mm, behind], dim=-1)
        inside = (place.abs() <= 1).all(dim=-1)
        step = 2 / depth / _cosine(target, cells)
        density = functional.grid_sample(volume.to(place), place, padding_mode="border", align_corners=False)
        return (density * (inside * step[:, None])[:, None]).sum(dim=2)


def _cosine(views: Views, cells: int) -> Tensor:
    """Of the angle between each ray and the central one, [B, cells, cells]."""
    n = -source_from_isocentre_mm(views) / views.sod_mm[:, None]
    return torch.einsum("bihw,bi->bhw", ray_map(views, cells)[:, :3], n)


class UNet(nn.Module):
    """[B, inputs, n, n] to [B, outputs, n, n] through n / 2 and n / 4.

    pose_features: length of a vector that scales and moves the features of every block; 0: there is none.
    """

    def __init__(self, inputs: int, outputs: int, width: int, pose_features: int = 0) -> None:
        super().__init__()
        embedding = 4 * width if pose_features else 0
        if pose_features:
            self.embedding = nn.Sequential(nn.Linear(pose_features, embedding), nn.SiLU())
        self.stem = nn.Conv2d(inputs, width, 3, padding=1)
        self.down = nn.ModuleList([Residual(width, width, embedding), Residual(width, 2 * width, embedding)])
        self.middle = Residual(2 * width, 2 * width, embedding)
        self.up = nn.ModuleList([Residual(4 * width, 2 * width, embedding), Residual(3 * width, width, embedding)])
        self.out = nn.Sequential(nn.GroupNorm(NORM_GROUPS, width), nn.SiLU(), nn.Conv2d(width, outputs, 1))

    def forward(self, hidden: Tensor, pose: Tensor | None = None) -> Tensor:
        embedding = None if pose is None else self.embedding(pose)
        hidden, kept = self.stem(hidden), []
        for block in self.down:
            hidden = block(hidden, embedding)
            kept.append(hidden)
            hidden = functional.avg_pool2d(hidden, 2)
        hidden = self.middle(hidden, embedding)
        for block in self.up:
            hidden = functional.interpolate(hidden, scale_factor=2, mode="nearest")
            hidden = block(torch.cat([hidden, kept.pop()], dim=1), embedding)
        return self.out(hidden)


class Residual(nn.Module):
    """Two convolutions beside the identity; between them an embedding, if there is one, sets scales and shifts."""

    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.GroupNorm(NORM_GROUPS, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.norm = nn.GroupNorm(NORM_GROUPS, outputs)
        if embedding:
            self.modulation = nn.Linear(embedding, 2 * outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.identity = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, hidden: Tensor, embedding: Tensor | None) -> Tensor:
        inner = self.norm(self.first(hidden))
        if embedding is not None:
            scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
            inner = inner * (1 + scale) + shift
        return self.identity(hidden) + self.second(functional.silu(inner))


def _convolution_3d(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.GroupNorm(NORM_GROUPS, inputs), nn.SiLU(), nn.Conv3d(inputs, outputs, 3, padding=1))
