"""Which planes the `cpu` projector needs for a view, and how fine the grid on each is.

The rays of a view leave a cube around the source, in voxels, through one face or several; those that leave through the
same face cross most slices of the same axis, and share a plane. Positions are in voxels, angles do not occur.
"""

import math

import numpy as np
from numba import njit

from drrgen.projectors.lanes import NUM

# (row, column) for each main axis, as axes of a voxel (column, row, slice): x, the axis along which a CT is finest, is
# the column wherever it can be.
AXES = ((2, 1), (2, 0), (1, 0))
# The columns of the grid that are summed together: two vectors. A row of sums is then one line of the cache.
WIDTH = 2 * NUM
# The plane's grid is this much finer than the pixels on it (the geometric mean of the smallest and the largest), and
# never coarser than voxels. Bilinear interpolation on such a grid blurs about as a pixel's area does: a triangle of
# half-width w has the second moment w^2 / 6, a pixel's width 1 / 12, equal for w = 1 / sqrt(2). Rows cost next to
# nothing, columns cost time.
_FINER = (1.6, 1.2)
# Where pixels are larger than voxels a pixel is the mean of several samples, at most so many steps of the grid apart.
_APART = 2.0
# So many voxels more must be cut off at one side before rows begin at the other.
_CLEARLY = 16
_FACES = 6

# One view's sums over the slices across one axis.
PASS = np.dtype(
    [
        # the source, and where along the main axis the plane is; which slices lie before the source
        *[(name, np.float64) for name in ("source_main", "source_row", "source_column", "plane")],
        *[(name, np.int64) for name in ("first_slice", "last_slice")],
        # the grid on the plane: rows x columns points, rows in either direction; columns in `phases` interleaved sets,
        # each in groups of eight
        *[(name, np.float64) for name in ("first_row", "row_step", "first_column", "column_step")],
        *[(name, np.int64) for name in ("rows", "columns", "phases", "offset")],
        # pixel (r, c) sees the point (to_row, to_column) / to_main of the grid, each a + b c + d r
        *[(name, np.float64, 3) for name in ("to_main", "to_row", "to_column")],
        # samples per pixel along the detector's columns and rows
        *[(name, np.int64) for name in ("across", "down")],
        # the pixels that see the volume through this pass lie in here, ends included
        *[(name, np.int64) for name in ("top", "bottom", "left", "right")],
        # which face of the cube the rays leave by: axis, or 3 + axis against it; and their direction, where a view has
        # several passes
        ("face", np.int64),
        ("shared", np.bool_),
        ("direction", np.float64, (3, 3)),
    ]
)


# Loops over numbers throughout: numba compiles whole-array expressions for many seconds.
@njit(cache=True)
def plan(source, first_pixel, column_step, row_step, counts, shape, passes, num_passes):  # type: ignore[no-untyped-def]
    """Write the passes of each view to passes[view, : num_passes[view]]; room for six of PASS a view. No offsets yet.

    source, first_pixel, column_step, row_step: [V, 3], as of `Views.rays`. counts: voxels along x, y, z. shape: pixels
    on a side.
    """
    # the ray of pixel (r, c) goes along direction @ (1, c, r)
    direction = np.empty((3, 3))
    regions, corners = np.empty((_FACES, 8, 3)), np.zeros(_FACES, np.int64)
    kept = np.empty((8, 3))
    for view in range(len(source)):
        for axis in range(3):
            direction[axis, 0] = first_pixel[view, axis] - source[view, axis]
            direction[axis, 1], direction[axis, 2] = column_step[view, axis], row_step[view, axis]
        num_seen, found, across, down = 0, 0, 1, 1
        for face in range(_FACES):
            corners[face] = _seen_through(face, direction, shape, regions[face], kept)
            num_seen += corners[face] > 0
        for face in range(_FACES):
            one = passes[view, found]
            region = regions[face, : corners[face]]
            if corners[face] and _plan_pass(face, region, source[view], direction, counts, shape, one):
                one.shared = num_seen > 1
                across, down = max(across, one.across), max(down, one.down)
                found += 1
        # passes that share a view share its samples: each belongs to one of them
        for index in range(found):
            passes[view, index].across, passes[view, index].down = across, down
        num_passes[view] = found


@njit(cache=True)
def _along(line, point):  # type: ignore[no-untyped-def]
    """line . point, of three numbers each."""
    return line[0] * point[0] + line[1] * point[1] + line[2] * point[2]


@njit(cache=True)
def _seen_through(face, direction, shape, region, kept):  # type: ignore[no-untyped-def]
    """The pixels whose rays leave through a face: the corners (1, c, r) of a convex polygon in `region`; their number.

    The detector, clipped by the four planes between this face and its neighbours (Sutherland-Hodgman). kept: room to
    work, of the size of `region`.
    """
    near, far = -0.5, shape - 0.5
    for corner in range(4):
        region[corner, 0] = 1
        region[corner, 1] = far if corner in (1, 2) else near
        region[corner, 2] = far if corner >= 2 else near
    count = 4
    main = face % 3
    sign = 1.0 if face < 3 else -1.0
    plane = np.empty(3)
    for turn in range(4):
        other = (main + 1 + turn % 2) % 3
        side = 1.0 if turn < 2 else -1.0
        for axis in range(3):
            plane[axis] = sign * direction[main, axis] + side * direction[other, axis]
        num_kept = 0
        for here in range(count):
            before = (here - 1) % count
            height, height_before = _along(plane, region[here]), _along(plane, region[before])
            if (height >= 0) != (height_before >= 0):
                part = height_before / (height_before - height)
                for axis in range(3):
                    kept[num_kept, axis] = region[before, axis] + part * (region[here, axis] - region[before, axis])
                num_kept += 1
            if height >= 0:
                for axis in range(3):
                    kept[num_kept, axis] = region[here, axis]
                num_kept += 1
        count = num_kept
        for corner in range(count):
            for axis in range(3):
                region[corner, axis] = kept[corner, axis]
    return count


