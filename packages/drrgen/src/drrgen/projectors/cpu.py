"""The projector for CPUs: Joseph's method slab by slab, several views to one pass over the volume, on all threads.

Joseph 1982 (doi 10.1109/TMI.1982.4307572) samples a ray where it crosses the slices of the axis along which it crosses
most, bilinearly within each. Rays that share this axis are summed together, slice by slice, on the grid of a plane
parallel to the slices, as in Lacroute & Levoy's shear-warp (1994, doi 10.1145/192161.192283), and the plane is
resampled once to the detector. New here: the rows are never sampled but summed as changes of slope, which makes a
fine grid cheap (`drrgen.projectors.slab`); each ray keeps its own axis, so a view may have several planes; and the grid
is chosen such that a pixel is nearer to the mean over its area than its central ray is.
"""

import math

import numba
import numpy as np
from numpy.typing import NDArray

from drrgen.errors import InputError
from drrgen.geometry import Detector, Float, Views
from drrgen.projectors import Project, slab

# The largest 16-bit step of attenuation above 0: second differences reach twice as far both ways, and must fit.
_LEVELS = 16382
# Points of the planes of one batch of views, per thread: 8 MiB, which stay in the cache until they are resampled.
_BATCH_POINTS = 1 << 21
# (main, row, column) as axes of a voxel (column, row, slice): x, the axis along which a CT is finest, is the column
# wherever it can be.
_AXES = ((0, 2, 1), (1, 2, 0), (2, 1, 0))
# The plane's grid is this much finer than the pixels on it, where these are smallest, and never coarser than voxels.
# Bilinear interpolation on such a grid blurs about as a pixel's area does: a triangle of half-width w has the second
# moment w^2 / 6, a pixel's width 1 / 12, equal for w = 1 / sqrt(2). Rows cost next to nothing, columns cost time.
_FINER = {"row": 1.6, "column": 1.2}
# Where pixels are larger than voxels a pixel is the mean of several samples, at most so many steps of the grid apart.
_APART = 2.0

Pass = NDArray[np.void]


def prepare(mu: NDArray[np.float32], voxel_from_world: Float) -> Project:
    """Signature, shapes and units: `drrgen.projectors`; mu of any sign, but finite, or it raises InputError.

    Voxels are rounded to 16382 steps between 0 and the extremes, an error of at most 0.003 % of these per voxel.
    Outside the volume attenuation is 0, reached linearly one voxel beyond the outermost centres. A source inside the
    volume sees the slices before it, whole. Results do not depend on the number of threads or on how views are
    batched, to the bit. Memory: 2 bytes per voxel, 3 more for each axis that is the main one of a ray, and about
    25 MB per thread.
    """
    return _Slabs(mu, voxel_from_world).project


