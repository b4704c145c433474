"""The twin of the `cpu` projector: Joseph ray by ray in float64, its transpose, and a pixel's area as many rays."""

import math

import numpy as np
from numba import njit, prange
from numpy.typing import ArrayLike, NDArray

from drrgen.geometry import Detector, Views

# Rays are clipped this far (in voxels) inside the zero border, so that rounding never reads beyond it.
_MARGIN = 1e-6


def project(
    mu: NDArray[np.float32], voxel_from_world: NDArray[np.float64], views: Views, detector: Detector
) -> NDArray[np.float32]:
    """Joseph 1982, doi 10.1109/TMI.1982.4307572: step from slice to slice along the axis in which the ray crosses most
    voxels, interpolate bilinearly within each slice, weight with the path length per slice.

    The ray through the centre of each pixel. Outside the volume attenuation is 0, reached linearly one voxel beyond the
    outermost centres. Shapes and units: `drrgen.projectors`.
    """
    shape = detector.shape
    line_integrals = np.empty((len(views), shape, shape), np.float32)
    rays = views.rays(detector, voxel_from_world)
    _cast(np.pad(mu, 1), *rays, views.sdd_mm, detector.pixel_mm, line_integrals)
    return line_integrals


def over_area(
    mu: NDArray[np.float32], voxel_from_world: NDArray[np.float64], views: Views, detector: Detector, rays: int = 4
) -> NDArray[np.float64]:
    """The mean of rays x rays line integrals evenly spread over each pixel: [view, row, column]."""
    size = detector.shape
    finer = Detector(size * rays, detector.pixel_mm / rays)
    cast = [project(mu, voxel_from_world, views[i : i + 1], finer)[0] for i in range(len(views))]
    return np.array(cast).reshape(-1, size, rays, size, rays).mean(axis=(2, 4), dtype=np.float64)


@njit(cache=True, parallel=True)
def _cast(padded, source, first_pixel, column_step, row_step, sdd_mm, pixel_mm, out):  # type: ignore[no-untyped-def]
    num_views, shape, _ = out.shape
    flat = padded.ravel()
    counts = (padded.shape[2] - 2, padded.shape[1] - 2, padded.shape[0] - 2)
    strides = (1, padded.shape[2], padded.shape[2] * padded.shape[1])
    for index in prange(num_views * shape):
        view, row = index // shape, index % shape
        x, y, z = source[view]
        for column in range(shape):
            dx = first_pixel[view, 0] + column * column_step[view, 0] + row * row_step[view, 0] - x
            dy = first_pixel[view, 1] + column * column_step[view, 1] + row * row_step[view, 1] - y
            dz = first_pixel[view, 2] + column * column_step[view, 2] + row * row_step[view, 2] - z
            across, down = (column - (shape - 1) / 2) * pixel_mm, (row - (shape - 1) / 2) * pixel_mm
            length_mm = math.sqrt(sdd_mm**2 + across**2 + down**2)
            if abs(dy) >= abs(dx) and abs(dy) >= abs(dz):
                main, b, c = (y, dy, 1), (x, dx, 0), (z, dz, 2)
            elif abs(dx) >= abs(dz):
                main, b, c = (x, dx, 0), (y, dy, 1), (z, dz, 2)
            else:
                main, b, c = (z, dz, 2), (x, dx, 0), (y, dy, 1)
            out[view, row, column] = length_mm * _march(flat, counts, strides, main, b, c)


@njit(cache=True)
def _march(flat, counts, strides, main, b, c):  # type: ignore[no-untyped-def]
    """The integral of attenuation over t >= 0 along a ray, from samples on the slices across its main axis.

    main, b, c: (start, direction, axis) of the ray along its main axis and along the two others, in voxels.
    """
    start, per_t, axis = main
    slope_b, slope_c = b[1] / per_t, c[1] / per_t
    at_zero_b, at_zero_c = b[0] - start * slope_b, c[0] - start * slope_c
    low, high = 0.0, counts[axis] - 1.0
    if per_t > 0:
        low = max(low, start)
    else:
        high = min(high, start)
    low, high = _clip(low, high, at_zero_b, slope_b, counts[b[2]])
    low, high = _clip(low, high, at_zero_c, slope_c, counts[c[2]])
    main_stride, b_stride, c_stride = strides[axis], strides[b[2]], strides[c[2]]
    total = 0.0
    for plane in range(math.ceil(low), math.floor(high) + 1):
        # + 1: the volume begins one voxel inside its zero border
        at_b, at_c = at_zero_b + slope_b * plane + 1, at_zero_c + slope_c * plane + 1
        floor_b, floor_c = int(at_b), int(at_c)
        weight_b, weight_c = at_b - floor_b, at_c - floor_c
        base = (plane + 1) * main_stride + floor_b * b_stride + floor_c * c_stride
        near = flat[base] + weight_b * (flat[base + b_stride] - flat[base])
        base += c_stride
        far = flat[base] + weight_b * (flat[base + b_stride] - flat[base])
        total += near + weight_c * (far - near)
    return total / abs(per_t)


@njit(cache=True)
def _clip(low, high, at_zero, slope, count):  # type: ignore[no-untyped-def]
    """The part of [low, high] in which at_zero + slope x stays within the zero border of `count` voxels."""
    first, last = -1 + _MARGIN, count - _MARGIN
    if abs(slope) < 1e-12:
        return (low, high) if first <= at_zero <= last else (1.0, 0.0)
    enter, leave = (first - at_zero) / slope, (last - at_zero) / slope
    return max(low, min(enter, leave)), min(high, max(enter, leave))


def back_project(
    images: ArrayLike,
    shape: tuple[int, int, int],
    voxel_from_world: NDArray[np.float64],
    views: Views,
    detector: Detector,
) -> NDArray[np.float64]:
    """The transpose of `project`, written without it: each pixel is spread over the voxels that its ray reads.

    A voxel is read with the weight of a hat, 1 at its centre and 0 at its neighbours', in each direction within the
    slice. images: [view, row, column]; result: [slice, row, column]. For tiny volumes: plain Python.
    """
    back = np.zeros(shape[::-1])
    offset_mm = (np.arange(detector.shape) - (detector.shape - 1) / 2) * detector.pixel_mm
    rays = zip(*views.rays(detector, voxel_from_world), strict=True)
    for image, (source, first, column_step, row_step) in zip(np.asarray(images), rays, strict=True):
        for (row, column), value in np.ndenumerate(image):
            ray = first + column * column_step + row * row_step - source
            main = int(np.argmax(np.abs(ray)))
            others = [axis for axis in range(3) if axis != main]
            ray_mm = math.hypot(views.sdd_mm, offset_mm[row], offset_mm[column])
            slices = np.moveaxis(back, main, 0)
            for plane in range(len(slices)):
                along = (plane - source[main]) / ray[main]
                if along >= 0:
                    at = source + along * ray
                    hats = [np.maximum(0, 1 - np.abs(np.arange(back.shape[axis]) - at[axis])) for axis in others]
                    slices[plane] += value * ray_mm / abs(ray[main]) * np.outer(*hats)
    return back.transpose()
