"""Where the source, the detector and its pixels are: float64, pure NumPy; docs/geometry.md in code."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Setup:
    """The distances of one X-ray room, in mm. `detector_mm` is the side of the square detector."""

    sdd_mm: float
    sod_mm: float
    detector_mm: float


PRESETS = {
    "chest": Setup(sdd_mm=1800.0, sod_mm=1640.0, detector_mm=432.0),
    "portable": Setup(sdd_mm=1100.0, sod_mm=950.0, detector_mm=432.0),
    "carm": Setup(sdd_mm=1020.0, sod_mm=850.0, detector_mm=432.0),
    # the geometry of the data set that SV-DRR was published with: 512 pixels of 0.7 mm
    "lidc-idri-drr": Setup(sdd_mm=1800.0, sod_mm=1650.0, detector_mm=358.4),
}


@dataclass(frozen=True)
class Detector:
    """A square detector of `shape` x `shape` pixels of `pixel_mm`."""

    shape: int
    pixel_mm: float


@dataclass(frozen=True)
class Views:
    """A batch of V cone-beam views around one isocentre.

    azimuth_deg, elevation_deg: [V]; DICOM's Positioner Primary and Secondary Angles. isocentre_mm: [3], LPS.
    """

    azimuth_deg: Float
    elevation_deg: Float
    isocentre_mm: Float
    sdd_mm: float
    sod_mm: float

    def __len__(self) -> int:
        return len(self.azimuth_deg)

    def __getitem__(self, which: slice) -> "Views":
        return Views(self.azimuth_deg[which], self.elevation_deg[which], self.isocentre_mm, self.sdd_mm, self.sod_mm)

    @property
    def axes(self) -> tuple[Float, Float, Float]:
        """(u, v, n), each [V, 3]: column direction, row direction, isocentre to detector centre."""
        return view_axes(self.azimuth_deg, self.elevation_deg)

    @property
    def source_mm(self) -> Float:
        """[V, 3], LPS."""
        return self.isocentre_mm - self.sod_mm * self.axes[2]

    @property
    def detector_mm(self) -> Float:
        """Centre of the detector, [V, 3], LPS."""
        return self.isocentre_mm + (self.sdd_mm - self.sod_mm) * self.axes[2]

    def rays(self, detector: Detector, frame_from_world: Float) -> tuple[Float, Float, Float, Float]:
        """(source, first pixel, column step, row step), each [V, 3], in an affine frame such as a volume's voxels.

        Pixel (row r, column c) of view v lies at first_pixel[v] + c column_step[v] + r row_step[v].
        """
        u, v, _ = self.axes
        column_mm, row_mm = u * detector.pixel_mm, v * detector.pixel_mm
        first_mm = self.detector_mm - (detector.shape - 1) / 2 * (column_mm + row_mm)
        linear, shift = frame_from_world[:3, :3].T, frame_from_world[:3, 3]
        return self.source_mm @ linear + shift, first_mm @ linear + shift, column_mm @ linear, row_mm @ linear

    def projection(self, detector: Detector) -> Float:
        """[V, 3, 4]: P with P [X; 1] ~ (column, row, 1) for X in LPS mm, pixel centres at integers."""
        u, v, n = self.axes
        focal = self.sdd_mm / detector.pixel_mm
        centre = (detector.shape - 1) / 2
        rotation = np.stack([focal * u + centre * n, focal * v + centre * n, n], axis=1)
        translation = -np.einsum("vij,vj->vi", rotation, self.source_mm)
        return np.concatenate([rotation, translation[:, :, None]], axis=2)


def view_axes(azimuth_deg: ArrayLike, elevation_deg: ArrayLike) -> tuple[Float, Float, Float]:
    """Unit vectors (u, v, n), each [..., 3] in LPS, of the views at these angles.

    n points from the isocentre to the detector; u along the stored image's columns, v = u x n down its rows. The
    triple is left-handed: the image is what an observer behind the detector sees, the mirror of a camera at the source.
    """
    theta, phi = np.deg2rad(azimuth_deg, dtype=np.float64), np.deg2rad(elevation_deg, dtype=np.float64)
    sin_t, cos_t, sin_p, cos_p = np.sin(theta), np.cos(theta), np.sin(phi), np.cos(phi)
    n = np.stack([cos_p * sin_t, -cos_p * cos_t, sin_p], axis=-1)
    u = np.stack([cos_t, sin_t, np.zeros_like(cos_t)], axis=-1)
    return u, np.cross(u, n), n


def project(projection: ArrayLike, points_mm: ArrayLike) -> Float:
    """(column, row) of LPS points [..., 3] under 3 x 4 matrices that broadcast against them: [..., 2]."""
    points = np.asarray(points_mm, dtype=np.float64)
    homogeneous = np.concatenate([points, np.ones_like(points[..., :1])], axis=-1)
    image = np.einsum("...ij,...j->...i", np.asarray(projection, dtype=np.float64), homogeneous)
    return image[..., :2] / image[..., 2:]
