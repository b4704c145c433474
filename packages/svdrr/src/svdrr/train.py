"""Shards in, a model out: the autoencoder, its latents, then the transformer from weak to strong resolution.

Where the model has a coarse branch, that is trained before the transformer, and stays as it is from then on.

The same command goes on where a run was stopped, however that happened. On a CPU it ends in the same weights, bit for
bit.
"""

import contextlib
import hashlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor, nn

from svdrr import clip, metrics, processes, validation
from svdrr import vae as autoencoder
from svdrr.checkpoint import Checkpoint, load, newest
from svdrr.coarse import CoarseMean
from svdrr.config import CoarseConfig, StageConfig, TrainConfig
from svdrr.data import draw_pairs, step_seed
from svdrr.errors import InputError
from svdrr.latents import Reader, cached
from svdrr.loop import Habits, fit
from svdrr.pipeline import FILM_PERCENTILES, SVDRRPipeline, scheduler
from svdrr.processes import gathered, on_main, require_same, unless_one_fails
from svdrr.run import Run, whole_folder
from svdrr.shards import Shard
from svdrr.start import begin, fitting_vae, stage_names, untrained, untrained_coarse, untrained_vae
from svdrr.stop import StoppedError, StopRequest
from svdrr.tasks import COARSE_STAGE, VAE_STAGE, Data, coarse_task, images, vae_task, view_task
from svdrr.transformer import ViewTransformer

SHOWN_PATIENTS, SHOWN_DEG = 2, [(-90.0, 0.0), (-45.0, 0.0), (45.0, 0.0), (90.0, 0.0)]
"""Whose views, from where, are synthesised while training goes on: for validation; azimuth and elevation."""

MEASURED_IMAGES = 128
"""Views that the scale of the latents (training) and the autoencoder's own error (validation) are measured on."""


def train(
    config: TrainConfig,
    shards_folder: Path,
    out: Path | None = None,
    max_minutes: float | None = None,
    vae: str | None = None,
    only: str | None = None,
    at_once: int | None = None,
    wandb: str | None = None,
) -> Path:
    """Trains to the end, or until the time is over; returns the run's folder.

    vae: a trained autoencoder's folder or id on the Hub, to use instead of training one, or the config's. only: the
    name of the one stage to train, where it is the next. at_once: pairs that a process takes at once, for the sake of
    its memory; the batch is the same. wandb: a project of Weights & Biases that is to see the curves, too. Processes
    that `torchrun` or `accelerate launch` started share the work.

    Raises InputError for shards that cannot be trained on, a `vae` that does not fit or an `out` that holds another
    run, and SystemExit(128 + signal) after a clean stop by SIGINT or SIGTERM.
    """
    vae = vae or config.vae.default
    accelerator = processes.accelerator(config.mixed_precision)
    config, run, train_shards, val_shards = on_main(
        accelerator, lambda: begin(config, shards_folder, out, vae, only, wandb, accelerator.num_processes)
    )
    encoder = None if config.image_encoder is None else clip.load(config.image_encoder).to(accelerator.device)
    with contextlib.ExitStack() as stack:
        if accelerator.device.type == "cpu":  # CUDA has no deterministic kernels for some of what we use
            stack.enter_context(deterministic())
        stop = stack.enter_context(StopRequest(max_minutes))
        session = Session(config, run, accelerator, stop, train_shards, val_shards, at_once, encoder)
        if on_main(accelerator, lambda: run.finished):
            session.say(f"{run.folder} is finished: its model is {run.model}. Another --out trains another.")
            return run.folder
        on_main(accelerator, lambda: stack.enter_context(run.locked()))
        if wandb is not None:
            on_main(accelerator, lambda: run.mirror(wandb))
        if accelerator.device.type == "cpu" and config.mixed_precision != "no":
            session.say(
                f"{config.mixed_precision} is very slow on most CPUs: --settings with mixed_precision no is not"
            )
        if not val_shards:
            session.say("none of these shards is for validation: training goes on without")
        try:
            train_stages(session, vae, only)
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{reason} Give a smaller --at-once; what is saved stays, and goes on with it") from error
        except StoppedError as stopped:
            session.say(str(stopped))
            if stopped.exit_code:
                raise SystemExit(stopped.exit_code) from None
    return run.folder


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """While entered, torch adds up in one order only. What the process had set comes back."""
    settings = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # type: ignore[attr-defined] # a costly guard
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        settings.fill_uninitialized_memory = before[1]  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Session:
    """What all stages of one run share. at_once: see `train`. image_encoder: see clip.py."""

    config: TrainConfig
    run: Run
    accelerator: Accelerator
    stop: StopRequest
    train_shards: list[Shard]
    val_shards: list[Shard]
    at_once: int | None
    image_encoder: nn.Module | None = None

    def say(self, words: str) -> None:
        """One line to whoever started the run, however many processes there are."""
        if self.accelerator.is_main_process:
            print(words, file=sys.stderr)

    def meet(self, code: int, where: str) -> None:
        """Waits for all processes. Raises StoppedError in all of them, where one has a reason (`code`) to stop."""
        codes = gathered(self.accelerator, torch.tensor([code]))
        self.stop.obey(int(codes.max()), where)

    def shared(self, count: int, values: Callable[[slice], Tensor]) -> Tensor:
        return processes.shared(self.accelerator, count, self.at_once, values)

    @property
    def habits(self) -> Habits:
        config = self.config
        return Habits(
            warmup_steps=config.warmup_steps,
            decay=config.decay,
            betas=config.betas,
            weight_decay=config.weight_decay,
            clip_norm=config.clip_norm,
            ema_decay=config.ema_decay,
            log_every=config.log_every,
            checkpoint_every=config.checkpoint_every,
            keep_checkpoints=config.keep_checkpoints,
            checkpoints=self.run.checkpoints,
            at_once=self.at_once,
            log=self.run.log,
        )


