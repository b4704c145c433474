"""The slices of one series as a stack: their order, the grid they make, and every way in which they do not."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from drrgen.defects import Defect, SeriesRejected, printable
from drrgen.dicom.headers import LEFT_OUT
from drrgen.dicom.pixels import Decode
from drrgen.dicom.series import Series, Slice
from drrgen.volume import COSINE_TOLERANCE, MAX_SIDE, MAX_VOXELS, SPACING_MM

Float = NDArray[np.float64]

# A step between slices may differ from the median step by this much: positions are written with few digits.
STEP_TOLERANCE = 0.01
STEP_TOLERANCE_MM = 0.01
# ... but such differences may not add up: no slice lies farther from its place on the grid, in steps.
PLACE_TOLERANCE = 0.1
# Slices may drift sideways by this much per slice, in pixels, before they count as shifted.
DRIFT_TOLERANCE_PX = 0.1
# A straight drift is a tilted gantry's; no gantry tilts by more than 30 degrees.
MAX_TILT = np.tan(np.deg2rad(35))
# Interpolation bridges one missing slice, never two side by side.
MAX_BRIDGED_STEPS = 2
# A few slices of another kind in a series are strays; more than this fraction are a second scan: which is meant?
MAX_STRAYS = 0.1

# Fewer slices are scouts, tests or fragments.
MIN_SLICES = 8


@dataclass(frozen=True)
class Stack:
    """Slices in order, and the grid of the volume that they make.

    depth_mm: [n], of each slice along the normal, from the first. shift_px: [n, 2], (column, row) of each slice's first
    pixel on the grid. shape: slices, rows, columns of the grid; its slices are even steps from first to last depth.
    """

    slices: tuple[Slice, ...]
    depth_mm: Float
    shift_px: Float
    shape: tuple[int, int, int]
    world_from_voxel: Float

    @property
    def is_grid(self) -> bool:
        """Whether the slices are those of the grid, as they are."""
        return len(self.slices) == self.shape[0] and not self.shift_px.any() and _is_even(np.diff(self.depth_mm))


def examine(series: Series, decode: Decode) -> tuple[list[Defect], Stack | None]:
    """All that is wrong with a series, and the stack that remains when it is repaired; None where it cannot be.

    Reads headers only, but compares the pixels of slices that lie at one place.
    """
    defects = _unusable(series)
    if not series.slices:
        return defects, None
    try:
        _check_origin(series)
        alike, strays = without_strays(list(series.slices))
        defects += strays
        _check_size(alike)
        return defects, _stack(alike, decode, defects)
    except SeriesRejected as error:
        return [*defects, *error.defects], None


def _rejected(code: str, message: str) -> SeriesRejected:
    return SeriesRejected(Defect(code, message))


def _unusable(series: Series) -> list[Defect]:
    """One defect per code, which names the first file and counts the others."""
    defects = []
    for code, count in Counter(one.defect.code for one in series.unusable).items():
        first = min((one for one in series.unusable if one.defect.code == code), key=lambda one: one.path).defect
        if count > 1:
            first = replace(first, message=f"{count} files; the first: {first.message}")
        # where nothing else is, there is nothing to leave it out of
        defects.append(first if series.slices else replace(first, repair=None))
    return defects


def _check_origin(series: Series) -> None:
    if not series.origin.series_uid:
        raise _rejected("missing-tags", f"{len(series.slices)} CT slices have no SeriesInstanceUID")
    if len(series.origins) > 1:
        raise _rejected("mixed-patient", "files of different patients or studies share one SeriesInstanceUID")


def _check_size(slices: list[Slice]) -> None:
    if len(slices) < MIN_SLICES:
        raise _rejected("too-few-slices", f"{len(slices)} usable slices are no volume")
    if len(slices) * np.prod(slices[0].shape) > MAX_VOXELS:
        raise _rejected("absurd-size", f"{len(slices)} slices of {slices[0].shape} pixels")
    spacings = np.array([one.spacing_mm for one in slices])
    if not (SPACING_MM[0] <= spacings.min() and spacings.max() <= SPACING_MM[1]):
        raise _rejected("absurd-size", f"PixelSpacing of {spacings.min():g} to {spacings.max():g} mm")


def without_strays(slices: list[Slice]) -> tuple[list[Slice], list[Defect]]:
    """The largest set of slices that are alike, and the defects of there being others."""
    defects = []
    for code, what, is_like in (
        ("mixed-shape", "rows or columns", lambda a, b: a.shape == b.shape),
        ("mixed-orientation", "orientation", lambda a, b: _near(a.orientation, b.orientation, COSINE_TOLERANCE)),
        (
            "mixed-spacing",
            "PixelSpacing",
            lambda a, b: _near(a.spacing_mm, b.spacing_mm, STEP_TOLERANCE * abs(min(b.spacing_mm))),
        ),
    ):
        sets: list[list[Slice]] = []
        for one in slices:
            like = next((group for group in sets if is_like(one, group[0])), None)
            if like is None:
                sets.append([one])
            else:
                like.append(one)
        if len(sets) > 1:
            largest = max(sets, key=len)
            others = len(slices) - len(largest)
            first = min(one.path for group in sets if group is not largest for one in group)
            repair = LEFT_OUT if others <= MAX_STRAYS * len(slices) else None
            message = f"{others} of {len(slices)} slices have another {what}"
            defects.append(Defect(code, message, repair, printable(first.name)))
            slices = largest
    return slices, defects


def _near(a: tuple[float, ...], b: tuple[float, ...], tolerance: float) -> bool:
    return all(abs(x - y) <= tolerance for x, y in zip(a, b, strict=True))


def _stack(slices: list[Slice], decode: Decode, defects: list[Defect]) -> Stack:
    """The slices along their normal; what is wrong is added to the defects, what cannot be laid out is raised."""
    along_row, along_column, normal = _axes(slices[0])
    slices = sorted(slices, key=lambda one: (float(np.dot(one.position_mm, normal)), one.path))
    slices = _without_duplicates(slices, normal, decode, defects)
    slices = _without_outliers(slices, normal, defects)
    _check_size(slices)
    positions = np.array([one.position_mm for one in slices])
    depth_mm = (positions - positions[0]) @ normal
    num_steps = _check_steps(np.diff(depth_mm), defects)

    between_rows, between_columns = slices[0].spacing_mm
    offset_px = (positions - positions[0]) @ np.stack([along_row / between_columns, along_column / between_rows], 1)
    rows, columns = slices[0].shape
    upward_mm, first_mm = (positions[-1] - positions[0]) / num_steps, positions[0]
    if _check_drift(
        offset_px * [between_columns, between_rows], depth_mm, num_steps, min(slices[0].spacing_mm), defects
    ):
        low_px = np.floor(offset_px.min(axis=0))
        offset_px = offset_px - low_px
        columns, rows = np.array([columns, rows]) + np.ceil(offset_px.max(axis=0)).astype(int)
        first_mm = first_mm + low_px @ np.stack([along_row * between_columns, along_column * between_rows])
        upward_mm = normal * depth_mm[-1] / num_steps
    else:
        offset_px = np.zeros_like(offset_px)
    shape = (num_steps + 1, int(rows), int(columns))
    if np.prod(shape) > MAX_VOXELS or max(shape[1:]) > MAX_SIDE:
        raise _rejected("absurd-size", f"{shape} voxels")

    world_from_voxel = np.eye(4)
    world_from_voxel[:3, :3] = np.stack([along_row * between_columns, along_column * between_rows, upward_mm], axis=1)
    world_from_voxel[:3, 3] = first_mm
    return Stack(tuple(slices), depth_mm, offset_px, shape, world_from_voxel)


def _axes(one: Slice) -> tuple[Float, Float, Float]:
    """Unit vectors along a row, along a column, and normal to both (DICOM PS3.3 C.7.6.2.1.1)."""
    along_row, along_column = np.array(one.orientation[:3]), np.array(one.orientation[3:])
    lengths = np.array([along_row @ along_row, along_column @ along_column, 1 + along_row @ along_column])
    if np.abs(lengths - 1).max() > COSINE_TOLERANCE:
        raise _rejected("bad-orientation", "ImageOrientationPatient is not two orthogonal unit vectors")
    return along_row, along_column, np.cross(along_row, along_column)


def _without_duplicates(slices: list[Slice], normal: Float, decode: Decode, defects: list[Defect]) -> list[Slice]:
    """One slice per depth. Copies are equal in place and pixels; which of two unequal ones is right nobody knows."""
    depths = np.array([one.position_mm for one in slices]) @ normal
    places = np.split(np.arange(len(slices)), np.flatnonzero(np.diff(depths) >= STEP_TOLERANCE_MM) + 1)
    kept = [slices[place[0]] for place in places]
    if len(kept) == len(slices):
        return slices
    first = printable(next(slices[place[1]].path.name for place in places if len(place) > 1))
    for place in places:
        ones = [slices[i] for i in place]
        if len(ones) > 1 and not _are_copies(ones, decode):
            names = " and ".join(printable(f"{one.path.parent.name}/{one.path.name}") for one in ones[:2])
            raise SeriesRejected(Defect("duplicate-position", "two slices lie at one position and differ", file=names))
    count = len(slices) - len(kept)
    defects.append(Defect("duplicate-slice", f"{count} slices are exact copies of others", "dropped", first))
    return kept


def _are_copies(slices: list[Slice], decode: Decode) -> bool:
    first, *others = slices
    if not all(_near(one.position_mm, first.position_mm, STEP_TOLERANCE_MM) for one in others):
        return False
    images = decode(slices)
    image = next(images)
    return all(np.array_equal(image, other) for other in images)


def _without_outliers(slices: list[Slice], normal: Float, defects: list[Defect]) -> list[Slice]:
    """Without a first or a last slice that lies too far from the others for interpolation to reach it."""
    if len(slices) < MIN_SLICES:
        return slices
    steps = np.diff(np.array([one.position_mm for one in slices]) @ normal)
    limit = _longest_bridge(steps)
    low, high = int(steps[0] > limit >= steps[1]), int(steps[-1] > limit >= steps[-2])
    for is_far, one, gap in ((low, slices[0], steps[0]), (high, slices[-1], steps[-1])):
        if is_far:
            message = f"an end slice lies {gap:g} mm from the next, the others {np.median(steps):g} mm"
            defects.append(Defect("outlier-end-slice", message, "trimmed", printable(one.path.name)))
    return slices[low : len(slices) - high]


def _longest_bridge(steps: Float) -> float:
    return float(MAX_BRIDGED_STEPS * np.median(steps) * (1 + STEP_TOLERANCE))


def _is_even(steps: Float) -> bool:
    step = np.median(steps)
    off_mm = np.cumsum(steps) - np.arange(1, len(steps) + 1) * steps.mean()
    return bool(
        (np.abs(steps - step) <= max(STEP_TOLERANCE * step, STEP_TOLERANCE_MM)).all()
        and (np.abs(off_mm) <= PLACE_TOLERANCE * step).all()
    )


def _check_steps(steps: Float, defects: list[Defect]) -> int:
    """The number of even steps from the first slice to the last."""
    step = float(np.median(steps))
    if step > SPACING_MM[1]:
        raise _rejected("absurd-size", f"steps of {step:g} mm between slices")
    if _is_even(steps):
        return len(steps)
    can_bridge = steps.max() <= _longest_bridge(steps)
    whole = np.rint(steps / step)
    if whole.min() >= 1 and _is_even(steps / whole):
        count, side_by_side = int((whole - 1).sum()), int(whole.max() - 1)
        message = f"{count} missing between the others" + (f", up to {side_by_side} side by side" if count > 1 else "")
        defects.append(
            Defect("missing-slices", message, "interpolated from the slices beside them" if can_bridge else None)
        )
    else:
        message = f"steps of {steps.min():.3f} to {steps.max():.3f} mm between slices"
        repair = f"resampled to even steps of about {step:.3f} mm from the true positions" if can_bridge else None
        defects.append(Defect("non-uniform-spacing", message, repair))
    return round(float(steps.sum()) / step)


def _check_drift(offset_mm: Float, depth_mm: Float, num_steps: int, pixel_mm: float, defects: list[Defect]) -> bool:
    """Whether the slices do not lie straight above one another. offset_mm: [n, 2], in plane, from the first slice."""
    per_step = np.linalg.norm(np.diff(offset_mm, axis=0), axis=1) / (np.diff(depth_mm) / depth_mm[-1] * num_steps)
    slope = offset_mm[-1] / depth_mm[-1]
    is_straight = np.abs(offset_mm - np.outer(depth_mm, slope)).max() <= pixel_mm / 2
    if per_step.max() <= DRIFT_TOLERANCE_PX * pixel_mm and is_straight:
        return False
    tilt = float(np.linalg.norm(slope))
    if is_straight:
        message = (
            f"slices are shifted sideways evenly: the gantry was tilted by {np.rad2deg(np.arctan(tilt)):.1f} degrees"
        )
        defects.append(Defect("gantry-tilt", message, "sheared back" if tilt <= MAX_TILT else None))
    else:
        message = f"slices are shifted sideways by up to {np.ptp(offset_mm, axis=0).max():.1f} mm, in no straight line"
        defects.append(Defect("shifted-slices", message))
    return True
