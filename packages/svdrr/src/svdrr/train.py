"""Shards in, a model out: the autoencoder, its latents, then the transformer from weak to strong resolution.

Where the model has a coarse branch, that is trained before the transformer, and stays as it is from then on.

The same command goes on where a run was stopped, however that happened. On a CPU it ends in the same weights, bit for
bit: a step depends on nothing but the state before it and on (seed, stage, step).
"""

import copy
import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor, nn
from tqdm import tqdm

from svdrr import flow, metrics, pixart
from svdrr import vae as autoencoder
from svdrr.checkpoint import Checkpoint, latest, restore, save, state
from svdrr.coarse import CoarseMean
from svdrr.config import CoarseConfig, StageConfig, TrainConfig
from svdrr.data import Batch, draw_pairs, gather, step_seed, training_shards
from svdrr.errors import InputError
from svdrr.latents import Reader, cached, online
from svdrr.pipeline import FILM_PERCENTILES, SVDRRPipeline, scheduler
from svdrr.run import Run, open_run, whole_folder
from svdrr.shards import Shard, open_folder
from svdrr.stop import StoppedError, StopRequest
from svdrr.transformer import ViewTransformer

VAE_STAGE, COARSE_STAGE = "vae", "coarse"
MEASURED_IMAGES = 128
"""Views that the scale of the latents (training) and the autoencoder's own error (validation) are measured on."""

BETAS = (0.9, 0.95)
"""Of AdamW. A short memory of the gradients' size, as is usual for transformers; it pays most in short runs."""

Network = TypeVar("Network", bound=nn.Module)


def train(
    config: TrainConfig,
    shards_folder: Path,
    out: Path | None = None,
    max_minutes: float | None = None,
    vae: str | None = None,
) -> Path:
    """Trains to the end, or until the time is over; returns the run's folder.

    vae: a trained autoencoder's folder or id on the Hub, to use instead of training one. Raises InputError for shards
    that cannot be trained on, a `vae` that does not fit or an `out` that holds another run, and SystemExit(128 +
    signal) after a clean stop by SIGINT or SIGTERM.
    """
    if config.model.image_embedding:
        raise InputError(
            f"the model of {config.preset} needs a frozen CLIP encoder, which this version does not have: "
            "choose another --preset (docs/training.md says what this one is good for)"
        )
    shards = open_folder(shards_folder)
    train_shards, val_shards = training_shards(shards)
    for shard in train_shards + val_shards:
        for stage in config.stages:
            shard.check_level(stage.size)
    given = None
    if vae is not None:
        given = fitting_vae(vae, config)
        config = replace(config, pretrained_vae=autoencoder.digest(given))
    run = open_run(config, data_digest(train_shards, val_shards), out)
    if run.finished:
        print(f"{run.folder} is finished: its model is {run.model}. Another --out trains another.", file=sys.stderr)
        return run.folder
    if not val_shards:
        print(f"none of these {len(shards)} shards is for validation: training goes on without", file=sys.stderr)

    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    if accelerator.num_processes > 1:
        raise InputError("this version trains in one process: start it without `accelerate launch`")
    torch.use_deterministic_algorithms(accelerator.device.type == "cpu")  # CUDA has none for some of what we use
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # a costly guard

    with run.locked(), StopRequest(max_minutes) as stop:
        session = Session(config, run, accelerator, stop, train_shards, val_shards)
        try:
            checkpoint = latest(run.checkpoints)
            transformer = untrained(config)  # first, for what is wrong with its `init` costs no autoencoder's training
            coarse = untrained_coarse(config)
            if not run.vae.is_dir():
                keep_vae(session, train_vae(session, checkpoint) if given is None else given)
            used = AutoencoderKL.from_pretrained(run.vae).to(accelerator.device).requires_grad_(False)

            names = [stage.name for stage in config.stages]
            begin = names.index(checkpoint.stage) if checkpoint and checkpoint.stage in names else 0
            if not config.model.scaled_source:
                unscale_source(transformer, used)
            if coarse is not None and config.coarse is not None:
                if not run.coarse.is_dir():
                    coarse = train_coarse(session, config.coarse, used, coarse, checkpoint)
                    with whole_folder(run.coarse) as partial:
                        coarse.save_pretrained(partial)
                coarse = CoarseMean.from_pretrained(run.coarse).to(accelerator.device).requires_grad_(False)
            for stage in config.stages[begin:]:
                transformer = train_stage(session, stage, used, coarse, transformer, checkpoint)
            save_pipeline(session, used, coarse, transformer)
            print(f"{run.folder} is finished: its model is {run.model}", file=sys.stderr)
        except StoppedError as stopped:
            print(f"{stop.reason}, saved at {stopped}: the same command goes on from there", file=sys.stderr)
            if stop.signal is not None:
                raise SystemExit(128 + stop.signal) from None
    return run.folder


