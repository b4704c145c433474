"""The commands as typed: one line and exit code 2 for every mistake, and a picture at the end."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from svdrr import radiograph
from svdrr.config import TrainConfig
from svdrr.presets import svdrr_xl, toy
from svdrr.shards import open_folder
from svdrr.train import train

Typed = Callable[..., subprocess.CompletedProcess[str]]
SVDRR = Path(sys.executable).with_name("svdrr")


def svdrr(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SVDRR, *map(str, words)], cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["sample", "--help"]])
def test_help_helps(words: list[str]) -> None:
    assert svdrr(Path.cwd(), *words).returncode == 0


def test_the_command_line_does_not_import_torch() -> None:
    code = "import sys, svdrr.cli; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_dry_run_prints_the_settings(tmp_path: Path) -> None:
    result = svdrr(tmp_path, "train", "--shards", "nowhere", "--seed", 3, "--dry-run")
    assert TrainConfig.from_json(json.loads(result.stdout)) == toy(seed=3)
    result = svdrr(tmp_path, "train", "--preset", "svdrr-xl", "--init", "PixArt", "--dry-run")
    assert TrainConfig.from_json(json.loads(result.stdout)) == replace(svdrr_xl(), init="PixArt")
    assert not list(tmp_path.iterdir())


def test_mistakes_are_one_line_and_exit_code_2(typed: Typed, make_shards: Callable[..., Path], tmp_path: Path) -> None:
    make_shards(patients=3, levels=(128, 64)).rename(tmp_path / "more shards")
    for name, change in (
        ("mixed", lambda file: file["views"].attrs.__setitem__("sdd_mm", 1500.0)),
        ("synthesised", lambda file: file.attrs.__setitem__("kind", "synthesised")),
    ):
        shutil.copytree(tmp_path / "more shards", tmp_path / name)
        with h5py.File(tmp_path / name / "P-02.h5", "r+") as file:
            change(file)
    make_shards(patients=3).rename(tmp_path / "small shards")
    make_shards(patients=1)
    (tmp_path / "a file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/x.h5").write_bytes(b"half a shard")
    for words, expected in [
        (["train", "--shards", "nowhere"], "no folder nowhere"),
        (["train", "--shards", "empty"], "no shard (*.h5) in empty"),
        (["train", "--shards", "broken"], "broken/x.h5 is not a readable HDF5 file"),
        (["train", "--shards", "shards"], "one patient only (P-00)"),
        (["train", "--shards", "mixed"], "mixed/P-00.h5 has SDD 1800 mm and mixed/P-02.h5 1500 mm"),
        (["train", "--shards", "synthesised"], "synthesised/P-02.h5 is synthesised"),
        (["train", "--shards", "small shards"], "P-00.h5 has images of 32, 16 pixels, not 64: render it again with 64"),
        (["train", "--settings", "broken/x.h5"], "broken/x.h5 holds no settings"),
        (["train", "--shards", "more shards", "--stage", "8px"], "--stage is one of vae, 64px, 128px"),
        (["train", "--preset", "huge"], "--preset is one of toy, small, base, svdrr-xl"),
        (
            ["train", "--shards", "more shards", "--out", "a file/run"],
            "cannot make the folder a file/run (Not a directory)",
        ),
        (["train", "--shards", "more shards", "--vae", "empty"], "--vae empty cannot be read"),
        (["sample", "--image", "x.png", "--theta", "nan"], "no angles"),
        (["sample", "--image", "x.png", "--theta", 30, "--out", "empty"], "no file can be written at empty"),
        (["sample", "--image", "x.png", "--theta", 30], "no model in runs/latest: train one with `svdrr train"),
    ]:
        result = typed(*words)
        assert result.returncode == 2
        assert expected in result.stderr
        assert result.stderr.startswith("svdrr: ")
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_shard_found_damaged_midway_is_one_line_and_exit_code_2(
    typed: Typed, make_shards: Callable[..., Path]
) -> None:
    """The first training patient's smaller images, which the autoencoder begins with; above the line is its bar."""
    with h5py.File(make_shards(patients=3, levels=(128, 64)) / "P-00.h5", "r+") as file:
        file["images/64"][:] += 1
    result = typed("train", "--shards", "shards")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert re.search(r"svdrr: shards/P-00.h5: image \d of level 64 fails its checksum: delete it and give", last)


def test_wrong_usage_is_exit_code_2_without_a_trace(tmp_path: Path) -> None:
    for words in (["sample", "--image", "x.png"], ["sample", "--theta", "left"], ["fly"], ["train", "--wings"]):
        result = svdrr(tmp_path, *words)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr


def test_sample_from_png_to_png(tiny: TrainConfig, shards: Path, typed: Typed, tmp_path: Path) -> None:
    train(tiny, shards)
    view = open_folder(shards)[0].images(32, [3])[0]
    radiograph.write_png(tmp_path / "x.png", view, {})

    result = typed("sample", "--image", "x.png", "--theta", 30, "--phi", 10)
    assert result.returncode == 0
    assert result.stdout == "x_theta30_phi10.png\n"
    assert result.stderr.splitlines()[-1].startswith("SYNTHETIC - NOT FOR DIAGNOSIS")
    with Image.open("x_theta30_phi10.png") as image:
        assert (image.size, image.mode) == ((32, 32), "I;16")
        assert image.text["Warning"] == "SYNTHETIC - NOT FOR DIAGNOSIS"
        assert (image.text["azimuth_deg"], image.text["elevation_deg"], image.text["seed"]) == ("30", "10", "0")

    words = ["--theta", 30, "--phi", 10, "--model", "runs/latest", "--samples", 2, "--out", "y.png"]
    assert typed("sample", "--image", "x.png", *words).stdout == "y_seed0.png\ny_seed1.png\n"
    names = ("x_theta30_phi10.png", "y_seed0.png", "y_seed1.png")
    first, same, other = (radiograph.read(Path(name)).pixels for name in names)
    assert np.abs(first - same).max() < 1e-3  # alone or in a batch: products of another shape round differently
    assert np.abs(first - other).max() > 0.1

    Image.fromarray((255 - view * 20).astype(np.uint8)).save("film.jpg")
    result = typed("sample", "--image", "film.jpg", "--theta", -90, "--out", "z.png")
    assert result.returncode == 0
    assert "film.jpg is taken as a film" in result.stderr
    assert radiograph.read(Path("z.png")).pixels.shape == (32, 32)

    weights = Path("runs/latest/model/transformer/diffusion_pytorch_model.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    result = typed("sample", "--image", "x.png", "--theta", 30)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert (
        "model is damaged (transformer/diffusion_pytorch_model.safetensors is not what SHA256SUMS says)"
        in result.stderr
    )

    Path("no image.png").write_bytes(b"no image")
    result = typed("sample", "--image", "no image.png", "--theta", 30)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
