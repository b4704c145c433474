"""What each stage of training is: what a step reads, its loss row by row, and what is watched meanwhile."""

import numpy as np
import torch
from torch import Tensor, nn

from svdrr import flow
from svdrr import vae as autoencoder
from svdrr.config import StageConfig, TrainConfig
from svdrr.data import Batch, Pairs, draw_pairs, gather, step_seed
from svdrr.latents import Reader
from svdrr.loop import Task
from svdrr.shards import Shard

VAE_STAGE = "vae"


def vae_task(config: TrainConfig, shards: list[Shard], device: torch.device) -> Task:
    """The autoencoder, on crops of views of every stage's size in turn."""
    settings = config.vae
    sizes = [stage.size for stage in config.stages]

    def drawn(step: int) -> Pairs:
        return draw_pairs(shards, settings.batch, 0, step_seed(config.seed, VAE_STAGE, step))

    def read(step: int, rows: slice) -> Tensor:
        size = sizes[step % len(sizes)]
        generator = torch.Generator().manual_seed(step_seed(config.seed, f"{VAE_STAGE} crop", step))
        row, column = torch.randint(max(1, size - settings.crop + 1), (2,), generator=generator).tolist()
        views = images(shards, size, drawn(step), rows)
        return views[..., row : row + settings.crop, column : column + settings.crop]

    def losses(model: nn.Module, views: Tensor, step: int, rows: slice) -> Tensor:
        weights = settings.kl_weight, settings.gradient_weight, settings.equivariance_weight
        generator = torch.Generator().manual_seed(step_seed(config.seed, VAE_STAGE, step))
        return autoencoder.loss(model, views.to(device), *weights, generator, settings.batch, rows)

    def describe(step: int, row: int) -> str:
        pairs = drawn(step)
        return f"{shards[pairs.shard[row]].path.name}, view {pairs.target[row]}"

    return Task(VAE_STAGE, settings.steps, settings.batch, settings.learning_rate, read, losses, describe)


def view_task(
    config: TrainConfig,
    stage: StageConfig,
    train: tuple[list[Shard], Reader],
    val: tuple[list[Shard], Reader],
    device: torch.device,
) -> Task:
    """The transformer at one size. train, val: shards, and who reads their latents."""

    def drawn(step: int) -> Pairs:
        return draw_pairs(train[0], stage.batch, config.pa_fraction, step_seed(config.seed, stage.name, step))

    def read(step: int, rows: slice) -> Batch:
        pairs = Pairs(*(index[rows] for index in drawn(step)))
        return gather(*train, pairs, stage.size, config.model.absolute_pose, torch.device("cpu"))

    def losses(model: nn.Module, batch: Batch, step: int, rows: slice) -> Tensor:
        generator = torch.Generator().manual_seed(step_seed(config.seed, stage.name, step))
        return pair_losses(
            model,
            batch.to(device),
            config.model.prediction,
            stage.shift,
            config.drop_source,
            generator,
            stage.batch,
            rows,
        )

    def describe(step: int, row: int) -> str:
        pairs = drawn(step)
        return f"{train[0][pairs.shard[row]].path.name}, view {pairs.source[row]} to {pairs.target[row]}"

    def watch(average: nn.Module, done: int) -> dict[str, float]:
        seed = step_seed(config.seed, "validation", 0)
        count = config.validation_pairs
        pairs = draw_pairs(val[0], count, config.pa_fraction, seed)
        batch = gather(*val, pairs, stage.size, config.model.absolute_pose, device)
        generator = torch.Generator().manual_seed(seed)
        found = pair_losses(average, batch, config.model.prediction, stage.shift, 0, generator, count, slice(0, count))
        return {"validation_loss": found.mean().item()}

    return Task(
        stage.name, stage.steps, stage.batch, stage.learning_rate, read, losses, describe, watch if val[0] else None
    )


def pair_losses(
    model: nn.Module,
    batch: Batch,
    prediction: str,
    shift: float,
    drop_source: float,
    generator: torch.Generator,
    count: int,
    rows: slice,
) -> Tensor:
    """The loss of each of these rows of a batch of `count` pairs: [rows].

    Noise, noise levels and dropped sources are drawn for all of the batch, so that it does not matter who takes which.
    """
    latents = batch.target_latent
    noise = torch.randn((count, *latents.shape[1:]), generator=generator)[rows].to(latents.device)
    levels = flow.OBJECTIVES[prediction].levels(count, shift, generator)[rows].to(latents.device)
    drop = (torch.rand(count, generator=generator)[rows] < drop_source).to(latents.device)
    noised = flow.OBJECTIVES[prediction].noised(latents, noise, levels)
    predicted = model(noised.latents, noised.timestep, **batch.condition, drop_source=drop)
    return flow.loss(predicted, noised.target)


def images(shards: list[Shard], size: int, pairs: Pairs, rows: slice = slice(None)) -> Tensor:
    """Line integrals [rows, 1, size, size] of the pairs' targets."""
    chosen = zip(pairs.shard[rows], pairs.target[rows], strict=True)
    return torch.from_numpy(np.stack([shards[s].images(size, [v]) for s, v in chosen]))
