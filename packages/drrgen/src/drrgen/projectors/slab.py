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
from drrgen.projectors.plan import WIDTH

# A slice is stored in strips of this many columns plus an overlap, so that the window of eight neighbouring columns of
# the grid lies in one strip, and so that going down the rows is going on in memory.
STRIP, OVERLAP = 32, 16
# Zero columns on both sides of a slice, for windows that stand half outside.
PAD = 16
# What is zero is known for cells of this many columns of a slice.
CELL = 16
# Slices that are summed in one go into the sums of these columns, while these are in the nearest cache.
_GROUP = 8
# Views that read the same slices in turn.
_TOGETHER = 12
# Pairs of vectors to a task: few, so that every thread finds one; many, because each task begins with a table.
_TILES = 4, 32
# Numbers in the sums of one task: 24 MiB. Beyond it tasks are smaller.
_ROOM = 6 << 20

_FAST = dict(cache=True, nogil=True, fastmath=True, error_model="numpy")
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
    most_columns, most_rows = 0, 0
    for index in range(len(passes)):
        most_columns, most_rows = max(most_columns, passes[index].columns), max(most_rows, passes[index].rows)
    num_batches = (len(passes) + _TOGETHER - 1) // _TOGETHER
    together = (len(passes) + num_batches - 1) // num_batches
    num_pairs = most_columns // WIDTH
    tile = min(num_pairs * num_batches // (2 * num_threads), _ROOM // (together * (most_rows + 1) * WIDTH), _TILES[1])
    tile = max(tile, _TILES[0])
    num_tiles = (num_pairs + tile - 1) // tile
    for thread in prange(num_threads):
        sums = np.empty((together * tile * (most_rows + 1) + 1) * WIDTH, np.float32)
        # a row of sums is one line of the cache, not parts of two
        sums = sums[-sums.ctypes.data % (4 * WIDTH) // 4 :]
        # each thread gets tasks from everywhere: the middle of a body is more work than its sides. Every task has its
        # own points of the planes: no sum depends on the number of threads
        for task in range(thread, num_batches * num_tiles, num_threads):
            start = task // num_tiles * together
            some = passes[start : start + together]
            _sum_tile(changes, first, last, some, planes, task % num_tiles * tile, tile, sums)


@njit(**_FAST)
def _sum_tile(changes, first, last, passes, planes, first_pair, tile, sums):  # type: ignore[no-untyped-def]
    """The part of some passes' grids in the pairs of vectors first_pair .. first_pair + tile. sums: room to work."""
    num_slices, num_strips, num_kinks, _ = changes.shape
    flat = changes.reshape(-1)
    most_rows = 0
    for index in range(len(passes)):
        most_rows = max(most_rows, passes[index].rows)
    # changes of slope: [pass, pair, row, lane]
    size = (most_rows + 1) * WIDTH
    sums[: len(passes) * tile * size] = 0
    where = np.empty((_GROUP, num_kinks), np.int32)
    weights = np.empty((_GROUP, 2, num_kinks), np.float32)
    first_kink, last_kink = np.empty(_GROUP, np.int64), np.empty(_GROUP, np.int64)
    for group_start in range(0, num_slices, _GROUP):
        for index in range(len(passes)):
            one = passes[index]
            num_pairs = min(tile, one.columns // WIDTH - first_pair)
            if num_pairs <= 0:
                continue
            start, stop = max(group_start, one.first_slice), min(group_start + _GROUP, one.last_slice + 1)
            for main in range(start, stop):
                place = main - group_start
                first_kink[place], last_kink[place] = _kinks(one, main, num_kinks, where[place], weights[place])
            for pair in range(num_pairs):
                group = 2 * (first_pair + pair)
                left, right = _column(group, one.phases), _column(group + 1, one.phases)
                base = np.uint64((index * tile + pair) * size)
                for main in range(start, stop):
                    place = main - group_start
                    scale = (main - one.source_main) / (one.plane - one.source_main)
                    step = one.column_step * scale
                    at = one.source_column + (one.first_column - one.source_column) * scale + PAD
                    at_left, at_right = at + step * left, at + step * right
                    step *= one.phases
                    # the cells that the windows touch, and the rows in which they are not zero
                    low_cell = max(0, math.floor(at_left) // CELL)
                    high_cell = min(first.shape[1] - 1, (math.floor(at_right + step * (lanes.NUM - 1)) + 1) // CELL)
                    low, high = num_kinks, -1
                    for cell in range(low_cell, high_cell + 1):
                        if last[main, cell] >= 0:
                            low, high = min(low, first[main, cell]), max(high, last[main, cell])
                    low, high = max(low, first_kink[place]), min(high, last_kink[place])
                    if low <= high:
                        _add_rows(
                            flat, main * num_strips, num_strips, num_kinks, at_left, at_right, step, low,
                            where[place, low : high + 1], weights[place, :, low : high + 1], sums, base,
                        )  # fmt: skip
    for index in range(len(passes)):
        one = passes[index]
        for pair in range(min(tile, one.columns // WIDTH - first_pair)):
            group = 2 * (first_pair + pair)
            _integrate(
                sums[(index * tile + pair) * size :], one.rows, one.columns, one.phases,
                planes[one.offset :], _column(group, one.phases), _column(group + 1, one.phases),
            )  # fmt: skip


@njit(**_FAST)
def _column(group, phases):  # type: ignore[no-untyped-def]
    """The first of the eight columns of a group; the others follow `phases` apart."""
    return group // phases * lanes.NUM * phases + group % phases


@njit(**_FAST)
def _kinks(one, main, num_kinks, where, weights):  # type: ignore[no-untyped-def]
    """Where in the grid's rows a slice's voxel rows lie, and how the change of slope there is shared by two grid rows;
    the first and the last one that are not beyond the grid's last row.

    A change of slope at position p, q - 1 <= p < q, adds (q - p) to row q and 1 more to every row after it; as a second
    difference that is (q - p) in row q and 1 - (q - p) in row q + 1. It holds for q = 0 and any p < 0 as well.
    """
    scale = (main - one.source_main) / (one.plane - one.source_main)
    step = one.row_step * scale
    at = one.source_row + (one.first_row - one.source_row) * scale + 1
    end = at + step * (one.rows - 1)
    first, last = 0, num_kinks - 1
    if step > 0:
        last = min(last, math.floor(end))
    else:
        first = max(first, math.ceil(end))
    per_kink, start, size = 1 / step, -at / step, abs(step)
    final = np.int32(one.rows - 1)
    for kink in range(first, last + 1):
        position = start + kink * per_kink
        # where a slice is next to the source, positions are too large for an integer
        row = min(np.int32(math.floor(max(position, -1.0))) + np.int32(1), final)
        where[kink] = row * np.int32(WIDTH)
        weights[0, kink] = size * (row - position)
        weights[1, kink] = size * (1 - row + position)
    return first, last


@njit(**_FAST)
def _add_rows(flat, first_strip, num_strips, num_kinks, left, right, step, low, where, weights, sums, base):  # type: ignore[no-untyped-def]
    """Add the changes of slope of some rows of a slice, from row `low` on, at two times eight columns of the grid.

    The columns lie at left, left + step, ... and at right, right + step, ... in the slice's stored columns. Eight of
    them are a blend of as many contiguous loads as they span voxels. The sums begin at `base`.
    """
    drift = (lanes.NUM - 1) * (step - 1)
    window, window2 = math.floor(left + min(0.0, drift)), math.floor(right + min(0.0, drift))
    taps = 2 + max(int(left + max(0.0, drift) - window), int(right + max(0.0, drift) - window2))
    strip, strip2 = window // STRIP, window2 // STRIP
    if taps > 5 or min(window, window2) < 0 or max(strip, strip2) >= num_strips:
        _add_rows_apart(flat, first_strip, num_strips, num_kinks, left, step, low, where, weights, sums, base)
        _add_rows_apart(flat, first_strip, num_strips, num_kinks, right, step, low, where, weights, sums, base + _U8)
        return
    at = ((first_strip + strip) * num_kinks + low) * (STRIP + OVERLAP) + window % STRIP
    at2 = ((first_strip + strip2) * num_kinks + low) * (STRIP + OVERLAP) + window2 % STRIP
    drift, start, start2 = np.float32(step - 1), np.float32(left - window), np.float32(right - window2)
    if taps <= 2:
        _blend_rows(2, flat, at, at2, drift, start, start2, where, weights, sums, base)
    elif taps == 3:
        _blend_rows(3, flat, at, at2, drift, start, start2, where, weights, sums, base)
    elif taps == 4:
        _blend_rows(4, flat, at, at2, drift, start, start2, where, weights, sums, base)
    else:
        _blend_rows(5, flat, at, at2, drift, start, start2, where, weights, sums, base)


@njit(inline="always", **_FAST)
def _blend_rows(taps, flat, at, at2, drift, start, start2, where, weights, sums, base):  # type: ignore[no-untyped-def]
    """The inner loop; a copy of it is compiled for each number of taps."""
    x = lanes.multiply_add(lanes.splat(drift), lanes.ramp(), lanes.splat(start))
    y = lanes.multiply_add(lanes.splat(drift), lanes.ramp(), lanes.splat(start2))
    x0, y0 = lanes.hat(x, lanes.splat(np.float32(0))), lanes.hat(y, lanes.splat(np.float32(0)))
    x1, y1 = lanes.hat(x, lanes.splat(np.float32(1))), lanes.hat(y, lanes.splat(np.float32(1)))
    x2, y2 = lanes.hat(x, lanes.splat(np.float32(2))), lanes.hat(y, lanes.splat(np.float32(2)))
    x3, y3 = lanes.hat(x, lanes.splat(np.float32(3))), lanes.hat(y, lanes.splat(np.float32(3)))
    x4, y4 = lanes.hat(x, lanes.splat(np.float32(4))), lanes.hat(y, lanes.splat(np.float32(4)))
    # unsigned, because numba makes provision for signed indices that count from the end
    here, here2 = np.uint64(at), np.uint64(at2)
    for kink in range(np.uint64(len(where))):
        value = lanes.multiply(x0, lanes.load(flat, here))
        value2 = lanes.multiply(y0, lanes.load(flat, here2))
        value = lanes.multiply_add(x1, lanes.load(flat, here + np.uint64(1)), value)
        value2 = lanes.multiply_add(y1, lanes.load(flat, here2 + np.uint64(1)), value2)
        if taps > 2:
            value = lanes.multiply_add(x2, lanes.load(flat, here + np.uint64(2)), value)
            value2 = lanes.multiply_add(y2, lanes.load(flat, here2 + np.uint64(2)), value2)
        if taps > 3:
            value = lanes.multiply_add(x3, lanes.load(flat, here + np.uint64(3)), value)
            value2 = lanes.multiply_add(y3, lanes.load(flat, here2 + np.uint64(3)), value2)
        if taps > 4:
            value = lanes.multiply_add(x4, lanes.load(flat, here + np.uint64(4)), value)
            value2 = lanes.multiply_add(y4, lanes.load(flat, here2 + np.uint64(4)), value2)
        row = base + np.uint64(where[kink])
        share = lanes.splat(weights[np.uint64(0), kink])
        lanes.store(sums, row, lanes.multiply_add(share, value, lanes.load(sums, row)))
        row += _U8
        lanes.store(sums, row, lanes.multiply_add(share, value2, lanes.load(sums, row)))
        row += _U8
        share = lanes.splat(weights[np.uint64(1), kink])
        lanes.store(sums, row, lanes.multiply_add(share, value, lanes.load(sums, row)))
        row += _U8
        lanes.store(sums, row, lanes.multiply_add(share, value2, lanes.load(sums, row)))
        here += np.uint64(STRIP + OVERLAP)
        here2 += np.uint64(STRIP + OVERLAP)


@njit(**_FAST)
def _add_rows_apart(flat, first_strip, num_strips, num_kinks, at, step, low, where, weights, sums, base):  # type: ignore[no-untyped-def]
    """The same for eight columns that lie apart, one at a time: for slices much nearer to the source than the plane."""
    for lane in range(lanes.NUM):
        column = math.floor(at + step * lane)
        far = np.float32(at + step * lane - column)
        strip = column // STRIP
        if column < 0 or strip >= num_strips:
            continue
        load_at = ((first_strip + strip) * num_kinks + low) * (STRIP + OVERLAP) + column % STRIP
        for kink in range(len(where)):
            value = flat[load_at] + far * (np.float32(flat[load_at + 1]) - np.float32(flat[load_at]))
            here = base + np.uint64(where[kink]) + np.uint64(lane)
            sums[here] += weights[0, kink] * value
            sums[here + np.uint64(WIDTH)] += weights[1, kink] * value
            load_at += STRIP + OVERLAP


@njit(**_FAST)
def _integrate(changes, num_rows, width, phases, plane, left, right):  # type: ignore[no-untyped-def]
    """Changes of slope [row, two vectors] to values in the columns from left and from right on, `phases` apart.

    Two cumulative sums, in float64. plane: [row, width], flat.
    """
    slope, slope2 = lanes.widen(lanes.splat(np.float32(0))), lanes.widen(lanes.splat(np.float32(0)))
    value, value2 = slope, slope2
    apart = np.empty(WIDTH, np.float32)
    for row in range(np.uint64(num_rows)):
        here = row * np.uint64(WIDTH)
        slope = lanes.add(slope, lanes.widen(lanes.load(changes, here)))
        slope2 = lanes.add(slope2, lanes.widen(lanes.load(changes, here + _U8)))
        value, value2 = lanes.add(value, slope), lanes.add(value2, slope2)
        start = row * np.uint64(width)
        if phases == 1:
            lanes.store(plane, start + np.uint64(left), lanes.narrow(value))
            lanes.store(plane, start + np.uint64(right), lanes.narrow(value2))
        else:
            lanes.store(apart, np.uint64(0), lanes.narrow(value))
            lanes.store(apart, _U8, lanes.narrow(value2))
            for lane in range(np.uint64(lanes.NUM)):
                plane[start + np.uint64(left) + lane * np.uint64(phases)] = apart[lane]
                plane[start + np.uint64(right) + lane * np.uint64(phases)] = apart[lane + _U8]


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
        index, weight = np.empty(shape, np.int32), np.empty((3, shape), np.float32)
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
                    _interpolate(plane, one.left, one.right, one.columns, index, weight, line)


@njit(**_FAST)
def _locate(one, r, shift, sdd_mm, pixel_mm, scale, index, weight):  # type: ignore[no-untyped-def]
    """Where in the plane the samples of one line of the detector lie, and what they weigh; of the pass' pixels only.

    index: the grid's point before each sample. weight: how far the sample is beyond it, (row, column), and `scale`
    times the mm that the ray goes from slice to slice, 0 for samples outside the grid.
    """
    # float32 is within a few 1e-7 of a position, of hundreds or thousands, and its vectors are twice as long
    main, main_step = np.float32(one.to_main[0] + one.to_main[2] * r), np.float32(one.to_main[1])
    row, row_step = np.float32(one.to_row[0] + one.to_row[2] * r), np.float32(one.to_row[1])
    column, column_step = np.float32(one.to_column[0] + one.to_column[2] * r), np.float32(one.to_column[1])
    last_row, last_column, width = np.float32(one.rows - 2), np.float32(one.columns - 2), np.int32(one.columns)
    middle = (len(index) - 1) / 2
    near_squared = np.float32((sdd_mm**2 + ((r - middle) * pixel_mm) ** 2) * scale**2)
    across_step, first, centre = np.float32(pixel_mm * scale), np.float32(one.left + shift), np.float32(middle)
    nothing, whole, tiny = np.float32(0), np.float32(1), np.float32(1e-20)
    # counted from 0, because numba makes provision for indices that count from the end
    index, down = index[one.left : one.right + 1], weight[0, one.left : one.right + 1]
    beyond, length = weight[1, one.left : one.right + 1], weight[2, one.left : one.right + 1]
    for pixel in range(len(index)):
        c = first + np.float32(np.int32(pixel))
        # rays beside the pass, whose weight `_disown` makes 0, may run parallel to the plane
        ahead = main + main_step * c
        per_main = whole / (ahead if abs(ahead) > tiny else tiny)
        at_row, at_column = (row + row_step * c) * per_main, (column + column_step * c) * per_main
        near_row, near_column = min(max(at_row, nothing), last_row), min(max(at_column, nothing), last_column)
        i, j = np.int32(near_row), np.int32(near_column)
        index[pixel] = i * width + j
        down[pixel], beyond[pixel] = near_row - np.float32(i), near_column - np.float32(j)
        across = across_step * (c - centre)
        is_inside = near_row == at_row and near_column == at_column
        length[pixel] = math.sqrt(near_squared + across * across) * abs(per_main) if is_inside else nothing


@njit(**_FAST)
def _interpolate(plane, left, right, width, index, weight, line):  # type: ignore[no-untyped-def]
    """Add the plane at the samples of `_locate`, bilinear, to a line of pixels."""
    # unsigned, because numba makes provision for signed indices that count from the end
    width = np.uint64(width)
    for pixel in range(np.uint64(left), np.uint64(right + 1)):
        upper = np.uint64(index[pixel])
        lower = upper + width
        down, beyond = weight[0, pixel], weight[1, pixel]
        above = plane[upper] + beyond * (plane[upper + np.uint64(1)] - plane[upper])
        below = plane[lower] + beyond * (plane[lower + np.uint64(1)] - plane[lower])
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
