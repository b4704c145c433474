"""What each stage of training is: what a step reads, its loss row by row, and what is watched meanwhile."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from svdrr import flow, validation
from svdrr import vae as autoencoder
from svdrr.config import StageConfig, TrainConfig
from svdrr.data import (
    Batch,
    Draws,
    Pairs,
    Read,
    draw_augmentations,
    draw_noise,
    draw_pairs,
    encode_batch,
    read_batch,
    step_seed,
)
from svdrr.latents import Reader, read_images
from svdrr.loop import Task
from svdrr.shards import Shard

VAE_STAGE = "vae"


@dataclass(frozen=True)
class Data:
    """Shards, and how their views of one size become latents.

    stored: reads latents (svdrr.latents), of train or of val shards; None: each view is encoded when it is wanted.
    encode: line integrals [B, 1, size, size] to latents [B, C, side, side], on `device`.
    """

    train: list[Shard]
    val: list[Shard]
    size: int
    side: int
    stored_train: Reader | None
    stored_val: Reader | None
    encode: Callable[[Tensor], Tensor]
    device: torch.device


Shared = Callable[[int, Callable[[slice], Tensor]], Tensor]
"""(count, function of some of so many rows) to its values for all of them, which processes compute together."""


def vae_task(config: TrainConfig, shards: list[Shard], device: torch.device) -> Task:
    """The autoencoder, on crops of views of every stage's size in turn."""
    settings = config.vae
    sizes = [stage.size for stage in config.stages]

    def drawn(step: int) -> Pairs:
        return draw_pairs(shards, settings.batch, 0, step_seed(config.seed, VAE_STAGE, step))

    def read(step: int, rows: slice) -> Tensor:
        return images(shards, sizes[step % len(sizes)], drawn(step).rows(rows))

    def losses(model: nn.Module, views: Tensor, step: int, rows: slice) -> Tensor:
        generator = torch.Generator().manual_seed(step_seed(config.seed, VAE_STAGE, step))
        most = max(1, views.shape[-1] - settings.crop + 1)
        row, column = torch.randint(most, (2,), generator=generator).tolist()
        crop = views[..., row : row + settings.crop, column : column + settings.crop].to(device)
        weights = settings.kl_weight, settings.gradient_weight, settings.equivariance_weight
        return autoencoder.loss(model, crop, *weights, generator, settings.batch, rows)

    def describe(step: int, row: int) -> str:
        pairs = drawn(step)
        return f"{shards[pairs.shard[row]].path.name}, view {pairs.target[row]}"

    return Task(VAE_STAGE, settings.steps, settings.batch, settings.learning_rate, read, losses, describe)


def view_task(
    config: TrainConfig, stage: StageConfig, data: Data, shared: Shared, show: Callable[[Any, int], None]
) -> Task:
    """The transformer at one size. show: makes a picture of views by the weights' average, after so many steps."""
    prediction, shift = config.model.prediction, stage.shift

    def seed(step: int) -> int:
        return step_seed(config.seed, stage.name, step)

    def drawn(step: int) -> Pairs:
        return draw_pairs(data.train, stage.batch, config.pa_fraction, seed(step))

    def read(step: int, rows: slice) -> Read:
        augmentations = draw_augmentations(stage.batch, config.augment_fraction, seed(step))[rows]
        return read_batch(data.train, data.stored_train, drawn(step).rows(rows), augmentations, data.size, data.side)

    def losses(model: nn.Module, read: Read, step: int, rows: slice) -> Tensor:
        batch = encode_batch(read, data.encode, data.size, config.model.absolute_pose, data.device)
        draws = draw_noise(stage.batch, batch.target_latent.shape[1:], config.drop_source, seed(step))
        return pair_losses(model, batch, draws.rows(rows), prediction, shift)

    def describe(step: int, row: int) -> str:
        pairs = drawn(step)
        return f"{data.train[pairs.shard[row]].path.name}, view {pairs.source[row]} to {pairs.target[row]}"

    def validate(average: nn.Module, done: int) -> dict[str, float]:
        found = shared(config.validation_pairs, lambda rows: validation_losses(average, rows))
        return validation.by_angle(found, fixed.bin)

    def validation_losses(model: nn.Module, rows: slice) -> Tensor:
        pairs = fixed.pairs.rows(rows)
        read = read_batch(data.val, data.stored_val, pairs, [None] * len(pairs.shard), data.size, data.side)
        batch = encode_batch(read, data.encode, data.size, config.model.absolute_pose, data.device)
        draws = draw_noise(config.validation_pairs, batch.target_latent.shape[1:], 0.0, validation_seed)
        return pair_losses(model, batch, draws._replace(quantile=fixed.quantile).rows(rows), prediction, shift)

    def showing(average: nn.Module, done: int) -> dict[str, float]:
        show(average, done)
        return {}

    validation_seed = step_seed(config.seed, "validation", 0)
    watches = []
    if data.val:
        fixed = validation.fixed_pairs(data.val, config.validation_pairs, config.pa_fraction, validation_seed)
        watches = [(config.validate_every, validate), (config.sample_every, showing)]
    return Task(stage.name, stage.steps, stage.batch, stage.learning_rate, read, losses, describe, watches)


def pair_losses(model: nn.Module, batch: Batch, draws: Draws, prediction: str, shift: float) -> Tensor:
    """The loss of each pair of a batch, [B]; what is truncated of its target does not count."""
    latents, objective = batch.target_latent, flow.OBJECTIVES[prediction]
    noise, quantile, drop = (values.to(latents.device) for values in draws)
    timestep = objective.timestep(quantile, shift)
    noised = objective.noised(latents, noise, timestep)
    predicted = model(noised.latents, timestep, **batch.condition, drop_source=drop)
    return flow.loss(predicted, noised.target, 1 - batch.target_truncated)


def images(shards: list[Shard], size: int, pairs: Pairs) -> Tensor:
    """Line integrals [B, 1, size, size] of the pairs' targets."""
    return torch.from_numpy(read_images(shards, size, pairs.shard, pairs.target))[:, None]
