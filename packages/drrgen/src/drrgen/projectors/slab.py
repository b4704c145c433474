"""The compiled half of the `cpu` projector: lay a volume out in slices, sum its slices on a plane, resample the plane.

A slice of the volume, seen from the source on a plane parallel to it, is the slice itself, scaled and shifted. Bilinear
interpolation of it on the plane's grid is therefore separable, and along the rows it is piecewise linear with kinks at
the voxel rows only. So nothing is sampled: at each kink the change of slope is added, and once per view two cumulative
sums turn changes of slope into values. The cost depends on the voxels, hardly on the number of rows of the grid.

Names: `main` is the axis across the slices, `row` and `column` are the two axes within one.
"""

import math

import numpy as np
from numba import njit, prange

from drrgen.projectors import lanes

# A slice is stored in strips of this many columns plus an overlap, so that the window of eight neighbouring columns of
# the grid lies in one strip, and so that going down the rows is going on in memory.
STRIP, OVERLAP = 32, 16
# Zero columns on both sides of a slice, for windows that stand half outside.
PAD = 16
# What is zero is known for cells of this many columns of a slice.
CELL = 16
# Slices that are summed in one go into the sums of eight columns, while these are in the nearest cache.
_GROUP = 8
# Views that read the same slices in turn.
TOGETHER = 4
# Groups of eight columns to a task: few, so that every thread finds one; many, because each task begins with a table.
_TILES = 8, 64

# One view's sums over the slices across one axis. Positions are in voxels.
PASS = np.dtype(
    [
        # the source, and where along the main axis the plane is; which slices lie before the source
        *[(name, np.float64) for name in ("source_main", "source_row", "source_column", "plane")],
        *[(name, np.int64) for name in ("first_slice", "last_slice")],
        # the grid on the plane: rows x columns points; columns in `phases` interleaved sets, each in groups of eight
        *[(name, np.float64) for name in ("first_row", "row_step", "first_column", "column_step")],
        *[(name, np.int64) for name in ("rows", "columns", "phases", "offset")],
        # pixel (r, c) sees the point (to_row, to_column) / to_main of the grid, each a + b c + d r
        *[(name, np.float64, 3) for name in ("to_main", "to_row", "to_column")],
        # samples per pixel along the detector's columns and rows
        *[(name, np.int64) for name in ("across", "down")],
        # the pixels that see the volume through this pass lie in here, ends included
        *[(name, np.int64) for name in ("top", "bottom", "left", "right")],
        # which face of a cube around the source the rays leave by, and their direction, where a view has two passes
        ("face", np.int64),
        ("shared", np.bool_),
        ("direction", np.float64, (3, 3)),
    ]
)

_FAST = dict(cache=True, fastmath=True, error_model="numpy")
_U8 = np.uint64(lanes.NUM)


