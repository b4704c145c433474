"""Which folder a command means, and how each mistake is answered."""

import errno
import fcntl
import importlib.util
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svdrr.config import TrainConfig
from svdrr.errors import InputError
from svdrr.run import LATEST, RUNS, Run, model_folder, open_run, require_wandb, whole_folder


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_same_command_finds_its_run(tiny: TrainConfig) -> None:
    first = open_run(tiny, "data", out=None)
    assert first.folder.parent == RUNS
    assert LATEST.resolve() == first.folder.resolve()
    assert open_run(tiny, "data", out=None).folder == first.folder


def test_another_config_or_other_data_start_another_run(tiny: TrainConfig) -> None:
    folders = [open_run(tiny, "data", out=None).folder]
    folders.append(open_run(replace(tiny, seed=1), "data", out=None).folder)
    folders.append(open_run(tiny, "other data", out=None).folder)
    assert len(set(folders)) == 3
    assert LATEST.resolve() == folders[-1].resolve()


def test_a_given_folder_is_used_and_latest_left_alone(tiny: TrainConfig, tmp_path: Path) -> None:
    assert open_run(tiny, "data", tmp_path / "here").folder == tmp_path / "here"
    assert open_run(tiny, "data", tmp_path / "here").folder == tmp_path / "here"
    assert not LATEST.exists()


def test_a_given_folder_of_something_else_is_refused(tiny: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(InputError, match="not empty and not a run: give another --out"):
        open_run(tiny, "data", tmp_path)
    (tmp_path / "config.json").write_text("not JSON")
    with pytest.raises(InputError, match=r"config.json cannot be read"):
        open_run(tiny, "data", tmp_path)


def test_a_run_whose_making_was_broken_off_is_made(tiny: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.partial").write_text("{")
    assert open_run(tiny, "data", tmp_path / "run").folder == tmp_path / "run"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_latest_that_a_copy_made_a_folder_is_left_alone(tiny: TrainConfig) -> None:
    LATEST.mkdir(parents=True)
    with pytest.raises(InputError, match="runs/latest is no link to a run"):
        open_run(tiny, "data", out=None)
    assert [path.name for path in RUNS.iterdir()] == ["latest"]


def test_differences_are_named(tiny: TrainConfig, tmp_path: Path) -> None:
    open_run(tiny, "data", tmp_path / "run")
    other = replace(tiny, stages=(tiny.stages[0], replace(tiny.stages[1], steps=9)))
    with pytest.raises(InputError, match=r"its stages.1.steps is 5, not 9; its shards are data, not other"):
        open_run(other, "other", tmp_path / "run")


def test_a_folder_gets_its_name_when_it_is_whole(tmp_path: Path) -> None:
    def fail() -> None:
        with whole_folder(tmp_path / "model") as partial:
            partial.mkdir()
            (partial / "half").touch()
            raise RuntimeError

    for _ in range(2):  # the second time over the leftovers of the first
        with pytest.raises(RuntimeError):
            fail()
        assert not (tmp_path / "model").exists()
    with whole_folder(tmp_path / "model") as partial:
        partial.mkdir()
        (partial / "all").touch()
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"all", "SHA256SUMS"}
    done = subprocess.run(
        ["sha256sum", "--check", "SHA256SUMS"], cwd=tmp_path / "model", capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "all: OK\n")


def test_all_of_it_is_on_the_disk_before_a_folder_gets_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, sync, synced = tmp_path / "model", os.fsync, []

    def noting(descriptor: int) -> None:
        sync(descriptor)
        synced.append((folder.exists(), os.fstat(descriptor).st_ino))

    monkeypatch.setattr(os, "fsync", noting)
    with whole_folder(folder) as partial:
        (partial / "unet").mkdir(parents=True)
        (partial / "unet/weights").write_bytes(b"some")
        (partial / "index.json").touch()
    inside = {(False, path.stat().st_ino) for path in (folder, *folder.rglob("*"))}
    assert len(inside) == 5  # with the list of checksums
    assert set(synced[:-1]) == inside
    assert synced[-1] == (True, tmp_path.stat().st_ino)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_locks_it_says_so_and_a_second_trainer_ends_the_first(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    killed, first, second = (Run(tmp_path) for _ in range(3))
    with killed.locked():
        pass
    with first.locked():
        first.log("64px", 1, loss=0.5)
        with second.locked():
            assert capsys.readouterr().err.count("no locks on the file system of") == 3
            second.log("64px", 1, loss=0.5)
            with pytest.raises(InputError, match=r"process \d+ on .* has begun with .* since: this .* leaves it to"):
                first.log("64px", 2, loss=0.25)
            second.log("64px", 2, loss=0.25)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 1, 2]


def test_where_the_model_is(tiny: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model in runs/latest: train one with `svdrr train --shards shards`"):
        model_folder(None)
    with pytest.raises(InputError, match="no model in nowhere: give --model a run"):
        model_folder(Path("nowhere"))
    run = open_run(tiny, "data", out=None)
    with pytest.raises(InputError, match="is not finished: go on with the same `svdrr train` command"):
        model_folder(None)
    run.model.mkdir()
    (run.model / "model_index.json").touch()
    assert model_folder(None) == LATEST / "model"
    assert model_folder(run.folder) == run.model
    assert model_folder(run.model) == run.model


def test_the_log_is_a_json_object_per_line(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.log("64px", 1, loss=0.5)
    run.log("64px", 2, loss=0.25, learning_rate=1e-3)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"], line["loss"]) for line in lines] == [("64px", 1, 0.5), ("64px", 2, 0.25)]


def test_curves_and_pictures_are_for_tensorboard_too(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, picture = Run(tmp_path), np.arange(64, dtype=np.uint8).reshape(8, 8)
    run.log("64px", 3, loss=0.5)
    run.show("64px", 4, picture)
    events = EventAccumulator(str(run.tensorboard)).Reload()
    assert [(point.step, point.value) for point in events.Scalars("64px/loss")] == [(3, 0.5)]
    assert [image.step for image in events.Images("64px/samples")] == [4]
    with Image.open(run.samples / "64px-0000004.png") as image:
        assert np.array_equal(np.asarray(image), picture)


def test_weights_and_biases_is_asked_for_by_its_extra() -> None:
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    with pytest.raises(InputError, match=r"pip install 'svdrr\[wandb\]'"):
        require_wandb()
