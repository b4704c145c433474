"""The commands as a user types them, from DICOM to picture, and one clear line for every mistake."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import h5py
import pytest
from PIL import Image
from tests.drrgen.volumes import volume

from drrgen import cli, dataset, dicom
from drrgen.config import RenderConfig
from drrgen.run import render_folder


def drrgen(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the command line in this process; the exit code."""
    monkeypatch.setattr(sys, "argv", ["drrgen", *map(str, arguments)])
    for hook in ("excepthook", "unraisablehook"):  # main sets its own; put back those of pytest
        monkeypatch.setattr(sys, hook, getattr(sys, hook))
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: drrgen(*arguments, monkeypatch=monkeypatch)


@pytest.fixture(scope="module")
def ct_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two phantoms, as the command writes them."""
    out = tmp_path_factory.mktemp("phantoms") / "ct"
    with pytest.MonkeyPatch.context() as patch:
        assert drrgen("phantom", "--out", out, "--patients", 2, "--matrix", 64, monkeypatch=patch) == 0
    return out


SMALL = ("--grid", "45deg", "--size", 64, "--levels", "64,32", "--elevation", "-45:45")
TINY = {"grid": "90deg", "size": 32}


def test_phantoms_lie_as_tcia_downloads_do(ct_dir: Path) -> None:
    found = dicom.find_series(ct_dir)
    assert [one.origin.patient_id for one in found] == ["PHANTOM-0000", "PHANTOM-0001"]
    depths = {len(path.relative_to(ct_dir).parts) for path in ct_dir.rglob("*.dcm")}
    assert depths == {5}  # collection / patient / study / series / file


def test_render_validate_view(run, ct_dir: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("render", "--ct-dir", ct_dir, *SMALL) == 0
    assert "2 rendered by cpu, 0 already finished" in capsys.readouterr().out
    finished = sorted(Path("shards").glob("*.h5"))
    assert len(finished) == 2
    assert run("validate", *finished) == 0
    before = [path.read_bytes() for path in finished]

    assert run("render", "--ct-dir", ct_dir, *SMALL) == 0
    assert "0 rendered by cpu, 2 already finished" in capsys.readouterr().out
    assert run("render", "--ct-dir", ct_dir, *SMALL, "--overwrite") == 0
    assert [path.read_bytes() for path in finished] == before

    assert run("view", finished[0], "--sheet", "sheet.png") == 0
    with Image.open("sheet.png") as sheet:
        assert sheet.size == (8 * 64, 3 * 64)
    assert run("view", finished[0], "--html", "page.html", "--gif", "orbit.gif", "--max-mb", 0.5) == 0
    assert re.search(r"page.html: 24 views of 64 pixels, 0\.\d\d MB\norbit.gif: 8 fr", capsys.readouterr().out)
    assert Path("page.html").stat().st_size < 0.5e6


def test_render_with_a_spectrum_and_materials(run, ct_dir: Path, capsys: pytest.CaptureFixture) -> None:
    """The beam is harder than 60 keV where much is before it, and the bone image knows bone."""
    Path("one").mkdir()
    shutil.copytree(next(ct_dir.glob("*/PHANTOM-0000")), "one/ct")
    for out, *options in (("mono",), ("chest", "--spectrum", "chest120", "--materials")):
        assert run("render", "--ct-dir", "one", *SMALL, "--out", out, *options) == 0
    (mono,), (chest,) = (list(Path(out).glob("*.h5")) for out in ("mono", "chest"))
    assert run("validate", mono, chest) == 0
    with h5py.File(mono) as a, h5py.File(chest) as b:
        difference = (b["images/64"][:].astype(float) - a["images/64"][:]) / 4096
        whole = a["images/64"][:] / 4096
        assert difference[whole > 6].mean() < -0.1  # behind much, 60 keV attenuate too much ...
        assert 0 < difference[(whole > 0.2) & (whole < 1.5)].mean() < 0.1  # ... and behind little, too little
        assert 0.02 < b["images_bone/64"][:].sum() / b["images/64"][:].sum() < 0.3
        assert "spectrum" not in a
    capsys.readouterr()
    assert run("render", "--ct-dir", "one", *SMALL, "--out", "mono", "--energy", 70) == 2
    assert "--overwrite" in one_line(capsys)
    assert run("render", "--ct-dir", "one", *SMALL, "--out", "mono", "--energy", 60) == 0
    assert "1 already finished" in capsys.readouterr().out


def test_shards_from_before_there_was_a_choice_are_finished(run, ct_dir: Path, capsys) -> None:
    """The first version rendered at 60 keV, deflated, and had neither a word for it nor a manifest."""
    assert run("render", "--ct-dir", ct_dir, *SMALL) == 0
    Path("shards/manifest.jsonl").unlink()
    for path in Path("shards").glob("*.h5"):
        with h5py.File(path, "r+") as file:
            known = json.loads(file.attrs["config_json"])
            later = {"energy_kev": 60.0, "spectrum": None, "materials": False, "compression": "deflate"}
            assert {name: known.pop(name) for name in later} == later
            file.attrs["config_json"] = json.dumps(known, sort_keys=True)
            file.attrs["config_sha256"] = hashlib.sha256(file.attrs["config_json"].encode()).hexdigest()
    assert run("render", "--ct-dir", ct_dir, *SMALL) == 0
    assert "2 already finished" in capsys.readouterr().out
    assert run("render", "--ct-dir", ct_dir, *SMALL, "--materials") == 2
    assert run("render", "--ct-dir", ct_dir, *SMALL, "--compression", "zstd") == 2


@pytest.mark.parametrize("config_json", ["", "no JSON", "[1]", "{}", "null", '{"grid": "5deg"}'])
def test_a_shard_of_unreadable_settings_was_made_with_others(config_json: str) -> None:
    assert not RenderConfig().made(config_json)
    assert RenderConfig().made(RenderConfig().to_json())


def test_a_broken_shard_is_rendered_again(run, ct_dir: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("render", "--ct-dir", ct_dir, *SMALL) == 0
    first, _ = sorted(Path("shards").glob("*.h5"))
    whole = first.read_bytes()
    first.write_bytes(whole[:-1000])
    assert run("render", "--ct-dir", ct_dir, *SMALL) == 0
    assert "1 rendered by cpu, 1 already finished" in capsys.readouterr().out
    assert first.read_bytes() == whole


def test_settings_are_not_mixed_in_one_folder(run, ct_dir: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("render", "--ct-dir", ct_dir, *SMALL) == 0
    assert run("render", "--ct-dir", ct_dir, *SMALL, "--keep-table") == 2
    assert "--overwrite" in one_line(capsys)


def test_rejected_series_are_named_and_the_others_done(run, tmp_path: Path, ct_dir: Path, capsys) -> None:
    dicom.write_series(tmp_path / "ct" / "gap", volume(series_uid="1.9"), "noise")
    (tmp_path / "ct" / "gap" / "1-003.dcm").unlink()
    shutil.copytree(next(ct_dir.glob("*/PHANTOM-0000")), tmp_path / "ct" / "good")
    assert run("render", "--ct-dir", "ct", *SMALL) == 1
    captured = capsys.readouterr()
    assert "rejected TEST-01 1.9 in ct/gap: missing-slices" in captured.err
    assert "--on-defect repair renders it" in captured.err
    assert "1 rendered by cpu, 0 already finished, 1 rejected" in captured.out


def test_a_patient_with_and_without_a_table_are_two_series(run, capsys: pytest.CaptureFixture) -> None:
    assert run("phantom", "--out", "ct/alone", "--patients", 1, "--matrix", 32) == 0
    assert run("phantom", "--out", "ct/on_table", "--patients", 1, "--matrix", 32, "--table") == 0
    assert run("render", "--ct-dir", "ct", *SMALL) == 0
    assert "2 rendered" in capsys.readouterr().out


def test_an_odd_size_has_one_level(run, ct_dir: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("render", "--ct-dir", ct_dir, "--grid", "90deg", "--size", 65) == 0
    assert run("validate", *Path("shards").glob("*.h5")) == 0
    capsys.readouterr()
    assert run("view", *list(Path("shards").glob("*.h5"))[:1], "--mp4", "orbit.mp4") == 0
    assert "4 frames of 64 pixels" in capsys.readouterr().out  # a film's sides are even


def test_a_full_disk_is_one_line(ct_dir: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the full disk; nothing that looks like a shard is left."""
    program = Path(sys.executable).with_name("drrgen")
    command = f"ulimit -f 64; exec {program} render --ct-dir {ct_dir} --grid 30deg --size 128 --out {tmp_path / 'out'}"
    # ignored, so that the write fails instead of the process
    ignore = "trap '' XFSZ; "
    done = subprocess.run(["bash", "-c", ignore + command], capture_output=True, text=True)
    lines = [line for line in re.split(r"[\r\n]+", done.stderr) if line and "view/s" not in line]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, lines
    assert list((tmp_path / "out").glob("*.h5")) == []


