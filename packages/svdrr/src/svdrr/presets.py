"""Recipes: each a function that returns a whole TrainConfig, its docstring the command, the minutes and the score."""

from collections.abc import Callable
from dataclasses import replace

from svdrr.config import ModelConfig, StageConfig, TrainConfig, VAEConfig
from svdrr.errors import InputError


def toy(seed: int = 0) -> TrainConfig:
    """What a laptop can train: 128-pixel views through a 64-pixel stage.

    svdrr train --shards shards --preset toy

    2 to 3 minutes on two cores, on the 48 synthetic patients of `make demo`; 28.5 dB on held-out ones, where a copy of
    the source has 18.0 and the mean training view 26.9. Enough for pose, outline and large organs; ribs stay blurred.
    """
    return TrainConfig(
        preset="toy",
        seed=seed,
        vae=VAEConfig(
            latent_channels=4,
            block_channels=(8, 16, 16),
            layers_per_block=1,
            kl_weight=1e-6,
            crop=64,
            steps=420,
            batch=4,
            learning_rate=5e-3,
        ),
        model=ModelConfig(patch_size=4, num_layers=2, num_heads=4, head_dim=32),
        # Shifted far beyond the rule of token counts: X-rays are smooth, and much of a view still shows through half
        # noise. Against a shift of 6, 12 gained 0.5 to 1 dB at equal time.
        stages=(
            StageConfig(size=64, steps=500, batch=16, learning_rate=6e-3, shift=12.0),
            StageConfig(size=128, steps=1000, batch=16, learning_rate=4e-3, shift=12.0),
        ),
        pa_fraction=0.7,
        augment_fraction=0.0,
        drop_source=0.05,
        warmup_steps=50,
        weight_decay=0.01,
        clip_norm=1.0,
        ema_decay=0.99,
        mixed_precision="no",
        log_every=10,
        validate_every=100,
        sample_every=500,
        validation_pairs=32,
        checkpoint_every=100,
        keep_checkpoints=2,
    )


def small(seed: int = 0) -> TrainConfig:
    """A first model of real CTs for one GPU: 12 layers of width 384, 30.1 million parameters; 256 pixels, then 512.

    svdrr train --shards shards --preset small

    Hours: not measured. Score: not measured; no run of it has been made.
    """
    return TrainConfig(
        preset="small",
        seed=seed,
        vae=VAEConfig(
            latent_channels=4,
            block_channels=(32, 64, 128, 128),
            layers_per_block=1,
            kl_weight=1e-6,
            crop=256,
            steps=20_000,
            batch=16,
            learning_rate=2e-4,
        ),
        model=ModelConfig(patch_size=2, num_layers=12, num_heads=6, head_dim=64),
        # the shift of `toy`, whose latents are as large as these of 256 pixels
        stages=(
            StageConfig(size=256, steps=100_000, batch=64, learning_rate=3e-4, shift=12.0),
            StageConfig(size=512, steps=40_000, batch=32, learning_rate=1e-4, shift=12.0),
        ),
        pa_fraction=0.5,
        augment_fraction=0.5,
        drop_source=0.1,
        warmup_steps=1000,
        weight_decay=0.01,
        clip_norm=1.0,
        ema_decay=0.9999,
        mixed_precision="bf16",
        log_every=100,
        validate_every=1000,
        sample_every=5000,
        validation_pairs=64,
        checkpoint_every=1000,
        keep_checkpoints=2,
    )


def base(seed: int = 0) -> TrainConfig:
    """The model that we recommend for LIDC-IDRI: 12 layers of width 768, 119.7 million parameters.

    svdrr train --shards shards --preset base

    Hours: not measured. Score: not measured; no run of it has been made.
    """
    config = small(seed)
    return replace(
        config,
        preset="base",
        vae=replace(
            config.vae, block_channels=(64, 128, 256, 256), layers_per_block=2, steps=40_000, learning_rate=1e-4
        ),
        model=replace(config.model, num_heads=12),
        stages=(
            StageConfig(size=256, steps=200_000, batch=64, learning_rate=2e-4, shift=12.0),
            StageConfig(size=512, steps=100_000, batch=32, learning_rate=1e-4, shift=12.0),
        ),
    )


def svdrr_xl(seed: int = 0) -> TrainConfig:
    """The model of SV-DRR (Xie et al. 2025): PixArt-Sigma-XL/2 of 604.8 million parameters, 605.7 with its own token.

    svdrr train --shards shards --preset svdrr-xl --init PixArt-alpha/PixArt-Sigma-XL-2-256x256

    The recipe is the paper's: docs/training.md says where not. The SDXL autoencoder and CLIP come from the Hub, or its
    cache on this machine; of the former, `vae` has the shape only. It needs `pip install 'svdrr[clip]'`.

    Hours: not measured. Score: not measured; no run of it has been made, and the paper's own is in its table 1.
    """
    return TrainConfig(
        preset="svdrr-xl",
        seed=seed,
        vae=VAEConfig(
            latent_channels=4,
            block_channels=(128, 256, 512, 512),
            layers_per_block=2,
            kl_weight=1e-6,
            crop=256,
            steps=0,
            batch=1,
            learning_rate=0.0,
            default="stabilityai/sdxl-vae",
            measured=False,
        ),
        model=ModelConfig(
            patch_size=2,
            num_layers=28,
            num_heads=16,
            head_dim=72,
            prediction="epsilon",
            preconditioned=False,
            learned_variance=True,
            scaled_source=False,
            pooled_source=True,
            image_embedding=768,
            ray_maps=False,
            absolute_pose=False,
            pose_modulation=False,
            qk_norm=False,
            cross_norm=False,
            pixart_positions=True,
            norm_eps=1e-6,
            learned_null=False,
        ),
        stages=(
            StageConfig(size=256, steps=200_000, batch=64, learning_rate=5e-6, shift=1.0),
            StageConfig(size=512, steps=100_000, batch=32, learning_rate=3e-6, shift=1.0),
            StageConfig(size=1024, steps=100_000, batch=8, learning_rate=1e-6, shift=1.0),
        ),
        pa_fraction=1.0,
        augment_fraction=0.0,
        drop_source=0.05,
        drop_stream=0.05,
        warmup_steps=1000,
        weight_decay=0.01,
        clip_norm=1.0,
        ema_decay=0.0,
        mixed_precision="bf16",
        log_every=100,
        validate_every=1000,
        sample_every=5000,
        validation_pairs=64,
        checkpoint_every=1000,
        keep_checkpoints=2,
        betas=(0.9, 0.999),
        decay=False,
        token_rate=10.0,
        guidance_scale=3.0,
        image_encoder="openai/clip-vit-large-patch14",
        spread_weights=True,
    )


PRESETS: dict[str, Callable[[int], TrainConfig]] = {
    "toy": toy,
    "small": small,
    "base": base,
    "svdrr-xl": svdrr_xl,
}


def preset(name: str, seed: int) -> TrainConfig:
    """The recipe of this name. Raises InputError naming the choices where there is none."""
    if name not in PRESETS:
        raise InputError(f"no preset {name!r}: --preset is one of {', '.join(PRESETS)}")
    return PRESETS[name](seed)
