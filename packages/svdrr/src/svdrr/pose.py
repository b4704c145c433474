"""The reader's half of docs/geometry.md: angles in, the rays and the features that the model is told about, out."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

BODY_MM = 200.0
"""Unit of the rays' moments: about half a chest's width, so that both halves of a ray map have the same size."""

REFERENCE_SDD_MM = 1800.0
REFERENCE_PIXEL_MM = 432 / 512
"""The `chest` geometry at 512 pixels; distances enter the model as logarithms relative to it."""

HARMONICS = 4
POSE_FEATURES = 2 * 2 * 2 * HARMONICS + 6 + 2
"""sin and cos of 4 harmonics of 2 angles of 2 views; 6 numbers of the relative rotation; log SDD; log pixel pitch."""
RELATIVE_POSE_FEATURES = 4


@dataclass(frozen=True)
class Views:
    """A batch of B cone-beam views around the isocentre; every field is a float tensor [B].

    azimuth_deg, elevation_deg: DICOM's Positioner Primary and Secondary Angles. detector_mm: side of the detector.
    """

    azimuth_deg: Tensor
    elevation_deg: Tensor
    sdd_mm: Tensor
    sod_mm: Tensor
    detector_mm: Tensor

    def __len__(self) -> int:
        return len(self.azimuth_deg)

    def to(self, device: torch.device | str) -> "Views":
        return Views(*(getattr(self, field.name).to(device) for field in fields(self)))

    def turned(self, azimuth_deg: Tensor) -> "Views":
        """The views with the whole world turned about the body's long axis by these angles [B]."""
        return replace(self, azimuth_deg=self.azimuth_deg + azimuth_deg)


def view_axes(azimuth_deg: Tensor, elevation_deg: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors (u, v, n), each [B, 3] in LPS: along the columns, down the rows, isocentre to detector centre.

    v = u x n, so the triple is left-handed: the image is what an observer behind the detector sees.
    """
    theta, phi = torch.deg2rad(azimuth_deg), torch.deg2rad(elevation_deg)
    n = torch.stack([phi.cos() * theta.sin(), -phi.cos() * theta.cos(), phi.sin()], dim=-1)
    u = torch.stack([theta.cos(), theta.sin(), torch.zeros_like(theta)], dim=-1)
    return u, torch.linalg.cross(u, n), n


def source_from_isocentre_mm(views: Views) -> Tensor:
    """The X-ray source relative to the isocentre, [B, 3], LPS mm."""
    return -views.sod_mm[:, None] * view_axes(views.azimuth_deg, views.elevation_deg)[2]


def projection(views: Views, size: int) -> Tensor:
    """P [B, 3, 4] with P [X; 1] ~ (column, row, 1) for X in LPS mm relative to the isocentre, on `size` pixels."""
    u, v, n = view_axes(views.azimuth_deg, views.elevation_deg)
    focal = (views.sdd_mm * size / views.detector_mm)[:, None]
    centre = (size - 1) / 2
    rotation = torch.stack([focal * u + centre * n, focal * v + centre * n, n], dim=1)
    translation = -rotation @ source_from_isocentre_mm(views)[:, :, None]
    return torch.cat([rotation, translation], dim=2)


def ray_map(views: Views, cells: int) -> Tensor:
    """The rays of a cells x cells detector as Plücker coordinates [B, 6, cells, cells]: direction d, moment S x d.

    d is the unit vector from the source to the cell's centre, in LPS. The moment is taken about the isocentre; its
    length is the ray's distance from there, here in units of BODY_MM.
    """
    u, v, n = view_axes(views.azimuth_deg, views.elevation_deg)
    offset = (torch.arange(cells, dtype=u.dtype, device=u.device) + 0.5) / cells - 0.5
    offset_mm = offset * views.detector_mm[:, None]
    across = offset_mm[:, None, :, None] * u[:, None, None, :]
    down = offset_mm[:, :, None, None] * v[:, None, None, :]
    direction = views.sdd_mm[:, None, None, None] * n[:, None, None, :] + across + down
    direction = torch.nn.functional.normalize(direction, dim=-1)
    source = source_from_isocentre_mm(views)[:, None, None, :].expand_as(direction)
    moment = torch.linalg.cross(source, direction) / BODY_MM
    return torch.cat([direction, moment], dim=-1).permute(0, 3, 1, 2)


def pose_features(source: Views, target: Views, size: int) -> Tensor:
    """What the model is told about a pair of views besides their rays: [B, POSE_FEATURES].

    The absolute angles of both (a body is not the same from all sides), the rotation between them as the first two
    columns of its matrix (Zhou et al. 2019), and the target's SDD and pixel pitch on the detector, at `size` pixels.
    """
    angles = [source.azimuth_deg, source.elevation_deg, target.azimuth_deg, target.elevation_deg]
    harmonics = torch.arange(1, HARMONICS + 1, device=angles[0].device)
    phase = torch.deg2rad(torch.stack(angles, dim=-1))[:, :, None] * harmonics
    source_from_world = torch.stack(view_axes(source.azimuth_deg, source.elevation_deg), dim=1)
    target_from_world = torch.stack(view_axes(target.azimuth_deg, target.elevation_deg), dim=1)
    target_from_source = target_from_world @ source_from_world.mT
    lengths = [target.sdd_mm / REFERENCE_SDD_MM, target.detector_mm / size / REFERENCE_PIXEL_MM]
    return torch.cat(
        [
            phase.sin().flatten(1),
            phase.cos().flatten(1),
            target_from_source[:, :, :2].flatten(1),
            torch.stack(lengths, dim=-1).log(),
        ],
        dim=1,
    )


def relative_pose(source: Views, target: Views) -> Tensor:
    """What Zero-1-to-3 and SV-DRR tell their models about a pair of views: [B, RELATIVE_POSE_FEATURES].

    (difference of polar angles, sin and cos of the difference of azimuths, 0 for that of radii), source minus target,
    in radians; the polar angle is counted from the cranial end, so it falls where the elevation rises.
    """
    polar = torch.deg2rad(target.elevation_deg - source.elevation_deg)
    azimuth = torch.deg2rad(source.azimuth_deg - target.azimuth_deg)
    return torch.stack([polar, azimuth.sin(), azimuth.cos(), torch.zeros_like(polar)], dim=-1)
