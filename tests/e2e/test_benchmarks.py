"""What makes the tables of docs/training.md still runs: nothing else would notice a benchmark that cannot."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.benchmarks import training
from tests.e2e.test_train_resume import toy  # noqa: F401 - a fixture
from tests.svdrr.shards_for_tests import write_folder

from svdrr import presets
from svdrr.config import TrainConfig
from svdrr.train import deterministic


def test_training(
    toy: TrainConfig,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    folder = write_folder(tmp_path / "shards")
    monkeypatch.setitem(presets.PRESETS, "toy", lambda seed: replace(toy, seed=seed))
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["training", str(folder), "--stages", "1", "--steps", "2"])
    with deterministic():  # which the benchmark is, too, to its end
        training.main()
    torch.set_num_threads(threads)
    cells = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| `toy`, 16")]
    assert [row[1] for row in cells] == list(training.WAYS)
    assert all(float(row[3]) > 0 for row in cells)
