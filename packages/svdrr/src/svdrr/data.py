"""Which patients are trained on, and which pairs of their views a training step sees; all of it repeatable."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svdrr.errors import InputError
from svdrr.latents import Latents
from svdrr.pose import Views
from svdrr.shards import Shard
from svdrr.transformer import condition

SPLITS = ("train", "val", "test")
SPLITS_FILE = "splits.json"
_CURE = "the same `drrgen render` puts that right"


def split(patient_id: str) -> str:
    """One of SPLITS, by the patient's name alone: the rule `hash` of docs/shard-schema.md (Splits)."""
    h = int(hashlib.sha256(f"drr-sphere:{patient_id}".encode()).hexdigest()[:8], 16) / 2**32
    return "train" if h < 0.8 else "val" if h < 0.9 else "test"


def splits(shards: Sequence[Shard]) -> list[str]:
    """The split of each shard: what the splits.json of its folder says, or, where there is none, `split`.

    Raises InputError where that file is damaged, or does not say it of a patient.
    """
    known = {folder: _read_splits(folder / SPLITS_FILE) for folder in {shard.path.parent for shard in shards}}
    return [_listed(shard, known[shard.path.parent]) for shard in shards]


def _read_splits(path: Path) -> dict | None:
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["patients"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} does not say who is in which split ({error!r}): delete it, and {_CURE}") from error


def _listed(shard: Shard, patients: dict | None) -> str:
    if patients is None:
        return split(shard.patient_id)
    found = patients.get(shard.patient_id)
    if found not in SPLITS:
        path, wanted = shard.path.with_name(SPLITS_FILE), ", ".join(SPLITS)
        if found is None:
            raise InputError(f"{path} does not list patient {shard.patient_id} of {shard.path.name}: {_CURE}")
        raise InputError(f"{path}: patient {shard.patient_id} is in {found!r}, and there are {wanted}: correct that")
    return found


def training_shards(shards: Sequence[Shard]) -> tuple[list[Shard], list[Shard]]:
    """(train, val) shards. Raises InputError where there is nothing to train on, or nothing to hold out."""
    patients = sorted({shard.patient_id for shard in shards})
    if len(patients) == 1:
        raise InputError(f"one patient only ({patients[0]}): a model is judged on others, so render more patients")
    of = splits(shards)
    train = [shard for shard, name in zip(shards, of, strict=True) if name == "train"]
    if not train:
        raise InputError(f"none of the {len(patients)} patients falls into the training split: render more patients")
    return train, [shard for shard, name in zip(shards, of, strict=True) if name == "val"]


def step_seed(seed: int, stage: str, step: int) -> int:
    """Where everything random in one training step starts from: a resumed run draws what an unbroken one does."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stage}/{step}".encode()).digest()[:8])


class Pairs(NamedTuple):
    """A batch of B (source view, target view) of one shard each; indices [B]."""

    shard: NDArray[np.int64]
    source: NDArray[np.int64]
    target: NDArray[np.int64]


def draw_pairs(shards: Sequence[Shard], count: int, pa_fraction: float, seed: int) -> Pairs:
    """`count` pairs: patients equally often, the source PA in this fraction and else any view, the target any view."""
    by_patient = defaultdict(list)
    for index, shard in enumerate(shards):
        by_patient[shard.patient_id].append(index)
    series = list(by_patient.values())

    rng = np.random.default_rng(seed)
    pairs = Pairs(*np.zeros((3, count), dtype=np.int64))
    for row in range(count):
        of_patient = series[rng.integers(len(series))]
        pairs.shard[row] = of_patient[rng.integers(len(of_patient))]
        shard = shards[pairs.shard[row]]
        pa = rng.random() < pa_fraction
        pairs.source[row] = shard.nearest_view(0, 0) if pa else rng.integers(len(shard))
        pairs.target[row] = rng.integers(len(shard))
    return pairs


class Batch(NamedTuple):
    """What the transformer learns from: target latents [B, C, h, w], and its condition on source and poses.

    target_truncated: [B, h, w], 0 to 1, how much of each cell of the target is marked as truncated. source, target:
    the B views.
    """

    target_latent: Tensor
    condition: dict[str, Tensor]
    target_truncated: Tensor
    source: Views
    target: Views


def gather(
    shards: Sequence[Shard],
    read: Callable[[NDArray[np.int64], NDArray[np.int64]], Latents],
    pairs: Pairs,
    size: int,
    absolute_pose: bool,
    device: torch.device,
) -> Batch:
    """The pairs' latents and geometry. read: latents of views of shards, by both indices (see svdrr.latents).

    size: of the images that were encoded, in pixels. absolute_pose: as in transformer.condition.
    """

    def views(view: NDArray[np.int64]) -> Views:
        rows = []
        for shard, v in zip((shards[s] for s in pairs.shard), view, strict=True):
            rows.append((shard.azimuth_deg[v], shard.elevation_deg[v], shard.sdd_mm, shard.sod_mm, shard.detector_mm))
        return Views(*torch.tensor(rows, dtype=torch.float32, device=device).unbind(dim=1))

    both = read(np.tile(pairs.shard, 2), np.concatenate([pairs.target, pairs.source]))
    target, source = both.values.to(device).chunk(2)
    source_views, target_views = views(pairs.source), views(pairs.target)
    return Batch(
        target,
        condition(source, source_views, target_views, size, absolute_pose),
        both.truncated[: len(target)].to(device),
        source_views,
        target_views,
    )
