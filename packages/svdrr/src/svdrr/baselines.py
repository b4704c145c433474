"""What a model has to beat: the source itself, and the mean training view from the target's direction."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from svdrr.shards import Shard


def copy_source(source: NDArray[np.float32], num_targets: int) -> NDArray[np.float32]:
    """The source view [N, N] as the answer for every target: [num_targets, N, N]."""
    return np.broadcast_to(source, (num_targets, *source.shape))


def mean_view(train: Sequence[Shard], azimuth_deg: float, elevation_deg: float, size: int) -> NDArray[np.float32]:
    """The mean over training shards of each one's view nearest to these angles, [size, size]."""
    views = [shard.images(size, [shard.nearest_view(azimuth_deg, elevation_deg)])[0] for shard in train]
    return np.mean(views, axis=0)
