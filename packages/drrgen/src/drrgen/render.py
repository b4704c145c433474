"""One volume and many views in, stored pixels at every level out, by batches: memory does not grow with views."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from drrgen.geometry import Detector, Views
from drrgen.projectors import Project, StoringProject
from drrgen.shards import SCALE, Images, halved

# Pixels of float32 held at once; 16 MiB, which stay in the cache, and which the allocator keeps for the next batch.
_BATCH_PIXELS = 1 << 22


def render(
    project: Project,
    views: Views,
    detector: Detector,
    levels: list[int],
) -> Iterator[dict[int, Images]]:
    """Batches {size: uint16 images [views, size, size]}, in the order of the views.

    project: a projector's, of the volume. levels: sizes from the detector's shape down, each half of the one before.
    """
    batch = max(1, _BATCH_PIXELS // detector.shape**2)
    for start in range(0, len(views), batch):
        some = views[start : start + batch]
        if isinstance(project, StoringProject):
            yield project.stored(some, detector, levels, 1 / SCALE)
            continue
        line_integrals = project(some, detector)
        pyramid = {levels[0]: quantised(line_integrals)}
        for larger, smaller in pairwise(levels):
            pyramid[smaller] = halved(pyramid[larger])
        yield pyramid


def quantised(line_integrals: NDArray[np.float32]) -> Images:
    """Line integrals as the schema stores them: to nearest, and never beyond the scale's end."""
    return np.clip(np.rint(line_integrals * np.float32(1 / SCALE)), 0, np.iinfo(np.uint16).max).astype(np.uint16)
