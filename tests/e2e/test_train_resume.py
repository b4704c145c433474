"""`svdrr train`, killed without warning and started again by the same command, ends in the same weights."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.svdrr.shards_for_tests import write_folder

# the command as installed, but for the lengths of the preset's stages: a minute's work instead of a laptop's coffee break
SVDRR = """
from dataclasses import replace
from svdrr import cli, presets

def brief(seed, toy=presets.toy):
    config = toy(seed)
    return replace(
        config,
        vae=replace(config.vae, block_channels=(4, 8), crop=16, steps=20, batch=2),
        model=replace(config.model, num_layers=2, num_heads=2, head_dim=8),
        stages=tuple(replace(config.stages[0], size=size, steps=20, batch=2) for size in (16, 32)),
        log_every=1,
        checkpoint_every=3,
    )

presets.PRESETS["toy"] = brief
cli.main()
"""
FATAL_STEPS = [("vae", 8), ("16px", 4), ("16px", 17), ("32px", 10)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    write_folder(home / "shards")
    return home


def start(home: Path, out: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", SVDRR, "train", "--preset", "toy", "--out", out]
    return subprocess.Popen(command, cwd=home, stderr=subprocess.DEVNULL)


def steps(run: Path) -> Iterator[tuple[str, int]]:
    """Every step in the log so far; a last line without its end is still being written."""
    text = (run / "log.jsonl").read_text() if (run / "log.jsonl").exists() else ""
    for line in text.splitlines(keepends=True):
        if line.endswith("\n") and "loss" in (values := json.loads(line)):
            yield values["stage"], values["step"]


@pytest.mark.slow
def test_killed_in_every_stage_it_ends_in_the_same_weights(home: Path) -> None:
    assert start(home, "unbroken").wait() == 0
    for fatal in FATAL_STEPS:
        process = start(home, "broken")
        while fatal not in steps(home / "broken"):
            assert process.poll() is None, f"ended before {fatal}"
            time.sleep(0.005)
        process.kill()
        process.wait()
    assert not (home / "broken/model").exists()
    assert start(home, "broken").wait() == 0

    done = list(steps(home / "broken"))
    assert len(done) > len(set(done)), "no step was lost by any kill: the test proves nothing"
    assert set(done) == set(steps(home / "unbroken"))
    for part in ("vae", "transformer"):
        weights = f"model/{part}/diffusion_pytorch_model.safetensors"
        broken, unbroken = load_file(home / "broken" / weights), load_file(home / "unbroken" / weights)
        assert broken.keys() == unbroken.keys()
        assert [name for name in broken if not torch.equal(broken[name], unbroken[name])] == []
