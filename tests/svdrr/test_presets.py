"""What the presets say of themselves is what they are, counted on the meta device."""

import re
from pathlib import Path

import pytest
import torch

from svdrr.pipeline import STEPS
from svdrr.presets import PRESETS, preset
from svdrr.start import untrained

TRAINING = Path(__file__).parents[2] / "docs/training.md"


def millions(name: str) -> float:
    with torch.device("meta"):
        transformer = untrained(preset(name, seed=0))
    return sum(parameter.numel() for parameter in transformer.parameters()) / 1e6


@pytest.mark.parametrize("name", PRESETS)
def test_the_documents_know_its_size(name: str) -> None:
    (told,) = re.findall(rf"^\| `{name}` \| \d+ x \d+ \| ([\d.]+) M ", TRAINING.read_text(), re.MULTILINE)
    assert float(told) == pytest.approx(millions(name), abs=0.05)


@pytest.mark.parametrize("name", ["small", "base", "svdrr-xl"])
def test_its_docstring_knows_its_size_and_that_nothing_was_measured(name: str) -> None:
    text = PRESETS[name].__doc__
    assert f"{millions(name):.1f}" in text
    assert "Hours: not measured" in text
    assert "Score: not measured" in text


def test_the_papers_recipe() -> None:
    """Learning rates, batches and steps of its three stages; the optimizer; what is dropped; how it is sampled."""
    config = preset("svdrr-xl", 0)
    stages = [(stage.size, stage.learning_rate, stage.batch, stage.steps) for stage in config.stages]
    assert stages == [(256, 5e-6, 64, 200_000), (512, 3e-6, 32, 100_000), (1024, 1e-6, 8, 100_000)]
    assert (config.betas, config.weight_decay, config.clip_norm, config.token_rate) == ((0.9, 0.999), 0.01, 1, 10)
    assert (config.warmup_steps, config.decay, config.ema_decay) == (1000, False, 0)
    assert (config.drop_source, config.drop_stream, config.model.learned_null) == (0.05, 0.05, False)
    assert (config.model.prediction, config.model.learned_variance, config.pa_fraction) == ("epsilon", True, 1)
    assert (STEPS["epsilon"], config.guidance_scale) == (20, 3)
    assert (config.vae.default, config.vae.measured) == ("stabilityai/sdxl-vae", False)
    assert config.image_encoder == "openai/clip-vit-large-patch14"


@pytest.mark.parametrize("name", ["small", "base", "svdrr-xl"])
def test_large_presets_see_an_eighth_of_the_pixels_per_side(name: str) -> None:
    config = preset(name, seed=0)
    assert len(config.vae.block_channels) == 4  # each block but the last halves the side
    assert [stage.size for stage in config.stages][:2] == [256, 512]
