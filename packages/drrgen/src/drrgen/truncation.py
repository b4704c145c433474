"""Which rays leave the body where the CT ends: their line integrals lack what lies beyond the first or last slice."""

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from drrgen.geometry import Detector, Float, Views


def truncated(body: NDArray[np.bool_], voxel_from_world: Float, views: Views, detector: Detector) -> NDArray[np.uint8]:
    """1 where a pixel's central ray passes through body in an end slice, else 0: [view, row, column].

    body: the mask, [slice, row, column], of a volume whose end slices, the axial ones, are those nearest to the
    patient's head and feet, along whichever axis of the array they lie. Rays run on behind the detector, as those of
    the projectors do.
    """
    # the voxel axis (column, row, slice) that changes most along z
    axis = int(np.abs(np.linalg.inv(voxel_from_world)[2, :3]).argmax())
    ends = np.ascontiguousarray(np.moveaxis(body, 2 - axis, 0)[[0, -1]])
    places = np.array([0.0, body.shape[2 - axis] - 1.0])
    # the axis across the ends first, then the two others in the order in which they index `ends`
    order = [axis, *(other for other in (2, 1, 0) if other != axis)]
    rays = [np.ascontiguousarray(part[:, order]) for part in views.rays(detector, voxel_from_world)]
    out = np.zeros((len(views), detector.shape, detector.shape), np.uint8)
    _mark(ends, places, *rays, out)
    return out


def halved(marks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The next lower level of [..., row, column]: 1 where one of the four is."""
    rows = marks[..., ::2, :] | marks[..., 1::2, :]
    return rows[..., ::2] | rows[..., 1::2]


@njit(cache=True, nogil=True, parallel=True)
def _mark(ends, places, source, first_pixel, column_step, row_step, out):  # type: ignore[no-untyped-def]
    num_views, shape, _ = out.shape
    for index in prange(num_views * shape):
        view, row = index // shape, index % shape
        start = first_pixel[view] + row * row_step[view] - source[view]
        for end in range(2):
            ahead = places[end] - source[view, 0]
            for column in range(shape):
                across = start[0] + column * column_step[view, 0]
                t = ahead / across if across != 0 else -1.0
                if t > 0:
                    i = int(np.rint(source[view, 1] + t * (start[1] + column * column_step[view, 1])))
                    j = int(np.rint(source[view, 2] + t * (start[2] + column * column_step[view, 2])))
                    if 0 <= i < ends.shape[1] and 0 <= j < ends.shape[2] and ends[end, i, j]:
                        out[view, row, column] = 1