def train_stages(session: Session, vae: str | None, only: str | None) -> None:
    """What is not done yet, up to the finished model; or the stage `only`, where it is the next."""
    config, run = session.config, session.run
    checkpoint, upcoming = where_to_go_on(session)
    if only is not None and only != upcoming:
        names = stage_names(config)
        if names.index(only) < names.index(upcoming):
            session.say(f"stage {only} is finished: the next is {upcoming}")
            return
        raise InputError(f"stage {only} is not the next of {run.folder}: train --stage {upcoming} first")

    # first, for what is wrong with these costs no autoencoder's training
    transformer, coarse = untrained(config, session.say), untrained_coarse(config)
    if upcoming == VAE_STAGE:
        keep_vae(session, train_vae(session, checkpoint) if vae is None else fitting_vae(vae, config))
        if only == VAE_STAGE:
            return
    used = (
        run.read(AutoencoderKL, run.vae, is_copy=vae is not None and not config.vae.measured)
        .to(session.accelerator.device)
        .requires_grad_(False)
    )
    if not config.model.scaled_source:
        unscale_source(transformer, used)
    if config.coarse is not None and coarse is not None:
        if upcoming in (VAE_STAGE, COARSE_STAGE):
            train_coarse(session, config.coarse, used, coarse, checkpoint)
        if only == COARSE_STAGE:
            return
        coarse = run.read(CoarseMean, run.coarse).to(session.accelerator.device).requires_grad_(False)
    names = [stage.name for stage in config.stages]
    first = names.index(checkpoint.stage) if checkpoint and checkpoint.stage in names else 0
    for stage in config.stages[first:]:
        transformer = train_stage(session, stage, used, coarse, transformer, checkpoint)
        if stage.name == only != names[-1]:
            return
    if session.accelerator.is_main_process:
        save_pipeline(session, used, coarse, transformer)
    session.say(f"{run.folder} is finished: its model is {run.model}")


