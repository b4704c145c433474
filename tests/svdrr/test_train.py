"""A tiny run of every stage: stopped anywhere and started again, it ends in the same weights, bit for bit."""

import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from safetensors.torch import load, load_file, save_file

from svdrr import vae as autoencoder
from svdrr.config import CoarseConfig, TrainConfig
from svdrr.errors import InputError
from svdrr.pipeline import SVDRRPipeline
from svdrr.shards import open_folder
from svdrr.start import begin, data_digest
from svdrr.train import deterministic, train

KNOWN_FILES = {"config.json", "checkpoints", "latents", "vae", "model", "log.jsonl", "lock", "tensorboard", "samples"}


@pytest.fixture(scope="module")
def unbroken(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[TrainConfig], Path]:
    """The run folder of this configuration, trained in one go; the second call finds it finished."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    return lambda config: train(config, shards, folder)


def assert_same(one: Path, other: Path) -> None:
    """Every trained weight, and every setting of the model."""
    for part in ("vae", "transformer"):
        name = f"model/{part}/diffusion_pytorch_model.safetensors"
        ours, theirs = load_file(one / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    for name in ("vae/config.json", "model_index.json", "scheduler/scheduler_config.json"):
        ours, theirs = (json.loads((run / "model" / name).read_text()) for run in (one, other))
        assert ours | {"_name_or_path": ""} == theirs | {"_name_or_path": ""}  # diffusers notes where it read from


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_stopped_at_every_step_it_ends_in_the_same_weights(
    tiny: TrainConfig, shards: Path, unbroken: Callable[[TrainConfig], Path], tmp_path: Path
) -> None:
    """Across the autoencoder, the latents of both levels and both stages; each call has time for one step."""
    run, stops = tmp_path / "run", 0
    while not (run / "model").is_dir():
        train(tiny, shards, run, max_minutes=0)
        stops += 1
    assert stops > tiny.vae.steps + sum(stage.steps for stage in tiny.stages)
    assert_same(run, unbroken(tiny))


def test_steps_that_were_lost_are_done_again(
    tiny: TrainConfig, shards: Path, unbroken: Callable[[TrainConfig], Path], tmp_path: Path
) -> None:
    """As after a kill between two checkpoints: the newest one is taken away, in the middle of the first stage."""
    run = tmp_path / "run"
    while not (newest := list(run.glob("checkpoints/*16px-0000003*"))):
        train(tiny, shards, run, max_minutes=0)
    newest[0].unlink()
    train(tiny, shards, run)
    assert_same(run, unbroken(tiny))


def test_leaves_a_documented_folder_a_log_and_a_model(
    tiny: TrainConfig, unbroken: Callable[[TrainConfig], Path]
) -> None:
    run = unbroken(tiny)
    assert {path.name for path in run.iterdir()} == KNOWN_FILES
    record = json.loads((run / "config.json").read_text())
    assert TrainConfig.from_json(record["config"]) == tiny
    assert record["versions"]["torch"] == torch.__version__
    lines = log(run)
    assert {line["stage"] for line in lines} == {"vae", "16px", "32px"}
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert sum("validation_loss" in line for line in lines) == 6  # after steps 2, 4 and 5 of both stages
    pipeline = SVDRRPipeline.from_pretrained(run / "model")
    assert (pipeline.config.size, pipeline.scheduler.config.shift) == (32, 2.0)
    assert (pipeline.config.sdd_mm, pipeline.config.sod_mm, pipeline.config.detector_mm) == (1800, 1640, 432)
    assert list(pipeline.config.film_line_integrals) == sorted(pipeline.config.film_line_integrals)


def test_a_diffusion_of_epsilon_is_trained_and_saved_with_its_scheduler(
    tiny: TrainConfig, shards: Path, tmp_path: Path
) -> None:
    """Together with other switches of the model."""
    switches = {"pooled_source": True, "ray_maps": False, "absolute_pose": False, "scaled_source": False}
    config = replace(tiny, model=replace(tiny.model, prediction="epsilon", preconditioned=False, **switches))
    run = train(config, shards, tmp_path / "run")
    assert all(math.isfinite(line["loss"]) for line in log(run) if "loss" in line)
    pipeline = SVDRRPipeline.from_pretrained(run / "model")
    assert isinstance(pipeline.scheduler, DPMSolverMultistepScheduler)
    assert pipeline.transformer.config.source_scale == pytest.approx(1 / pipeline.vae.config.scaling_factor)


def test_a_finished_run_says_so(
    tiny: TrainConfig, unbroken: Callable[[TrainConfig], Path], capsys: pytest.CaptureFixture
) -> None:
    run = unbroken(tiny)
    before = (run / "log.jsonl").read_text()
    assert unbroken(tiny) == run
    assert "is finished" in capsys.readouterr().err
    assert (run / "log.jsonl").read_text() == before


def test_seed_and_data_decide_the_weights(
    tiny: TrainConfig, shards: Path, unbroken: Callable[[TrainConfig], Path], tmp_path: Path
) -> None:
    other = train(replace(tiny, seed=1), shards, tmp_path / "run")
    with pytest.raises(AssertionError):
        assert_same(other, unbroken(tiny))


def test_another_config_or_other_shards_are_refused(
    tiny: TrainConfig,
    shards: Path,
    unbroken: Callable[[TrainConfig], Path],
    make_shards: Callable[..., Path],
) -> None:
    run = unbroken(tiny)
    with pytest.raises(InputError, match=r"its seed is 0, not 1\): give another --out"):
        train(replace(tiny, seed=1), shards, run)
    with pytest.raises(InputError, match=r"its shards are .*, not .*: give another --out"):
        train(tiny, make_shards(patients=4), run)


def test_a_run_goes_on_with_the_split_that_it_began_with(shards: Path) -> None:
    """Shards for tests come and go; one that moves from training to validation makes another run."""
    one, two, three = open_folder(shards)[:3]
    assert data_digest([one, two], [three]) != data_digest([one], [two, three]) != data_digest([one], [two])
    assert data_digest([one], [two]) == data_digest([one], [two])


def test_without_validation_patients_it_says_so_and_goes_on(
    tiny: TrainConfig, make_shards: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = make_shards(patients=4)
    for name in ("P-01.h5", "P-02.h5"):  # the two that the split gives to validation
        (folder / name).unlink()
    run = train(tiny, folder, tmp_path / "run")
    assert "for validation" in capsys.readouterr().err
    assert not any("validation_loss" in line for line in log(run))


def test_a_level_that_the_shards_lack_is_refused_before_anything_is_written(
    tiny: TrainConfig, make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="has images of 32 pixels, not 16"):
        train(tiny, make_shards(levels=(32,)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """An autoencoder of three colours that somebody else trained, as far as the run knows."""
    torch.manual_seed(5)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        latent_channels=2,
        norm_num_groups=2,
    )
    vae.save_pretrained(tmp_path / "given")
    return tmp_path / "given"


def test_settings_that_cannot_be_trained_are_refused_before_anything_is_written(
    tiny: TrainConfig, shards: Path, tmp_path: Path
) -> None:
    other = tmp_path / "PixArt of one layer"
    PixArtTransformer2DModel(2, 8, 2, num_layers=1, sample_size=8, caption_channels=8).save_pretrained(other)
    for wrong, words in [
        (replace(tiny, stages=tiny.stages[:1] * 2), "two stages of one size"),
        (replace(tiny, model=replace(tiny.model, patch_size=3)), "makes patches of 6 pixels"),
        (replace(tiny, vae=replace(tiny.vae, crop=15)), "a crop of 15 pixels"),
        (replace(tiny, model=replace(tiny.model, prediction="image")), "no prediction 'image'"),
        (replace(tiny, mixed_precision="fp16"), "fp16 is for GPUs"),
        (replace(tiny, mixed_precision="fp8"), "no mixed_precision 'fp8': it is one of no, bf16, fp16"),
        (replace(tiny, ema_decay=1.5), "ema_decay is 1.5, and 0 to 1 is wanted"),
        (replace(tiny, drop_source=0.6, drop_stream=0.3), "drops 1.2 of its sources"),
        (replace(tiny, token_rate=2.0), "a token_rate of 2, and no pooled_source"),
        (replace(tiny, model=replace(tiny.model, head_dim=7)), "is 14 wide, .* give a multiple of 4"),
        (replace(tiny, vae=replace(tiny.vae, block_channels=(3, 6))), r"block_channels=\[3, 6\] .* multiples of 4"),
        (replace(tiny, coarse=CoarseConfig("regression", 6, 8, 1, 2, 1e-3)), "cells=6: give a multiple of 4"),
        (replace(tiny, init=str(tmp_path / "nowhere")), "no PixArt weights at .*nowhere"),
        (replace(tiny, init=str(other)), "these are not the weights of a PixArt of 2 layers"),
    ]:
        if "fp16" in words and torch.cuda.is_available():
            continue
        with pytest.raises(InputError, match=words):
            train(wrong, shards, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_curves_that_cannot_be_sent_are_refused_before_anything_is_written(
    tiny: TrainConfig, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"pip install 'svdrr\[wandb\]'"):
        train(tiny, shards, tmp_path / "run", wandb="project")
    assert not (tmp_path / "run").exists()


def test_what_is_damaged_in_a_run_is_named_and_its_cure_leads_to_the_same_weights(
    tiny: TrainConfig, shards: Path, unbroken: Callable[[TrainConfig], Path], tmp_path: Path
) -> None:
    run, vae = shutil.copytree(unbroken(tiny), tmp_path / "run"), tmp_path / "run/vae"
    (run / "model/model_index.json").unlink()
    with pytest.raises(InputError, match=r"/model is not whole: delete it, and the same command makes it again"):
        train(tiny, shards, run)
    shutil.rmtree(run / "model")
    train(tiny, shards, run)
    assert_same(run, unbroken(tiny))

    shutil.rmtree(run / "model")
    weights, config = vae / "diffusion_pytorch_model.safetensors", vae / "config.json"
    whole = weights.read_bytes()
    cure = rf"{vae} is damaged \(.*\): put it back from a copy, or delete {vae} and {run}/checkpoints, and the same"
    for damage in (
        lambda: weights.write_bytes(whole[:-100]),
        lambda: save_file(dict(list(load(whole).items())[1:]), weights),
        lambda: config.write_text("{"),
        lambda: weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1])),
        config.unlink,
    ):
        damage()
        with pytest.raises(InputError, match=cure):
            train(tiny, shards, run)
    shutil.rmtree(vae)
    shutil.rmtree(run / "checkpoints")
    train(tiny, shards, run)
    assert_same(run, unbroken(tiny))


def test_a_damaged_copy_of_a_given_autoencoder_costs_no_training(
    tiny: TrainConfig, shards: Path, given: Path, tmp_path: Path
) -> None:
    """Where its scale is its own, so that the copy made again is the very same."""
    tiny = replace(tiny, vae=replace(tiny.vae, measured=False))
    run = train(tiny, shards, tmp_path / "run", vae=str(given))
    once, vae = shutil.copytree(run, tmp_path / "once"), run / "vae"
    shutil.rmtree(run / "model")
    (vae / "config.json").unlink()
    with pytest.raises(InputError, match=rf"or delete {vae}, and the same command makes all that again"):
        train(tiny, shards, run, vae=str(given))
    shutil.rmtree(vae)
    assert_same(train(tiny, shards, run, vae=str(given)), once)


def test_what_the_process_had_set_comes_back(tiny: TrainConfig, unbroken: Callable[[TrainConfig], Path]) -> None:
    def state() -> tuple[int, bool]:
        return torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory

    before = state()
    unbroken(tiny)
    assert state() == before == (0, True)
    with deterministic():
        assert state() == (2, False)
    assert state() == before


def test_a_given_autoencoder_is_used_as_it_is_with_its_scale_measured(
    tiny: TrainConfig, shards: Path, given: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = train(tiny, shards, tmp_path / "run", max_minutes=0, vae=str(given))
    assert not (run / "model").exists()
    train(tiny, shards, run, vae=str(given))
    assert capsys.readouterr().err.count("round trip") == 1
    lines = log(run)
    assert not [line for line in lines if line["stage"] == "vae" and "loss" in line]
    assert [math.isfinite(line["round_trip_psnr"]) for line in lines if line["stage"] == "vae"] == [True]
    digest = json.loads((run / "config.json").read_text())["config"]["pretrained_vae"]
    assert digest == autoencoder.digest(AutoencoderKL.from_pretrained(given))
    weights = [load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (given, run / "model/vae")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    config = json.loads((run / "model/vae/config.json").read_text())
    assert config["scaling_factor"] != 0.18215  # what diffusers says of every other

    with pytest.raises(InputError, match=rf"its pretrained_vae is {digest}, not None\): give another --out"):
        train(tiny, shards, run)
    other = AutoencoderKL.from_pretrained(given)
    with torch.no_grad():
        other.quant_conv.bias += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=rf"its pretrained_vae is {digest}, not .*: give another --out"):
        train(tiny, shards, run, vae=str(tmp_path / "other"))


def test_an_autoencoder_that_does_not_fit_is_refused_before_anything_is_written(
    tiny: TrainConfig, shards: Path, given: Path, tmp_path: Path
) -> None:
    for config, words in [
        (
            replace(tiny, vae=replace(tiny.vae, latent_channels=4)),
            "latents of 2 channels, and the preset tiny is for 4",
        ),
        (replace(tiny, model=replace(tiny.model, patch_size=16)), "patches of 32 pixels .* its stage of 16 pixels"),
    ]:
        with pytest.raises(InputError, match=words):
            train(config, shards, tmp_path / "run", vae=str(given))
    assert not (tmp_path / "run").exists()


def test_latents_can_be_made_while_training(
    tiny: TrainConfig, shards: Path, unbroken: Callable[[TrainConfig], Path], tmp_path: Path
) -> None:
    """No cache is written, and the losses are those of the cache, but for its 16 bits: 2^-11 of a latent of 1."""
    run = train(replace(tiny, cache_latents=False), shards, tmp_path / "run")
    assert not (run / "latents").exists()
    losses = [[line["loss"] for line in log(folder) if "loss" in line] for folder in (run, unbroken(tiny))]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_a_loss_that_is_no_number_stops_with_stage_and_step(tiny: TrainConfig, shards: Path, tmp_path: Path) -> None:
    wild = replace(tiny, vae=replace(tiny.vae, learning_rate=1e30))
    with pytest.raises(InputError, match=r"at stage vae, step \d \(P-\d\d.h5, view \d.*lower learning rate"):
        train(wild, shards, tmp_path / "run")


def test_stages_can_be_trained_one_by_one(
    tiny: TrainConfig, shards: Path, unbroken: Callable[[TrainConfig], Path], tmp_path: Path, capsys
) -> None:
    run = tmp_path / "run"
    with pytest.raises(InputError, match=r"no stage '64px' in tiny: --stage is one of vae, 16px, 32px"):
        train(tiny, shards, run, only="64px")
    with pytest.raises(InputError, match=r"stage 32px is not the next of .*: train --stage vae first"):
        train(tiny, shards, run, only="32px")
    train(tiny, shards, run, only="vae")
    with pytest.raises(InputError, match=r"stage 32px is not the next of .*: train --stage 16px first"):
        train(tiny, shards, run, only="32px")
    train(tiny, shards, run, max_minutes=0, only="16px")
    train(tiny, shards, run, only="16px")
    train(tiny, shards, run, only="16px")
    assert "stage 16px is finished: the next is 32px" in capsys.readouterr().err
    assert not (run / "model").exists()
    train(tiny, shards, run, only="32px")
    assert_same(run, unbroken(tiny))


def test_rows_taken_one_at_a_time_are_the_same_batch(
    tiny: TrainConfig, shards: Path, unbroken: Callable[[TrainConfig], Path], tmp_path: Path
) -> None:
    """But for the order of sums, of which Adam, dividing gradients by their size, makes more: 1e-4 of a loss."""
    run = train(tiny, shards, tmp_path / "run", at_once=1)
    losses = [[line["loss"] for line in log(folder) if "loss" in line] for folder in (run, unbroken(tiny))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_damaged_shard_is_named_and_the_run_goes_on_once_it_is_whole(
    tiny: TrainConfig,
    shards: Path,
    unbroken: Callable[[TrainConfig], Path],
    make_shards: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """One bit of one image. What was taken away for good makes another run."""
    folder, run = make_shards(), tmp_path / "run"
    whole = (folder / "P-03.h5").read_bytes()
    with h5py.File(folder / "P-03.h5", "r+") as file:
        file["images/16"][2, 8, 8] ^= 1
    with pytest.raises(InputError, match=r"P-03.h5: image 2 of level 16 fails its checksum: delete it"):
        train(tiny, folder, run)
    (folder / "P-03.h5").unlink()
    with pytest.raises(InputError, match=r"its shards are .*: give another --out"):
        train(tiny, folder, run)
    (folder / "P-03.h5").write_bytes(whole)
    train(tiny, folder, run)
    assert_same(run, unbroken(tiny))


def test_damaged_latents_are_named_and_the_run_goes_on_once_they_are_deleted(
    tiny: TrainConfig, shards: Path, unbroken: Callable[[TrainConfig], Path], tmp_path: Path
) -> None:
    """One bit of each view but the first of the last stage's files, before its last step."""
    run = shutil.copytree(unbroken(tiny), tmp_path / "run")
    shutil.rmtree(run / "model")
    max(run.glob("checkpoints/*")).unlink()
    paths = list(run.glob("latents/*/*/32/*.npy"))
    for path in paths:
        records = np.load(path, mmap_mode="r+")
        records["content"]["latents"].view(np.uint16)[1:] ^= 1
        records.flush()
    with pytest.raises(
        InputError, match=r"\.npy is damaged \(view \d fails its checksum\): delete it and run the same"
    ):
        train(tiny, shards, run)
    for path in paths:
        path.unlink()
    train(tiny, shards, run)
    assert_same(run, unbroken(tiny))


