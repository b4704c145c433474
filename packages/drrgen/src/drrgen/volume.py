"""A CT volume: Hounsfield units on a grid, and where the grid lies in the patient."""

import math
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

# HU beyond these are padding, the corners outside the scanner's circle, or metal in a 12-bit scanner.
HU_CLAMP = (-1000, 3071)
# More than any CT has: files that claim more are refused before memory is allocated.
MAX_SIDE = 4096
MAX_VOXELS = 1_000_000_000
# Between voxels of anything that is a CT of a person.
SPACING_MM = (0.05, 20.0)
# Cosines of directions agree, and are orthonormal, within this.
COSINE_TOLERANCE = 1e-3
# Every CT of a person has air around or in it, and something denser than water.
AIR_HU = -500
_SAMPLE_VOXELS = 1_000_000


@dataclass(frozen=True)
class Origin:
    """Where a volume comes from: the only DICOM tags that ever reach a shard. None where a file lacks one."""

    patient_id: str
    study_uid: str
    series_uid: str
    manufacturer: str | None = None
    kernel: str | None = None
    kvp: float | None = None
    slice_thickness_mm: float | None = None


@dataclass(frozen=True)
class Volume:
    """hu: int16 [slice, row, column]. world_from_voxel: [4, 4], voxel (column, row, slice) to LPS mm."""

    hu: NDArray[np.int16]
    world_from_voxel: NDArray[np.float64]
    origin: Origin
    defects: tuple[str, ...] = field(default=())
    repairs: tuple[str, ...] = field(default=())

    @property
    def spacing_mm(self) -> NDArray[np.float64]:
        """Between voxel centres along (column, row, slice)."""
        return np.linalg.norm(self.world_from_voxel[:3, :3], axis=0)

    @property
    def voxel_from_world(self) -> NDArray[np.float64]:
        """[4, 4], LPS mm to voxel (column, row, slice)."""
        return np.linalg.inv(self.world_from_voxel).astype(np.float64)

    @property
    def centre_mm(self) -> NDArray[np.float64]:
        """Centre of the bounding box in LPS: the isocentre of every view."""
        slices, rows, columns = self.hu.shape
        middle = np.array([(columns - 1) / 2, (rows - 1) / 2, (slices - 1) / 2, 1.0])
        return (self.world_from_voxel @ middle)[:3]

    def with_hu(self, hu: NDArray[np.int16]) -> "Volume":
        """The same grid with other values."""
        return replace(self, hu=hu)


def not_hounsfield(values: NDArray) -> str | None:
    """Why voxels, [slice, row, column], are no CT of a person in HU, in a line; None where they may be.

    Looks at about a million of them.
    """
    step = math.ceil((values.size / _SAMPLE_VOXELS) ** (1 / 3))
    sample = values[::step, ::step, ::step]
    if np.percentile(sample, 1) <= AIR_HU and sample.max() >= 0:
        return None
    return (
        f"values of {sample.min():g} to {sample.max():g} are no CT of a person in HU, which has air near -1000: "
        "stored with an offset or normalised? convert to HU"
    )
