"""The coarse branch: the lift follows the documented geometry, both kinds learn, and the transformer leaves them be."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from svdrr import vae as autoencoder
from svdrr.coarse import KINDS, REACH_MM, CoarseMean, cast, frustum_mm
from svdrr.config import CoarseConfig, TrainConfig
from svdrr.data import Batch, draw_noise, draw_pairs, encode_batch, read_batch
from svdrr.errors import InputError
from svdrr.latents import Latents, Reader
from svdrr.pipeline import SVDRRPipeline, scheduler
from svdrr.pose import Views, projection
from svdrr.shards import Shard, open_folder
from svdrr.tasks import given_coarse, pair_losses
from svdrr.train import train
from svdrr.transformer import ViewTransformer, condition

CHEST, PORTABLE = (1800.0, 1640.0, 432.0), (1100.0, 950.0, 400.0)
TARGETS_DEG = [(0.0, 0.0), (30.0, 10.0), (90.0, 0.0), (-60.0, -30.0), (180.0, 20.0), (45.0, 80.0)]
CELLS = 8


def views(angles_deg: list[tuple[float, float]], lengths_mm: tuple[float, float, float] = CHEST) -> Views:
    rows = torch.tensor([(*angles, *lengths_mm) for angles in angles_deg], dtype=torch.float64)
    return Views(*rows.unbind(dim=1))


def in_single(views: Views) -> Views:
    return Views(*(getattr(views, name).float() for name in vars(views)))


@pytest.mark.parametrize("point_mm", [(0.0, 0.0, 0.0), (60.0, -50.0, 40.0), (-80.0, 40.0, -60.0)])
@pytest.mark.parametrize("lengths_mm", [CHEST, PORTABLE])
def test_a_ball_on_the_sources_rays_is_cast_to_where_it_projects(
    lengths_mm: tuple[float, float, float], point_mm: tuple[float, float, float]
) -> None:
    """A Gaussian ball of a deviation of 1.3 to 1.6 cells: its shadow's centre, and the line integral through it.

    A twentieth of a cell: the shadow of a ball off the axis lies up to 0.03 cells outside its centre's, as that of any
    sphere in perspective, and interpolation shifts it by up to 0.02. Interpolation between voxels of 25 mm blurs the
    ball by a voxel / sqrt(6) each way, there and back, which takes 5 to 15 % of its peak.
    """
    cells, deviation_mm = 20, 35.0
    source = views([(10.0, 5.0)] * len(TARGETS_DEG), lengths_mm)
    target = views(TARGETS_DEG, lengths_mm)
    point = torch.tensor(point_mm, dtype=torch.float64)
    away = (frustum_mm(source, cells, cells) - point).square().sum(dim=-1)
    shadow = cast(torch.exp(-away / 2 / deviation_mm**2)[:, None], source, target)[:, 0]

    homogeneous = projection(target, cells) @ torch.cat([point, torch.ones(1, dtype=torch.float64)])
    place = torch.arange(cells, dtype=torch.float64)
    mass = shadow.sum(dim=(1, 2))
    centre = torch.stack([(shadow * place).sum(dim=(1, 2)), (shadow * place[:, None]).sum(dim=(1, 2))], dim=1)
    assert (centre / mass[:, None] - homogeneous[:, :2] / homogeneous[:, 2:]).abs().max() < 0.05
    peak = shadow.amax(dim=(1, 2)) * REACH_MM / (math.sqrt(2 * math.pi) * deviation_mm)
    assert peak.min() > 0.85
    assert peak.max() < 1


def test_each_channel_is_cast_alone_and_a_ray_sees_as_much_as_it_crosses() -> None:
    """Of a full volume, the source's own rays see 2 reaches, and more the more they slant; 1e-9 is rounding."""
    source = views([(20.0, -10.0)], PORTABLE)
    volume = torch.stack([torch.ones(4, CELLS, CELLS), torch.zeros(4, CELLS, CELLS)])[None].double()
    full, empty = cast(volume, source, source)[0]
    assert empty.abs().max() == 0
    offset = ((torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS - 0.5) * PORTABLE[2] / PORTABLE[0]
    assert torch.allclose(full, 2 * (1 + offset[:, None] ** 2 + offset**2).sqrt(), atol=1e-9)


def test_beyond_the_frustum_there_is_nothing() -> None:
    """A source whose beam is 40 mm wide at the isocentre, seen from the side: a band of light, and darkness around."""
    cells = 24
    source, target = views([(0.0, 0.0)], (1800.0, 1640.0, 44.0)), views([(90.0, 0.0)])
    seen = cast(torch.ones(1, 1, cells, cells, cells, dtype=torch.float64), source, target)[0, 0]
    height_mm = ((torch.arange(cells, dtype=torch.float64) + 0.5) / cells - 0.5) * CHEST[2] * CHEST[1] / CHEST[0]
    assert seen[height_mm.abs() > 30].abs().max() == 0  # the beam is at most 46 mm high, which perspective enlarges
    assert seen[height_mm.abs() < 15, 2:-2].min() > 0


def some_coarse(kind: str) -> CoarseMean:
    torch.manual_seed(0)
    return CoarseMean(kind, latent_channels=2, cells=CELLS, width=8, volume_channels=4)


@pytest.mark.parametrize("kind", KINDS)
def test_both_kinds_hear_the_source_and_both_views_at_any_resolution(kind: str) -> None:
    coarse = some_coarse(kind)
    latents = torch.randn(3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    source = in_single(views([(0.0, 0.0), (40.0, 10.0), (-80.0, 0.0)]))
    target = in_single(views([(90.0, 0.0), (5.0, -20.0), (-60.0, 30.0)]))
    with torch.no_grad():
        reference = coarse(latents, source, target)
        for other in (
            coarse(latents.flip(0), source, target),
            coarse(latents, target, target),
            coarse(latents, source, source),
            coarse(latents, source, in_single(views([(90.0, 0.0), (5.0, -20.0), (-60.0, 30.0)], PORTABLE))),
        ):
            assert (other - reference).abs().max() > 1e-3
        assert coarse(latents[..., :12, :12], source, target).shape == (3, 2, 12, 12)


def a_batch(shards: list[Shard], stored: Reader, count: int, seed: int) -> Batch:
    """Pairs of 16-pixel views whose latents are all stored."""
    read = read_batch(shards, stored, draw_pairs(shards, count, 0.5, seed), [None] * count, 16, CELLS)
    return encode_batch(read, torch.nn.Identity(), 16, True, torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_both_kinds_learn_more_than_the_mean(kind: str, shards: Path) -> None:
    """The views themselves, at 8 x 8 and of variance 1, stand for latents: the error of their mean is 1.

    After these 30 steps a sixth of it is left; the bound is twice that.
    """
    opened = open_folder(shards)
    images = torch.from_numpy(np.stack([shard.images(16) for shard in opened]))
    values = functional.avg_pool2d(images, 2)[:, :, None]
    values = (values - values.mean()) / values.std()

    def read(shard: np.ndarray, view: np.ndarray) -> Latents:
        return Latents(values[shard, view], torch.zeros(len(shard), CELLS, CELLS))

    torch.manual_seed(0)
    coarse = CoarseMean(kind, latent_channels=1, cells=CELLS, width=8, volume_channels=4)
    optimizer = torch.optim.AdamW(coarse.parameters(), lr=1e-2)

    def error(seed: int, count: int) -> Tensor:
        batch = a_batch(opened, read, count, seed)
        predicted = coarse(batch.condition["source_latent"], batch.source, batch.target)
        return functional.mse_loss(predicted, batch.target_latent)

    for step in range(30):
        optimizer.zero_grad()
        error(step, 8).backward()
        optimizer.step()
    with torch.no_grad():
        assert error(1000, 64) < 1 / 3


@pytest.fixture
def pipeline() -> SVDRRPipeline:
    torch.manual_seed(0)
    settings = {"latent_channels": 2, "patch_size": 2, "num_layers": 1, "num_heads": 2, "head_dim": 8}
    transformer = ViewTransformer(**settings, coarse=True)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    vae = autoencoder.build(2, (4, 8), 1)
    pipeline = SVDRRPipeline(vae, transformer, scheduler("velocity", 3.0), size=16, coarse=some_coarse("lift"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampled(pipeline: SVDRRPipeline, source: Tensor | None = None, **settings: object) -> Tensor:
    if source is None:
        source = an_image()
    settings = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0)} | settings
    return pipeline(source, (0.0, 0.0), TARGETS_DEG[1:3], **settings).line_integrals


def an_image() -> Tensor:
    return 8 * torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(1))


def test_the_transformer_hears_the_coarse_mean_but_not_where_the_source_is_dropped(pipeline: SVDRRPipeline) -> None:
    transformer, generator = pipeline.transformer, torch.Generator().manual_seed(0)
    source = in_single(views([(0.0, 0.0)] * 2))
    told = condition(torch.randn(2, 2, CELLS, CELLS, generator=generator), source, source, 16)
    noisy, coarse = torch.randn(2, 2, 2, CELLS, CELLS, generator=generator)
    timestep = torch.tensor([500.0, 500.0])

    def predicted(coarse: Tensor, drop: list[bool]) -> Tensor:
        return transformer(noisy, timestep, **told, coarse_latent=coarse, drop_source=torch.tensor(drop))

    with torch.no_grad():
        moved = predicted(coarse, [True, False]) - predicted(coarse.flip(0), [True, False])
    assert moved[0].abs().max() == 0
    assert moved[1].abs().max() > 1e-3
    predicted(coarse, [True, False]).square().sum().backward()
    assert transformer.null_coarse.grad.abs().max() > 0
    with pytest.raises(InputError, match="needs a coarse_latent"):
        transformer(noisy, timestep, **told)


def test_guidance_of_0_does_not_hear_the_source_through_the_coarse_mean(pipeline: SVDRRPipeline) -> None:
    """As without a coarse branch; 1e-4 of 8 is rounding, the predictions being sums of two."""
    ones = [sampled(pipeline, image, guidance_scale=0.0) for image in (an_image(), an_image().flip(2))]
    assert torch.allclose(*ones, atol=1e-4)


def test_a_start_of_1_is_noise_alone_and_less_is_the_coarse_mean_under_noise(pipeline: SVDRRPipeline) -> None:
    """As the transformer hears them first; 1e-6 is rounding."""
    heard: list[Tensor] = []
    pipeline.transformer.register_forward_pre_hook(lambda _, arguments: heard.append(arguments[0]))
    reference = sampled(pipeline)
    sigmas = pipeline.scheduler.sigmas
    assert torch.equal(sampled(pipeline, start=1.0), reference)
    assert torch.equal(pipeline.scheduler.sigmas, sigmas)
    noise = heard[0]

    source, target = in_single(views([(0.0, 0.0)] * 2)), in_single(views(TARGETS_DEG[1:3]))
    with torch.no_grad():
        coarse = pipeline.coarse(autoencoder.encode(pipeline.vae, an_image()).expand(2, -1, -1, -1), source, target)
    for start in (0.5, 0.01):
        heard.clear()
        sampled(pipeline, start=start)
        assert len(heard) == 3
        assert torch.allclose(heard[0], (1 - start) * coarse + start * noise, atol=1e-6)
        assert pipeline.scheduler.sigmas[0].item() == pytest.approx(start, abs=1e-6)


def test_survives_saving_bit_for_bit(pipeline: SVDRRPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    again = SVDRRPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.coarse.config.kind == "lift"
    assert torch.equal(sampled(pipeline, start=0.7), sampled(again, start=0.7))


def test_what_cannot_be_is_refused(pipeline: SVDRRPipeline) -> None:
    with pytest.raises(InputError, match="no coarse branch 'mean': its kind is one of regression, lift"):
        CoarseMean("mean")
    with pytest.raises(InputError, match="cells=6: give a multiple of 4"):
        CoarseMean("lift", cells=6)
    for start in (0.0, 1.5):
        with pytest.raises(InputError, match="above 0 and up to 1"):
            sampled(pipeline, start=start)
    with pytest.raises(InputError, match="wants a coarse mean: give"):
        SVDRRPipeline(pipeline.vae, pipeline.transformer, pipeline.scheduler)
    plain = ViewTransformer(latent_channels=2, num_layers=1, num_heads=2, head_dim=8)
    with pytest.raises(InputError, match="wants no coarse mean: leave"):
        SVDRRPipeline(pipeline.vae, plain, pipeline.scheduler, coarse=pipeline.coarse)
    with pytest.raises(InputError, match="this model has none"):
        sampled(SVDRRPipeline(pipeline.vae, plain, pipeline.scheduler), start=0.5)


@pytest.fixture
def with_branch(tiny: TrainConfig) -> TrainConfig:
    """One step of the autoencoder, two of the coarse branch, and one of each stage; no stops at latents."""
    coarse = CoarseConfig("lift", cells=4, width=8, volume_channels=4, steps=2, batch=2, learning_rate=1e-3)
    stages = tuple(replace(stage, steps=1) for stage in tiny.stages)
    return replace(tiny, coarse=coarse, vae=replace(tiny.vae, steps=1), stages=stages, cache_latents=False)


def test_stopped_at_every_step_it_ends_in_the_same_weights(
    with_branch: TrainConfig, shards: Path, tmp_path: Path
) -> None:
    unbroken, run, stops = train(with_branch, shards, tmp_path / "unbroken"), tmp_path / "run", 0
    kept = []
    while not (run / "model").is_dir():
        train(with_branch, shards, run, max_minutes=0)
        stops += 1
        kept += [path.read_bytes() for path in run.glob("coarse/*.safetensors")]
    assert stops > 1 + 2 + 1
    assert len(kept) > 1
    assert set(kept) == {kept[0]}  # the transformer's training leaves it as it was
    for part in ("vae", "coarse", "transformer"):
        name = f"model/{part}/diffusion_pytorch_model.safetensors"
        ours, theirs = load_file(unbroken / name), load_file(run / name)
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert (unbroken / "coarse/config.json").exists()
    lines = [json.loads(line) for line in (unbroken / "log.jsonl").read_text().splitlines()]
    assert next(line["stage"] for line in lines if any("validation_loss" in name for name in line)) == "coarse"
    assert TrainConfig.from_json(json.loads((run / "config.json").read_text())["config"]) == with_branch


def test_no_gradient_of_the_transformer_arrives_in_the_coarse_branch(pipeline: SVDRRPipeline, shards: Path) -> None:
    opened = open_folder(shards)

    def read(shard: np.ndarray, view: np.ndarray) -> Latents:
        return Latents(torch.ones(len(shard), 2, CELLS, CELLS), torch.zeros(len(shard), CELLS, CELLS))

    pipeline.coarse.requires_grad_(True)
    batch = given_coarse(pipeline.coarse, a_batch(opened, read, 2, 0))
    assert batch.condition["coarse_latent"].std() > 0
    draws = draw_noise(2, batch.target_latent.shape[1:], 0.0, seed=0)
    pair_losses(pipeline.transformer, batch, draws, "velocity", 1.0).sum().backward()
    assert [parameter.grad for parameter in pipeline.coarse.parameters() if parameter.grad is not None] == []
    assert pipeline.transformer.patch_condition.weight.grad.abs().max() > 0


def test_a_kind_that_there_is_none_of_costs_no_training(with_branch: TrainConfig, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no coarse branch 'none'"):
        train(replace(with_branch, coarse=replace(with_branch.coarse, kind="none")), shards, tmp_path / "run")
    assert not (tmp_path / "run/checkpoints").exists()
