"""The reference projector: Siddon's exact path lengths through voxels of constant attenuation, in float64. Slow."""

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from drrgen.geometry import Detector, Views
from drrgen.projectors import Project, extremes


def prepare(mu: NDArray[np.float32], voxel_from_world: NDArray[np.float64]) -> Project:
    """Siddon 1985, doi 10.1118/1.595715: the ray is cut at every voxel boundary, each piece weighted with its voxel.

    The ray is the one through the pixel's centre. Signature, shapes and units: `drrgen.projectors`; mu of any sign, but
    finite, or it raises InputError.
    """
    extremes(mu)

    def project(views: Views, detector: Detector) -> NDArray[np.float32]:
        line_integrals = np.empty((len(views), detector.shape, detector.shape), np.float32)
        _cast(mu, *views.rays(detector, voxel_from_world), views.sdd_mm, detector.pixel_mm, line_integrals)
        return line_integrals

    return project


@njit(cache=True, parallel=True)
def _cast(mu, source, first_pixel, column_step, row_step, sdd_mm, pixel_mm, out):  # type: ignore[no-untyped-def]
    num_views, shape, _ = out.shape
    for index in prange(num_views * shape):
        view, row = index // shape, index % shape
        for column in range(shape):
            direction = first_pixel[view] + column * column_step[view] + row * row_step[view] - source[view]
            across, down = (column - (shape - 1) / 2) * pixel_mm, (row - (shape - 1) / 2) * pixel_mm
            length_mm = np.sqrt(sdd_mm**2 + across**2 + down**2)
            out[view, row, column] = length_mm * _mean_along(mu, source[view], direction)


@njit(cache=True)
def _mean_along(mu, start, direction):  # type: ignore[no-untyped-def]
    """The integral of mu over t >= 0 along start + t direction, in voxel coordinates (column, row, slice)."""
    counts = (mu.shape[2], mu.shape[1], mu.shape[0])
    cuts = np.empty(counts[0] + counts[1] + counts[2] + 4)
    cuts[0] = 0.0
    num_cuts = 1
    for axis in range(3):
        if direction[axis] != 0:
            for plane in range(counts[axis] + 1):
                t = (plane - 0.5 - start[axis]) / direction[axis]
                if t > 0:
                    cuts[num_cuts] = t
                    num_cuts += 1
    cuts = np.sort(cuts[:num_cuts])
    total = 0.0
    for piece in range(num_cuts - 1):
        middle = start + (cuts[piece] + cuts[piece + 1]) / 2 * direction
        i, j, k = int(np.rint(middle[0])), int(np.rint(middle[1])), int(np.rint(middle[2]))
        if 0 <= i < counts[0] and 0 <= j < counts[1] and 0 <= k < counts[2]:
            total += (cuts[piece + 1] - cuts[piece]) * mu[k, j, i]
    return total
