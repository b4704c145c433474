"""Which patients are trained on, and what a training step sees of them; all of it repeatable.

What is drawn for row i of a step's batch depends on nothing but the seed, the stage, the step and i: whichever process
computes it, and however the batch is divided. A batch comes in two phases: `read_batch` reads, and may do so in
another thread; `encode_batch` encodes what is still an image, on the device.
"""

import hashlib
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svdrr.augment import augmented
from svdrr.errors import InputError
from svdrr.latents import Reader, encoded, read_images, read_truncated
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
    """(train, val) shards. Raises InputError where there is nothing to train on or to hold out, or they do not fit."""
    patients = sorted({shard.patient_id for shard in shards})
    if len(patients) == 1:
        raise InputError(f"one patient only ({patients[0]}): a model is judged on others, so render more patients")
    of = splits(shards)
    train = [shard for shard, name in zip(shards, of, strict=True) if name == "train"]
    if not train:
        raise InputError(f"none of the {len(patients)} patients falls into the training split: render more patients")
    val = [shard for shard, name in zip(shards, of, strict=True) if name == "val"]
    for shard in train + val:
        _require_trainable(shard, train[0])
    return train, val


def _require_trainable(shard: Shard, first: Shard) -> None:
    """Raises InputError for a shard that was not rendered from a CT, or not in the geometry of the first."""
    if shard.kind != "rendered":
        raise InputError(
            f"{shard.path} is {shard.kind}, and a model learns from rendered views: move it out of the folder"
        )
    for name, attribute in (("SDD", "sdd_mm"), ("SOD", "sod_mm"), ("detector", "detector_mm")):
        here, there = getattr(shard, attribute), getattr(first, attribute)
        if not math.isclose(here, there, rel_tol=1e-6):  # a detector is a product of pixels and their pitch
            raise InputError(
                f"{first.path} has {name} {there:g} mm and {shard.path} {here:g} mm: a model learns one geometry, "
                "so render one of them again, or keep them in two folders"
            )


def step_seed(seed: int, stage: str, step: int) -> int:
    """Where everything random in one training step starts from: a resumed run draws what an unbroken one does."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stage}/{step}".encode()).digest()[:8])


class Pairs(NamedTuple):
    """A batch of B (source view, target view) of one shard each; indices [B]."""

    shard: NDArray[np.int64]
    source: NDArray[np.int64]
    target: NDArray[np.int64]

    def rows(self, rows: slice) -> "Pairs":
        return Pairs(*(indices[rows] for indices in self))


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


def draw_augmentations(count: int, fraction: float, seed: int) -> list[np.random.Generator | None]:
    """For each of `count` rows what its source is augmented with; None where it is not, but in this fraction."""
    rngs = [np.random.default_rng((seed, row)) for row in range(count)] if fraction else []
    return [rng if rng.random() < fraction else None for rng in rngs] or [None] * count


class Draws(NamedTuple):
    """What is drawn for a batch besides its pairs, on the CPU.

    noise: [B, C, h, w]. quantile: [B], 0 to 1, of the noise levels (see flow.Objective). drop: [B, 2], whose source is
    dropped, in the first of the model's streams and in the second.
    """

    noise: Tensor
    quantile: Tensor
    drop: Tensor

    def rows(self, rows: slice) -> "Draws":
        return Draws(*(values[rows] for values in self))


def draw_noise(count: int, shape: Sequence[int], drop_source: float, seed: int, drop_stream: float = 0.0) -> Draws:
    """For `count` targets of the shape [C, h, w].

    The fraction `drop_source` of them goes without its source, and `drop_stream` without its first stream, and as many
    without its second.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, *shape, generator=generator)
    quantile = torch.rand(count, generator=generator)
    lot = torch.rand(count, generator=generator)
    first = lot < drop_source + drop_stream
    second = (lot < drop_source) | ~first & (lot < drop_source + 2 * drop_stream)
    return Draws(noise, quantile, torch.stack([first, second], dim=1))


