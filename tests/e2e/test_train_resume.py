"""`svdrr train`, killed without warning and started again by the same command, ends in the same weights."""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.svdrr.shards_for_tests import write_folder

from svdrr import cli, presets
from svdrr.config import TrainConfig
from svdrr.train import train

FATAL_STEPS = [("vae", 8), ("16px", 17), ("32px", 10)]


@pytest.fixture
def toy() -> TrainConfig:
    """The real preset, with a smaller model on smaller images for fewer steps."""
    config = presets.toy()
    return replace(
        config,
        vae=replace(config.vae, block_channels=(4, 8), crop=16, steps=20, batch=2),
        model=replace(config.model, patch_size=2, num_layers=2, num_heads=2, head_dim=8),
        stages=tuple(replace(config.stages[0], size=size, steps=20, batch=2) for size in (16, 32)),
        log_every=1,
        checkpoint_every=3,
    )


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Here, as in the processes started: threads that wait for one another, beside other processes, are slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# a process of its own for every command, but what `svdrr train` imports is imported once for all of them
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["svdrr.train"])


def start(home: Path, toy: TrainConfig) -> BaseProcess:
    process = SERVER.Process(target=as_typed, args=(home, toy))
    process.start()
    return process


def as_typed(home: Path, toy: TrainConfig) -> None:
    os.chdir(home)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    presets.PRESETS["toy"] = lambda seed: toy
    sys.argv = ["svdrr", "train", "--shards", "shards", "--preset", "toy", "--out", "broken"]
    cli.main()


def steps(run: Path) -> Iterator[tuple[str, int]]:
    """Every step in the log so far; a last line without its end is still being written."""
    text = (run / "log.jsonl").read_text() if (run / "log.jsonl").exists() else ""
    for line in text.splitlines(keepends=True):
        if line.endswith("\n") and "loss" in (values := json.loads(line)):
            yield values["stage"], values["step"]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_killed_in_every_stage_it_ends_in_the_same_weights(toy: TrainConfig, tmp_path: Path) -> None:
    write_folder(tmp_path / "shards")
    unbroken, broken = train(toy, tmp_path / "shards", tmp_path / "unbroken"), tmp_path / "broken"

    for fatal in FATAL_STEPS:
        process = start(tmp_path, toy)
        while fatal not in steps(broken):
            assert process.is_alive(), f"ended before {fatal}"
            time.sleep(0.005)
        process.kill()
        process.join()
    assert not (broken / "model").exists()
    last = start(tmp_path, toy)
    last.join()
    assert last.exitcode == 0

    done = list(steps(broken))
    assert len(done) > len(set(done)), "no step was lost by any kill: the test proves nothing"
    assert set(done) == set(steps(unbroken))
    for part in ("vae", "transformer"):
        weights = f"model/{part}/diffusion_pytorch_model.safetensors"
        ours, theirs = load_file(broken / weights), load_file(unbroken / weights)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
