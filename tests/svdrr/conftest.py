"""What the tests of svdrr share: shards of small ellipsoid bodies, and a configuration that trains in seconds."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.svdrr.shards_for_tests import ANGLES_DEG, random_body, write_folder, write_shard

from svdrr.config import ModelConfig, StageConfig, TrainConfig, VAEConfig


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight patients, seven azimuths, levels 32 and 16. Read only: shared by all tests."""
    return write_folder(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., Path]:
    """write_folder, into this test's own folder."""
    return lambda **settings: write_folder(tmp_path / "shards", **settings)


@pytest.fixture
def a_shard(tmp_path: Path) -> Path:
    """One shard of two views, this test's own, to be damaged."""
    return write_shard(tmp_path / "one.h5", "P-00", random_body(np.random.default_rng(0)), ANGLES_DEG[3:5], (32, 16))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """Every part of a training run, each a few steps long, and its autoencoder measured on few images."""
    monkeypatch.setattr("svdrr.train.MEASURED_IMAGES", 8)
    return TrainConfig(
        preset="tiny",
        seed=0,
        vae=VAEConfig(
            latent_channels=2,
            block_channels=(4, 8),
            layers_per_block=1,
            kl_weight=1e-6,
            crop=16,
            steps=4,
            batch=2,
            learning_rate=1e-3,
            equivariance_weight=0.5,
        ),
        model=ModelConfig(patch_size=2, num_layers=2, num_heads=2, head_dim=8),
        stages=(
            StageConfig(size=16, steps=5, batch=2, learning_rate=1e-3, shift=1.0),
            StageConfig(size=32, steps=5, batch=2, learning_rate=1e-3, shift=2.0),
        ),
        pa_fraction=0.5,
        augment_fraction=0.5,
        drop_source=0.1,
        warmup_steps=2,
        weight_decay=0.01,
        clip_norm=1.0,
        ema_decay=0.9,
        mixed_precision="no",
        log_every=2,
        validate_every=2,
        sample_every=4,
        validation_pairs=2,
        checkpoint_every=2,
        keep_checkpoints=2,
    )
