"""The README's commands exist as printed, and lead all the way from DICOM to a synthesised view."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer.main
from PIL import Image

import drrgen.cli
import svdrr.cli
from svdrr import presets, radiograph
from svdrr.shards import open_folder
from svdrr.train import train

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *ROOT.glob("packages/*/README.md"), *ROOT.glob("docs/**/*.md")]
COMMANDS = [
    pytest.param(match[1], re.split("[#>]", match[2])[0].split(), id=f"{path.relative_to(ROOT)}: {match[0]}")
    for path in DOCUMENTS
    for block in re.findall(r"^```\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
    for match in re.finditer(r"^(drrgen|svdrr) ([a-z].*)$", block, re.MULTILINE)
]
Typed = Callable[..., subprocess.CompletedProcess[str]]


def test_the_documents_have_commands() -> None:
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize(("program", "words"), COMMANDS)
def test_every_printed_command_parses(program: str, words: list[str]) -> None:
    group = typer.main.get_command({"drrgen": drrgen.cli, "svdrr": svdrr.cli}[program].app)
    group.commands[words[0]].make_context(words[0], words[1:])


def run(*command: object, folder: Path) -> subprocess.CompletedProcess:
    program = Path(sys.executable).parent / str(command[0])
    return subprocess.run([program, *map(str, command[1:])], cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder after phantom, render and a few steps of training, all with their default places."""
    home = tmp_path_factory.mktemp("home")
    looks = ["--grid", "45deg", "--azimuth", "-90:90", "--elevation", "0:0", "--size", 128]
    assert run("drrgen", "phantom", "--out", "ct", "--patients", 6, "--matrix", 48, folder=home).returncode == 0
    assert run("drrgen", "render", "--ct-dir", "ct", *looks, folder=home).returncode == 0
    toy = presets.toy()
    brief = replace(
        toy,
        vae=replace(toy.vae, steps=3, batch=2),
        stages=tuple(replace(stage, steps=2, batch=2) for stage in toy.stages),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        train(brief, Path("shards"))
    return home


def test_sample_takes_the_latest_run(home: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    (shard, *_) = open_folder(home / "shards")
    radiograph.write_png(home / "x.png", shard.images(128, [shard.nearest_view(0, 0)])[0], {})
    first = run("svdrr", "sample", "--image", "x.png", "--theta", 30, "--phi", 10, "--out", "y.png", folder=home)
    assert first.returncode == 0, first.stderr
    with Image.open(home / "y.png") as image:
        assert (image.mode, image.size) == ("I;16", (128, 128))
        assert "NOT FOR DIAGNOSIS" in image.info["Warning"]
    again = run("svdrr", "sample", "--image", "x.png", "--theta", 30, "--phi", 10, "--out", "z.png", folder=home)
    assert again.returncode == 0
    assert (home / "y.png").read_bytes() == (home / "z.png").read_bytes()
    monkeypatch.chdir(home)
    other = ["--theta", 30, "--phi", 10, "--seed", 1, "--out", "other.png"]
    assert typed("sample", "--image", "x.png", *other).returncode == 0
    assert (home / "y.png").read_bytes() != (home / "other.png").read_bytes()


def test_a_real_film_is_a_source(home: Path, real_data: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    film = real_data / "chest-xray" / "00000001_000.png"
    done = typed("sample", "--image", film, "--theta", 30, "--phi", 10, "--out", "film.png")
    assert done.returncode == 0, done.stderr
    assert "film" in done.stderr
    assert np.isfinite(radiograph.read(home / "film.png").pixels).all()


def assert_one_line(done: subprocess.CompletedProcess[str], cure: str) -> None:
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert cure in lines[0]


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        (("sample", "--image", "ct", "--theta", 30), "--image"),
        (("sample", "--image", "nowhere.png", "--theta", 30), "nowhere.png"),
        (("sample", "--image", "text.png", "--theta", 30), "PNG"),
        (("sample", "--image", "text.png", "--theta", 30, "--model", "nowhere"), "svdrr train"),
        (("train", "--shards", "empty"), "drrgen render"),
        (("train", "--shards", "shards", "--preset", "huge"), "toy"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    home: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch, arguments, cure: str
) -> None:
    monkeypatch.chdir(home)
    (home / "text.png").write_text("no image")
    (home / "empty").mkdir(exist_ok=True)
    assert_one_line(typed(*arguments), cure)


def test_what_the_commands_import_adds_no_line(tmp_path: Path) -> None:
    """Each in a process of its own: libraries have much to say when they are imported."""
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    assert_one_line(run("svdrr", "train", "--shards", "nowhere", folder=tmp_path), "drrgen render")
    assert_one_line(run("svdrr", "sample", "--image", "x.png", "--theta", 30, folder=tmp_path), "svdrr train")
