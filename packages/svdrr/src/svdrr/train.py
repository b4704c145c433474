"""Shards in, a model out: the autoencoder, its latents, then the transformer from weak to strong resolution.

Where the model has a coarse branch, that is trained before the transformer, and stays as it is from then on.

The same command goes on where a run was stopped, however that happened. On a CPU it ends in the same weights, bit for
bit.
"""

import contextlib
import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor, nn

from svdrr import clip, metrics, pixart, processes, validation
from svdrr import vae as autoencoder
from svdrr.checkpoint import Checkpoint, latest
from svdrr.coarse import CoarseMean
from svdrr.config import CoarseConfig, StageConfig, TrainConfig
from svdrr.data import draw_pairs, step_seed, training_shards
from svdrr.errors import InputError
from svdrr.latents import Reader, cached
from svdrr.loop import Habits, fit
from svdrr.pipeline import FILM_PERCENTILES, SVDRRPipeline, scheduler
from svdrr.processes import gathered, on_main
from svdrr.run import Run, open_run, whole_folder
from svdrr.shards import Shard, open_folder
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
    torch.use_deterministic_algorithms(accelerator.device.type == "cpu")  # CUDA has none for some of what we use
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # a costly guard

    config, run, train_shards, val_shards = on_main(
        accelerator, lambda: begin(config, shards_folder, out, vae, only, accelerator.num_processes)
    )
    encoder = None if config.image_encoder is None else clip.load(config.image_encoder).to(accelerator.device)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest(max_minutes))
        session = Session(config, run, accelerator, stop, train_shards, val_shards, at_once, encoder)
        if run.finished:
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


def begin(
    config: TrainConfig, shards_folder: Path, out: Path | None, vae: str | None, only: str | None, num_processes: int
) -> tuple[TrainConfig, Run, list[Shard], list[Shard]]:
    """Everything that can be wrong is found here, before anything is written: the run, its shards, its whole config."""
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
    train_shards, val_shards = training_shards(open_folder(shards_folder))
    for shard in train_shards + val_shards:
        for stage in config.stages:
            shard.check_level(stage.size)
    of_hub = [name for name in (vae, config.image_encoder, config.init) if name is not None and not Path(name).is_dir()]
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
        untrained(replace(config, init=None))
        untrained_coarse(config)
    return config, open_run(config, data_digest(train_shards, val_shards), out), train_shards, val_shards


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


def stage_names(config: TrainConfig) -> list[str]:
    """The stages in their order."""
    return [VAE_STAGE, *([COARSE_STAGE] if config.coarse else []), *(stage.name for stage in config.stages)]


def train_stages(session: Session, vae: str | None, only: str | None) -> None:
    """What is not done yet, up to the finished model; or the stage `only`, where it is the next."""
    config, run = session.config, session.run
    checkpoint = latest(run.checkpoints)
    upcoming = next_stage(config, run, checkpoint)
    session.accelerator.wait_for_everyone()  # before the first of them changes what the others have just read
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
    used = AutoencoderKL.from_pretrained(run.vae).to(session.accelerator.device).requires_grad_(False)
    if not config.model.scaled_source:
        unscale_source(transformer, used)
    if config.coarse is not None and coarse is not None:
        if not run.coarse.is_dir():
            train_coarse(session, config.coarse, used, coarse, checkpoint)
        if only == COARSE_STAGE:
            return
        coarse = CoarseMean.from_pretrained(run.coarse).to(session.accelerator.device).requires_grad_(False)
    names = [stage.name for stage in config.stages]
    first = names.index(checkpoint.stage) if checkpoint and checkpoint.stage in names else 0
    for stage in config.stages[first:]:
        transformer = train_stage(session, stage, used, coarse, transformer, checkpoint)
        if stage.name == only != names[-1]:
            return
    if session.accelerator.is_main_process:
        save_pipeline(session, used, coarse, transformer)
    session.say(f"{run.folder} is finished: its model is {run.model}")


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


def train_vae(session: Session, checkpoint: Checkpoint | None) -> AutoencoderKL:
    """A new autoencoder, trained."""
    config, accelerator = session.config, session.accelerator
    torch.manual_seed(step_seed(config.seed, VAE_STAGE, -1))
    vae = autoencoder.build(config.vae.latent_channels, config.vae.block_channels, config.vae.layers_per_block)
    task = vae_task(config, session.train_shards, accelerator.device)
    return fit(task, session.habits, vae, checkpoint, accelerator, session.stop)


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
    of_train, of_val = stored(session.train_shards), stored(session.val_shards)
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


def data_digest(train: Sequence[Shard], val: Sequence[Shard]) -> str:
    """SHA-256 of what the shards contain, in their order, and of which are for what."""
    return hashlib.sha256(repr([[shard.digest for shard in some] for some in (train, val)]).encode()).hexdigest()