@njit(parallel=True, **_FAST)
def lay_out(voxels, changes, first, last):  # type: ignore[no-untyped-def]
    """Second differences of `voxels` along its rows, in strips, and which rows of each cell of columns are not zero.

    voxels: int16 [main, row, column], in any memory order. changes: int16 [main, strip, row + 2, STRIP + OVERLAP], 0;
    its row i + 1 is the change of slope at voxel row i. first, last: int16 [main, cell], such that rows outside
    first..last are zero in the cell.
    """
    num_slices, num_rows, num_columns = voxels.shape
    # a few slices to a task: where the main axis is contiguous in `voxels`, they share its cache lines
    for task in prange((num_slices + 31) // 32):
        stop = min(num_slices, 32 * task + 32)
        for row in range(-1, num_rows + 1):
            for column in range(num_columns):
                strip, place = (column + PAD) // STRIP, (column + PAD) % STRIP
                for main in range(32 * task, stop):
                    change = np.int64(0)
                    if row > 0:
                        change += np.int64(voxels[main, row - 1, column])
                    if 0 <= row < num_rows:
                        change -= 2 * np.int64(voxels[main, row, column])
                    if row < num_rows - 1:
                        change += np.int64(voxels[main, row + 1, column])
                    if change != 0:
                        changes[main, strip, row + 1, place] = change
                        if place < OVERLAP and strip > 0:
                            changes[main, strip - 1, row + 1, STRIP + place] = change
                        cell = (column + PAD) // CELL
                        if last[main, cell] < 0:
                            first[main, cell] = row + 1
                        last[main, cell] = row + 1


@njit(parallel=True, **_FAST)
def sum_slices(changes, first, last, passes, planes, num_threads):  # type: ignore[no-untyped-def]
    """The sums over all slices on the grid of each pass: planes[offset + row * columns + column], flat float32."""
    most = 0
    for index in range(len(passes)):
        most = max(most, passes[index].columns)
    num_batches = (len(passes) + TOGETHER - 1) // TOGETHER
    most_groups = most // lanes.NUM
    tile = min(max(_TILES[0], most_groups * num_batches // (2 * num_threads)), _TILES[1])
    num_tiles = (most_groups + tile - 1) // tile
    # every task has its own points of the planes: no sum depends on the number of threads
    for task in prange(num_batches * num_tiles):
        start = task // num_tiles * TOGETHER
        _sum_tile(changes, first, last, passes[start : start + TOGETHER], planes, task % num_tiles * tile, tile)


@njit(**_FAST)
def _sum_tile(changes, first, last, passes, planes, first_group, tile):  # type: ignore[no-untyped-def]
    """The part of some passes' grids in the groups of columns first_group .. first_group + tile."""
    num_slices, num_strips, num_kinks, _ = changes.shape
    flat = changes.reshape(-1)
    most_rows = 0
    for index in range(len(passes)):
        most_rows = max(most_rows, passes[index].rows)
    # changes of slope: [pass, group, row, lane]
    size = (most_rows + 1) * lanes.NUM
    sums = np.zeros(len(passes) * tile * size, np.float32)
    where = np.empty((_GROUP, num_kinks), np.int32)
    weights = np.empty((_GROUP, 2, num_kinks), np.float32)
    last_kink = np.empty(_GROUP, np.int64)
    for group_start in range(0, num_slices, _GROUP):
        for index in range(len(passes)):
            one = passes[index]
            num_groups = min(tile, one.columns // lanes.NUM - first_group)
            if num_groups <= 0:
                continue
            start, stop = max(group_start, one.first_slice), min(group_start + _GROUP, one.last_slice + 1)
            for main in range(start, stop):
                place = main - group_start
                last_kink[place] = _kinks(one, main, num_kinks, where[place], weights[place])
            for group in range(num_groups):
                phase = (first_group + group) % one.phases
                first_place = (first_group + group) // one.phases * lanes.NUM
                base = np.uint64((index * tile + group) * size)
                for main in range(start, stop):
                    place = main - group_start
                    scale = (main - one.source_main) / (one.plane - one.source_main)
                    step = one.column_step * scale
                    at = one.source_column + (one.first_column - one.source_column) * scale + step * phase + PAD
                    step *= one.phases
                    at += step * first_place
                    end = at + step * (lanes.NUM - 1)
                    # the cells that the window touches, and the rows in which they are not zero
                    low_cell = max(0, math.floor(at) // CELL)
                    high_cell = min(first.shape[1] - 1, (math.floor(end) + 1) // CELL)
                    low, high = num_kinks, -1
                    for cell in range(low_cell, high_cell + 1):
                        if last[main, cell] >= 0:
                            low, high = min(low, first[main, cell]), max(high, last[main, cell])
                    high = min(high, last_kink[place])
                    if low <= high:
                        _add_rows(
                            flat, main * num_strips, num_strips, num_kinks, at, step, low, high,
                            where[place], weights[place], sums, base,
                        )  # fmt: skip
    for index in range(len(passes)):
        one = passes[index]
        for group in range(min(tile, one.columns // lanes.NUM - first_group)):
            phase, first_place = (first_group + group) % one.phases, (first_group + group) // one.phases * lanes.NUM
            _integrate(
                sums[(index * tile + group) * size :], one.rows, one.columns, one.phases,
                planes[one.offset + first_place * one.phases + phase :],
            )  # fmt: skip


@njit(**_FAST)
def _kinks(one, main, num_kinks, where, weights):  # type: ignore[no-untyped-def]
    """Where in the grid's rows a slice's voxel rows lie, how the change of slope there is shared by two grid rows, and
    the last one above the grid's end.

    A change of slope at position p, q - 1 <= p < q, adds (q - p) to row q and 1 more to every row after it; as a second
    difference that is (q - p) in row q and 1 - (q - p) in row q + 1. It holds for q = 0 and any p < 0 as well.
    """
    scale = (main - one.source_main) / (one.plane - one.source_main)
    step = one.row_step * scale
    at = one.source_row + (one.first_row - one.source_row) * scale + 1
    last = min(num_kinks - 1, math.floor(at + step * (one.rows - 1)))
    per_kink, first = 1 / step, -at / step
    final = np.int32(one.rows - 1)
    for kink in range(last + 1):
        position = first + kink * per_kink
        row = min(max(np.int32(0), np.int32(math.floor(position)) + np.int32(1)), final)
        where[kink] = row * np.int32(lanes.NUM)
        weights[0, kink] = step * (row - position)
        weights[1, kink] = step * (1 - row + position)
    return last


@njit(**_FAST)
def _add_rows(flat, first_strip, num_strips, num_kinks, at, step, low, high, where, weights, sums, base):  # type: ignore[no-untyped-def]
    """Add the changes of slope low..high of a slice, at eight columns of the grid, to the sums that begin at `base`.

    The columns lie at at, at + step, ... in the slice's stored columns. Eight of them are a blend of as many contiguous
    loads as they span voxels.
    """
    drift = (lanes.NUM - 1) * (step - 1)
    window = math.floor(at + min(0.0, drift))
    taps = int(at + max(0.0, drift) - window) + 2
    strip = window // STRIP
    if taps > 5 or window < 0 or strip >= num_strips:
        _add_rows_apart(flat, first_strip, num_strips, num_kinks, at, step, low, high, where, weights, sums, base)
        return
    load_at = ((first_strip + strip) * num_kinks + low) * (STRIP + OVERLAP) + window % STRIP
    drift, start = np.float32(step - 1), np.float32(at - window)
    if taps <= 3:
        _blend_rows(3, flat, load_at, drift, start, where[low : high + 1], weights[:, low : high + 1], sums, base)
    elif taps == 4:
        _blend_rows(4, flat, load_at, drift, start, where[low : high + 1], weights[:, low : high + 1], sums, base)
    else:
        _blend_rows(5, flat, load_at, drift, start, where[low : high + 1], weights[:, low : high + 1], sums, base)


@njit(inline="always", **_FAST)
def _blend_rows(taps, flat, load_at, drift, start, where, weights, sums, base):  # type: ignore[no-untyped-def]
    """The inner loop; a copy of it is compiled for each number of taps."""
    x = lanes.multiply_add(lanes.splat(drift), lanes.ramp(), lanes.splat(start))
    tap0 = lanes.hat(x, lanes.splat(np.float32(0)))
    tap1 = lanes.hat(x, lanes.splat(np.float32(1)))
    tap2 = lanes.hat(x, lanes.splat(np.float32(2)))
    tap3 = lanes.hat(x, lanes.splat(np.float32(3)))
    tap4 = lanes.hat(x, lanes.splat(np.float32(4)))
    # unsigned, because numba makes provision for signed indices that count from the end
    voxel = np.uint64(load_at)
    for kink in range(np.uint64(len(where))):
        value = lanes.multiply(tap0, lanes.load(flat, voxel))
        value = lanes.multiply_add(tap1, lanes.load(flat, voxel + np.uint64(1)), value)
        value = lanes.multiply_add(tap2, lanes.load(flat, voxel + np.uint64(2)), value)
        if taps > 3:
            value = lanes.multiply_add(tap3, lanes.load(flat, voxel + np.uint64(3)), value)
        if taps > 4:
            value = lanes.multiply_add(tap4, lanes.load(flat, voxel + np.uint64(4)), value)
        here = base + np.uint64(where[kink])
        share = lanes.splat(weights[np.uint64(0), kink])
        lanes.store(sums, here, lanes.multiply_add(share, value, lanes.load(sums, here)))
        here += _U8
        share = lanes.splat(weights[np.uint64(1), kink])
        lanes.store(sums, here, lanes.multiply_add(share, value, lanes.load(sums, here)))
        voxel += np.uint64(STRIP + OVERLAP)


@njit(**_FAST)
def _add_rows_apart(flat, first_strip, num_strips, num_kinks, at, step, low, high, where, weights, sums, base):  # type: ignore[no-untyped-def]
    """The same for columns that lie apart, one at a time: for slices much nearer to the source than the plane is."""
    for lane in range(lanes.NUM):
        column = math.floor(at + step * lane)
        far = np.float32(at + step * lane - column)
        strip = column // STRIP
        if column < 0 or strip >= num_strips:
            continue
        load_at = ((first_strip + strip) * num_kinks + low) * (STRIP + OVERLAP) + column % STRIP
        for kink in range(low, high + 1):
            value = flat[load_at] + far * (np.float32(flat[load_at + 1]) - np.float32(flat[load_at]))
            here = base + np.uint64(where[kink]) + np.uint64(lane)
            sums[here] += weights[0, kink] * value
            sums[here + _U8] += weights[1, kink] * value
            load_at += STRIP + OVERLAP


@njit(**_FAST)
def _integrate(changes, rows, columns, phases, plane):  # type: ignore[no-untyped-def]
    """Changes of slope [row, lane] to values at plane[row * columns + lane * phases]: two sums, in float64."""
    slope, value = np.zeros(lanes.NUM), np.zeros(lanes.NUM)
    for row in range(rows):
        for lane in range(lanes.NUM):
            slope[lane] += changes[row * lanes.NUM + lane]
            value[lane] += slope[lane]
        for lane in range(lanes.NUM):
            plane[row * columns + lane * phases] = value[lane]


@njit(parallel=True, **_FAST)
def resample(passes, starts, planes, sdd_mm, pixel_mm, step, out):  # type: ignore[no-untyped-def]
    """The planes at the detector's pixels, times the way through one slice: out [view, row, column], float32.

    passes: those of view v are starts[v] .. starts[v + 1]. step: attenuation of one unit of the planes.
    """
    num_views, shape, _ = out.shape
    for task in prange(num_views * shape):
        view, row = task // shape, task % shape
        line = out[view, row]
        line[:] = 0
        index, weight = np.empty((2, shape), np.int32), np.empty((3, shape), np.float32)
        for pass_index in range(starts[view], starts[view + 1]):
            one = passes[pass_index]
            if not one.top <= row <= one.bottom:
                continue
            plane = planes[one.offset :]
            for i in range(one.down):
                r = row + (i + 0.5) / one.down - 0.5
                for j in range(one.across):
                    shift = (j + 0.5) / one.across - 0.5
                    scale = step / (one.down * one.across)
                    _locate(one, r, shift, sdd_mm, pixel_mm, scale, index, weight)
                    if one.shared:
                        _disown(one, r, shift, weight)
                    _interpolate(one, plane, index, weight, line)


@njit(**_FAST)
def _locate(one, r, shift, sdd_mm, pixel_mm, scale, index, weight):  # type: ignore[no-untyped-def]
    """Where the samples of one line of the detector lie on the plane, and what they weigh; of the pass' pixels only.

    index: (row, column) of the grid's point before each sample. weight: how far the sample is beyond it, (row, column),
    and `scale` times the mm that the ray goes from slice to slice, 0 for samples outside the grid.
    """
    shape = index.shape[1]
    near_squared = sdd_mm**2 + ((r - (shape - 1) / 2) * pixel_mm) ** 2
    main, row, column = (
        one.to_main[0] + one.to_main[2] * r,
        one.to_row[0] + one.to_row[2] * r,
        one.to_column[0] + one.to_column[2] * r,
    )
    main_step, row_step, column_step = one.to_main[1], one.to_row[1], one.to_column[1]
    last_row, last_column = np.float64(one.rows - 2), np.float64(one.columns - 2)
    for pixel in range(one.left, one.right + 1):
        c = pixel + shift
        per_main = 1 / (main + main_step * c)
        at_row, at_column = (row + row_step * c) * per_main, (column + column_step * c) * per_main
        near_row, near_column = min(max(at_row, 0.0), last_row), min(max(at_column, 0.0), last_column)
        i, j = np.int32(near_row), np.int32(near_column)
        index[0, pixel], index[1, pixel] = i, j
        weight[0, pixel], weight[1, pixel] = near_row - i, near_column - j
        across = (c - (shape - 1) / 2) * pixel_mm
        inside = near_row == at_row and near_column == at_column
        weight[2, pixel] = scale * math.sqrt(near_squared + across**2) * abs(per_main) if inside else 0.0


@njit(**_FAST)
def _interpolate(one, plane, index, weight, line):  # type: ignore[no-untyped-def]
    """Add the plane at the samples of `_locate`, bilinear, to a line of pixels."""
    width = np.int32(one.columns)
    for pixel in range(np.uint64(one.left), np.uint64(one.right + 1)):
        # unsigned, because numba makes provision for signed indices that count from the end
        upper = np.uint64(index[0, pixel] * width + index[1, pixel])
        lower = upper + np.uint64(width)
        down, right = weight[0, pixel], weight[1, pixel]
        above = plane[upper] + right * (plane[upper + np.uint64(1)] - plane[upper])
        below = plane[lower] + right * (plane[lower + np.uint64(1)] - plane[lower])
        line[pixel] += weight[2, pixel] * (above + down * (below - above))


@njit(**_FAST)
def _disown(one, r, shift, weight):  # type: ignore[no-untyped-def]
    """Weigh 0 what belongs to another pass: rays that cross more slices of another axis; y goes before x before z."""
    axis = one.face % 3
    sign = 1.0 if one.face < 3 else -1.0
    second, third = (axis + 1) % 3, (axis + 2) % 3
    # x: y before, z after; y: both after; z: both before
    wins_second, wins_third = axis == 1, axis != 2
    main, main_step = one.direction[axis, 0] + one.direction[axis, 2] * r, one.direction[axis, 1]
    this, this_step = one.direction[second, 0] + one.direction[second, 2] * r, one.direction[second, 1]
    that, that_step = one.direction[third, 0] + one.direction[third, 2] * r, one.direction[third, 1]
    for pixel in range(one.left, one.right + 1):
        c = pixel + shift
        ahead = sign * (main + main_step * c)
        over_this, over_that = ahead - abs(this + this_step * c), ahead - abs(that + that_step * c)
        is_own = (over_this > 0 or (wins_second and over_this == 0)) and (
            over_that > 0 or (wins_third and over_that == 0)
        )
        weight[2, pixel] = weight[2, pixel] if is_own else np.float32(0)
