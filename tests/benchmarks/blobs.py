"""A smooth phantom: Gaussian blobs, whose line integrals are closed forms on which no voxel grid has a say."""

import math

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from drrgen.geometry import Detector, Float, Views

# Blobs are followed to so many sigmas: beyond, they are 1e-11 of their peak.
_REACH = 7.0
# Gauss-Legendre points of a pixel's side: exact for polynomials up to x^5, and a blob is wider than a pixel.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(3)


def draw(seed: int, number: int = 40) -> Float:
    """[number, 5]: x, y, z (mm, LPS, around the origin), sigma (4 to 18 mm), peak (1/mm). As wide as a chest."""
    rng = np.random.default_rng(seed)
    centre_mm = rng.uniform([-110, -110, -90], [110, 110, 90], (number, 3))
    return np.column_stack([centre_mm, rng.uniform(4, 18, number), rng.uniform(0.005, 0.03, number)])


def voxelise(blobs: Float, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> NDArray[np.float32]:
    """[slice, row, column], 1/mm: the value at each voxel's centre. spacing_mm: x, y, z. Centred on the origin."""
    mu = np.zeros(shape, np.float32)
    for *centre_mm, sigma_mm, peak in blobs:
        parts, factors = [], []
        for count, step, middle in zip(shape, spacing_mm[::-1], centre_mm[::-1], strict=True):
            at_mm = (np.arange(count) - (count - 1) / 2) * step - middle
            near = np.flatnonzero(np.abs(at_mm) < _REACH * sigma_mm)
            parts.append(slice(near[0], near[-1] + 1))
            factors.append(np.exp(-(at_mm[near] ** 2) / 2 / sigma_mm**2).astype(np.float32))
        z, y, x = factors
        mu[tuple(parts)] += np.float32(peak) * z[:, None, None] * y[:, None] * x
    return mu


def line_integrals(blobs: Float, views: Views, detector: Detector) -> tuple[Float, Float]:
    """(central rays, means over pixels' areas), each [view, row, column]."""
    rays = views.rays(detector, np.eye(4))
    central, area = np.empty((2, len(views), detector.shape, detector.shape))
    _cast(blobs, *rays, np.zeros(1), np.ones(1), central)
    _cast(blobs, *rays, _NODES / 2, _WEIGHTS / 2, area)
    return central, area


@njit(cache=True, parallel=True)
def _cast(blobs, source, first_pixel, column_step, row_step, nodes, weights, out):  # type: ignore[no-untyped-def]
    """A pixel is the weighted mean at nodes x nodes places, in pixels from its centre.

    A ray at distance d from a blob's centre collects w sqrt(2 pi) s exp(-d^2 / 2 s^2) of it.
    """
    num_views, shape, _ = out.shape
    for index in prange(num_views * shape):
        view, row = index // shape, index % shape
        for column in range(shape):
            total = 0.0
            for i in range(len(nodes)):
                for j in range(len(nodes)):
                    across, down = column + nodes[j], row + nodes[i]
                    ray = first_pixel[view] + across * column_step[view] + down * row_step[view] - source[view]
                    x, y, z = ray / math.sqrt(ray[0] ** 2 + ray[1] ** 2 + ray[2] ** 2)
                    for b in range(len(blobs)):
                        bx = blobs[b, 0] - source[view, 0]
                        by = blobs[b, 1] - source[view, 1]
                        bz = blobs[b, 2] - source[view, 2]
                        sigma = blobs[b, 3]
                        # |b x ray|, without the difference of two large squares
                        px, py, pz = by * z - bz * y, bz * x - bx * z, bx * y - by * x
                        reach = (px * px + py * py + pz * pz) / (2 * sigma * sigma)
                        if reach < 30.0:
                            value = blobs[b, 4] * math.sqrt(2 * math.pi) * sigma * math.exp(-reach)
                            total += weights[i] * weights[j] * value
            out[view, row, column] = total