@dataclass(frozen=True)
class Session:
    """What all stages of one run share."""

    config: TrainConfig
    run: Run
    accelerator: Accelerator
    stop: StopRequest
    train_shards: list[Shard]
    val_shards: list[Shard]


def fitting_vae(name: str, config: TrainConfig) -> AutoencoderKL:
    """The trained autoencoder of this name. Raises InputError where it does not fit model and stages, or is none."""
    vae = autoencoder.load(name)
    theirs, ours = vae.config.latent_channels, config.vae.latent_channels
    if theirs != ours:
        raise InputError(
            f"--vae {name} has latents of {theirs} channels, and the preset {config.preset} is for {ours}: "
            "give another --vae or --preset"
        )
    patch = autoencoder.cell(vae) * config.model.patch_size
    for stage in config.stages:
        if stage.size % patch:
            raise InputError(
                f"--vae {name} makes patches of {patch} pixels in the preset {config.preset}, and its stage of "
                f"{stage.size} pixels is no multiple of it: give another --vae or --preset"
            )
    return vae


def train_vae(session: Session, checkpoint: Checkpoint | None) -> AutoencoderKL:
    """Trains the autoencoder on crops of views of every stage's size."""
    settings, device = session.config.vae, session.accelerator.device
    sizes = [stage.size for stage in session.config.stages]

    def loss_at(model: nn.Module, step: int) -> Tensor:
        seed = step_seed(session.config.seed, VAE_STAGE, step)
        generator = torch.Generator().manual_seed(seed)
        size = sizes[step % len(sizes)]
        row, column = torch.randint(max(1, size - settings.crop + 1), (2,), generator=generator).tolist()
        views = any_images(session.train_shards, size, settings.batch, seed).to(device)
        batch = views[..., row : row + settings.crop, column : column + settings.crop]
        weights = settings.kl_weight, settings.gradient_weight, settings.equivariance_weight
        return autoencoder.loss(model, batch, *weights, generator).mean()

    torch.manual_seed(step_seed(session.config.seed, VAE_STAGE, -1))
    vae = autoencoder.build(settings.latent_channels, settings.block_channels, settings.layers_per_block)
    return fit(session, VAE_STAGE, settings.steps, settings.learning_rate, vae, checkpoint, loss_at, validate=None)


def keep_vae(session: Session, vae: AutoencoderKL) -> None:
    """Measures the scale of the latents and the error of the round trip, and leaves `vae` in the run's folder."""
    vae = vae.to(session.accelerator.device).requires_grad_(False)
    size, seed = session.config.stages[-1].size, step_seed(session.config.seed, "measure", 0)

    def batches(shards: Sequence[Shard]) -> Iterator[Tensor]:
        images = any_images(shards, size, MEASURED_IMAGES, seed)
        yield from (batch.to(session.accelerator.device) for batch in images.split(session.config.vae.batch))

    with torch.no_grad():
        autoencoder.measure_latents(vae, batches(session.train_shards))
        psnr = np.concatenate(
            [
                metrics.psnr(autoencoder.decode(vae, autoencoder.encode(vae, batch)).cpu(), batch.cpu())
                for batch in batches(session.val_shards or session.train_shards)
            ]
        ).mean()
    if math.isnan(psnr):
        raise InputError("the autoencoder decodes these shards to what is no number: use another")
    session.run.log(stage=VAE_STAGE, round_trip_psnr=psnr)
    print(f"the autoencoder's round trip: {psnr:.1f} dB, the ceiling of all that follows", file=sys.stderr)
    with whole_folder(session.run.vae) as partial:
        vae.save_pretrained(partial)


def any_images(shards: Sequence[Shard], size: int, count: int, seed: int) -> Tensor:
    """Line integrals [count, 1, size, size] of views drawn from all, patients equally often."""
    pairs = draw_pairs(shards, count, pa_fraction=0, seed=seed)
    views = [shards[s].images(size, [v]) for s, v in zip(pairs.shard, pairs.target, strict=True)]
    return torch.from_numpy(np.stack(views))


def untrained(config: TrainConfig) -> ViewTransformer:
    """The transformer as the first stage starts with it.

    Raises InputError where it is to begin from weights (`init`) that are missing or of another shape.
    """
    settings = asdict(config.model)
    del settings["scaled_source"]  # which is known when the autoencoder is: see unscale_source
    torch.manual_seed(step_seed(config.seed, config.stages[0].name, -1))
    has_coarse = config.coarse is not None
    transformer = ViewTransformer(latent_channels=config.vae.latent_channels, coarse=has_coarse, **settings)
    if config.init is not None:
        loaded = pixart.load(transformer, config.init)
        print(
            f"begun from {config.init}; new: {_listed(loaded.new)}; not used: {_listed(loaded.unused)}", file=sys.stderr
        )
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


