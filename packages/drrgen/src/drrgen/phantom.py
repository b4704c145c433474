"""Phantoms painted from ellipsoids: their line integrals are closed forms, their voxels converge to them.

Ellipsoids are painted one after the other in a world of air: where several overlap, the last one decides, in voxels
and on rays alike. A ray meets an ellipsoid in one interval, so a line integral is a finite sum of lengths times
attenuation: exact, and the truth that projectors are tested against.
"""

import hashlib
import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numba import njit, prange
from numpy.typing import ArrayLike, NDArray

from drrgen.attenuation import hu_from_mu, mu_per_mm
from drrgen.geometry import Detector, Views
from drrgen.volume import Origin, Volume

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Ellipsoid:
    """All points X (LPS mm) with |ball_from_mm (X - centre_mm)| <= 1. centre_mm: [3]. ball_from_mm: [3, 3]."""

    hu: int
    centre_mm: Float
    ball_from_mm: Float


def ellipsoid(hu: float, centre_mm: ArrayLike, semi_axes_mm: ArrayLike, axes: ArrayLike | None = None) -> Ellipsoid:
    """The ellipsoid with these semi-axes [3] along the columns of `axes` [3, 3], orthonormal; None: x, y, z."""
    along = np.eye(3) if axes is None else np.asarray(axes, dtype=np.float64)
    semi_axes = np.asarray(semi_axes_mm, dtype=np.float64)
    return Ellipsoid(round(hu), np.asarray(centre_mm, dtype=np.float64), along.T / semi_axes[:, None])


@dataclass(frozen=True)
class Nodule:
    """A ball in a lung. centre_mm: [3], LPS."""

    centre_mm: Float
    diameter_mm: float


@dataclass(frozen=True)
class Phantom:
    """Ellipsoids in the order in which they are painted. isocentre_mm: [3], LPS, the centre of its volumes."""

    name: str
    ellipsoids: Sequence[Ellipsoid]
    isocentre_mm: Float
    nodules: tuple[Nodule, ...] = field(default=())

    @property
    def arrays(self) -> tuple[Float, Float, Float]:
        """centre_mm [E, 3], ball_from_mm [E, 3, 3] and attenuation in 1/mm [E]."""
        return (
            np.array([one.centre_mm for one in self.ellipsoids]),
            np.array([one.ball_from_mm for one in self.ellipsoids]),
            mu_per_mm([one.hu for one in self.ellipsoids]).astype(np.float64),
        )


def beads() -> Phantom:
    """A large ball at the patient's left, a smaller one in front, a small one towards the head: no symmetry is left."""
    isocentre_mm = np.array([10.0, -20.0, 30.0])
    places = (([60, 0, 0], 10), ([0, -45, 0], 7), ([0, 0, 75], 5))
    balls = [ellipsoid(1000, isocentre_mm + np.array(offset), [radius] * 3) for offset, radius in places]
    return Phantom("BEADS", balls, isocentre_mm)


def line_integrals(phantom: Phantom, views: Views, detector: Detector) -> Float:
    """Attenuation along the ray from the source through the centre of every pixel: [view, row, column]."""
    images = np.empty((len(views), detector.shape, detector.shape))
    arrays = phantom.arrays
    rays = zip(*views.rays(detector, np.eye(4)), strict=True)
    for image, (source, first_pixel, column_step, row_step) in zip(images, rays, strict=True):
        # the rays of a row of pixels fill a plane: only the ellipsoids that reach it matter
        row_pixels = first_pixel + np.arange(detector.shape)[:, None] * row_step
        near = _near_planes(*arrays[:2], source, np.cross(row_pixels - source, column_step))
        _integrate(image, near, source, first_pixel, column_step, row_step, *arrays)
    return images


def voxelise(
    phantom: Phantom, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], supersample: int = 2
) -> Volume:
    """The phantom as a CT volume: axial slices in ascending z, centred on the phantom's isocentre.

    shape: slices, rows, columns. spacing_mm: along x, y, z. A voxel is the mean attenuation of supersample ** 3 points,
    as HU, rounded. UIDs follow from the ellipsoids and the grid; they are of the kind that is made from a UUID (DICOM
    PS3.5 B.2).
    """
    slices, rows, columns = shape
    spacing = np.array(spacing_mm, dtype=np.float64)
    first_mm = phantom.isocentre_mm - (np.array([columns, rows, slices]) - 1) / 2 * spacing
    world_from_voxel = np.diag([*spacing, 1.0])
    world_from_voxel[:3, 3] = first_mm

    step_mm = spacing / supersample
    first_sample_mm = first_mm - (spacing - step_mm) / 2
    arrays = phantom.arrays
    hu = np.empty(shape, np.int16)
    mu = np.empty((rows, columns))
    for index in range(slices):
        up_mm = np.array([0, 0, index * spacing[2]])
        near = _near_planes(*arrays[:2], first_mm + up_mm, np.array([[0, 0, 1]]), slack_mm=spacing[2] / 2)[0]
        _paint(mu, first_sample_mm + up_mm, step_mm, supersample, *(array[near] for array in arrays))
        hu[index] = np.rint(hu_from_mu(mu))

    content = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    study_uid, series_uid = (
        f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, text).int}"
        for text in (f"{phantom.name} {content}", f"{phantom.name} {content} {shape} {spacing_mm} {supersample}")
    )
    origin = Origin(phantom.name, study_uid, series_uid, slice_thickness_mm=float(spacing[2]))
    return Volume(hu, world_from_voxel, origin)


