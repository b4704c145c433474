"""From one X-ray to the views from other directions: the model with its scheduler, and the only sampling loop."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from svdrr import clip, flow
from svdrr import vae as autoencoder
from svdrr.coarse import CoarseMean
from svdrr.errors import InputError
from svdrr.pose import Views
from svdrr.transformer import ViewTransformer, condition

FILM_PERCENTILES = (1.0, 25.0, 50.0, 75.0, 99.0)
"""Of a film's grey values, matched to those of the training views from PA: see radiograph.from_film."""

STEPS = {"velocity": 8, "epsilon": 20}
"""Of sampling, by what the model predicts; SV-DRR takes 20."""


def scheduler(prediction: str, shift: float) -> SchedulerMixin:
    """What samples a model that predicts this: Euler's steps along a flow, DPM-Solver++ for a diffusion.

    shift: of the flow's noise levels, as in training.
    """
    if prediction == "velocity":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    start, end = flow.BETA_RANGE
    return DPMSolverMultistepScheduler(beta_start=start, beta_end=end, beta_schedule="linear")


@dataclass
class SVDRROutput(BaseOutput):
    """line_integrals: [B, 1, N, N], one view per target."""

    line_integrals: Tensor


class SVDRRPipeline(DiffusionPipeline):
    """Synthesises views of a patient from one view.

    size: side in pixels of the images it was trained on last. sdd_mm, sod_mm, detector_mm: the geometry it was trained
    with. film_line_integrals: the line integrals at FILM_PERCENTILES of the training views from PA. guidance_scale: of
    a call that gives none. coarse: for a transformer that is given a coarse mean, the network that predicts it; raises
    InputError where only one is there. image_encoder: the CLIP (see clip.py) that embeds the source for a transformer
    that wants it; without, a call has to give the embedding. Raises InputError where it does not fit.

    Load it by `SVDRRPipeline.from_pretrained(folder)`; the generic `DiffusionPipeline.from_pretrained` does not know
    this class.
    """

    model_cpu_offload_seq = "image_encoder->coarse->transformer->vae"
    _optional_components = ["coarse", "image_encoder"]  # noqa: RUF012 - diffusers' own, a list

    def __init__(
        self,
        vae: AutoencoderKL,
        transformer: ViewTransformer,
        scheduler: SchedulerMixin,
        size: int = 128,
        sdd_mm: float = 1800.0,
        sod_mm: float = 1640.0,
        detector_mm: float = 432.0,
        film_line_integrals: list[float] | None = None,
        guidance_scale: float = 1.0,
        coarse: CoarseMean | None = None,
        image_encoder: Any = None,
    ) -> None:
        super().__init__()
        if transformer.config.coarse and coarse is None:
            raise InputError("this transformer wants a coarse mean: give `coarse`, what it was trained with")
        if coarse is not None and not transformer.config.coarse:
            raise InputError("this transformer wants no coarse mean: leave `coarse` out")
        if image_encoder is not None and image_encoder.config.projection_dim != transformer.config.image_embedding:
            raise InputError(
                f"this transformer wants an image_embedding of {transformer.config.image_embedding} numbers, and this "
                f"image_encoder makes {image_encoder.config.projection_dim}: give another, or none"
            )
        self.register_modules(
            vae=vae, transformer=transformer, scheduler=scheduler, coarse=coarse, image_encoder=image_encoder
        )
        self.register_to_config(
            size=size,
            sdd_mm=sdd_mm,
            sod_mm=sod_mm,
            detector_mm=detector_mm,
            film_line_integrals=film_line_integrals,
            guidance_scale=guidance_scale,
        )

    @torch.no_grad()
    def __call__(
        self,
        source: Tensor,
        source_deg: tuple[float, float],
        targets_deg: list[tuple[float, float]],
        sdd_mm: float | None = None,
        sod_mm: float | None = None,
        detector_mm: float | None = None,
        num_inference_steps: int | None = None,
        start: float | None = None,
        guidance_scale: float | None = None,
        image_embedding: Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> SVDRROutput:
        """The views at `targets_deg`, B pairs of (azimuth, elevation), from a source view at `source_deg`.

        source: line integrals [1 or B, 1, N, N]. The distances, of source and targets alike, are those of training by
        default, and so is the number of steps (STEPS). start: the sigma, above 0 and up to 1, at which sampling begins
        with the coarse mean under noise; by default it begins with noise alone, as at 1. guidance_scale: 1 samples the
        model as it is; more pushes away from what the null condition gives; by default that of the pipeline.
        image_embedding: [1 or B, E] of the source, for a model that needs it and has no encoder of its own. generator:
        one for all or one per target; a CPU generator gives the same noise on every device. Raises InputError at a
        `start` that cannot be.
        """
        guidance_scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        if start is not None:
            self._check_start(start)
        device = self._execution_device
        count = len(targets_deg)
        lengths_mm = (
            self.config.sdd_mm if sdd_mm is None else sdd_mm,
            self.config.sod_mm if sod_mm is None else sod_mm,
            self.config.detector_mm if detector_mm is None else detector_mm,
        )
        source_views = _views([source_deg] * count, lengths_mm).to(device)
        target_views = _views(targets_deg, lengths_mm).to(device)

        source_latent = autoencoder.encode(self.vae, source.to(device, self.vae.dtype)).to(self.transformer.dtype)
        source_latent = source_latent.expand(count, -1, -1, -1)
        absolute_pose = self.transformer.config.absolute_pose
        told = condition(source_latent, source_views, target_views, source.shape[-1], absolute_pose)
        if image_embedding is None and self.image_encoder is not None:
            image_embedding = clip.embed(self.image_encoder, source.to(device, self.image_encoder.dtype))
        if image_embedding is not None:
            told["image_embedding"] = image_embedding.to(source_latent).expand(count, -1)
        if self.coarse is not None:
            coarse_latent = self.coarse(source_latent.to(self.coarse.dtype), source_views, target_views)
            told["coarse_latent"] = coarse_latent.to(source_latent.dtype)
        null = torch.ones(count, dtype=torch.bool, device=device)

        latents = randn_tensor(source_latent.shape, generator, device, source_latent.dtype)
        self._set_timesteps(num_inference_steps, 1.0 if start is None else start, device)
        if start is not None:
            latents = flow.path(told["coarse_latent"], latents, self.scheduler.sigmas[:1].to(latents))
        for timestep in self.progress_bar(self.scheduler.timesteps):
            timesteps = timestep.expand(count)
            predicted = self.transformer(latents, timesteps, **told)[:, : latents.shape[1]]  # without variances
            if guidance_scale != 1:
                without = self.transformer(latents, timesteps, **told, drop_source=null)[:, : latents.shape[1]]
                predicted = without + guidance_scale * (predicted - without)
            latents = self.scheduler.step(predicted, timestep, latents).prev_sample
        # one by one: a decoder at full size needs far more memory than all that came before
        views = [autoencoder.decode(self.vae, latent) for latent in latents.to(self.vae.dtype).split(1)]
        return SVDRROutput(line_integrals=torch.cat(views))

    def _check_start(self, start: float) -> None:
        if self.coarse is None:
            raise InputError(
                f"start={start:g} needs a coarse mean to start from, and this model has none: leave it out"
            )
        if self.transformer.config.prediction != "velocity":
            raise InputError(f"start={start:g} is a flow's, and this model predicts the noise: leave it out")
        if not 0 < start <= 1:
            raise InputError(f"start={start:g} is no noise level to start from: give one above 0 and up to 1")

    def _set_timesteps(self, steps: int | None, start: float, device: torch.device) -> None:
        prediction = self.transformer.config.prediction
        steps = STEPS[prediction] if steps is None else steps
        if prediction == "velocity":  # the scheduler's own spacing would begin at less than pure noise
            shift = self.scheduler.shift
            first = start / (shift - (shift - 1) * start)  # which the scheduler's shift takes to `start`
            self.scheduler.set_timesteps(sigmas=np.linspace(first, first / steps, steps), device=device)
        else:
            self.scheduler.set_timesteps(steps, device=device)


def _views(angles_deg: list[tuple[float, float]], lengths_mm: tuple[float, float, float]) -> Views:
    rows = torch.tensor([(*angles, *lengths_mm) for angles in angles_deg], dtype=torch.float32)
    return Views(*rows.unbind(dim=1))
