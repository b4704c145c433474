"""Validation takes the same pairs of all angles at every call, and its picture shows what it says."""

from pathlib import Path

import numpy as np
import pytest
import torch

from svdrr import vae as autoencoder
from svdrr.config import TrainConfig
from svdrr.data import Pairs
from svdrr.metrics import DATA_RANGE
from svdrr.pipeline import SVDRRPipeline, scheduler
from svdrr.shards import open_folder
from svdrr.start import untrained
from svdrr.validation import angle_deg, by_angle, fixed_pairs, sample_grid


def test_the_angle_is_that_between_the_directions(shards: Path) -> None:
    """Views every 30 degrees of azimuth from -90; in the horizontal plane the angle is the difference."""
    opened = open_folder(shards)
    pairs = Pairs(np.zeros(4, int), np.array([0, 3, 2, 5]), np.array([6, 3, 3, 3]))
    assert angle_deg(opened, pairs) == pytest.approx([180, 0, 30, 60], abs=1e-5)


def test_every_angle_that_there_is_has_its_share_and_all_noise_levels(shards: Path) -> None:
    """At 30 degrees' steps bins 0, 2, 4 and 6 exist: 16 pairs are four of each, in turns, at 1/8, 3/8, 5/8 and 7/8."""
    opened = open_folder(shards)
    fixed, again = fixed_pairs(opened, 16, 0.5, seed=1), fixed_pairs(opened, 16, 0.5, seed=1)
    assert fixed.bin.tolist() == [0, 2, 4, 6] * 4
    for one in (0, 2, 4, 6):
        assert fixed.quantile[fixed.bin == one].tolist() == [0.125, 0.375, 0.625, 0.875]
    angles = angle_deg(opened, fixed.pairs)
    assert np.array_equal((angles + 1e-3).clip(max=90) // 15, fixed.bin)  # 30 degrees may be 29.999999
    assert all(np.array_equal(a, b) for a, b in zip(fixed.pairs, again.pairs, strict=True))
    assert len(np.unique(fixed.pairs.shard)) > 1


def test_losses_are_averaged_by_bin_under_names_for_a_log() -> None:
    means = by_angle(torch.tensor([1.0, 2.0, 6.0, 8.0]), np.array([0, 6, 0, 2]))
    assert means == {
        "validation_loss": 4.25,
        "validation_loss_0-15": 3.5,
        "validation_loss_30-45": 8.0,
        "validation_loss_90+": 2.0,
    }


def test_the_grid_shows_truth_over_synthesis_in_one_window(tiny: TrainConfig, shards: Path) -> None:
    opened = open_folder(shards)[:2]
    torch.manual_seed(0)
    pipeline = SVDRRPipeline(autoencoder.build(2, (4, 8), 1), untrained(tiny), scheduler("velocity", 1.0), size=16)
    pipeline.set_progress_bar_config(disable=True)
    grid = sample_grid(pipeline, opened, [(60, 0), (-90, 0)], seed=0)
    assert grid.dtype == np.uint8
    assert grid.shape == (4 * 16, 3 * 16)
    views = opened[1].images(16, [3, 5, 0])
    assert np.array_equal(grid[32:48], np.rint(np.hstack(views).clip(0, DATA_RANGE) * (255 / DATA_RANGE)))
    assert not grid[16:32, :16].any()
    assert grid[16:32, 16:].any()
    assert np.array_equal(grid, sample_grid(pipeline, opened, [(60, 0), (-90, 0)], seed=0))
    assert not np.array_equal(grid, sample_grid(pipeline, opened, [(60, 0), (-90, 0)], seed=1))
