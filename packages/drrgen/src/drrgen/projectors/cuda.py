"""The projector for NVIDIA GPUs: Joseph's method ray by ray, in one Triton kernel for many views.

Joseph 1982 (doi 10.1109/TMI.1982.4307572): a ray is sampled where it crosses the slices of the axis along which it
crosses most, bilinearly within each. One program marches the central rays of a tile of pixels of one view. Where a ray
runs is worked out in float64, once per ray; the march itself is float32, counted from the voxel that the ray meets in
the middle of the volume.

With TRITON_INTERPRET=1 in the environment the kernel runs on the CPU, slowly: that is how it is tested without a GPU.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from drrgen.errors import InputError
from drrgen.geometry import Detector, Float, Views
from drrgen.projectors import StoringProject, extremes

try:
    import torch
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    raise InputError(
        f"--projector cuda needs {error.name}, which is not installed: pip install 'drrgen[cuda]', or --projector cpu"
    ) from error

# Pixels of one tile, one to a lane: a warp of 32 lanes is two rows of 16 neighbours, which read neighbouring voxels.
_ROWS, _COLUMNS = 8, 16
# Pixels of one launch: 16 MiB of float32, some 4 ms of work at 1000 views of 1024 pixels per second. What one launch
# made is copied while the next one runs.
_LAUNCH_PIXELS = 1 << 22
# Zeros around the box of voxels that are not 0: one voxel for the border in which attenuation falls to 0, one more for
# what rounding reads beyond it.
_PAD = 2
_CONSTANTS = {"ROWS": _ROWS, "COLUMNS": _COLUMNS, "PAD": _PAD}
_OPTIONS = {"num_warps": _ROWS * _COLUMNS // 32, "enable_fp_fusion": True}
# Voxels are indexed with 32 bits, from an origin that may lie outside the box.
_MAX_VOXELS = 2**30


def has_device() -> bool:
    """Whether torch finds a GPU."""
    return torch.cuda.is_available()


def require_device() -> torch.device:
    """Where the kernel runs: on torch's current GPU, or on the CPU under Triton's interpreter; else InputError."""
    if triton.knobs.runtime.interpret:
        return torch.device("cpu")
    if not has_device():
        raise InputError(
            f"--projector cuda: torch {torch.__version__} finds no GPU (CUDA device) on this machine: "
            "install a build of torch for its driver, or choose --projector cpu"
        )
    return torch.device("cuda", torch.cuda.current_device())


def prepare(mu: NDArray[np.float32], voxel_from_world: Float) -> StoringProject:
    """Signature, shapes and units: `drrgen.projectors`; mu of any sign, but finite, or it raises InputError.

    The ray is the one through the pixel's centre. Outside the volume attenuation is 0, reached linearly one voxel
    beyond the outermost centres. A source inside the volume sees the slices before it, whole. Results do not depend on
    how views are batched, to the bit. Memory on the GPU: two copies, in float32, of the box of voxels that are not 0,
    and what one launch makes, whatever the number of views.
    """
    return _Rays(mu, voxel_from_world, require_device())


class _Rays:
    """The voxels that are not 0, in two layouts, so that neighbouring lanes read neighbours whatever the view.

    A detector's columns follow x where y is the main axis, and y where x is; along z it depends on the view.
    """

    def __init__(self, mu: NDArray[np.float32], voxel_from_world: Float, device: torch.device) -> None:
        extremes(mu)
        self._voxel_from_world = voxel_from_world
        self._device = device
        box = _box(mu)
        # (low, count) of the box along x, y, z
        self._low = [axis.start for axis in box[::-1]]
        self._count = [axis.stop - axis.start for axis in box[::-1]]
        num_padded = int(np.prod([count + 2 * _PAD for count in self._count]))
        if num_padded > _MAX_VOXELS:
            raise InputError(f"--projector cuda holds {_MAX_VOXELS} voxels, not {num_padded}: choose --projector cpu")
        # [slice, row, column] and [slice, column, row], one after the other; nothing else is ever on the GPU
        self._layouts = torch.zeros(2 * num_padded, dtype=torch.float32, device=device)
        slices, rows, columns = (count + 2 * _PAD for count in self._count[::-1])
        inner = (slice(_PAD, -_PAD),) * 3
        upright = self._layouts[:num_padded].view(slices, rows, columns)
        for place, one in enumerate(mu[box], _PAD):
            upright[place, _PAD:-_PAD, _PAD:-_PAD] = torch.from_numpy(np.ascontiguousarray(one))
        self._layouts[num_padded:].view(slices, columns, rows)[inner] = upright[inner].transpose(1, 2)

    def __call__(self, views: Views, detector: Detector) -> NDArray[np.float32]:
        line_integrals = np.empty((len(views), detector.shape, detector.shape), np.float32)
        self._bring([line_integrals], ([cast] for cast in self._cast(views, detector)))
        return line_integrals

    def stored(
        self, views: Views, detector: Detector, levels: list[int], steps_per_unit: float
    ) -> dict[int, NDArray[np.uint16]]:
        """See `drrgen.projectors.StoringProject`: only what is stored leaves the GPU."""
        images = {size: np.empty((len(views), size, size), np.uint16) for size in levels}
        casts = self._cast(views, detector)
        self._bring(list(images.values()), (_pyramid(cast, levels, steps_per_unit) for cast in casts))
        return images

    def _cast(self, views: Views, detector: Detector) -> Iterator[torch.Tensor]:
        """Line integrals [view, row, column] on the device, float32, launch by launch."""
        rays = torch.from_numpy(np.concatenate(views.rays(detector, self._voxel_from_world), axis=1)).to(self._device)
        shape = detector.shape
        tiles = triton.cdiv(shape, _ROWS) * triton.cdiv(shape, _COLUMNS)
        for part in rays.split(max(1, _LAUNCH_PIXELS // shape**2)):
            cast = torch.empty((len(part), shape, shape), dtype=torch.float32, device=self._device)
            _march_tiles[(tiles * len(part),)](
                self._layouts, part, cast, shape, views.sdd_mm, detector.pixel_mm, *self._low, *self._count,
                **_CONSTANTS, **_OPTIONS,
            )  # fmt: skip
            yield cast

    def _bring(self, out: list[NDArray[np.generic]], made: Iterator[list[torch.Tensor]]) -> None:
        """Fill arrays with what is made, part by part along the views; a part is copied while the next one is made."""
        first, on_the_way = 0, None
        for tensors in made:
            # without blocking, the copies lie in page-locked memory, which torch keeps for the next ones
            parts = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
            arrived = torch.cuda.current_stream().record_event() if self._device.type == "cuda" else None
            if on_the_way:
                first = _unload(out, first, *on_the_way)
            on_the_way = parts, arrived
        if on_the_way:
            _unload(out, first, *on_the_way)


def _unload(
    out: list[NDArray[np.generic]], first: int, parts: list[torch.Tensor], arrived: "torch.cuda.Event | None"
) -> int:
    """Copy parts that have arrived into `out`, from view `first` on; the first view after them."""
    if arrived is not None:
        arrived.synchronize()
    for whole, part in zip(out, parts, strict=True):
        whole[first : first + len(part)] = part.numpy()
    return first + len(parts[0])


def _box(mu: NDArray[np.float32]) -> tuple[slice, slice, slice]:
    """The smallest box [slice, row, column] that holds all voxels that are not 0; one voxel where there is none."""
    planes: NDArray[np.bool_] = (mu != 0).any(axis=2)
    columns: NDArray[np.bool_] = (mu != 0).any(axis=(0, 1))
    lines = planes.any(axis=1), planes.any(axis=0), columns
    found = [np.flatnonzero(line) if line.any() else np.zeros(1, int) for line in lines]
    one, two, three = (slice(int(line[0]), int(line[-1]) + 1) for line in found)
    return one, two, three


def _pyramid(line_integrals: torch.Tensor, levels: list[int], steps_per_unit: float) -> list[torch.Tensor]:
    """What `render.quantised` and `shards.halved` make of line integrals, to the bit; overwrites them."""
    steps = line_integrals.mul_(steps_per_unit).round_().clamp_(0, np.iinfo(np.uint16).max).to(torch.int32)
    stored = [steps.to(torch.uint16)]
    for _ in pairwise(levels):
        total = steps[:, ::2, ::2] + steps[:, 1::2, ::2] + steps[:, ::2, 1::2] + steps[:, 1::2, 1::2]
        steps = (total + 2) >> 2
        stored.append(steps.to(torch.uint16))
    return stored


# Adding this to a float32 between -2^22 and 2^22 rounds it to the nearest integer, which is then in the lowest bits:
# two additions instead of two conversions, of which a GPU makes a fraction as many per second.
_ROUND = tl.constexpr(12582912.0)
_ROUND_BITS = tl.constexpr(0x4B400000)
# Rays are clipped a little outside the zero border, so that rounding drops nothing.
_REACH = tl.constexpr(1.25)
# Samples are summed by so many, and then their sums: equal samples, as in a phantom, all round to the same side.
_TOGETHER = tl.constexpr(32)

_SIZES = ["shape", "low_x", "low_y", "low_z", "count_x", "count_y", "count_z"]


@triton.jit(do_not_specialize=_SIZES)
def _march_tiles(  # type: ignore[no-untyped-def]
    layouts, rays, out, shape, sdd_mm, pixel_mm, low_x, low_y, low_z, count_x, count_y, count_z,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS x COLUMNS pixels of one view.

    layouts: the box of counts and zeros around it, as [z, y, x] and then [z, x, y]; its first voxel that is not
    padding is (low_x, low_y, low_z) of the volume. rays: float64 [view, (source, first pixel, column step, row step) x
    (x, y, z)], in voxels of the volume. out: float32 [view, row, column].
    """
    tiles_across = tl.cdiv(shape, COLUMNS)
    num_tiles = tiles_across * tl.cdiv(shape, ROWS)
    view, tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    row = (tile // tiles_across) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tile % tiles_across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    is_pixel = (row < shape) & (column < shape)

    rays += view * 12
    source_x, source_y, source_z = tl.load(rays), tl.load(rays + 1), tl.load(rays + 2)
    along_x, along_y = tl.load(rays + 6), tl.load(rays + 7)
    r, c = row.to(tl.float64), column.to(tl.float64)
    dx = tl.load(rays + 3) + c * along_x + r * tl.load(rays + 9) - source_x
    dy = tl.load(rays + 4) + c * along_y + r * tl.load(rays + 10) - source_y
    dz = tl.load(rays + 5) + c * tl.load(rays + 8) + r * tl.load(rays + 11) - source_z

    # the axis in which a ray crosses most voxels is its main one; of the others, b is contiguous in one of the layouts
    is_y = (tl.abs(dy) >= tl.abs(dx)) & (tl.abs(dy) >= tl.abs(dz))
    is_x = (tl.abs(dx) >= tl.abs(dz)) & ~is_y
    is_z = ~(is_x | is_y)
    b_is_y = is_x | (tl.where(is_z, tl.abs(along_y) - tl.abs(along_x), 0.0) > 0)
    c_is_x = is_z & b_is_y
    c_is_y = is_z & ~b_is_y
    d_main = tl.where(is_y, dy, tl.where(is_x, dx, dz))
    d_b = tl.where(b_is_y, dy, dx)
    d_c = tl.where(c_is_x, dx, tl.where(c_is_y, dy, dz))

    # from here on slice 0 of each axis is the middle one of the box
    source_x -= low_x + count_x // 2
    source_y -= low_y + count_y // 2
    source_z -= low_z + count_z // 2
    source_main = tl.where(is_y, source_y, tl.where(is_x, source_x, source_z))
    source_b = tl.where(b_is_y, source_y, source_x)
    source_c = tl.where(c_is_x, source_x, tl.where(c_is_y, source_y, source_z))
    count_main = tl.where(is_y, count_y, tl.where(is_x, count_x, count_z))
    count_b = tl.where(b_is_y, count_y, count_x)
    count_c = tl.where(c_is_x, count_x, tl.where(c_is_y, count_y, count_z))

    # slices of the box that lie before the source, and of these the ones that the ray crosses within its box
    low = -(count_main // 2).to(tl.float64)
    high = low + (count_main - 1)
    low = tl.where(d_main > 0, tl.maximum(low, tl.ceil(source_main)), low).to(tl.float32)
    high = tl.where(d_main > 0, high, tl.minimum(high, tl.floor(source_main))).to(tl.float32)
    slope_b, origin_b, at_b, low, high = _line(source_main, source_b, d_b / d_main, count_b, low, high)
    slope_c, origin_c, at_c, low, high = _line(source_main, source_c, d_c / d_main, count_c, low, high)
    is_hit = is_pixel & (low <= high)
    low, high = tl.where(is_hit, tl.ceil(low), 1e9).to(tl.int32), tl.where(is_hit, tl.floor(high), -1e9).to(tl.int32)

    width_x, width_y, width_z = count_x + 2 * PAD, count_y + 2 * PAD, count_z + 2 * PAD
    width_b = tl.where(b_is_y, width_y, width_x)
    plane = width_x * width_y
    stride_main = tl.where(is_z, plane, width_b)
    stride_c = tl.where(is_z, width_b, plane)
    voxels = layouts + tl.where(b_is_y, plane.to(tl.int64) * width_z, 0)
    voxels += (count_main // 2 + PAD) * stride_main
    voxels += (count_c // 2 + PAD + origin_c).to(tl.int64) * stride_c + (count_b // 2 + PAD + origin_b)

    # slices that all rays of the tile cross need no mask: almost all
    first, last = tl.min(low), tl.max(high)
    first_shared, last_shared = tl.max(low), tl.min(high)
    if first_shared > last_shared:
        first_shared, last_shared = last + 1, last
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    ray = (low, high, voxels, stride_main, stride_c, at_b, slope_b, at_c, slope_c)
    total = _march(total, first, first_shared - 1, ray, MASKED=True)
    total = _march(total, first_shared, last_shared, ray, MASKED=False)
    total = _march(total, last_shared + 1, last, ray, MASKED=True)

    across, down = (column - (shape - 1) / 2) * pixel_mm, (row - (shape - 1) / 2) * pixel_mm
    length_mm = tl.sqrt(sdd_mm * sdd_mm + across * across + down * down)
    line_integral = total * (length_mm / tl.abs(d_main).to(tl.float32))
    tl.store(out + (view * shape + row) * shape + column, line_integral, mask=is_pixel)


@triton.jit
def _line(source_main, source, slope, count, low, high):  # type: ignore[no-untyped-def]
    """Where a ray runs along b or c, which has `count` voxels: (slope, origin, at) such that in slice j it is at voxel
    origin + at + slope j; and the part of [low, high] in which it is within the zero border.

    The origin is an integer, and at less than 1: the smaller a number, the finer is float32.
    """
    at = source - source_main * slope
    origin = tl.floor(at)
    at, slope, origin = (at - origin).to(tl.float32), slope.to(tl.float32), origin.to(tl.int32)
    border = (-(count // 2) - origin).to(tl.float32) - _REACH
    safe = tl.where(tl.abs(slope) < 1e-12, 1e-12, slope)
    one, two = (border - at) / safe, (border + (count - 1 + 2 * _REACH) - at) / safe
    low, high = tl.maximum(low, tl.minimum(one, two)), tl.minimum(high, tl.maximum(one, two))
    return slope, origin, at, low, high


@triton.jit
def _march(total, first, last, ray, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add the samples on slices first .. last; with a mask, of those rays only for which the slice is in low .. high.

    voxels, in `ray`: pointers to the voxel (0, origin of b, origin of c), counted from the middle of the box.
    """
    low, high, voxels, stride_main, stride_c, at_b, slope_b, at_c, slope_c = ray
    for start in range(first, last + 1, _TOGETHER):
        part = tl.zeros_like(total)
        for j in tl.range(start, tl.minimum(start + _TOGETHER, last + 1), loop_unroll_factor=4):
            b, c = at_b + slope_b * j, at_c + slope_c * j
            rounded_b, rounded_c = (b - 0.5) + _ROUND, (c - 0.5) + _ROUND
            weight_b, weight_c = b - (rounded_b - _ROUND), c - (rounded_c - _ROUND)
            before_b = rounded_b.to(tl.int32, bitcast=True) - _ROUND_BITS
            before_c = rounded_c.to(tl.int32, bitcast=True) - _ROUND_BITS
            near = voxels + (j * stride_main + before_c * stride_c + before_b)
            far = near + stride_c
            if MASKED:
                mask = (j >= low) & (j <= high)
                v00, v10 = tl.load(near, mask, 0.0), tl.load(near + 1, mask, 0.0)
                v01, v11 = tl.load(far, mask, 0.0), tl.load(far + 1, mask, 0.0)
            else:
                v00, v10, v01, v11 = tl.load(near), tl.load(near + 1), tl.load(far), tl.load(far + 1)
            v00 += weight_b * (v10 - v00)
            v01 += weight_b * (v11 - v01)
            part += v00 + weight_c * (v01 - v00)
        total += part
    return total