@njit(cache=True)
def _plan_pass(face, region, source, direction, counts, shape, one):  # type: ignore[no-untyped-def]
    """The plane and its grid for the pixels in `region` [corners, (1, c, r)]; False where they see nothing."""
    main = face % 3
    row, column = AXES[main]
    # slices before the source; the one that holds it has no scale
    first, last = 0, counts[main] - 1
    if face < 3:
        first = max(first, math.floor(source[main]) + 1)
    else:
        last = min(last, math.ceil(source[main]) - 1)
    if first > last:
        return False
    # in the middle, where the scales of the slices differ least from 1
    plane = (first + last) / 2
    reach = plane - source[main]
    one.source_main, one.source_row, one.source_column = source[main], source[row], source[column]
    one.plane, one.first_slice, one.last_slice, one.face = plane, first, last, face
    for place in range(2):
        axis = column if place else row
        # the volume's shadow on the plane, with the border in which attenuation falls to 0
        shadow_low, shadow_high = np.inf, -np.inf
        for end in (first, last):
            for edge in (-1, counts[axis]):
                at = source[axis] + (edge - source[axis]) * reach / (end - source[main])
                shadow_low, shadow_high = min(shadow_low, at), max(shadow_high, at)
        low, high, smallest, largest = np.inf, -np.inf, np.inf, 0.0
        for corner in range(len(region)):
            at, by_column, by_row = _on_plane(direction, axis, main, reach, region[corner])
            low, high = min(low, source[axis] + at), max(high, source[axis] + at)
            move = math.hypot(by_column, by_row)
            smallest, largest = min(smallest, move), max(largest, move)
        # rows begin at the side where less of the shadow is cut off: what is before the first row is summed in vain.
        # Where it makes no difference, such as in symmetric views, rounding must not decide
        is_reversed = place == 0 and low - shadow_low > shadow_high - high + _CLEARLY
        low, high = max(low, shadow_low), min(high, shadow_high)
        if low >= high:
            return False
        step = min(1.0, max(1e-6, math.sqrt(smallest * largest) / _FINER[place]))
        num_points = math.ceil((high - low) / step) + 4
        start = low - step
        if is_reversed:
            start, step = high + step, -step
        for term in range(3):
            to_grid = ((source[axis] - start) * direction[main, term] + reach * direction[axis, term]) / step
            one.direction[axis, term] = direction[axis, term]
            if place == 0:
                one.to_row[term] = to_grid
            else:
                one.to_column[term] = to_grid
        if place == 0:
            one.first_row, one.row_step, one.rows = start, step, num_points
        else:
            one.first_column, one.column_step = start, step
            # columns of a slice that are read together are a voxel apart: finer grids are several interleaved ones
            one.phases = max(1, min(math.floor(1.2 / step), (num_points + WIDTH - 1) // WIDTH))
            group = one.phases * WIDTH
            one.columns = (num_points + group - 1) // group * group
    for term in range(3):
        one.direction[main, term] = one.to_main[term] = direction[main, term]
    # how many steps of the grid it is from pixel to pixel, along the detector's columns and rows, where it is least
    across, down = np.inf, np.inf
    left, top, right, bottom = np.inf, np.inf, -np.inf, -np.inf
    for corner in range(len(region)):
        _, row_by_column, row_by_row = _on_plane(direction, row, main, reach, region[corner])
        _, column_by_column, column_by_row = _on_plane(direction, column, main, reach, region[corner])
        across = min(across, math.hypot(row_by_column / one.row_step, column_by_column / one.column_step))
        down = min(down, math.hypot(row_by_row / one.row_step, column_by_row / one.column_step))
        left, right = min(left, region[corner, 1]), max(right, region[corner, 1])
        top, bottom = min(top, region[corner, 2]), max(bottom, region[corner, 2])
    one.across, one.down = max(1, math.ceil(across / _APART)), max(1, math.ceil(down / _APART))
    one.left, one.top = max(0, math.floor(left)), max(0, math.floor(top))
    one.right, one.bottom = min(shape - 1, math.ceil(right)), min(shape - 1, math.ceil(bottom))
    return True


@njit(cache=True)
def _on_plane(direction, axis, main, reach, pixel):  # type: ignore[no-untyped-def]
    """Where the ray of a pixel (1, c, r) meets the plane, along an axis from the source; how far that moves from pixel
    to pixel, along the detector's columns and along its rows."""
    per_main = reach / _along(direction[main], pixel)
    slope = _along(direction[axis], pixel) * per_main / reach
    return (
        slope * reach,
        per_main * (direction[axis, 1] - slope * direction[main, 1]),
        per_main * (direction[axis, 2] - slope * direction[main, 2]),
    )
