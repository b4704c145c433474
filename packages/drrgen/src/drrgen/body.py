"""The patient without the table: which voxels lie inside the skin."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from drrgen.defects import Defect, SeriesRejected
from drrgen.volume import HU_CLAMP, Volume

Mask = NDArray[np.bool_]

# Above this is tissue, the shell of a table or folded cloth; below it lung, air, most cloth and the foam of mattresses.
TISSUE_HU = -300
# Most of the air around a patient lies below this, most of a lung above it, even with emphysema.
FREE_AIR_HU = -950
# Shells of tables, sheets and tubes are thinner than twice this, the walls of a chest are not, or only in places.
SHELL_RADIUS_MM = 3.0
# There a lung leaks out through a gap narrower than twice this, and is wider itself.
LEAK_RADIUS_MM = 10.0
# What clings to the skin (straps, folds of a sheet, edges of a mattress) is thinner than twice this, chin and nose not.
CLING_RADIUS_MM = 6.0
# An arm is thicker than twice this, the rails and panels of a table are not.
ARM_RADIUS_MM = 12.0
# Without the outer ARM_RADIUS_MM, an arm has at least this fraction of the largest part's volume.
MIN_PART = 0.005
# The mask is found on voxels of about this size in plane, and on slices at most so far apart.
GRID_MM = 1.5
STEP_MM = 2.0
# It is grown by this much so that no skin is lost: a voxel of that grid, and the blurred edge of the skin.
SKIN_MM = 3.0
# Connected within a slice, not from slice to slice.
IN_SLICE = ndimage.generate_binary_structure(3, 1) & np.array([False, True, False])[:, None, None]


def remove_table(volume: Volume) -> NDArray[np.int16]:
    """The HU of a volume, [slice, row, column], with everything outside the body set to air, -1000 HU."""
    return masked(volume, body_mask(volume))


def masked(volume: Volume, mask: Mask) -> NDArray[np.int16]:
    """The HU of a volume where the mask is, and air elsewhere."""
    return np.where(mask, volume.hu, np.int16(HU_CLAMP[0]))


def body_mask(volume: Volume) -> Mask:
    """True inside the skin, lungs and bowel gas included: [slice, row, column].

    Found on axial slices, whichever way the volume is stored: tissue without thin shells, its thick connected parts,
    filled slice by slice, without what clings to them. Nothing depends on what is up or behind: patients lie as they
    like. Raises SeriesRejected where nothing is left.
    """
    along_z = 2 - int(np.abs(volume.world_from_voxel[2, :3]).argmax())
    spacing_mm = volume.spacing_mm[::-1].tolist()
    step_mm = spacing_mm.pop(along_z)
    mask = _axial_mask(np.moveaxis(volume.hu, along_z, 0), step_mm, max(spacing_mm))
    return np.moveaxis(mask, 0, along_z)


def _axial_mask(hu_there: NDArray[np.int16], step_mm: float, pixel_mm: float) -> Mask:
    """Of axial slices step_mm apart, with pixels of pixel_mm."""
    slices, rows, columns = hu_there.shape
    factor = max(1, round(GRID_MM / pixel_mm))
    pixel_mm *= factor
    step = max(1, int(STEP_MM / step_mm))
    looked_at = np.linspace(0, slices - 1, 1 + -(-(slices - 1) // step)).round().astype(int)
    hu = hu_there[looked_at, ::factor, ::factor]

    seen = _seen(hu)
    body = _thick_parts(_opened((hu > TISSUE_HU) | ~seen, SHELL_RADIUS_MM / pixel_mm) & seen, pixel_mm)
    body = _with_open_lungs(_filled(body), hu, seen, pixel_mm)
    body = _thick_parts(_opened(body | ~seen, CLING_RADIUS_MM / pixel_mm) & seen, pixel_mm)
    if not body.any():
        raise SeriesRejected(Defect("no-body", "there is no body in this volume; --keep-table renders it as it is"))
    body = _dilated(body, SKIN_MM / pixel_mm)

    # a slice between two that were looked at has the skin of both
    every = np.arange(slices)
    before, after = (np.searchsorted(looked_at, every, side) for side in ("right", "left"))
    mask = body[before - 1] | body[after]
    return np.repeat(np.repeat(mask, factor, axis=1), factor, axis=2)[:, :rows, :columns]


def _seen(hu: NDArray[np.int16]) -> Mask:
    """The scanner's circle, [row, column], if nothing lies outside it; all True if something does, or no circle fits.

    Outside it is no air: the patient may go on there.
    """
    rows, columns = hu.shape[1:]
    y, x = np.ogrid[:rows, :columns]
    circle = np.hypot(y - (rows - 1) / 2, x - (columns - 1) / 2) <= max(rows, columns) / 2
    return circle if hu[:, ~circle].max(initial=-1000) <= -1000 else np.ones_like(circle)


def _with_open_lungs(body: Mask, hu: NDArray[np.int16], seen: Mask, pixel_mm: float) -> Mask:
    """A body and the lungs that gaps in the chest wall leave open to the outside, with the wall around them.

    Gaps are where the wall is as thin as a shell, or cut off by the scanner's circle. The basins that remain when they
    are closed are lungs if most of their voxels are no free air and have the body on at least three of four sides: a
    mattress has it on one, the air beside an arm on two.
    """
    radius = LEAK_RADIUS_MM / pixel_mm
    basins, count = ndimage.label(_eroded(~body & seen, radius), IN_SLICE)
    sides = sum(_behind(body, axis, way) for axis in (1, 2) for way in (1, -1))
    like_lung = basins[(hu > FREE_AIR_HU) & (sides >= 3)]
    is_lung = np.bincount(like_lung, minlength=count + 1) > np.bincount(basins.ravel(), minlength=count + 1) / 2
    is_lung[0] = False
    if not is_lung.any():
        return body
    lungs = _dilated(is_lung[basins], radius)
    wall = _dilated(lungs, 2 * SHELL_RADIUS_MM / pixel_mm) & (hu > TISSUE_HU)
    return _filled(body | lungs | wall)


def _behind(mask: Mask, axis: int, way: int) -> NDArray[np.uint8]:
    """1 where some of the mask lies before a voxel along an axis, walked forwards (way 1) or backwards (-1)."""
    walked = np.flip(mask, axis) if way < 0 else mask
    reached = np.logical_or.accumulate(walked, axis=axis).view(np.uint8)
    return np.flip(reached, axis) if way < 0 else reached


def _filled(mask: Mask) -> Mask:
    """Each slice without holes: only what reaches the edge of the image is outside."""
    gaps, count = ndimage.label(~mask, IN_SLICE)
    is_inside = np.ones(count + 1, bool)
    for edge in (gaps[:, 0], gaps[:, -1], gaps[:, :, 0], gaps[:, :, -1]):
        is_inside[edge] = False
    is_inside[0] = True  # the mask itself
    return is_inside[gaps]


def _thick_parts(mask: Mask, pixel_mm: float) -> Mask:
    """The connected parts (in 3D, across faces) that are as thick as arms."""
    labels, count = ndimage.label(mask)
    sizes = np.bincount(labels[_eroded(mask, ARM_RADIUS_MM / pixel_mm)], minlength=count + 1)
    is_body = sizes >= max(MIN_PART * sizes[1:].max(initial=0), 1)
    is_body[0] = False
    return is_body[labels]


def _opened(mask: Mask, radius_px: float) -> Mask:
    """Opening of each slice with a disc: erosion, then dilation. Outside the image counts as part of the mask."""
    return ~_eroded(~_eroded(mask, radius_px), radius_px)


def _eroded(mask: Mask, radius_px: float) -> Mask:
    """Erosion of each slice with a disc; what is outside the image takes nothing away."""
    return ~_dilated(~mask, radius_px)


def _dilated(mask: Mask, radius_px: float) -> Mask:
    """Dilation of each slice with a disc, put together from its rows: the shortest, at the top and bottom, first."""
    out, row, half = mask.copy(), mask.copy(), 0
    for up in range(min(int(radius_px), mask.shape[1] - 1), -1, -1):
        while half < int(np.sqrt(radius_px**2 - up**2)):
            half += 1
            narrow = row.copy()
            row[..., 1:] |= narrow[..., :-1]
            row[..., :-1] |= narrow[..., 1:]
        out[:, up:] |= row[:, : row.shape[1] - up]
        out[:, : row.shape[1] - up] |= row[:, up:]
    return out
