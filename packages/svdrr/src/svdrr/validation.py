"""How training goes on patients that it does not see: a loss by angle on fixed pairs and noise, and a grid of views."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svdrr.data import Pairs, draw_pairs
from svdrr.metrics import DATA_RANGE
from svdrr.pipeline import SVDRRPipeline
from svdrr.shards import Shard

EDGES_DEG = (0, 15, 30, 45, 60, 75, 90)
"""Where the bins of the angle between source and target begin; the last has no end."""

POOL = 32
"""Pairs that are drawn for each that is taken: enough that also a rare angle is found, where the views have it."""


class Fixed(NamedTuple):
    """Validation pairs [V], the bin of each, and the quantile of its noise level (see flow.Objective)."""

    pairs: Pairs
    bin: NDArray[np.int64]
    quantile: Tensor


def angle_deg(shards: Sequence[Shard], pairs: Pairs) -> NDArray[np.float64]:
    """The angle between the directions of source and target: [B]."""
    directions = []
    for view in (pairs.source, pairs.target):
        angles = [
            (shards[s].azimuth_deg[v], shards[s].elevation_deg[v]) for s, v in zip(pairs.shard, view, strict=True)
        ]
        azimuth, elevation = np.deg2rad(angles).T
        beside = np.cos(elevation)
        directions.append([beside * np.sin(azimuth), -beside * np.cos(azimuth), np.sin(elevation)])
    return np.rad2deg(np.arccos(np.einsum("ib,ib->b", *directions).clip(-1, 1)))


def fixed_pairs(shards: Sequence[Shard], count: int, pa_fraction: float, seed: int) -> Fixed:
    """`count` pairs, as many from each bin as there are, and in each bin noise levels of all kinds.

    The bins take turns, so that any stretch of the rows has something of all.
    """
    pool = draw_pairs(shards, POOL * count, pa_fraction, seed)
    bins = np.digitize(angle_deg(shards, pool).round(3), EDGES_DEG) - 1  # the angles of a grid lie on the edges
    rank = np.zeros_like(bins)
    for one in np.unique(bins):
        rank[bins == one] = np.arange(np.sum(bins == one))
    taken = np.lexsort((bins, rank))[:count]
    bins, rank = bins[taken], rank[taken]
    quantile = (rank + 0.5) / np.bincount(bins)[bins]
    return Fixed(Pairs(*(indices[taken] for indices in pool)), bins, torch.tensor(quantile, dtype=torch.float32))


def by_angle(losses: Tensor, bins: NDArray[np.int64]) -> dict[str, float]:
    """The mean of losses [V], and that of each bin that has any, by names for a log."""
    values = losses.detach().double().cpu().numpy()
    ends = [f"-{end}" for end in EDGES_DEG[1:]] + ["+"]
    names = [f"validation_loss_{begin}{end}" for begin, end in zip(EDGES_DEG, ends, strict=True)]
    means = {names[one]: float(values[bins == one].mean()) for one in np.unique(bins)}
    return {"validation_loss": float(values.mean()), **means}


def sample_grid(
    pipeline: SVDRRPipeline, shards: Sequence[Shard], targets_deg: Sequence[tuple[float, float]], seed: int
) -> NDArray[np.uint8]:
    """Two rows of 8-bit tiles per shard: its PA view and the true views, then black and what the pipeline makes of it.

    Of the views nearest to the targets, (azimuth, elevation): [2 shards N, (1 + targets) N]. Black is 0 and white
    metrics.DATA_RANGE in all; each target's noise is the same for every shard and at every call.
    """
    size, rows = pipeline.config.size, []
    for shard in shards:
        views = [shard.nearest_view(*angles) for angles in ((0, 0), *targets_deg)]
        angles_deg = [(float(shard.azimuth_deg[view]), float(shard.elevation_deg[view])) for view in views]
        truth = shard.images(size, views)
        made = pipeline(
            torch.from_numpy(truth[:1, None]),
            angles_deg[0],
            angles_deg[1:],
            sdd_mm=shard.sdd_mm,
            sod_mm=shard.sod_mm,
            detector_mm=shard.detector_mm,
            generator=[torch.Generator().manual_seed(seed + number) for number in range(len(targets_deg))],
        ).line_integrals[:, 0]
        rows += [np.hstack([*truth]), np.hstack([np.zeros_like(truth[0]), *made.float().cpu().numpy()])]
    return np.rint(255 * (np.vstack(rows) / DATA_RANGE).clip(0, 1)).astype(np.uint8)
