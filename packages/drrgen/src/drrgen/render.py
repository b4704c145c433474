"""One volume and many views in, stored pixels at every level out, by batches: memory does not grow with views."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(views), batch):
            some = views[start : start + batch]
            if isinstance(project, StoringProject):
                yield project.stored(some, detector, levels, 1 / SCALE)
                continue
            pyramids = list(pool.map(partial(_pyramid, levels=levels), project(some, detector)))
            yield {size: np.stack([pyramid[size] for pyramid in pyramids]) for size in levels}


def _pyramid(line_integrals: NDArray[np.float32], levels: list[int]) -> dict[int, Images]:
    """One view at every level: [..., size, size]."""
    pyramid = {levels[0]: quantised(line_integrals)}
    for larger, smaller in pairwise(levels):
        pyramid[smaller] = halved(pyramid[larger])
    return pyramid


def quantised(line_integrals: NDArray[np.float32]) -> Images:
    """Line integrals as the schema stores them: to nearest, and never beyond the scale's end."""
    steps = line_integrals * np.float32(1 / SCALE)
    np.rint(steps, out=steps)
    return np.clip(steps, 0, np.iinfo(np.uint16).max, out=steps).astype(np.uint16)
