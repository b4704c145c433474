"""One volume and many views in, stored pixels at every level out, by batches: memory does not grow with views."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from drrgen.geometry import Detector, Views
from drrgen.projectors import Project, StoringProject
from drrgen.shards import SCALE, Images, halved
from drrgen.stages import Stages

# Pixels of float32 held at once; 16 MiB, which stay in the cache, and which the allocator keeps for the next batch.
_BATCH_PIXELS = 1 << 22


def render(
    project: Project,
    views: Views,
    detector: Detector,
    levels: list[int],
    num_threads: int = 1,
    stages: Stages | None = None,
) -> Iterator[dict[int, Images]]:
    """Batches {size: uint16 images [views, size, size]}, in the order of the views.

    project: a projector's, of the volume. levels: sizes from the detector's shape down, each half of the one before.
    """
    stages = stages or Stages()
    batch = max(1, _BATCH_PIXELS // detector.shape**2)
    with ThreadPoolExecutor(num_threads) as pool:
        for start in range(0, len(views), batch):
            some = views[start : start + batch]
            if isinstance(project, StoringProject):
                with stages("project"):
                    images = project.stored(some, detector, levels, 1 / SCALE)
            else:
                with stages("project"):
                    line_integrals = project(some, detector)
                with stages("round"):
                    pyramids = list(pool.map(partial(_pyramid, levels=levels), line_integrals))
                    images = {size: np.stack([pyramid[size] for pyramid in pyramids]) for size in levels}
            yield images


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
