"""The projector for CPUs: Joseph's method slab by slab, several views to one pass over the volume, on all threads."""

import math
from collections.abc import Callable

import numba
import numpy as np
from numpy.typing import NDArray

from drrgen.errors import InputError
from drrgen.geometry import Detector, Float, Views
from drrgen.projectors import slab

# The largest 16-bit step of attenuation above 0: second differences reach twice as far both ways, and must fit.
_LEVELS = 16382
# Bytes of the planes of one batch of views, per thread: they stay in the cache from the sums to the resampling.
_BATCH_BYTES = 8 << 20
# (main, row, column) as axes of a voxel (column, row, slice): x, the axis along which a CT is finest, is the column
# wherever it can be.
_AXES = ((0, 2, 1), (1, 2, 0), (2, 1, 0))
# The plane's grid is this much finer than the pixels on it. Bilinear interpolation then blurs as a pixel's area does:
# a triangle of half-width w has the second moment w^2 / 6, a pixel's width 1 / 12, equal for w = 1 / sqrt(2).
_FINER = {"row": 1.6, "column": 1.2}
# Samples of the plane within a pixel lie at most so many of the grid's steps apart.
_APART = 6.0


def prepare(mu: NDArray[np.float32], voxel_from_world: Float) -> Callable[[Views, Detector], NDArray[np.float32]]:
    return _Slabs(mu, voxel_from_world).project


class _Slabs:
    def __init__(self, mu: NDArray[np.float32], voxel_from_world: Float) -> None:
        low, high = float(mu.min()), float(mu.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError("attenuation is not finite everywhere: replace NaN and infinity in the volume")
        self._step = (max(high, 0.0) - min(low, 0.0)) / _LEVELS or 1.0
        self._voxels = np.rint(mu / np.float32(self._step)).astype(np.int16)
        self._voxel_from_world = voxel_from_world
        self._planes = np.empty(1, np.float32)
        self._laid_out: dict[int, tuple[NDArray[np.int16], ...]] = {}

    def project(self, views: Views, detector: Detector) -> NDArray[np.float32]:
        shape = detector.shape
        out = np.empty((len(views), shape, shape), np.float32)
        rays = views.rays(detector, self._voxel_from_world)
        counts = np.array(self._voxels.shape[::-1])
        passes: list[np.void] = []
        starts = [0]
        first_view = points = 0
        batch_bytes = numba.get_num_threads() * _BATCH_BYTES
        for view in range(len(views)):
            found = _passes(view - first_view, *(part[view] for part in rays), counts, shape)
            more = sum(int(one["rows"] * one["columns"]) for one in found)
            if passes and 4 * (points + more) > batch_bytes:
                self._cast(passes, starts, views, detector, out[first_view:view])
                passes, starts, first_view, points = [], [0], view, 0
                for one in found:
                    one["view"] = 0
            passes += found
            starts.append(len(passes))
            points += more
        self._cast(passes, starts, views, detector, out[first_view:])
        return out

    def _cast(self, found, starts, views, detector, out) -> None:
        passes = np.array(found, slab.PASS)
        sizes = passes["rows"] * passes["columns"]
        passes["offset"] = np.cumsum(sizes) - sizes
        if sizes.sum() > len(self._planes):
            self._planes = np.empty(int(sizes.sum()), np.float32)
        for axis in range(3):
            mine = passes[passes["axis"] % 3 == axis]
            if len(mine):
                slab.sum_slices(*self._across(axis), mine, self._planes)
        slab.resample(passes, np.array(starts), self._planes, views.sdd_mm, detector.pixel_mm, self._step, out)

    def _across(self, axis: int) -> tuple[NDArray[np.int16], ...]:
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


def _passes(view: int, source: Float, first_pixel: Float, column_step: Float, row_step: Float, counts, shape: int):
    """The passes of one view: one for each face of a cube around the source, in voxels, through which rays leave."""
    direction = np.stack([first_pixel - source, column_step, row_step], axis=1)
    edge = np.array([-0.5, shape - 0.5])
    outline = np.array([[1, c, r] for c, r in ((0, 0), (1, 0), (1, 1), (0, 1))], dtype=float)
    outline[:, 1:] = edge[outline[:, 1:].astype(int)]
    faces = []
    for face in range(6):
        axis, sign = face % 3, 1 if face < 3 else -1
        region = outline
        for other in {0, 1, 2} - {axis}:
            for side in (-1, 1):
                region = region if not len(region) else _clipped(region, sign * direction[axis] + side * direction[other])
        if len(region):
            faces.append((face, region))
        if region is outline:
            break
    found = []
    for face, region in faces:
        one = _plan(face, region, source, direction, counts, shape)
        if one is not None:
            one["view"], one["shared"] = view, len(faces) > 1
            found.append(one)
    # passes that share a view share its samples: each belongs to one of them
    for name in ("across", "down"):
        most = max((int(one[name]) for one in found), default=1)
        for one in found:
            one[name] = most
    return found


def _clipped(polygon: Float, plane: Float) -> Float:
    """The part of a convex polygon [corners, 3] of points (1, c, r) where plane . point >= 0 (Sutherland-Hodgman)."""
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


def _plan(face: int, region: Float, source: Float, direction: Float, counts, shape: int):
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
    plane = (first + last) / 2
    reach = plane - source[main]
    per_main = reach / (region @ direction[main])
    one = np.zeros((), slab.PASS)
    grid = {}
    for name, axis in (("row", row), ("column", column)):
        slope = region @ direction[axis] / (region @ direction[main])
        at = source[axis] + reach * slope
        low, high = at.min(), at.max()
        edges = source[axis] + np.array(
            [(edge - source[axis]) * reach / (end - source[main]) for edge in (-1, counts[axis]) for end in (first, last)]
        )
        low, high = max(low, edges.min()), min(high, edges.max())
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
    group = one["phases"] * slab.lanes.NUM
    one["columns"] = -(-(math.ceil((high - low) / step) + 4) // group) * group
    moves = np.hypot(row_moves, column_moves)
    one["across"], one["down"] = np.maximum(1, np.ceil(moves.max(axis=1) / _APART))
    one["source_main"], one["source_row"], one["source_column"] = source[list(axes)]
    one["plane"], one["first_slice"], one["last_slice"] = plane, first, last
    one["to_main"] = direction[main]
    for name, axis in (("row", row), ("column", column)):
        shift = source[axis] - one[f"first_{name}"]
        one[f"to_{name}"] = (shift * direction[main] + reach * direction[axis]) / one[f"{name}_step"]
    one["left"], one["top"] = np.maximum(0, np.floor(region[:, 1:].min(axis=0)))
    one["right"], one["bottom"] = np.minimum(shape - 1, np.ceil(region[:, 1:].max(axis=0)))
    one["axis"], one["direction"] = face, direction
    return one
