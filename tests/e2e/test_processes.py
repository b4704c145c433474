"""`svdrr train` in two processes is `svdrr train` in one, but for the order in which gradients are summed."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from tests.e2e.test_train_resume import one_thread, steps, toy  # noqa: F401 - fixtures
from tests.svdrr.shards_for_tests import write_folder

from svdrr.config import TrainConfig
from svdrr.data import training_shards
from svdrr.shards import open_folder
from svdrr.train import train

# the command as installed, but for the preset, which the test makes short
SVDRR = """
import json
from pathlib import Path
from svdrr import cli, config, presets
presets.PRESETS["toy"] = lambda seed: config.TrainConfig.from_json(json.loads(Path("toy.json").read_text()))
cli.main()
"""
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
RELATIVE = 1e-4
"""Of a loss. Sums of two halves round at 1e-7, of which Adam, dividing gradients by their size, makes more where these
are small: 1.3e-6 was seen. A wrong weight of a process's gradients changes the second loss by 1e-2."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("home") / "shards").parent


def launch(home: Path, config: TrainConfig, out: str) -> subprocess.Popen[str]:
    (home / f"{out}.json").write_text(json.dumps(config.to_json()))
    (home / "svdrr_of_this_test.py").write_text(SVDRR.replace("toy.json", f"{out}.json"))
    group = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*group, "svdrr_of_this_test.py", "train", "--preset", "toy", "--out", out]
    return subprocess.Popen(command, cwd=home, stderr=subprocess.PIPE, text=True, env=ONE_THREAD)


def values(run: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    found = {(line["stage"], line["step"]): line[name] for line in lines if name in line}
    return list(found.values())


def assert_close(one: Path, other: Path) -> None:
    for name in ("loss", "gradient_norm", "validation_loss"):
        assert values(one, name) == pytest.approx(values(other, name), rel=RELATIVE), name
    ours, theirs = (load_file(run / "model/transformer/diffusion_pytorch_model.safetensors") for run in (one, other))
    for name, tensor in ours.items():
        # a weight whose gradient is all rounding may go either way, by a step's learning rate of 6e-3 at most
        assert (tensor - theirs[name]).abs().mean() < 1e-4, name


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_processes_are_one(toy: TrainConfig, home: Path) -> None:  # noqa: F811
    """Each has all weights, the first step being one's; and half of them, and is stopped and gone on with by one."""
    toy = replace(toy, vae=replace(toy.vae, steps=6), validate_every=5)
    toy = replace(toy, stages=tuple(replace(stage, steps=12) for stage in toy.stages))
    alone = train(toy, home / "shards", home / "alone")
    train(toy, home / "shards", home / "both", max_minutes=0)
    both = launch(home, toy, "both")
    words = both.communicate()[1]
    assert both.returncode == 0, words
    assert_close(home / "both", alone)

    spread = replace(toy, spread_weights=True)
    stopped = launch(home, spread, "spread")
    while ("16px", 4) not in steps(home / "spread"):
        assert stopped.poll() is None, stopped.communicate()[1]
        time.sleep(0.02)
    stopped.send_signal(signal.SIGTERM)
    words = stopped.communicate()[1]
    assert stopped.returncode != 0
    assert words.count("stopped by SIGTERM, saved at stage") == 1, words
    assert not (home / "spread/model").exists()
    train(spread, home / "shards", home / "spread")
    assert_close(home / "spread", alone)


@pytest.mark.slow
def test_what_is_wrong_is_said_once(toy: TrainConfig, home: Path) -> None:  # noqa: F811
    odd = replace(toy, stages=tuple(replace(stage, batch=3) for stage in toy.stages))
    wrong = launch(home, odd, "wrong")
    words = wrong.communicate()[1]
    assert wrong.returncode != 0
    assert words.count("batches of 3, which 2 processes cannot share evenly") == 1, words
    assert "packages/svdrr" not in words, words  # of no trace


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_what_one_process_finds_damaged_ends_both_with_one_line(toy: TrainConfig, home: Path) -> None:  # noqa: F811
    toy = replace(toy, vae=replace(toy.vae, steps=1))
    train(toy, home / "shards", home / "damaged", max_minutes=0)
    train(toy, home / "shards", home / "damaged", only="vae")
    train(toy, home / "shards", home / "damaged", max_minutes=0)
    first = training_shards(open_folder(home / "shards"))[0][0]
    (path,) = (home / "damaged/latents").glob(f"*/*/16/{first.digest[:32]}.npy")
    records = np.load(path, mmap_mode="r+")
    records["content"]["truncated"][1:] ^= 1
    records.flush()
    words = launch(home, toy, "damaged").communicate()[1]
    assert words.count(f"{path.name} is damaged (view") == 1, words
    assert "packages/svdrr" not in words, words