def _near_planes(
    centre_mm: Float, ball_from_mm: Float, point_mm: Float, normals: ArrayLike, slack_mm: float = 0.0
) -> NDArray[np.bool_]:
    """[N, E]: which ellipsoids come closer than slack_mm (it needs unit normals) to the planes through a point.

    An ellipsoid, the image of the ball under M, extends by |M^T n| from its centre along a unit vector n.
    """
    directions = np.asarray(normals, dtype=np.float64)
    extent = np.linalg.norm(np.einsum("ni,eij->nej", directions, np.linalg.inv(ball_from_mm)), axis=2)
    return np.abs(directions @ (centre_mm - point_mm).T) < extent + slack_mm


@njit(cache=True, parallel=True)
def _integrate(out, near, source, first_pixel, column_step, row_step, centre, ball_from_mm, mu):  # type: ignore[no-untyped-def]
    """One view, out [row, column]; source to row_step as in `Views.rays`; near [row, E]: the ellipsoids to look at."""
    rows, columns = out.shape
    for row in prange(rows):
        x, y, z = source
        enter, leave, value = np.empty(len(mu)), np.empty(len(mu)), np.empty(len(mu))
        for column in range(columns):
            dx = first_pixel[0] + column * column_step[0] + row * row_step[0] - x
            dy = first_pixel[1] + column * column_step[1] + row * row_step[1] - y
            dz = first_pixel[2] + column * column_step[2] + row * row_step[2] - z
            hits = 0
            for e in range(len(mu)):
                if near[row, e]:
                    first, last = _chord((x, y, z), (dx, dy, dz), centre, ball_from_mm, e)
                    if first < last:
                        enter[hits], leave[hits], value[hits] = first, last, mu[e]
                        hits += 1
            out[row, column] = _painted(enter, leave, value, hits) * math.sqrt(dx * dx + dy * dy + dz * dz)


@njit(cache=True)
def _painted(enter, leave, value, hits):  # type: ignore[no-untyped-def]
    """The integral over t >= 0, where hit h paints [enter[h], leave[h]), walked from border to border."""
    total, here, end = 0.0, 0.0, 0.0
    for hit in range(hits):
        end = max(end, leave[hit])
    while here < end:
        border, top = end, 0.0
        for hit in range(hits):
            if enter[hit] > here:
                border = min(border, enter[hit])
            elif leave[hit] > here:
                border = min(border, leave[hit])
                top = value[hit]
        total += (border - here) * top
        here = border
    return total


@njit(cache=True, parallel=True)
def _paint(out, first_mm, step_mm, supersample, centre, ball_from_mm, mu):  # type: ignore[no-untyped-def]
    """Mean attenuation in the voxels of one slice, out [row, column]: chords paint lines of samples along x."""
    rows, columns = out.shape
    num_samples = columns * supersample
    share = 1 / supersample**3
    for row in prange(rows):
        line = np.empty(num_samples)
        out[row, :] = 0.0
        for sub in range(supersample * supersample):
            y = first_mm[1] + (row * supersample + sub // supersample) * step_mm[1]
            z = first_mm[2] + sub % supersample * step_mm[2]
            line[:] = 0.0
            for e in range(len(mu)):
                first, last = _chord((first_mm[0], y, z), (step_mm[0], 0.0, 0.0), centre, ball_from_mm, e)
                for sample in range(max(math.ceil(first), 0), min(math.floor(last), num_samples - 1) + 1):
                    line[sample] = mu[e]
            for column in range(columns):
                for sample in range(column * supersample, (column + 1) * supersample):
                    out[row, column] += share * line[sample]


@njit(cache=True)
def _chord(start, direction, centre, ball_from_mm, e):  # type: ignore[no-untyped-def]
    """(t, t) where start + t direction enters and leaves ellipsoid e; (1, -1) where it misses.

    Seen from the ball, the ray's point nearest to the centre halves the chord. Taking it first, instead of solving
    |start + t direction| = 1 for both ends, avoids the difference of two large squares.
    """
    x, y, z = start[0] - centre[e, 0], start[1] - centre[e, 1], start[2] - centre[e, 2]
    x, y, z = _transform(ball_from_mm, e, x, y, z)
    dx, dy, dz = _transform(ball_from_mm, e, direction[0], direction[1], direction[2])
    squared = dx * dx + dy * dy + dz * dz
    middle = -(x * dx + y * dy + z * dz) / squared
    x, y, z = x + middle * dx, y + middle * dy, z + middle * dz
    inside = 1 - (x * x + y * y + z * z)
    if inside <= 0:
        return 1.0, -1.0
    half = math.sqrt(inside / squared)
    return middle - half, middle + half


@njit(cache=True)
def _transform(matrices, e, x, y, z):  # type: ignore[no-untyped-def]
    return (
        matrices[e, 0, 0] * x + matrices[e, 0, 1] * y + matrices[e, 0, 2] * z,
        matrices[e, 1, 0] * x + matrices[e, 1, 1] * y + matrices[e, 1, 2] * z,
        matrices[e, 2, 0] * x + matrices[e, 2, 1] * y + matrices[e, 2, 2] * z,
    )