def unscale_source(transformer: ViewTransformer, vae: AutoencoderKL) -> None:
    """From now on the transformer undoes the normalisation of its source's latents, as this autoencoder has it."""
    shift = vae.config.shift_factor or 0.0  # the SDXL one has none
    transformer.register_to_config(source_scale=1 / vae.config.scaling_factor, source_shift=shift)


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "nothing"


Data = tuple[list[Shard], Reader]


def latents_of(session: Session, stage: StageConfig, vae: AutoencoderKL) -> tuple[Data, Data]:
    """The shards for training and for validation, each with what reads their latents of this stage's size."""
    config, device = session.config, session.accelerator.device

    def encode(images: Tensor) -> Tensor:
        with torch.autocast(device.type, enabled=False):  # as exact within a step as before it
            return autoencoder.encode(vae, images.to(device))

    def check() -> None:
        session.stop.check(f"the latents of {stage.name}")

    def latents(shards: list[Shard]) -> Reader:
        if not config.cache_latents:
            return online(shards, stage.size, encode)
        return cached(shards, stage.size, encode, vae_digest, session.run.latents, check)

    vae_digest = autoencoder.digest(vae)
    return (
        (session.train_shards, latents(session.train_shards)),
        (session.val_shards, latents(session.val_shards)),
    )


def train_coarse(
    session: Session,
    settings: CoarseConfig,
    vae: AutoencoderKL,
    start: CoarseMean,
    checkpoint: Checkpoint | None,
) -> CoarseMean:
    """Trains the coarse branch on the latents of every stage in turn; returns the average of its weights."""
    config, stages = session.config, session.config.stages
    data = [latents_of(session, stage, vae) for stage in stages]

    def error(model: nn.Module, index: int, some: Data, count: int, seed: int) -> Tensor:
        pairs = draw_pairs(some[0], count, config.pa_fraction, seed)
        device = session.accelerator.device
        batch = gather(*some, pairs, stages[index].size, config.model.absolute_pose, device)
        predicted = model(batch.condition["source_latent"], batch.source, batch.target)
        return flow.loss(predicted, batch.target_latent).mean()

    def loss_at(model: nn.Module, step: int) -> Tensor:
        index = step % len(stages)
        return error(model, index, data[index][0], settings.batch, step_seed(config.seed, COARSE_STAGE, step))

    def validate(model: nn.Module) -> float:
        count, seed = config.validation_pairs, step_seed(config.seed, "validation", 0)
        return float(np.mean([error(model, index, val, count, seed).item() for index, (_, val) in enumerate(data)]))

    return fit(
        session,
        COARSE_STAGE,
        settings.steps,
        settings.learning_rate,
        start,
        checkpoint,
        loss_at,
        validate if session.val_shards else None,
    )


def given_coarse(coarse: CoarseMean | None, batch: Batch) -> Batch:
    """The batch with the coarse mean in its condition, where there is one; no gradient goes to what predicts it."""
    if coarse is None:
        return batch
    with torch.no_grad():
        mean = coarse(batch.condition["source_latent"], batch.source, batch.target)
    return batch._replace(condition=batch.condition | {"coarse_latent": mean})


def train_stage(
    session: Session,
    stage: StageConfig,
    vae: AutoencoderKL,
    coarse: CoarseMean | None,
    start: ViewTransformer,
    checkpoint: Checkpoint | None,
) -> ViewTransformer:
    """Trains the transformer at one size, from the weights of `start`; returns their average."""
    config, device = session.config, session.accelerator.device
    train_data, val_data = latents_of(session, stage, vae)

    def loss_at(model: nn.Module, step: int) -> Tensor:
        seed = step_seed(config.seed, stage.name, step)
        pairs = draw_pairs(session.train_shards, stage.batch, config.pa_fraction, seed)
        batch = given_coarse(coarse, gather(*train_data, pairs, stage.size, config.model.absolute_pose, device))
        generator = torch.Generator().manual_seed(seed)
        return pair_loss(model, batch, config.model.prediction, stage.shift, config.drop_source, generator)

    def validate(model: nn.Module) -> float:
        seed = step_seed(config.seed, "validation", 0)
        pairs = draw_pairs(session.val_shards, config.validation_pairs, config.pa_fraction, seed)
        batch = given_coarse(coarse, gather(*val_data, pairs, stage.size, config.model.absolute_pose, device))
        generator = torch.Generator().manual_seed(seed)
        return pair_loss(model, batch, config.model.prediction, stage.shift, 0, generator).item()

    return fit(
        session,
        stage.name,
        stage.steps,
        stage.learning_rate,
        start,
        checkpoint,
        loss_at,
        validate if session.val_shards else None,
    )


