"""What a run starts with: everything that can be wrong with it is found here, before anything is written."""

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn

from svdrr import clip, pixart
from svdrr import vae as autoencoder
from svdrr.coarse import CoarseMean
from svdrr.config import TrainConfig
from svdrr.data import step_seed, training_shards
from svdrr.errors import InputError
from svdrr.run import Run, open_run, require_wandb
from svdrr.shards import Shard, open_folder
from svdrr.tasks import COARSE_STAGE, VAE_STAGE
from svdrr.transformer import ViewTransformer


def begin(
    config: TrainConfig,
    shards_folder: Path,
    out: Path | None,
    vae: str | None,
    only: str | None,
    wandb: str | None,
    num_processes: int,
) -> tuple[TrainConfig, Run, list[Shard], list[Shard]]:
    """The config with the digests of what is given, the run, its shards for training and for validation. See `train`.

    Raises InputError.
    """
    TrainConfig.from_json(config.to_json())  # which looks at every value, also where Python made the config
    if wandb is not None:
        require_wandb()
    names = stage_names(config)
    if only is not None and only not in names:
        raise InputError(f"no stage {only!r} in {config.preset}: --stage is one of {', '.join(names)}")
    if len(set(names)) < len(names):
        raise InputError(f"{config.preset} has two stages of one size ({', '.join(names)}): a size is trained once")
    before = [config.vae] * (vae is None) + ([config.coarse] if config.coarse else [])
    for batch in [trained.batch for trained in (*before, *config.stages)]:
        if batch % num_processes:
            raise InputError(
                f"{config.preset} has batches of {batch}, which {num_processes} processes cannot share evenly: "
                "start another number of them"
            )
    if (dropped := config.drop_source + 2 * config.drop_stream) > 1:
        raise InputError(f"{config.preset} drops {dropped:g} of its sources (drop_source + 2 drop_stream): 1 is all")
    if config.token_rate != 1 and not config.model.pooled_source:
        raise InputError(f"{config.preset} has a token_rate of {config.token_rate:g}, and no pooled_source: make it 1")
    train_shards, val_shards = training_shards(open_folder(shards_folder))
    for shard in train_shards + val_shards:
        for stage in config.stages:
            shard.check_level(stage.size)
    of_hub = [name for name in (vae, config.image_encoder, config.init) if name is not None and not Path(name).exists()]
    if of_hub:
        print(f"from the Hub, or its cache on this machine: {', '.join(of_hub)}", file=sys.stderr)
    if vae is None:
        cell = 2 ** (len(config.vae.block_channels) - 1)
        require_whole_patches(config, cell, "the autoencoder")
        if config.vae.crop % cell:
            raise InputError(
                f"a crop of {config.vae.crop} pixels is no multiple of the autoencoder's {cell}: change it"
            )
    else:
        config = replace(config, pretrained_vae=autoencoder.digest(fitting_vae(vae, config)))
    if config.image_encoder is not None:
        config = replace(config, image_encoder_digest=clip.digest(fitting_encoder(config.image_encoder, config)))
    elif config.model.image_embedding:
        raise InputError(
            f"the model of {config.preset} wants an image_embedding, and no image_encoder makes one: name it, or turn "
            "image_embedding off"
        )
    with torch.device("meta"):  # which finds what is wrong with their settings, and makes no numbers
        if vae is None:
            untrained_vae(config)
        untrained_coarse(config)
        untrained(config)
    return config, open_run(config, data_digest(train_shards, val_shards), out), train_shards, val_shards


def stage_names(config: TrainConfig) -> list[str]:
    """The stages in their order."""
    return [VAE_STAGE, *([COARSE_STAGE] if config.coarse else []), *(stage.name for stage in config.stages)]


def fitting_vae(name: str, config: TrainConfig) -> AutoencoderKL:
    """The trained autoencoder of this name. Raises InputError where it does not fit model and stages, or is none."""
    vae = autoencoder.load(name)
    theirs, ours = vae.config.latent_channels, config.vae.latent_channels
    if theirs != ours:
        raise InputError(
            f"--vae {name} has latents of {theirs} channels, and the preset {config.preset} is for {ours}: "
            "give another --vae or --preset"
        )
    require_whole_patches(config, autoencoder.cell(vae), f"--vae {name}")
    return vae


def require_whole_patches(config: TrainConfig, cell: int, whose: str) -> None:
    """Raises InputError where a stage's views are no whole patches of an autoencoder with cells of `cell` pixels."""
    patch = cell * config.model.patch_size
    for stage in config.stages:
        if stage.size % patch:
            raise InputError(
                f"{whose} makes patches of {patch} pixels in the preset {config.preset}, and its stage of "
                f"{stage.size} pixels is no multiple of it: give another --vae or --preset"
            )


def fitting_encoder(name: str, config: TrainConfig) -> nn.Module:
    """The image encoder of this name. Raises InputError where it does not fit the model, or is none."""
    encoder = clip.load(name)
    theirs, ours = encoder.config.projection_dim, config.model.image_embedding
    if theirs != ours:
        raise InputError(
            f"the image encoder {name} makes {theirs} numbers, and the model of {config.preset} wants {ours}: "
            "give another image_encoder"
        )
    return encoder


def untrained_vae(config: TrainConfig) -> AutoencoderKL:
    """The autoencoder as its training starts with it. Raises InputError: see vae.build."""
    torch.manual_seed(step_seed(config.seed, VAE_STAGE, -1))
    return autoencoder.build(config.vae.latent_channels, config.vae.block_channels, config.vae.layers_per_block)


def untrained(config: TrainConfig, say: Callable[[str], None] = lambda words: None) -> ViewTransformer:
    """The transformer as the first stage starts with it. say: told which weights it began from, and which not.

    Raises InputError where it is to begin from weights (`init`) that are missing or of another shape.
    """
    settings = asdict(config.model)
    del settings["scaled_source"]  # which is known when the autoencoder is: see unscale_source
    torch.manual_seed(step_seed(config.seed, config.stages[0].name, -1))
    has_coarse = config.coarse is not None
    transformer = ViewTransformer(latent_channels=config.vae.latent_channels, coarse=has_coarse, **settings)
    if config.init is not None:
        loaded = pixart.load(transformer, config.init)
        new, unused = (", ".join(names) or "nothing" for names in loaded)
        say(f"begun from {config.init}; new: {new}; not used: {unused}")
    return transformer


def untrained_coarse(config: TrainConfig) -> CoarseMean | None:
    """The coarse branch as its training starts with it; None where there is none. Raises InputError: see there."""
    if config.coarse is None:
        return None
    settings = config.coarse
    torch.manual_seed(step_seed(config.seed, COARSE_STAGE, -1))
    return CoarseMean(
        settings.kind, config.vae.latent_channels, settings.cells, settings.width, settings.volume_channels
    )


def data_digest(train: Sequence[Shard], val: Sequence[Shard]) -> str:
    """SHA-256 of what the shards contain, in their order, and of which are for what."""
    return hashlib.sha256(repr([[shard.digest for shard in some] for some in (train, val)]).encode()).hexdigest()
