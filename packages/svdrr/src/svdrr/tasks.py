"""What each stage of training is: what a step reads, its loss row by row, and what is watched meanwhile."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from svdrr import flow, validation
from svdrr import vae as autoencoder
from svdrr.coarse import CoarseMean
from svdrr.config import CoarseConfig, StageConfig, TrainConfig
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

VAE_STAGE, COARSE_STAGE = "vae", "coarse"


@dataclass(frozen=True)
class Data:
    """Shards, and how their views of one size become latents.

    stored: reads latents (svdrr.latents), of train or of val shards; None: each view is encoded when it is wanted.
    encode: line integrals [B, 1, size, size] to latents [B, C, side, side], on `device`. embed: likewise to embeddings
    [B, E], where there is an image encoder.
    """

    train: list[Shard]
    val: list[Shard]
    size: int
    side: int
    stored_train: Reader | None
    stored_val: Reader | None
    encode: Callable[[Tensor], Tensor]
    device: torch.device
    embed: Callable[[Tensor], Tensor] | None = None


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


def coarse_task(config: TrainConfig, settings: CoarseConfig, data: Sequence[Data], shared: Shared) -> Task:
    """The coarse mean, on the latents of every stage's size in turn."""
    pairs = [TrainingPairs(config, COARSE_STAGE, settings.batch, of_size) for of_size in data]
    held_out = [HeldOutPairs(config, of_size) for of_size in data if of_size.val]

    def read(step: int, rows: slice) -> Read:
        return pairs[step % len(pairs)].read(step, rows)

    def losses(model: nn.Module, read: Read, step: int, rows: slice) -> Tensor:
        return errors(model, pairs[step % len(pairs)].batch(read))

    def errors(model: nn.Module, batch: Batch) -> Tensor:
        predicted = model(batch.condition["source_latent"], batch.source, batch.target)
        return flow.loss(predicted, batch.target_latent, 1 - batch.target_truncated)

    def held_out_errors(model: nn.Module, some: HeldOutPairs, rows: slice) -> Tensor:
        return errors(model, some.batch(rows))

    def describe(step: int, row: int) -> str:
        return pairs[step % len(pairs)].describe(step, row)

    def validate(average: nn.Module, done: int) -> dict[str, float]:
        values: dict[str, float] = {}
        for of_size in held_out:
            found = shared(len(of_size), partial(held_out_errors, average, of_size))
            values |= {f"{name}_{of_size.size}px": value for name, value in of_size.by_angle(found).items()}
        return values

    watches = [(config.validate_every, validate)] if held_out else []
    return Task(COARSE_STAGE, settings.steps, settings.batch, settings.learning_rate, read, losses, describe, watches)


def view_task(
    config: TrainConfig,
    stage: StageConfig,
    data: Data,
    coarse: CoarseMean | None,
    shared: Shared,
    show: Callable[[Any, int], None],
) -> Task:
    """The transformer at one size. show: makes a picture of views by the weights' average, after so many steps."""
    prediction, shift = config.model.prediction, stage.shift
    pairs = TrainingPairs(config, stage.name, stage.batch, data)

    def losses(model: nn.Module, read: Read, step: int, rows: slice) -> Tensor:
        batch = given_coarse(coarse, pairs.batch(read))
        shape, seed = batch.target_latent.shape[1:], pairs.seed(step)
        draws = draw_noise(stage.batch, shape, config.drop_source, seed, config.drop_stream)
        return pair_losses(model, batch, draws.rows(rows), prediction, shift)

    def validate(average: nn.Module, done: int) -> dict[str, float]:
        return held_out.by_angle(shared(len(held_out), lambda rows: validation_losses(average, rows)))

    def validation_losses(model: nn.Module, rows: slice) -> Tensor:
        batch = given_coarse(coarse, held_out.batch(rows))
        return pair_losses(model, batch, held_out.draws(batch, rows), prediction, shift)

    def showing(average: nn.Module, done: int) -> dict[str, float]:
        show(average, done)
        return {}

    watches = []
    if data.val:
        held_out = HeldOutPairs(config, data)
        watches = [(config.validate_every, validate), (config.sample_every, showing)]
    rates = {} if config.token_rate == 1 else {"pooled_token": config.token_rate}
    return Task(
        stage.name, stage.steps, stage.batch, stage.learning_rate, pairs.read, losses, pairs.describe, watches, rates
    )


