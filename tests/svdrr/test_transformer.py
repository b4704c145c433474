"""Real tiny transformers: silent at the start, and every condition is heard once the weights are not at zero."""

import copy

import pytest
import torch
from torch import Tensor

from svdrr.pose import POSE_FEATURES, Views
from svdrr.transformer import ViewTransformer, condition, position_code

CHANNELS = 2


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    return random_inputs(8)


def random_inputs(cells: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "hidden_states": (3, CHANNELS, cells, cells),
        "source_latent": (3, CHANNELS, cells, cells),
        "source_rays": (3, 6, cells, cells),
        "target_rays": (3, 6, cells, cells),
        "pose": (3, POSE_FEATURES),
    }
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return values | {"timestep": torch.tensor([1000.0, 500.0, 100.0])}


@pytest.fixture
def fresh() -> ViewTransformer:
    torch.manual_seed(0)
    return ViewTransformer(latent_channels=CHANNELS, patch_size=2, num_layers=2, num_heads=2, head_dim=8)


@pytest.fixture
def awake(fresh: ViewTransformer) -> ViewTransformer:
    """The same, with every weight moved, as training would."""
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return fresh


def test_starts_at_the_best_linear_guess(fresh: ViewTransformer, inputs: dict[str, Tensor]) -> None:
    """Untrained, it gives the velocity that least squares gives for unit-variance data: x, 0, and almost -x."""
    velocity = fresh(**inputs)
    slope = torch.tensor([1.0, 0.0, -0.8 / 0.82])[:, None, None, None]
    assert torch.allclose(velocity, slope * inputs["hidden_states"], atol=1e-6)


@pytest.mark.parametrize("name", ["hidden_states", "timestep", "source_latent", "source_rays", "target_rays", "pose"])
def test_every_input_is_heard(awake: ViewTransformer, inputs: dict[str, Tensor], name: str) -> None:
    reference = awake(**inputs)
    other = inputs | {name: inputs[name].flip(0)}
    moved = (awake(**other) - reference).flatten(1).abs().amax(dim=1)
    assert moved[0] > 1e-3
    assert moved[2] > 1e-3
    assert moved[1] < 1e-5  # the middle sample is its own mirror: samples do not see one another


def test_both_streams_carry_the_source(awake: ViewTransformer, inputs: dict[str, Tensor]) -> None:
    """With one stream cut, the source is still heard through the other."""
    other = inputs | {"source_latent": inputs["source_latent"].flip(0)}
    for cut in ("patch_condition", "source_stem"):
        model = copy.deepcopy(awake)
        with torch.no_grad():
            for parameter in getattr(model, cut).parameters():
                parameter.zero_()
        assert (model(**other) - model(**inputs)).abs().max() > 1e-3


def test_many_source_tokens_say_more_than_one(awake: ViewTransformer, inputs: dict[str, Tensor]) -> None:
    """Cross-attention differs from one target token to the next; with a single key it could not."""
    block, width = awake.blocks[0], 16
    tokens, context = torch.randn(2, 1, 5, width, generator=torch.Generator().manual_seed(0))
    assert block.cross_attention(tokens, context).std(dim=1).max() > 1e-3
    assert block.cross_attention(tokens, context[:, :1]).std(dim=1).max() < 1e-6


def test_a_dropped_source_is_not_heard_but_its_pose_is(awake: ViewTransformer, inputs: dict[str, Tensor]) -> None:
    drop = torch.tensor([True, False, True])
    reference = awake(**inputs, drop_source=drop)
    kept = awake(**inputs)
    assert torch.allclose(reference[1], kept[1], atol=1e-5)
    assert (reference[0] - kept[0]).abs().max() > 1e-3
    other_source = inputs | {"source_latent": inputs["source_latent"].flip(0)}
    assert torch.allclose(awake(**other_source, drop_source=drop)[0], reference[0], atol=1e-5)
    other_pose = inputs | {"pose": inputs["pose"].flip(0)}
    assert (awake(**other_pose, drop_source=drop)[0] - reference[0]).abs().max() > 1e-3


def test_the_null_condition_is_learned(awake: ViewTransformer, inputs: dict[str, Tensor]) -> None:
    awake(**inputs, drop_source=torch.tensor([True, False, False])).square().sum().backward()
    assert awake.null_token.grad.abs().max() > 0
    assert awake.null_latent.grad.abs().max() > 0


def test_the_same_weights_work_at_two_resolutions(awake: ViewTransformer) -> None:
    for cells in (8, 16):
        assert awake(**random_inputs(cells)).shape == (3, CHANNELS, cells, cells)


def test_positions_are_places_in_the_image() -> None:
    """The code of a coarse token lies between those of the four finer tokens in its place, whatever the resolution."""
    fine, coarse = position_code(8, 8, 32, torch.device("cpu")), position_code(4, 4, 32, torch.device("cpu"))
    quads = fine.view(4, 2, 4, 2, 32).mean(dim=(1, 3)).view(16, 32)
    slow = [index for index in range(32) if index % 8 >= 4]  # wavelengths well above a token
    assert (quads - coarse)[:, slow].abs().max() < 0.1
    assert (coarse[0] - coarse[1])[slow].abs().max() > 0.1


def test_condition_is_what_forward_takes(awake: ViewTransformer) -> None:
    views = Views(*(torch.full((3,), value) for value in (30.0, 10.0, 1800.0, 1640.0, 432.0)))
    told = condition(torch.zeros(3, CHANNELS, 8, 8), views, views, size=32)
    assert awake(torch.zeros(3, CHANNELS, 8, 8), torch.ones(3), **told).isfinite().all()
