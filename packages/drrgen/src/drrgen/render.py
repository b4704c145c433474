"""One volume and many views in, stored pixels at every level out, by batches: memory does not grow with views."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from drrgen.geometry import Detector, Views
from drrgen.projectors import Projector
from drrgen.shards import SCALE, Images, halved

# Pixels of float32 held at once; 64 MiB.
_BATCH_PIXELS = 1 << 24


def render(
    mu: NDArray[np.float32],
    voxel_from_world: NDArray[np.float64],
    views: Views,
    detector: Detector,
    levels: list[int],
    projector: Projector,
) -> Iterator[tuple[dict[int, Images], int]]:
    """Batches of ({size: uint16 images [views, size, size]}, number of saturated pixels), in the order of the views.

    mu: [slice, row, column] in 1/mm. levels: sizes from the detector's shape down, each half of the one before.
    """
    batch = max(1, _BATCH_PIXELS // detector.shape**2)
    for start in range(0, len(views), batch):
        line_integrals = projector(mu, voxel_from_world, views[start : start + batch], detector)
        images, saturated = quantised(line_integrals)
        pyramid = {}
        for size in levels:
            pyramid[size] = images
            images = halved(images)
        yield pyramid, saturated


def quantised(line_integrals: NDArray[np.float32]) -> tuple[Images, int]:
    """Line integrals as the schema stores them, and how many exceed its range and are stored as 65535."""
    counts = np.rint(line_integrals * np.float32(1 / SCALE))
    return np.clip(counts, 0, 65535).astype(np.uint16), int((counts > 65535).sum())
