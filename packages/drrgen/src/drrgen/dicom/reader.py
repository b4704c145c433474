"""A stack of slices to a volume: one slice in memory beside it, repaired where that was asked for."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from drrgen.defects import Defect, SeriesRejected
from drrgen.dicom import pixels
from drrgen.dicom.series import Series
from drrgen.dicom.stack import Stack, examine
from drrgen.volume import HU_CLAMP, Volume, not_hounsfield


def read(series: Series, on_defect: str = "reject", decode: pixels.Decode = pixels.decode) -> Volume:
    """The volume of a series: slices sorted by position along their normal, spacing from positions only.

    on_defect: "reject" raises SeriesRejected where the slices are not one complete, regular, undistorted grid of
    undamaged files; "repair" only where docs/how-to/defects.md knows no repair. decode: see `pixels.decode`.
    """
    defects, stack = examine(series, decode)
    return read_stack(series, stack, defects, on_defect, decode)


def read_stack(
    series: Series,
    stack: Stack | None,
    defects: Sequence[Defect],
    on_defect: str,
    decode: pixels.Decode = pixels.decode,
) -> Volume:
    """The volume of a series that `examine` has seen; see `read`."""
    if refused := [one for one in defects if on_defect == "reject" or one.repair is None]:
        raise SeriesRejected(*refused)
    if stack is None:
        raise ValueError("a series without a stack has a defect without a repair")
    hu = np.empty(stack.shape, np.int16)
    if stack.is_grid:
        for image, decoded in zip(hu, decode(stack.slices), strict=True):
            image[:] = decoded
    else:
        _interpolate(hu, stack, decode(stack.slices))
    if reason := not_hounsfield(hu):
        raise SeriesRejected(Defect("not-hounsfield", reason))
    return Volume(
        hu,
        stack.world_from_voxel,
        series.origin,
        defects=tuple(f"{one.code}: {one.message}" for one in defects),
        repairs=tuple(f"{one.code}: {one.repair}" for one in defects),
    )


def _interpolate(hu: NDArray[np.int16], stack: Stack, images: Iterator[NDArray[np.int16]]) -> None:
    """Fill the grid from slices at their true depths: linear between neighbours, shifted in plane where they are."""
    depths_mm = np.linspace(0, stack.depth_mm[-1], len(hu))
    upper = _placed(next(images), stack, 0)
    lower = upper
    number = 0
    for target, depth in zip(hu, depths_mm, strict=True):
        while stack.depth_mm[number] < depth and number + 1 < len(stack.slices):
            number += 1
            lower, upper = upper, _placed(next(images), stack, number)
        below, above = stack.depth_mm[max(number - 1, 0)], stack.depth_mm[number]
        weight = np.float32((depth - below) / (above - below) if above > below else 1)
        target[:] = np.rint(lower + weight * (upper - lower))


def _placed(image: NDArray[np.int16], stack: Stack, number: int) -> NDArray[np.float32]:
    """A slice on the grid's rows and columns; air where it does not reach. Linear between pixels."""
    values = image.astype(np.float32)
    if not stack.shift_px.any():
        return values
    whole, part = np.divmod(stack.shift_px[number][::-1], 1)
    rows, columns = whole.astype(int)
    canvas = np.full(stack.shape[1:], HU_CLAMP[0], np.float32)
    canvas[rows : rows + image.shape[0], columns : columns + image.shape[1]] = values
    return ndimage.shift(canvas, part, order=1, mode="constant", cval=HU_CLAMP[0])
