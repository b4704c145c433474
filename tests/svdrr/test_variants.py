"""Every switch of the model changes what it says and nothing else, and every variant trains, samples and is saved."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from svdrr import vae as autoencoder
from svdrr.config import ModelConfig, TrainConfig
from svdrr.data import Batch, draw_noise
from svdrr.errors import InputError
from svdrr.pipeline import STEPS, SVDRRPipeline, scheduler
from svdrr.pose import Views
from svdrr.presets import svdrr_xl
from svdrr.start import untrained
from svdrr.tasks import pair_losses
from svdrr.train import unscale_source
from svdrr.transformer import ViewTransformer, condition

CHANNELS, SIZE, CELLS = 2, 16, 8
SHAPE = {"patch_size": 2, "num_layers": 2, "num_heads": 2, "head_dim": 8}
SMALL_PAPER = replace(svdrr_xl().model, **SHAPE, image_embedding=5)
VARIANTS = {
    "ours": ModelConfig(**SHAPE),
    "epsilon": ModelConfig(**SHAPE, prediction="epsilon"),
    "not preconditioned": ModelConfig(**SHAPE, preconditioned=False),
    "learned variance": ModelConfig(**SHAPE, prediction="epsilon", learned_variance=True),
    "unscaled source": ModelConfig(**SHAPE, scaled_source=False),
    "pooled": ModelConfig(**SHAPE, pooled_source=True),
    "pooled outside": ModelConfig(**SHAPE, pooled_source=True, image_embedding=5),
    "no rays": ModelConfig(**SHAPE, ray_maps=False),
    "relative": ModelConfig(**SHAPE, absolute_pose=False),
    "no pose modulation": ModelConfig(**SHAPE, pose_modulation=False),
    "no qk norm": ModelConfig(**SHAPE, qk_norm=False),
    "no cross norm": ModelConfig(**SHAPE, cross_norm=False),
    "null of zeros": ModelConfig(**SHAPE, learned_null=False),
    "PixArt's positions": ModelConfig(**SHAPE, pixart_positions=True, norm_eps=1e-6),
    "the paper": SMALL_PAPER,
}
# of the parameters, those that another variant has not, or in another shape
CHANGED = {
    "learned variance": {"final.weight", "final.bias"},
    "pooled": {"pose_token", "pooled_token"},
    "pooled outside": {"pose_token", "pooled_token", "source_stem", "source_norm", "null_token"},
    "no rays": {"patch_condition", "source_stem"},
    "relative": {"pose_token", "pose_embedding"},
    "no pose modulation": {"pose_embedding"},
    "no qk norm": {"query_norm", "key_norm"},
    "no cross norm": {"cross_norm"},
    "null of zeros": {"null_token", "null_latent"},
}
CHANGED["the paper"] = set().union(*CHANGED.values())


def the_vae() -> autoencoder.AutoencoderKL:
    torch.manual_seed(0)
    vae = autoencoder.build(CHANNELS, (4, 8), 1)
    vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    return vae


def awake(config: TrainConfig, model: ModelConfig) -> ViewTransformer:
    """The variant with every weight moved, as training would."""
    transformer = untrained(replace(config, model=model))
    if not model.scaled_source:
        unscale_source(transformer, the_vae())
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return transformer


def some_views(azimuths_deg: list[float], elevations_deg: list[float]) -> Views:
    lengths_mm = (torch.full((len(azimuths_deg),), value) for value in (1800.0, 1640.0, 432.0))
    return Views(torch.tensor(azimuths_deg), torch.tensor(elevations_deg), *lengths_mm)


def told(model: ModelConfig, turn_deg: float = 0.0) -> dict[str, Tensor]:
    """The condition of three pairs of views, all turned by an angle."""
    generator = torch.Generator().manual_seed(0)
    source_latent = torch.randn(3, CHANNELS, CELLS, CELLS, generator=generator)
    turn = torch.full((3,), turn_deg)
    source = some_views([0.0, 40.0, -80.0], [0.0, 10.0, 0.0]).turned(turn)
    target = some_views([90.0, 5.0, -60.0], [0.0, -20.0, 30.0]).turned(turn)
    values = condition(source_latent, source, target, SIZE, model.absolute_pose)
    if model.image_embedding:
        values["image_embedding"] = torch.randn(3, model.image_embedding, generator=generator)
    return values


def predicted(transformer: ViewTransformer, values: dict[str, Tensor], **more: Tensor) -> Tensor:
    noisy = torch.randn(3, CHANNELS, CELLS, CELLS, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return transformer(noisy, torch.tensor([900, 500, 100]), **values, **more)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> ModelConfig:
    return VARIANTS[request.param]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_switch_changes_the_parameters_that_it_names(tiny: TrainConfig, name: str) -> None:
    def shapes(variant: ModelConfig) -> dict[str, torch.Size]:
        state = untrained(replace(tiny, model=variant)).state_dict()
        return {name: tensor.shape for name, tensor in state.items()}

    ours, others, expected = shapes(VARIANTS["ours"]), shapes(VARIANTS[name]), CHANGED.get(name, set())
    differing = [key for key in ours.keys() | others.keys() if ours.get(key) != others.get(key)]
    assert {part for part in expected for key in differing if part in key} == expected
    assert [key for key in differing if not any(part in key for part in expected)] == []


def test_trains_a_step_in_which_every_parameter_has_its_part(tiny: TrainConfig, variant: ModelConfig) -> None:
    transformer = awake(tiny, variant)
    latents = torch.randn(3, CHANNELS, CELLS, CELLS, generator=torch.Generator().manual_seed(3))
    views = some_views([0.0] * 3, [0.0] * 3)  # which only a coarse branch asks for
    batch = Batch(latents, told(variant), torch.zeros(3, CELLS, CELLS), views, views)
    drop = torch.tensor([[True, True], [False, True], [False, False]])
    draws = draw_noise(3, latents.shape[1:], 0.0, seed=4)._replace(drop=drop)

    def loss() -> Tensor:
        return pair_losses(transformer, batch, draws, variant.prediction, 1.0).mean()

    before = loss()
    before.backward()
    assert [name for name, parameter in transformer.named_parameters() if parameter.grad is None] == []
    torch.optim.SGD(transformer.parameters(), lr=1e-5).step()
    assert loss() < before


def test_samples_and_survives_saving_bit_for_bit(tiny: TrainConfig, variant: ModelConfig, tmp_path: Path) -> None:
    transformer = awake(tiny, variant)
    transformer.save_pretrained(tmp_path)
    source = 8 * torch.rand(1, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    embedding = torch.ones(1, variant.image_embedding) if variant.image_embedding else None
    settings = {"guidance_scale": 2.0, "image_embedding": embedding, "num_inference_steps": 3}
    views = []
    for one in (transformer, ViewTransformer.from_pretrained(tmp_path)):
        pipeline = SVDRRPipeline(the_vae(), one, scheduler(one.config.prediction, 2.0), size=SIZE)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        targets_deg = [(30.0, 10.0), (-60.0, 0.0)]
        views.append(pipeline(source, (0.0, 0.0), targets_deg, generator=generator, **settings).line_integrals)
    assert views[0].isfinite().all()
    assert torch.equal(*views)


def test_a_pipeline_of_another_scheduler_survives_saving_too(tiny: TrainConfig, tmp_path: Path) -> None:
    transformer = awake(tiny, VARIANTS["the paper"])
    SVDRRPipeline(the_vae(), transformer, scheduler("epsilon", 1.0), size=SIZE).save_pretrained(tmp_path)
    again = SVDRRPipeline.from_pretrained(tmp_path)
    assert isinstance(again.scheduler, DPMSolverMultistepScheduler)
    assert again.scheduler.config.beta_end == 0.02
    assert again.transformer.config.image_embedding == 5


def test_a_dropped_source_is_not_heard_but_its_pose_is(tiny: TrainConfig, variant: ModelConfig) -> None:
    transformer, values = awake(tiny, variant), told(variant)
    drop = torch.ones(3, dtype=torch.bool)
    reference = predicted(transformer, values, drop_source=drop)
    source = {name: values[name].flip(0) for name in ("source_latent", "image_embedding") if name in values}
    assert torch.equal(predicted(transformer, values | source, drop_source=drop), reference)
    assert (predicted(transformer, values | source) - predicted(transformer, values)).abs().max() > 1e-3
    other_pose = values | {"pose": values["pose"].flip(0)}
    assert (predicted(transformer, other_pose, drop_source=drop) - reference).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["ours", "null of zeros", "pooled outside", "the paper"])
def test_each_stream_can_be_dropped_alone(tiny: TrainConfig, name: str) -> None:
    """The first sample loses its tokens, the second its latent, the third both. Zeros are what a null of zeros is."""
    transformer, values = awake(tiny, VARIANTS[name]), told(VARIANTS[name])
    drop = torch.tensor([[True, False], [False, True], [True, True]])
    found = predicted(transformer, values, drop_source=drop)
    kept, both = predicted(transformer, values), predicted(transformer, values, drop_source=torch.ones(3).bool())
    for row in (0, 1):
        assert (found[row] - kept[row]).abs().max() > 1e-4
        assert (found[row] - both[row]).abs().max() > 1e-4
    assert torch.equal(found[2], both[2])
    if name == "the paper":
        shift, scale = transformer.config.source_shift, transformer.config.source_scale
        zeros = {name: torch.zeros_like(values[name]) for name in ("image_embedding", "source_latent")}
        zeros["source_latent"] -= shift / scale  # which the model takes to zero
        assert torch.allclose(predicted(transformer, values | zeros), both, atol=1e-6)


@pytest.mark.parametrize("name", ["ours", "pooled", "pooled outside"])
def test_a_pooled_source_says_the_same_to_every_token(tiny: TrainConfig, name: str) -> None:
    transformer = awake(tiny, VARIANTS[name])
    said: list[Tensor] = []
    transformer.blocks[0].cross_attention.register_forward_hook(lambda *call: said.append(call[-1]))
    predicted(transformer, told(VARIANTS[name]))
    spread = (said[0] - said[0][:, :1]).abs().max()
    assert spread < 1e-6 if VARIANTS[name].pooled_source else spread > 1e-3


@pytest.mark.parametrize("name", ["ours", "no rays"])
def test_without_ray_maps_rays_are_not_heard(tiny: TrainConfig, name: str) -> None:
    transformer, values = awake(tiny, VARIANTS[name]), told(VARIANTS[name])
    others = {rays: values[rays].flip(0) for rays in ("source_rays", "target_rays")}
    same = torch.equal(predicted(transformer, values), predicted(transformer, values | others))
    assert same == (not VARIANTS[name].ray_maps)


@pytest.mark.parametrize("name", ["ours", "relative"])
def test_a_relative_pose_does_not_know_how_both_views_are_turned(tiny: TrainConfig, name: str) -> None:
    """By 50 degrees, whose sums with the other angles are exact; 1e-5 is rounding."""
    transformer = awake(tiny, VARIANTS[name])
    moved = predicted(transformer, told(VARIANTS[name], turn_deg=50.0)) - predicted(transformer, told(VARIANTS[name]))
    assert moved.abs().max() > 1e-3 if VARIANTS[name].absolute_pose else moved.abs().max() < 1e-5


@pytest.mark.parametrize("name", ["ours", "unscaled source"])
def test_an_unscaled_source_is_what_the_autoencoder_made(tiny: TrainConfig, name: str) -> None:
    """The model hears of the source what enters `patch_condition`: one pixel of a patch is one number there."""
    vae, transformer = the_vae(), awake(tiny, VARIANTS[name])
    heard: list[Tensor] = []
    transformer.patch_condition.register_forward_hook(lambda *call: heard.append(call[1][0]))
    image = 8 * torch.rand(3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        normalised = autoencoder.encode(vae, image)
        made = vae.encode(image / autoencoder.HALF_RANGE - 1).latent_dist.mean
    predicted(transformer, told(VARIANTS[name]) | {"source_latent": normalised})
    expected = normalised if VARIANTS[name].scaled_source else made
    patches = torch.nn.functional.pixel_unshuffle(expected, 2).flatten(2).mT
    assert torch.allclose(heard[0][..., : patches.shape[-1]], patches, atol=1e-5)


def test_what_is_not_preconditioned_is_silent_at_the_start(tiny: TrainConfig) -> None:
    """With preconditioning it starts at the linear guess: see test_transformer.py."""
    transformer = untrained(replace(tiny, model=VARIANTS["not preconditioned"]))
    assert torch.equal(predicted(transformer, told(VARIANTS["ours"])), torch.zeros(3, CHANNELS, CELLS, CELLS))


@pytest.mark.parametrize("name", ["epsilon", "learned variance"])
def test_a_learned_variance_is_as_many_channels_again(tiny: TrainConfig, name: str) -> None:
    model = VARIANTS[name]
    output = predicted(awake(tiny, model), told(model))
    assert output.shape == (3, CHANNELS * (1 + model.learned_variance), CELLS, CELLS)


def test_the_variance_is_learned_beside_the_noise_and_does_not_teach_it() -> None:
    """The gradient of the first channels is that of the squared error alone; the others have one of their own."""
    latents = torch.randn(3, CHANNELS, CELLS, CELLS, generator=torch.Generator().manual_seed(3))
    views = some_views([0.0] * 3, [0.0] * 3)
    batch = Batch(latents, {}, torch.zeros(3, CELLS, CELLS), views, views)
    draws = draw_noise(3, latents.shape[1:], 0.0, seed=4)
    gradients = []
    for channels in (CHANNELS, 2 * CHANNELS):
        output = torch.full((3, channels, CELLS, CELLS), 0.5, requires_grad=True)
        pair_losses(lambda *_, output=output, **__: output, batch, draws, "epsilon", 1.0).sum().backward()
        gradients.append(output.grad)
    assert torch.equal(gradients[0], gradients[1][:, :CHANNELS])
    assert gradients[1][:, CHANNELS:].abs().min() > 0


def test_each_prediction_has_its_scheduler() -> None:
    assert isinstance(scheduler("velocity", 2.0), FlowMatchEulerDiscreteScheduler)
    diffusion = scheduler("epsilon", 2.0)
    assert isinstance(diffusion, DPMSolverMultistepScheduler)
    assert diffusion.config.prediction_type == "epsilon"
    assert STEPS.keys() == {"velocity", "epsilon"}


def test_what_cannot_be_is_refused(tiny: TrainConfig) -> None:
    with pytest.raises(InputError, match="no prediction 'x0': it is one of velocity, epsilon"):
        ViewTransformer(prediction="x0")
    with pytest.raises(InputError, match="learned_variance is a diffusion's, and this model predicts the velocity"):
        ViewTransformer(learned_variance=True)
    with pytest.raises(InputError, match="needs pooled_source"):
        ViewTransformer(image_embedding=5)
    values = told(VARIANTS["the paper"])
    del values["image_embedding"]
    with pytest.raises(InputError, match=r"needs an image_embedding \[B, 5\]"):
        predicted(awake(tiny, VARIANTS["the paper"]), values)