def pair_loss(
    model: nn.Module, batch: Batch, prediction: str, shift: float, drop_source: float, generator: torch.Generator
) -> Tensor:
    """The loss on a batch of pairs, with noise, noise levels and dropped sources drawn from the generator."""
    latents = batch.target_latent
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    noised = flow.OBJECTIVES[prediction].noised(latents, noise, shift, generator)
    drop = (torch.rand(len(latents), generator=generator) < drop_source).to(latents.device)
    predicted = model(noised.latents, noised.timestep, **batch.condition, drop_source=drop)
    return flow.loss(predicted, noised.target).mean()


def fit(
    session: Session,
    name: str,
    steps: int,
    learning_rate: float,
    model: Network,
    checkpoint: Checkpoint | None,
    loss_at: Callable[[nn.Module, int], Tensor],
    validate: Callable[[nn.Module], float] | None,
) -> Network:
    """The loop: from `model`, or from the checkpoint where it is of this stage, to the end. Returns the average."""
    config, run, accelerator = session.config, session.run, session.accelerator
    model = model.to(accelerator.device).requires_grad_(True).train()
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=BETAS, weight_decay=config.weight_decay, fused=True
    )
    first = 0
    if checkpoint is not None and checkpoint.stage == name:
        restore(checkpoint, model, ema, optimizer)
        first = checkpoint.step
    prepared, prepared_optimizer = accelerator.prepare(model, optimizer)

    losses: list[float] = []
    since = time.monotonic()
    for step in tqdm(range(first, steps), desc=name, initial=first, total=steps, unit="step", mininterval=0.5):
        # one training step
        rate = learning_rate * schedule(step, steps, config.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with accelerator.autocast():
            loss = loss_at(prepared, step)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(prepared.parameters(), config.clip_norm)
        losses.append(loss.item())
        if not math.isfinite(losses[-1] + norm.item()):
            raise InputError(
                f"loss {losses[-1]:g} and gradient {norm:g} at stage {name}, step {step}; the weights in "
                f"{run.checkpoints} are from before: train again with a lower learning rate"
            )
        prepared_optimizer.step()
        prepared_optimizer.zero_grad()
        update_average(ema, model, min(config.ema_decay, (step + 1) / (step + 10)))
        done = step + 1

        # report
        if done % config.log_every == 0 or done == steps:
            now = time.monotonic()
            steps_per_s = round(len(losses) / (now - since), 3)
            run.log(stage=name, step=done, loss=np.mean(losses), learning_rate=rate, steps_per_s=steps_per_s)
            losses, since = [], now

        # validate
        if validate and (done % config.validate_every == 0 or done == steps):
            with torch.no_grad():
                run.log(stage=name, step=done, validation_loss=validate(ema))

        # checkpoint
        if done % config.checkpoint_every == 0 or done == steps or session.stop.reason:
            tensors = state(model, ema, optimizer)
            save(run.checkpoints, Checkpoint(name, done, tensors), config.keep_checkpoints)

        # stop?
        session.stop.check(f"stage {name}, step {done}")
    return ema


def schedule(step: int, steps: int, warmup_steps: int) -> float:
    """The factor on the learning rate: up in a line over the warm-up, down in half a cosine to the end."""
    return min(1.0, (step + 1) / warmup_steps) * (1 + math.cos(math.pi * step / steps)) / 2


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """One step of the exponential moving average of the weights."""
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)


def save_pipeline(
    session: Session, vae: AutoencoderKL, coarse: CoarseMean | None, transformer: ViewTransformer
) -> None:
    """Leaves the finished pipeline in the run's folder `model`, which marks the run as finished."""
    stage, shards = session.config.stages[-1], session.train_shards
    from_pa = [shard.images(stage.size, [shard.nearest_view(0, 0)]) for shard in shards]
    pipeline = SVDRRPipeline(
        vae=vae,
        transformer=transformer,
        coarse=coarse,
        scheduler=scheduler(transformer.config.prediction, stage.shift),
        size=stage.size,
        sdd_mm=float(np.median([shard.sdd_mm for shard in shards])),
        sod_mm=float(np.median([shard.sod_mm for shard in shards])),
        detector_mm=float(np.median([shard.detector_mm for shard in shards])),
        film_line_integrals=np.percentile(from_pa, FILM_PERCENTILES).tolist(),
    )
    with whole_folder(session.run.model) as partial:
        pipeline.save_pretrained(partial)


def data_digest(train: Sequence[Shard], val: Sequence[Shard]) -> str:
    """SHA-256 of what the shards contain, in their order, and of which are for what."""
    return hashlib.sha256(repr([[shard.digest for shard in some] for some in (train, val)]).encode()).hexdigest()
