"""Nodules that readers outlined in a CT, and the boxes around them in its views."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import ConvexHull

from drrgen.geometry import Float, project

# What each reader of LIDC-IDRI said of a nodule: 1 to 5, calcification 1 to 6.
RATINGS = (
    "subtlety",
    "internal_structure",
    "calcification",
    "sphericity",
    "margin",
    "lobulation",
    "spiculation",
    "texture",
    "malignancy",
)
MAX_READERS = 4
# Fewer points cost little, and may lie in one plane, which has no hull.
_MIN_HULL = 200


@dataclass(frozen=True)
class AnnotatedNodule:
    """One nodule as `num_readers` of up to four readers outlined it. All places are LPS in mm.

    points_mm: [K, 3], every outline of every reader, on both faces of the slice that it was drawn in: what lies between
    is the nodule. centroid_mm: [3]; diameter_mm: the largest width within a slice; both means over the readers.
    ratings: {name of RATINGS: one number per reader}. Which reader was who is not known.
    """

    points_mm: Float
    centroid_mm: Float
    diameter_mm: float
    num_readers: int
    ratings: dict[str, tuple[int, ...]]


def boxes(nodules: Sequence[AnnotatedNodule], projection: Float) -> NDArray[np.float32]:
    """[V, N, 4]: first column, first row, last column, last row of each nodule under each matrix of [V, 3, 4].

    In pixels of the largest level, centres at integers; not clipped, so that a box may lie beyond the image.
    """
    result = np.empty((len(projection), len(nodules), 4), np.float32)
    for number, nodule in enumerate(nodules):
        points = _corners(nodule.points_mm)
        for view, matrix in enumerate(projection):  # one by one: all at once would be gigabytes
            pixels = project(matrix, points)
            result[view, number] = *pixels.min(axis=0), *pixels.max(axis=0)
    return result


def _corners(points_mm: Float) -> Float:
    """Those of the points that can touch a box: a projection's extremes are those of the convex hull's corners."""
    if len(points_mm) < _MIN_HULL:
        return points_mm
    return points_mm[ConvexHull(points_mm).vertices]


def lower_level(boxes: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    """The same boxes where `factor` x `factor` pixels are one: pixel centres are integers at every level."""
    return (boxes + np.float32(0.5)) / np.float32(factor) - np.float32(0.5)