def where_to_go_on(session: Session) -> tuple[Checkpoint | None, str]:
    """The newest checkpoint, and the next stage.

    The main process looks them up for all: on a file system of a network, others may see later what it has written.
    """
    accelerator, run = session.accelerator, session.run
    path = on_main(accelerator, lambda: newest(run.checkpoints))
    if path is None:
        return None, on_main(accelerator, lambda: next_stage(session.config, run, None))
    checkpoint = unless_one_fails(accelerator, lambda: load(path))
    require_same(accelerator, str(path), lambda: checkpoint.digest)
    return checkpoint, on_main(accelerator, lambda: next_stage(session.config, run, checkpoint))


def next_stage(config: TrainConfig, run: Run, checkpoint: Checkpoint | None) -> str:
    """The name of the first stage that is not done; the last one, where only its model is left to be saved."""
    if not run.vae.is_dir():
        return VAE_STAGE
    if config.coarse is not None and not run.coarse.is_dir():
        return COARSE_STAGE
    if checkpoint is None or checkpoint.stage in (VAE_STAGE, COARSE_STAGE):
        return config.stages[0].name
    names = [stage.name for stage in config.stages]
    index = names.index(checkpoint.stage)
    done = checkpoint.step == config.stages[index].steps
    return names[min(index + done, len(names) - 1)]


def train_vae(session: Session, checkpoint: Checkpoint | None) -> AutoencoderKL:
    """A new autoencoder, trained."""
    config, accelerator = session.config, session.accelerator
    task = vae_task(config, session.train_shards, accelerator.device)
    return fit(task, session.habits, untrained_vae(config), checkpoint, accelerator, session.stop)


def keep_vae(session: Session, vae: AutoencoderKL) -> None:
    """Measures the scale of the latents and the error of the round trip, and leaves `vae` in the run's folder."""
    if session.accelerator.is_main_process:
        vae = vae.to(session.accelerator.device).requires_grad_(False)
        size, seed = session.config.stages[-1].size, step_seed(session.config.seed, "measure", 0)

        def batches(shards: list[Shard]) -> Iterator[Tensor]:
            views = images(shards, size, draw_pairs(shards, MEASURED_IMAGES, 0, seed))
            yield from (batch.to(session.accelerator.device) for batch in views.split(session.config.vae.batch))

        with torch.no_grad():
            if session.config.vae.measured:
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
        session.say(f"the autoencoder's round trip: {psnr:.1f} dB, the ceiling of all that follows")
        with whole_folder(session.run.vae) as partial:
            vae.save_pretrained(partial)
    session.meet(session.stop.code, "the autoencoder")


def unscale_source(transformer: ViewTransformer, vae: AutoencoderKL) -> None:
    """From now on the transformer undoes the normalisation of its source's latents, as this autoencoder has it."""
    shift = vae.config.shift_factor or 0.0  # the SDXL one has none
    transformer.register_to_config(source_scale=1 / vae.config.scaling_factor, source_shift=shift)


def train_coarse(
    session: Session, settings: CoarseConfig, vae: AutoencoderKL, start: CoarseMean, checkpoint: Checkpoint | None
) -> None:
    """Trains the coarse branch, and leaves it in the run's folder."""
    data = [latents_of(session, stage, vae) for stage in session.config.stages]
    task = coarse_task(session.config, settings, data, session.shared)
    coarse = fit(task, session.habits, start, checkpoint, session.accelerator, session.stop)
    if session.accelerator.is_main_process:
        with whole_folder(session.run.coarse) as partial:
            coarse.save_pretrained(partial)
    session.meet(session.stop.code, "the coarse branch")