def one_line(capsys: pytest.CaptureFixture) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in lines if "view/s" not in line and "patient/s" not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("drrgen: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        (("render", "--ct-dir", "nowhere"), "no such folder"),
        (("render", "--ct-dir", "."), "no CT in there"),
        (("scan", "--ct-dir", "."), "no CT in there"),
        (("scan", "--ct-dir", "nowhere"), "no such folder"),
        (("render", "--ct-dir", "ct", "--on-defect", "ignore"), "reject, repair"),
        (("render", "--ct-dir", ".", "--grid", "nonsense"), "5deg"),
        (("render", "--ct-dir", ".", "--grid", "7deg"), "divides 90"),
        (("render", "--ct-dir", ".", "--azimuth", "left"), "low:high"),
        (("render", "--ct-dir", ".", "--geometry", "bed"), "portable"),
        (("render", "--ct-dir", ".", "--projector", "opencl"), "auto, cpu, cuda, siddon"),
        (("render", "--ct-dir", ".", "--levels", "512,128"), "512,256"),
        (("render", "--ct-dir", ".", "--levels", "a"), "256,512"),
        (("render", "--ct-dir", ".", "--size", 0), "--size 0"),
        (("render", "--ct-dir", ".", "--energy", 160), "10 to 150 keV"),
        (("render", "--ct-dir", ".", "--compression", "lzma"), "choose one of deflate, zstd"),
        (("render", "--ct-dir", ".", "--spectrum", "chest"), "chest120, portable90, carm80"),
        (("render", "--ct-dir", ".", "--spectrum", "carm80", "--energy", 60), "choose one of them"),
        (("validate", "nowhere.h5"), "no such shard"),
        (("validate", "text.h5"), "not a readable HDF5 file"),
        (("validate", "empty"), "no shards in there"),
        (("status",), "no shards in there"),
        (("status", "--out", "empty"), "no shards in there"),
        (("render", "--ct-dir", "ct", "--splits", "random"), "hash, lidc-idri-drr"),
        (("view", "nowhere.h5", "--sheet", "x.png"), "no such shard"),
        (("view", "incomplete.h5", "--sheet", "x.png"), "render it again"),
        (("view", "whole.h5", "--sheet", "x.xyz"), ".png"),
        (("view", "whole.h5", "--html", "x.xyz"), ".html"),
        (("view", "whole.h5", "--gif", "x.xyz"), ".gif"),
        (("view", "whole.h5", "--mp4", "x.xyz"), ".mp4"),
        (("view", "whole.h5", "--html", "x.html", "--max-mb", 0.001), "--max-mb 0.001 is too little"),
        (("view", "whole.h5"), "--html page.html"),
        (("render", "--ct-dir", "ct", "--out", "text.h5"), "--out"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, ct_dir: Path, arguments, cure: str, capsys) -> None:
    Path("text.h5").write_text("no shard")
    Path("empty").mkdir()
    if "ct" in arguments or "whole.h5" in arguments or "incomplete.h5" in arguments:
        Path("ct").symlink_to(ct_dir)
        golden = Path(__file__).parents[1] / "contract" / "golden" / "1.0" / "tiny.h5"
        shutil.copy(golden, "whole.h5")
        shutil.copy(golden, "incomplete.h5")
        with h5py.File("incomplete.h5", "r+") as file:
            file.attrs["complete"] = False
    assert run(*arguments) == 2
    assert cure in one_line(capsys)


def test_unknown_options_exit_with_2(run) -> None:
    assert run("render", "--nonsense") == 2


def test_validate_names_the_bad_one(run, ct_dir: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("render", "--ct-dir", ct_dir, *SMALL) == 0
    good, bad = sorted(Path("shards").glob("*.h5"))
    Path("shards/manifest.jsonl").unlink()  # which would be enough
    with h5py.File(bad, "r+") as file:
        file["images/64"][0, 0, 0] += 100
    capsys.readouterr()
    assert run("validate", good, bad) == 1
    assert capsys.readouterr().out.splitlines()[:2] == [f"{good}: ok", f"{bad}: 2 violations"]


def test_a_folder_is_validated_by_its_manifest(run, ct_dir: Path, capsys: pytest.CaptureFixture) -> None:
    """A shard that is sound in itself is not the one that was written; another is gone. Both are made again."""
    assert run("render", "--ct-dir", ct_dir, *SMALL) == 0
    assert run("validate", "shards") == 0
    manifest = Path("shards/manifest.jsonl").read_text()
    first, second = sorted(Path("shards").glob("*.h5"))
    with h5py.File(first, "r+") as file:
        file.attrs["mood"] = "good"
    second.rename("elsewhere.h5")
    capsys.readouterr()
    assert run("validate", first) == 1
    assert run("validate", "shards", "elsewhere.h5") == 1
    shown = capsys.readouterr().out.splitlines()[2:]
    assert shown == [
        f"{first}: 1 violations",
        "  its sha256 is not that of manifest.jsonl: delete it, and the same `drrgen render` makes it again",
        f"{second}: 1 violations",
        "  manifest.jsonl lists it, and it is gone: the same `drrgen render` makes it again",
        "elsewhere.h5: ok",
    ]
    assert run("render", "--ct-dir", ct_dir, *SMALL) == 0
    assert f"rendering again: {first}: not as manifest.jsonl has it" in capsys.readouterr().err
    assert run("validate", "shards") == 0

    def hashes(text: str) -> list[str]:
        return [json.loads(line)["sha256"] for line in text.splitlines()]

    assert hashes(Path("shards/manifest.jsonl").read_text()) == hashes(manifest)


def test_settings_are_not_mixed_by_parts_or_by_another_folder_of_cts(run, ct_dir: Path, tmp_path, capsys) -> None:
    assert run("render", "--ct-dir", ct_dir, *SMALL, "--part", "0/2") == 0
    others = tmp_path / "others"
    assert run("phantom", "--out", others, "--patients", 1, "--matrix", 64, "--seed", 1) == 0
    capsys.readouterr()
    coarser = [*SMALL, "--grid", "90deg"]
    for again in (["--ct-dir", ct_dir, "--part", "1/2"], ["--ct-dir", others], ["--ct-dir", others, "--overwrite"]):
        assert run("render", *again, *coarser) == 2
        assert "was rendered with other settings (grid: 45deg instead of 90deg): " in capsys.readouterr().err
    assert run("render", "--ct-dir", ct_dir, "--part", "1/2", *coarser, "--overwrite") == 0  # the other part will, too
    assert run("render", "--ct-dir", ct_dir, "--part", "0/2", *coarser, "--overwrite") == 0
    assert run("render", "--ct-dir", others, *coarser, "--licence", "another") == 0
    assert run("render", "--ct-dir", ct_dir, *coarser) == 0
    assert "0 rendered by cpu, 2 already finished" in capsys.readouterr().out


def test_ctrl_c_in_a_callback_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python ends an exception there, whatever it is."""

    class Interrupted:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "unraisablehook", cli._interrupt_again)
    Interrupted()
    with pytest.raises(KeyboardInterrupt):
        time.sleep(60)


def test_a_run_that_is_killed_between_name_and_line_loses_nothing(run, ct_dir: Path, monkeypatch, capsys) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "add", die)
        with pytest.raises(KeyboardInterrupt):
            render_folder(
                ct_dir, Path("shards"), RenderConfig(**TINY), on_defect="reject", overwrite=False, part=(0, 2)
            )
    (named,) = Path("shards").glob("*.h5")
    assert run("status") == 1
    assert "1 missing" in (shown := capsys.readouterr().out)
    assert "1 of the done are not in manifest.jsonl" in shown
    summary = render_folder(ct_dir, Path("shards"), RenderConfig(**TINY), on_defect="reject", overwrite=False)
    assert (summary.rendered, summary.skipped) == (1, 1)
    assert dataset.read(Path("shards")).lines[named.name].seconds is None
    assert run("validate", "shards") == 0


def test_finished_shards_are_not_read_again(run, ct_dir: Path, monkeypatch) -> None:
    assert run("render", "--ct-dir", ct_dir, *SMALL) == 0
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert run("render", "--ct-dir", ct_dir, *SMALL) == 0


def test_status_from_the_first_run_to_the_last(run, tmp_path: Path, ct_dir: Path, capsys) -> None:
    dicom.write_series(tmp_path / "ct" / "gap", volume(series_uid="1.9"), "noise")
    (tmp_path / "ct" / "gap" / "1-003.dcm").unlink()
    shutil.copytree(next(ct_dir.glob("*/PHANTOM-0000")), tmp_path / "ct" / "good")
    assert run("render", "--ct-dir", "ct", *SMALL, "--keep-table") == 1
    (rejected,) = (json.loads(line) for line in Path("shards/rejected.jsonl").read_text().splitlines())
    assert (rejected["patient_id"], rejected["series_uid"]) == ("TEST-01", "1.9")
    assert (rejected["path"], rejected["codes"]) == ("gap", ["missing-slices"])
    assert "missing-slices: 1 missing between the others" in rejected["message"]
    capsys.readouterr()
    assert run("status") == 1
    shown = capsys.readouterr().out
    assert re.search(r"^ all +1 +1 +24 *$", shown, re.MULTILINE)
    assert "shards: 1 done, " in shown
    assert "1 rejected: 1 missing-slices; rejected.jsonl names them" in shown
    assert "missing:" not in shown

    assert run("render", "--ct-dir", "ct", *SMALL, "--keep-table", "--on-defect", "repair") == 0
    capsys.readouterr()
    assert run("status", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["shards"], found["views"], found["rejected"], found["missing"]) == (2, 48, {}, [])
    assert found["views_per_s"] > 0

    for path in Path("shards").glob("*.json*"):
        path.unlink()
    assert run("status", "--out", "shards") == 0
    assert "2 of the done are not in manifest.jsonl" in capsys.readouterr().out


def test_a_folder_is_split_by_one_rule(run, ct_dir: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("render", "--ct-dir", ct_dir, *SMALL, "--splits", "lidc-idri-drr") == 0
    before = {path: path.stat().st_mtime_ns for path in Path("shards").iterdir()}
    capsys.readouterr()
    assert run("render", "--ct-dir", ct_dir, *SMALL, "--overwrite") == 2
    assert "by the rule lidc-idri-drr, not hash: give --splits lidc-idri-drr" in one_line(capsys)
    assert {path: path.stat().st_mtime_ns for path in Path("shards").iterdir()} == before


def test_validate_goes_on_after_a_file_that_is_no_shard(run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    golden = Path(__file__).parents[1] / "contract" / "golden" / "1.0" / "tiny.h5"
    (tmp_path / "text.h5").write_text("no shard")
    assert run("validate", "text.h5", golden) == 2
    assert capsys.readouterr().out.strip() == f"{golden}: ok"


def test_dry_run_prints_the_settings_and_touches_nothing(run, capsys: pytest.CaptureFixture) -> None:
    assert run("render", "--ct-dir", "nowhere", "--dry-run") == 0
    assert '"levels": [512, 256, 128, 64]' in capsys.readouterr().out
    assert not Path("shards").exists()


def test_nothing_heavy_is_imported_for_help() -> None:
    code = (
        "import sys, drrgen.cli; print([m for m in ('numpy', 'numba', 'h5py', 'torch', 'pydicom') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
