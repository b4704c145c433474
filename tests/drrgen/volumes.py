"""Small CT volumes for the tests of reading, cleaning and rendering."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from drrgen import shards
from drrgen.volume import Origin, Volume


@contextmanager
def create(*about, **known) -> Iterator[shards.Writer]:
    """A shard, drafted and published."""
    with shards.draft(*about, **known) as writer:
        yield writer
    shards.publish(writer)


def volume(shape=(12, 16, 20), world_from_voxel=None, seed=0, series_uid="1.2.3.4") -> Volume:
    """Noise between -1000 and 2000 HU on an anisotropic grid that is centred nowhere in particular."""
    if world_from_voxel is None:
        world_from_voxel = np.diag([1.5, 1.25, 2.5, 1.0])
        world_from_voxel[:3, 3] = -30, 12, -240
    hu = np.random.default_rng(seed).integers(-1000, 2000, shape).astype(np.int16)
    return Volume(hu, world_from_voxel, Origin("TEST-01", "1.2.3", series_uid, "maker", "kernel", 120.0, 2.5))
