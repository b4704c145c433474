"""Every view as latents, encoded once per shard, VAE and level, and memory-mapped from then on."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from svdrr.shards import Shard

BATCH = 32
"""Views encoded at once: enough to keep a processor busy, few enough for its memory."""


def latent_path(folder: Path, shard: Shard, size: int, vae_digest: str) -> Path:
    """Both digests are in the name: latents of another shard content or of another VAE are never found."""
    return folder / vae_digest[:16] / str(size) / f"{shard.digest[:32]}.npy"


def cache(
    shards: Sequence[Shard],
    size: int,
    encode: Callable[[Tensor], Tensor],
    vae_digest: str,
    folder: Path,
    check: Callable[[], None] = lambda: None,
) -> list[NDArray[np.float16]]:
    """The latents [V, C, h, w] of each shard at this level, encoding those that are not in the folder yet.

    encode: line integrals [B, 1, size, size] to latents [B, C, h, w]. check: called after each shard that was encoded;
    where it raises, the next call goes on with the next shard.
    """
    arrays = []
    for shard in tqdm(shards, desc=f"latents {size}px", unit="shard"):
        path = latent_path(folder, shard, size, vae_digest)
        if not path.exists():
            images = torch.from_numpy(shard.images(size))[:, None]
            with torch.no_grad():
                latents = torch.cat([encode(batch) for batch in images.split(BATCH)])
            _write(path, latents.cpu().numpy().astype(np.float16))
            check()
        arrays.append(np.load(path, mmap_mode="r"))
    return arrays


def _write(path: Path, array: NDArray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
