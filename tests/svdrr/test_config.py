"""Configurations go to JSON and back, and refuse what they do not know."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from svdrr.config import TrainConfig, read_config
from svdrr.errors import InputError
from svdrr.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_json(name: str) -> None:
    config = preset(name, seed=7)
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert (config.preset, config.seed) == (name, 7)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_goes_from_weak_to_strong_in_whole_patches(name: str) -> None:
    config = preset(name, seed=0)
    sizes = [stage.size for stage in config.stages]
    assert len(sizes) >= 2
    assert sizes == sorted(set(sizes))
    factor = 2 ** (len(config.vae.block_channels) - 1) * config.model.patch_size
    assert all(size % factor == 0 for size in sizes)
    assert config.model.num_heads * config.model.head_dim % 4 == 0  # sines and cosines of rows and columns


def test_refuses_unknown_and_missing_keys(tiny: TrainConfig) -> None:
    values = tiny.to_json()
    values["stages"][1]["colour"] = "blue"
    with pytest.raises(InputError, match=r"config.stages\[1\]: unknown colour"):
        TrainConfig.from_json(values)
    values = tiny.to_json()
    del values["vae"]["crop"]
    with pytest.raises(InputError, match=r"config.vae: missing crop"):
        TrainConfig.from_json(values)


def test_a_file_of_settings_is_read_or_what_is_wrong_is_said(tiny: TrainConfig, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(tiny.to_json()))
    assert read_config(path) == tiny
    for part, value, words in [
        ("seed", "zero", "mine.json.seed is 'zero', not int"),
        ("stages", 3, "mine.json.stages is 3, not a list"),
        ("vae", None, "mine.json.vae is None, not a table"),
        ("pa_fraction", True, "mine.json.pa_fraction is True, not float"),
        ("init", 3, "mine.json.init is 3, not str"),
        ("log_every", 0, "mine.json.log_every is 0, and at least 1"),
        ("vae", tiny.to_json()["vae"] | {"batch": -2}, "mine.json.vae.batch is -2, and at least 1"),
        ("stages", [], "mine.json.stages has 0 values: at least 1"),
        ("betas", [0.9], "mine.json.betas has 1 values: 2 wanted"),
        ("betas", [0.9, 1.5], r"mine.json.betas\[1\] is 1.5, and at least 0 and less than 1 is wanted"),
        ("pa_fraction", 1.5, "mine.json.pa_fraction is 1.5, and 0 to 1 is wanted"),
        ("ema_decay", -0.1, "mine.json.ema_decay is -0.1, and 0 to 1"),
        ("weight_decay", float("nan"), "mine.json.weight_decay is nan, and at least 0"),
        ("guidance_scale", float("inf"), "mine.json.guidance_scale is inf, and at least 0"),
        ("clip_norm", 0, "mine.json.clip_norm is 0, and more than 0"),
        ("vae", tiny.to_json()["vae"] | {"learning_rate": -1.0}, "mine.json.vae.learning_rate is -1.0, and at least 0"),
        ("preset", "../../home", "mine.json.preset is '../../home', and a name that a folder can have"),
    ]:
        path.write_text(json.dumps(tiny.to_json() | {part: value}))
        with pytest.raises(InputError, match=words):
            read_config(path)
    for text in ("", "[]"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"mine\.json"):
            read_config(path)
    with pytest.raises(InputError, match="nowhere"):
        read_config(tmp_path / "nowhere")


def test_is_frozen_and_comparable(tiny: TrainConfig) -> None:
    assert replace(tiny, seed=1) != tiny
    with pytest.raises(AttributeError):
        tiny.seed = 1  # type: ignore[misc]


def test_an_unknown_preset_is_refused_with_the_choices() -> None:
    with pytest.raises(InputError, match="no preset 'huge': --preset is one of toy"):
        preset("huge", seed=0)