class _Slabs:
    """A volume in 16 bits, laid out along each axis when a view first needs it."""

    def __init__(self, mu: NDArray[np.float32], voxel_from_world: Float) -> None:
        low, high = float(mu.min()), float(mu.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError("attenuation is not finite everywhere: replace NaN and infinity in the volume")
        self._step = (max(high, 0.0) - min(low, 0.0)) / _LEVELS or 1.0
        self._voxels = np.rint(mu / np.float32(self._step)).astype(np.int16)
        self._voxel_from_world = voxel_from_world
        self._laid_out: dict[int, tuple[NDArray[np.int16], ...]] = {}
        self._planes = np.empty(0, np.float32)

    def project(self, views: Views, detector: Detector) -> NDArray[np.float32]:
        line_integrals = np.empty((len(views), detector.shape, detector.shape), np.float32)
        counts = np.array(self._voxels.shape[::-1])
        rays = np.stack(views.rays(detector, self._voxel_from_world), axis=1)
        limit = numba.get_num_threads() * _BATCH_POINTS
        batch: list[list[Pass]] = []
        num_done = num_points = 0
        for source, first_pixel, column_step, row_step in rays:
            passes = _passes(source, first_pixel, column_step, row_step, counts, detector.shape)
            more = sum(int(each["rows"] * each["columns"]) for each in passes)
            if batch and num_points + more > limit:
                self._cast(batch, views, detector, line_integrals[num_done : num_done + len(batch)])
                num_done, num_points, batch = num_done + len(batch), 0, []
            batch.append(passes)
            num_points += more
        if batch:
            self._cast(batch, views, detector, line_integrals[num_done:])
        return line_integrals

    def _cast(self, batch: list[list[Pass]], views: Views, detector: Detector, out: NDArray[np.float32]) -> None:
        passes = np.array([one for found in batch for one in found], slab.PASS)
        starts = np.cumsum([0] + [len(found) for found in batch])
        sizes = passes["rows"] * passes["columns"]
        passes["offset"] = np.cumsum(sizes) - sizes
        if sizes.sum() > len(self._planes):
            self._planes = np.empty(int(sizes.sum()), np.float32)
        for axis in range(3):
            across = passes[passes["face"] % 3 == axis]
            if len(across):
                slab.sum_slices(*self._across(axis), across, self._planes, numba.get_num_threads())
        slab.resample(passes, starts, self._planes, views.sdd_mm, detector.pixel_mm, self._step, out)

    def _across(self, axis: int) -> tuple[NDArray[np.int16], ...]:
        """What `slab.lay_out` makes of the volume, with its slices across `axis`."""
        if axis not in self._laid_out:
            voxels = self._voxels.transpose([2 - one for one in _AXES[axis]])
            slices, rows, columns = voxels.shape
            strips = -(-(columns + 2 * slab.PAD) // slab.STRIP)
            cells = strips * slab.STRIP // slab.CELL
            changes = np.zeros((slices, strips, rows + 2, slab.STRIP + slab.OVERLAP), np.int16)
            first, last = np.zeros((slices, cells), np.int16), np.full((slices, cells), -1, np.int16)
            slab.lay_out(voxels, changes, first, last)
            self._laid_out[axis] = changes, first, last
        return self._laid_out[axis]


def _passes(
    source: Float, first_pixel: Float, column_step: Float, row_step: Float, counts: NDArray[np.int64], shape: int
) -> list[Pass]:
    """The passes of one view: one for each face of a cube around the source, in voxels, through which rays leave.

    The arguments are those of `Views.rays` for one view, the counts of voxels along x, y, z, and of pixels on a side.
    """
    # the ray of pixel (r, c) goes along direction @ (1, c, r)
    direction = np.stack([first_pixel - source, column_step, row_step], axis=1)
    near, far = -0.5, shape - 0.5
    whole = np.array([[1, near, near], [1, far, near], [1, far, far], [1, near, far]])
    regions = {}
    for face in range(6):
        region = whole
        ahead = direction[face % 3] * (1 if face < 3 else -1)
        for other in {0, 1, 2} - {face % 3}:
            for side in (-1, 1):
                region = _clipped(region, ahead + side * direction[other])
        if len(region):
            regions[face] = region
        if region is whole:
            break
    found = [_plan(face, region, source, direction, counts, shape) for face, region in regions.items()]
    passes = [one for one in found if one is not None]
    for one in passes:
        one["shared"] = len(regions) > 1
        # passes that share a view share its samples: each belongs to one of them
        one["across"], one["down"] = (max(each[name] for each in passes) for name in ("across", "down"))
    return passes


def _clipped(polygon: Float, plane: Float) -> Float:
    """The part of a convex polygon [corners, 3] of points (1, c, r) where plane . point >= 0 (Sutherland-Hodgman)."""
    if not len(polygon):
        return polygon
    height = polygon @ plane
    if (height >= 0).all():
        return polygon
    kept = []
    for here in range(len(polygon)):
        before = here - 1
        if (height[here] >= 0) != (height[before] >= 0):
            part = height[before] / (height[before] - height[here])
            kept.append(polygon[before] + part * (polygon[here] - polygon[before]))
        if height[here] >= 0:
            kept.append(polygon[here])
    return np.array(kept).reshape(-1, 3)


def _plan(
    face: int, region: Float, source: Float, direction: Float, counts: NDArray[np.int64], shape: int
) -> Pass | None:
    """The plane and its grid for the pixels in `region` [corners, (1, c, r)]; None where they see nothing."""
    axes = _AXES[face % 3]
    main, row, column = axes
    sign = 1 if face < 3 else -1
    # slices before the source; the one that holds it has no scale
    first, last = 0, int(counts[main]) - 1
    if sign > 0:
        first = max(first, math.floor(source[main]) + 1)
    else:
        last = min(last, math.ceil(source[main]) - 1)
    if first > last:
        return None
    # in the middle, where the scales of the slices differ least from 1
    plane = (first + last) / 2
    reach = plane - source[main]
    per_main = reach / (region @ direction[main])
    one = np.zeros((), slab.PASS)
    grid = {}
    for name, axis in (("row", row), ("column", column)):
        slope = region @ direction[axis] / (region @ direction[main])
        at = source[axis] + reach * slope
        low, high = at.min(), at.max()
        # the volume's shadow on the plane, with the border in which attenuation falls to 0
        reaches = reach / (np.array([[first], [last]]) - source[main])
        shadow = source[axis] + (np.array([-1, counts[axis]]) - source[axis]) * reaches
        low, high = max(low, shadow.min()), min(high, shadow.max())
        if low >= high:
            return None
        # how far the point moves from pixel to pixel, along the detector's columns and rows: [2, corners]
        moves = per_main * (direction[axis, 1:, None] - slope * direction[main, 1:, None])
        step = min(1.0, max(1e-6, np.hypot(*moves).min() / _FINER[name]))
        grid[name] = low, high, step, moves / step
    low, high, step, row_moves = grid["row"]
    one["first_row"], one["row_step"], one["rows"] = low - step, step, math.ceil((high - low) / step) + 4
    low, high, step, column_moves = grid["column"]
    one["first_column"], one["column_step"] = low - step, step
    one["phases"] = max(1, math.floor(1.2 / step))
    # columns of a slice that are read together are a voxel apart: finer grids are several interleaved ones
    group = one["phases"] * slab.lanes.NUM
    one["columns"] = -(-(math.ceil((high - low) / step) + 4) // group) * group
    moves = np.hypot(row_moves, column_moves)
    one["across"], one["down"] = np.maximum(1, np.ceil(moves.min(axis=1) / _APART))
    one["source_main"], one["source_row"], one["source_column"] = source[list(axes)]
    one["plane"], one["first_slice"], one["last_slice"] = plane, first, last
    one["to_main"] = direction[main]
    for name, axis in (("row", row), ("column", column)):
        shift = source[axis] - one[f"first_{name}"]
        one[f"to_{name}"] = (shift * direction[main] + reach * direction[axis]) / one[f"{name}_step"]
    one["left"], one["top"] = np.maximum(0, np.floor(region[:, 1:].min(axis=0)))
    one["right"], one["bottom"] = np.minimum(shape - 1, np.ceil(region[:, 1:].max(axis=0)))
    one["face"], one["direction"] = face, direction
    return one