def test_batches_that_processes_cannot_share_are_refused(tiny: TrainConfig, shards: Path, tmp_path: Path) -> None:
    odd = replace(tiny, stages=tuple(replace(stage, batch=3) for stage in tiny.stages))
    with pytest.raises(InputError, match="batches of 3, which 2 processes cannot share evenly"):
        begin(odd, shards, tmp_path / "run", vae=None, only=None, wandb=None, num_processes=2)
    assert not (tmp_path / "run").exists()


def test_a_second_trainer_in_the_same_run_is_refused(tiny: TrainConfig, shards: Path, tmp_path: Path) -> None:
    from svdrr.run import Run

    train(tiny, shards, tmp_path / "run", max_minutes=0)
    with Run(tmp_path / "run").locked(), pytest.raises(InputError, match="another `svdrr train` is at work"):
        train(tiny, shards, tmp_path / "run")


def test_trains_in_any_thread(tiny: TrainConfig, shards: Path, tmp_path: Path) -> None:
    """Where only the main one may handle signals."""
    with ThreadPoolExecutor(1) as other:
        run = other.submit(train, tiny, shards, tmp_path, max_minutes=0).result()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["000001-vae-0000001.safetensors"]


def test_sigint_saves_and_stops(tiny: TrainConfig, shards: Path, tmp_path: Path) -> None:
    """The signal comes while the first step waits for its data: the step is finished and saved."""
    endless = replace(tiny, vae=replace(tiny.vae, steps=1_000_000))
    handler = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    with pytest.raises(SystemExit) as stopped:
        train(endless, shards, tmp_path / "run")
    assert stopped.value.code == 128 + signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is handler
    assert list((tmp_path / "run/checkpoints").glob("*.safetensors"))
