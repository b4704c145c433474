"""The patient without the table: which voxels lie inside the skin."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from drrgen.defects import Defect, SeriesRejected
from drrgen.volume import Volume

# Above this is tissue, cloth or table; below it lung, air and the foam of mattresses.
TISSUE_HU = -400
# Shells of tables, sheets and clothes are thinner than twice this, the walls of a chest are not.
SHELL_RADIUS_MM = 4.0
# A filled body has no appendage thinner than twice this; what clings to it (straps, edges of a mattress) has.
SMOOTH_RADIUS_MM = 10.0
# Arms and hands count as body from this fraction of the trunk's volume on.
MIN_PART = 0.01
# The mask is found on voxels of about this size in plane, and grown by this much so that no skin is lost.
GRID_MM = 1.5
SKIN_MM = 3.0


def remove_table(volume: Volume) -> NDArray[np.int16]:
    """The HU of a volume, [slice, row, column], with everything outside the body set to air, -1000 HU."""
    return np.where(body_mask(volume), volume.hu, np.int16(-1000))


def body_mask(volume: Volume) -> NDArray[np.bool_]:
    """True inside the skin, lungs and bowel gas included: [slice, row, column].

    Tissue without thin shells, its large connected parts, filled slice by slice.
    Raises SeriesRejected where nothing is left.
    """
    factor = max(1, round(GRID_MM / volume.spacing_mm[:2].max()))
    pixel_mm = volume.spacing_mm[:2].max() * factor
    tissue = volume.hu[:, ::factor, ::factor] > TISSUE_HU
    body = _large_parts(_opened(tissue, SHELL_RADIUS_MM / pixel_mm))
    filled = np.stack([ndimage.binary_fill_holes(image) for image in body])
    body = _large_parts(_opened(filled, SMOOTH_RADIUS_MM / pixel_mm))
    if not body.any():
        raise SeriesRejected(Defect("no-body", "there is no body in this volume; --keep-table renders it as it is"))
    grown = _eroded(~body, SKIN_MM / pixel_mm)
    mask = ~np.repeat(np.repeat(grown, factor, axis=1), factor, axis=2)
    return mask[:, : volume.hu.shape[1], : volume.hu.shape[2]]


def _opened(mask: NDArray[np.bool_], radius_px: float) -> NDArray[np.bool_]:
    """Opening of each slice with a disc: erosion, then dilation. Outside the image counts as part of the mask."""
    return ~_eroded(~_eroded(mask, radius_px), radius_px)


def _eroded(mask: NDArray[np.bool_], radius_px: float) -> NDArray[np.bool_]:
    """Erosion of each slice with a disc, by the distance to the nearest pixel outside: any radius at one price."""
    return np.stack([ndimage.distance_transform_edt(image) > radius_px if not image.all() else image for image in mask])


def _large_parts(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The connected parts (in 3D, across faces) that have at least MIN_PART of the largest one's volume."""
    labels, count = ndimage.label(mask)
    if count == 0:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= MIN_PART * sizes.max())[labels] & mask
