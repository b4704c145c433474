"""The cache encodes once per shard, autoencoder and level, and never serves what belongs to another."""

from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from svdrr.latents import cache, latent_path
from svdrr.shards import Shard, open_folder


@pytest.fixture
def opened(shards: Path) -> list[Shard]:
    return open_folder(shards)[:3]


class Encoder:
    """Every 4th pixel; counts the images that it saw."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return images[..., ::4, ::4]


def test_encodes_once_per_autoencoder_and_level(opened: list[Shard], tmp_path: Path) -> None:
    encoder, views = Encoder(), sum(map(len, opened))
    latents = cache(opened, 32, encoder, "vae 1", tmp_path)
    assert latents[1].shape == (len(opened[1]), 1, 8, 8)
    assert np.array_equal(latents[1][:, 0], opened[1].images(32)[:, ::4, ::4].astype(np.float16))
    for vae, size, expected in (("vae 1", 32, views), ("vae 2", 32, 2 * views), ("vae 2", 16, 3 * views)):
        cache(opened, size, encoder, vae, tmp_path)
        assert encoder.seen == expected


def test_goes_on_after_the_last_finished_shard(opened: list[Shard], tmp_path: Path) -> None:
    def stop_after_the_first() -> None:
        raise KeyboardInterrupt

    encoder = Encoder()
    with pytest.raises(KeyboardInterrupt):
        cache(opened, 32, encoder, "vae", tmp_path, stop_after_the_first)
    latent_path(tmp_path, opened[1], 32, "vae").with_suffix(".partial").write_bytes(b"half a file, from a kill")
    cache(opened, 32, encoder, "vae", tmp_path)
    assert encoder.seen == sum(map(len, opened))
    assert not list(tmp_path.rglob("*.partial"))