class TrainingPairs:
    """The pairs that each step of a stage sees."""

    def __init__(self, config: TrainConfig, stage: str, count: int, data: Data) -> None:
        self._config, self._stage, self._count, self._data = config, stage, count, data

    def seed(self, step: int) -> int:
        return step_seed(self._config.seed, self._stage, step)

    def _drawn(self, step: int) -> Pairs:
        return draw_pairs(self._data.train, self._count, self._config.pa_fraction, self.seed(step))

    def read(self, step: int, rows: slice) -> Read:
        data, pairs = self._data, self._drawn(step).rows(rows)
        augmentations = draw_augmentations(self._count, self._config.augment_fraction, self.seed(step))[rows]
        return read_batch(data.train, data.stored_train, pairs, augmentations, data.size, data.side)

    def batch(self, read: Read) -> Batch:
        data = self._data
        return encode_batch(read, data.encode, data.size, self._config.model.absolute_pose, data.device, data.embed)

    def describe(self, step: int, row: int) -> str:
        pairs = self._drawn(step)
        return f"{self._data.train[pairs.shard[row]].path.name}, view {pairs.source[row]} to {pairs.target[row]}"


class HeldOutPairs:
    """The pairs of patients for validation, with their noise: the same at every call."""

    def __init__(self, config: TrainConfig, data: Data) -> None:
        self._config, self._data, self.size = config, data, data.size
        self._seed = step_seed(config.seed, "validation", 0)
        self._fixed = validation.fixed_pairs(data.val, config.validation_pairs, config.pa_fraction, self._seed)

    def __len__(self) -> int:
        return len(self._fixed.bin)

    def batch(self, rows: slice) -> Batch:
        data, pairs = self._data, self._fixed.pairs.rows(rows)
        read = read_batch(data.val, data.stored_val, pairs, [None] * len(pairs.shard), data.size, data.side)
        return encode_batch(read, data.encode, data.size, self._config.model.absolute_pose, data.device, data.embed)

    def draws(self, batch: Batch, rows: slice) -> Draws:
        drawn = draw_noise(len(self), batch.target_latent.shape[1:], 0.0, self._seed)
        return drawn._replace(quantile=self._fixed.quantile).rows(rows)

    def by_angle(self, losses: Tensor) -> dict[str, float]:
        return validation.by_angle(losses, self._fixed.bin)


def given_coarse(coarse: CoarseMean | None, batch: Batch) -> Batch:
    """The batch with the coarse mean in its condition, where there is one; no gradient goes to what predicts it."""
    if coarse is None:
        return batch
    with torch.no_grad():
        mean = coarse(batch.condition["source_latent"], batch.source, batch.target)
    return batch._replace(condition=batch.condition | {"coarse_latent": mean})


def pair_losses(model: nn.Module, batch: Batch, draws: Draws, prediction: str, shift: float) -> Tensor:
    """The loss of each pair of a batch, [B]; what is truncated of its target does not count."""
    latents, objective = batch.target_latent, flow.OBJECTIVES[prediction]
    noise, quantile, drop = (values.to(latents.device) for values in draws)
    timestep = objective.timestep(quantile, shift)
    noised = objective.noised(latents, noise, timestep)
    output = model(noised.latents, timestep, **batch.condition, drop_source=drop)
    predicted, *variances = output.split(latents.shape[1], dim=1)
    weight = 1 - batch.target_truncated
    total = flow.loss(predicted, noised.target, weight)
    for variance in variances:  # one, where it is learned
        total = total + flow.variance_loss((predicted - noised.target).detach(), variance, timestep, weight)
    return total


def images(shards: list[Shard], size: int, pairs: Pairs) -> Tensor:
    """Line integrals [B, 1, size, size] of the pairs' targets."""
    return torch.from_numpy(read_images(shards, size, pairs.shard, pairs.target))[:, None]
