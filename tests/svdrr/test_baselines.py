"""The baselines are what they are called."""

from pathlib import Path

import numpy as np

from svdrr.baselines import copy_source, mean_view
from svdrr.shards import open_folder


def test_mean_view_is_the_mean_over_patients_at_that_angle(shards: Path) -> None:
    opened = open_folder(shards)[:3]
    index = opened[0].nearest_view(30, 0)
    expected = (opened[0].images(32)[index] + opened[1].images(32)[index] + opened[2].images(32)[index]) / 3
    assert np.allclose(mean_view(opened, 33, 2, 32), expected, atol=1e-6)


def test_copy_source_is_the_source(shards: Path) -> None:
    source = open_folder(shards)[0].images(16, [0])[0]
    answer = copy_source(source, 4)
    assert answer.shape == (4, 16, 16)
    assert all(np.array_equal(view, source) for view in answer)