class Read(NamedTuple):
    """B pairs as they were read, on the CPU: of 2 B views, targets before sources, those in is_image [2B] as images.

    latents: [2B - I, C, h, w] of the others. embeddings: [S, E] of the sources among these, where they are stored.
    images: line integrals [I, N, N]. target_truncated: as in Batch.
    """

    latents: Tensor | None
    embeddings: Tensor | None
    images: NDArray[np.float32]
    is_image: NDArray[np.bool_]
    target_truncated: Tensor
    source_views: Views
    target_views: Views


def read_batch(
    shards: Sequence[Shard],
    stored: Reader | None,
    pairs: Pairs,
    augmentations: Sequence[np.random.Generator | None],
    size: int,
    side: int,
) -> Read:
    """Phase one: everything about these pairs that disks know. Augmented sources are images, for no cache has them.

    stored: reads latents (see svdrr.latents); None: all views are images. augmentations: as draw_augmentations gives
    them, one per pair. size, side: of the images in pixels, of the latents in cells.
    """
    shard, view = np.tile(pairs.shard, 2), np.concatenate([pairs.target, pairs.source])
    rngs = [None] * len(pairs.shard) + list(augmentations)
    is_image = np.array([stored is None or rng is not None for rng in rngs])
    images = read_images(shards, size, shard[is_image], view[is_image])
    for image, rng in zip(images, itertools.compress(rngs, is_image), strict=True):
        if rng is not None:
            image[:] = augmented(image, rng)
    count = len(pairs.shard)
    if stored is None:
        latents, embeddings = None, None
        truncated = read_truncated(shards, size, side, pairs.shard, pairs.target)
    else:
        latents, truncated, embeddings = stored(shard[~is_image], view[~is_image])
        truncated = truncated[:count]
        if embeddings is not None:
            embeddings = embeddings[count:]
    views = (_views(shards, pairs.shard, v) for v in pairs[1:])
    return Read(latents, embeddings, images, is_image, truncated, *views)


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


def encode_batch(
    read: Read,
    encode: Callable[[Tensor], Tensor],
    size: int,
    absolute_pose: bool,
    device: torch.device,
    embed: Callable[[Tensor], Tensor] | None = None,
) -> Batch:
    """Phase two: what was read, as latents on the device. encode: line integrals [I, 1, N, N] to latents [I, C, h, w].

    size: of the images, in pixels. absolute_pose: as in transformer.condition. embed: as in latents.cached.
    """
    with torch.autocast(device.type, enabled=False):  # neither latents nor directions are to have 8 bits
        target, source = _together(read.latents, read.images, read.is_image, encode, device).chunk(2)
        views = read.source_views.to(device), read.target_views.to(device)
        told = condition(source, *views, size, absolute_pose)
        if embed is not None:
            is_image = read.is_image[len(source) :]
            images = read.images[len(read.images) - is_image.sum() :]
            told["image_embedding"] = _together(read.embeddings, images, is_image, embed, device)
    return Batch(target, told, read.target_truncated.to(device), *views)


def _together(
    stored: Tensor | None,
    images: NDArray[np.float32],
    is_image: NDArray[np.bool_],
    encode: Callable[[Tensor], Tensor],
    device: torch.device,
) -> Tensor:
    """What was stored of views, and what `encode` makes of the others' images, in the order of the views."""
    place = np.argsort(np.argsort(is_image, kind="stable"))  # of each view among the parts: images come last
    parts = [] if stored is None else [stored.to(device)]
    if len(images):
        parts.append(encoded(images, encode).to(device))
    return torch.cat(parts)[torch.from_numpy(place)]


def _views(shards: Sequence[Shard], shard: NDArray[np.int64], view: NDArray[np.int64]) -> Views:
    rows = []
    for one, v in zip((shards[s] for s in shard), view, strict=True):
        rows.append((one.azimuth_deg[v], one.elevation_deg[v], one.sdd_mm, one.sod_mm, one.detector_mm))
    return Views(*torch.tensor(rows, dtype=torch.float32).unbind(dim=1))
