"""The pipeline samples repeatably, survives saving, and agrees with training about the null condition."""

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from svdrr import vae as autoencoder
from svdrr.pipeline import SVDRRPipeline
from svdrr.transformer import ViewTransformer

TARGETS_DEG = [(30.0, 10.0), (-60.0, 0.0)]


@pytest.fixture
def pipeline() -> SVDRRPipeline:
    torch.manual_seed(0)
    transformer = ViewTransformer(latent_channels=2, patch_size=2, num_layers=1, num_heads=2, head_dim=8)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    pipeline = SVDRRPipeline(
        vae=autoencoder.build(2, (4, 8), 1),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
        size=16,
        sdd_mm=1100.0,
        film_line_integrals=[0.0, 0.5, 1.0, 2.0, 5.0],
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def source() -> torch.Tensor:
    return 8 * torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(1))


def sampled(pipeline: SVDRRPipeline, source: torch.Tensor, seed: int = 0, **settings: object) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    settings = {"targets_deg": TARGETS_DEG, "num_inference_steps": 3} | settings
    return pipeline(source, (0.0, 0.0), generator=generator, **settings).line_integrals


def test_the_same_seed_gives_the_same_views(pipeline: SVDRRPipeline, source: torch.Tensor) -> None:
    views = sampled(pipeline, source)
    assert views.shape == (2, 1, 16, 16)
    assert views.min() >= 0
    assert torch.equal(views, sampled(pipeline, source))
    assert not torch.equal(views, sampled(pipeline, source, seed=1))


def test_survives_saving_bit_for_bit(pipeline: SVDRRPipeline, source: torch.Tensor, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    again = SVDRRPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert (again.config.size, again.config.sdd_mm) == (16, 1100.0)
    assert again.config.film_line_integrals == [0.0, 0.5, 1.0, 2.0, 5.0]
    assert torch.equal(sampled(pipeline, source), sampled(again, source))


def test_the_generic_loader_does_not_know_it(pipeline: SVDRRPipeline, tmp_path: Path) -> None:
    """As the class documents; should this pass one day, the document can be shorter."""
    from diffusers import DiffusionPipeline

    pipeline.save_pretrained(tmp_path)
    with pytest.raises(AttributeError, match="SVDRRPipeline"):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_a_view_does_not_depend_on_its_batch(pipeline: SVDRRPipeline, source: torch.Tensor) -> None:
    """With a generator per target; 1e-4 of 8: matrix products of another shape round differently."""
    generators = [torch.Generator().manual_seed(number) for number in (5, 6)]
    both = pipeline(source, (0.0, 0.0), TARGETS_DEG, num_inference_steps=3, generator=generators).line_integrals
    alone = sampled(pipeline, source, seed=6, targets_deg=TARGETS_DEG[1:])
    assert torch.allclose(both[1:], alone, atol=1e-4)


def test_guidance_of_1_is_the_plain_model_and_more_is_not(pipeline: SVDRRPipeline, source: torch.Tensor) -> None:
    plain = sampled(pipeline, source)
    assert torch.equal(plain, sampled(pipeline, source, guidance_scale=1.0))
    assert not torch.allclose(plain, sampled(pipeline, source, guidance_scale=2.0), atol=1e-3)


def test_guidance_of_0_is_the_null_condition(pipeline: SVDRRPipeline, source: torch.Tensor) -> None:
    """It does not hear the source at all."""
    other = source.flip(2)
    views = [sampled(pipeline, image, guidance_scale=0.0) for image in (source, other)]
    assert torch.allclose(*views, atol=1e-4)
    assert not torch.allclose(sampled(pipeline, source), sampled(pipeline, other), atol=1e-3)


def test_geometry_and_angles_matter(pipeline: SVDRRPipeline, source: torch.Tensor) -> None:
    reference = sampled(pipeline, source)
    for other in ({"sdd_mm": 1800.0}, {"detector_mm": 300.0}, {"targets_deg": [(-30.0, 10.0), (60.0, 0.0)]}):
        assert not torch.allclose(reference, sampled(pipeline, source, **other), atol=1e-3)