def train_stage(
    session: Session,
    stage: StageConfig,
    vae: AutoencoderKL,
    coarse: CoarseMean | None,
    start: ViewTransformer,
    checkpoint: Checkpoint | None,
) -> ViewTransformer:
    """Trains the transformer at one size, from the weights of `start`; returns their average."""
    config, run, accelerator = session.config, session.run, session.accelerator
    blocks = list(start.blocks) if config.spread_weights else []

    def show(average: ViewTransformer, done: int) -> None:
        if not (accelerator.is_main_process or blocks):  # whose forward pass is everybody's
            return
        pipeline = pipeline_of(session, stage, vae, coarse, average)
        pipeline.set_progress_bar_config(disable=True)
        picture = validation.sample_grid(pipeline, session.val_shards[:SHOWN_PATIENTS], SHOWN_DEG, config.seed)
        if accelerator.is_main_process:
            run.show(stage.name, done, picture)

    task = view_task(config, stage, latents_of(session, stage, vae), coarse, session.shared, show)
    return fit(task, session.habits, start, checkpoint, accelerator, session.stop, blocks)


def latents_of(session: Session, stage: StageConfig, vae: AutoencoderKL) -> Data:
    """The shards' views at this stage's size, encoded where they are not. Raises StoppedError between two shards."""
    config, accelerator = session.config, session.accelerator
    part = accelerator.process_index, accelerator.num_processes
    codes = [0]

    def encode(images: Tensor) -> Tensor:
        return autoencoder.encode(vae, images.to(accelerator.device))

    def embed(images: Tensor) -> Tensor:
        return clip.embed(session.image_encoder, images.to(accelerator.device))

    def is_over() -> bool:
        codes.append(session.stop.code)
        return codes[-1] > 0

    def stored(shards: list[Shard]) -> Reader | None:
        if not config.cache_latents:
            return None
        return cached(shards, stage.size, encode, digest, session.run.latents, part, is_over, embedding)

    digest, embedding = autoencoder.digest(vae), None
    if session.image_encoder is not None:
        digest, embedding = hashlib.sha256(f"{digest}/{config.image_encoder_digest}".encode()).hexdigest(), embed
    side = stage.size // autoencoder.cell(vae)
    require_same(accelerator, str(session.run.vae), lambda: digest)
    of_train, of_val = unless_one_fails(accelerator, lambda: (stored(session.train_shards), stored(session.val_shards)))
    session.meet(max(codes), f"the latents of {stage.name}")
    return Data(
        session.train_shards,
        session.val_shards,
        stage.size,
        side,
        of_train,
        of_val,
        encode,
        accelerator.device,
        embedding,
    )


def pipeline_of(
    session: Session,
    stage: StageConfig,
    vae: AutoencoderKL,
    coarse: CoarseMean | None,
    transformer: ViewTransformer,
    film_line_integrals: list[float] | None = None,
) -> SVDRRPipeline:
    """What samples these weights at the size of this stage."""
    first = session.train_shards[0]  # all have the same geometry
    return SVDRRPipeline(
        vae=vae,
        coarse=coarse,
        image_encoder=session.image_encoder,
        transformer=transformer,
        scheduler=scheduler(transformer.config.prediction, stage.shift),
        size=stage.size,
        sdd_mm=first.sdd_mm,
        sod_mm=first.sod_mm,
        detector_mm=first.detector_mm,
        film_line_integrals=film_line_integrals,
        guidance_scale=session.config.guidance_scale,
    )


def save_pipeline(
    session: Session, vae: AutoencoderKL, coarse: CoarseMean | None, transformer: ViewTransformer
) -> None:
    """Leaves the finished pipeline in the run's folder `model`, which marks the run as finished."""
    stage = session.config.stages[-1]
    from_pa = [shard.images(stage.size, [shard.nearest_view(0, 0)]) for shard in session.train_shards]
    pipeline = pipeline_of(session, stage, vae, coarse, transformer, np.percentile(from_pa, FILM_PERCENTILES).tolist())
    with whole_folder(session.run.model) as partial:
        pipeline.save_pretrained(partial)
