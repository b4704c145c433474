"""Reading CT series: what is written comes back, order comes from positions, what is wrong is refused with its code."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
from tests.drrgen.volumes import volume

from drrgen import dicom, lidc
from drrgen.defects import SeriesRejected
from drrgen.errors import InputError
from drrgen.volume import Volume


@pytest.fixture
def written() -> Volume:
    return volume()


@pytest.fixture
def folder(tmp_path: Path, written: Volume) -> Path:
    dicom.write_series(tmp_path / "series", written, "test")
    return tmp_path / "series"


def read_only_series(folder: Path) -> Volume:
    (series,) = dicom.find_series(folder)
    return dicom.read(series)


def edit(path: Path, change: Callable[[pydicom.Dataset], None]) -> None:
    dataset = pydicom.dcmread(path)
    change(dataset)
    dataset.save_as(path)


def test_round_trip(folder: Path, written: Volume) -> None:
    back = read_only_series(folder)
    assert np.array_equal(back.hu, written.hu)
    assert np.allclose(back.world_from_voxel, written.world_from_voxel, atol=1e-6)  # decimal strings of 8 digits
    assert back.origin == written.origin


def test_order_comes_from_positions_not_names(folder: Path, written: Volume) -> None:
    names = sorted(folder.iterdir())
    for number, path in enumerate(np.random.default_rng(0).permutation(names)):
        path.rename(folder / f"{number:06d}")
    assert np.array_equal(read_only_series(folder).hu, written.hu)


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ((1, 0, 0), (0, 1, 0)),  # axial, head first supine
        ((-1, 0, 0), (0, 1, 0)),  # axial, stored from the patient's left: the normal points to the feet
        ((1, 0, 0), (0, -1, 0)),  # prone
        ((0, 1, 0), (0, 0, -1)),  # sagittal
        ((0.6, 0.8, 0), (-0.8, 0.6, 0)),  # turned on the table
    ],
)
def test_any_orientation_keeps_every_voxel_where_it_is(tmp_path: Path, row, column) -> None:
    """The value at a place in the patient does not depend on how the slices were cut or stored."""
    affine = np.eye(4)
    affine[:3, :3] = np.stack([row, column, np.cross(row, column)], 1) * [1.5, 1.25, 2.5]
    affine[:3, 3] = 5, -7, 11
    written = volume(world_from_voxel=affine)
    dicom.write_series(tmp_path / "series", written, "test")
    back = read_only_series(tmp_path)
    rng = np.random.default_rng(0)
    for _ in range(20):
        voxel = np.array([rng.integers(20), rng.integers(16), rng.integers(12)])
        place_mm = written.world_from_voxel @ [*voxel, 1]
        i, j, k = np.rint((back.voxel_from_world @ place_mm)[:3]).astype(int)
        assert back.hu[k, j, i] == written.hu[voxel[2], voxel[1], voxel[0]]
    assert np.allclose(back.centre_mm, written.centre_mm, atol=1e-5)


def test_slope_and_intercept_per_slice_and_clamp(folder: Path, written: Volume) -> None:
    for path in folder.iterdir():
        edit(path, lambda dataset: setattr(dataset, "RescaleSlope", "2"))
    expected = np.clip((written.hu.astype(int) + 1000) * 2 - 1000, *dicom.HU_CLAMP)
    assert np.array_equal(read_only_series(folder).hu, expected)


def test_signed_pixels(folder: Path, written: Volume) -> None:
    for path in folder.iterdir():

        def to_signed(dataset: pydicom.Dataset) -> None:
            stored = dataset.pixel_array.astype(np.int32) + dicom.HU_CLAMP[0]
            dataset.PixelRepresentation, dataset.RescaleIntercept = 1, 0
            dataset.PixelData = stored.astype("<i2").tobytes()

        edit(path, to_signed)
    assert np.array_equal(read_only_series(folder).hu, written.hu)


@pytest.mark.parametrize("compressor", ["JPEG", "JPEG2000"])
def test_compressed_slices_are_the_same_slices(folder: Path, written: Volume, tmp_path: Path, compressor: str) -> None:
    """Lossless JPEG and JPEG 2000, encoded by SimpleITK's GDCM, in the files' own headers."""
    writer = SimpleITK.ImageFileWriter()
    writer.UseCompressionOn()
    writer.SetCompressor(compressor)
    writer.SetFileName(str(tmp_path / "encoded.dcm"))
    for path in folder.iterdir():
        writer.Execute(SimpleITK.Cast(SimpleITK.ReadImage(str(path)), SimpleITK.sitkInt16))
        encoded = pydicom.dcmread(tmp_path / "encoded.dcm")
        assert encoded.file_meta.TransferSyntaxUID.is_compressed

        def swap_pixels(dataset: pydicom.Dataset, encoded: pydicom.Dataset = encoded) -> None:
            dataset.PixelData, dataset.PixelRepresentation = encoded.PixelData, 1
            dataset["PixelData"].is_undefined_length = True
            dataset.RescaleIntercept = encoded.RescaleIntercept
            dataset.file_meta.TransferSyntaxUID = encoded.file_meta.TransferSyntaxUID

        edit(path, swap_pixels)
    assert np.array_equal(read_only_series(folder).hu, written.hu)


def test_other_files_are_passed_over(folder: Path, written: Volume) -> None:
    (folder / "LICENSE").write_text("CC BY")
    (folder / "069.xml").write_text("<LidcReadMessage/>")
    (folder / "x.dcm").write_bytes(b"\0" * 200)
    radiograph = pydicom.dcmread(next(folder.glob("1-*.dcm")))
    radiograph.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"  # CR image storage
    radiograph.save_as(folder / "cr.dcm")
    assert read_only_series(folder).hu.shape == written.hu.shape


def test_two_series_in_one_folder(folder: Path) -> None:
    dicom.write_series(folder / "again", volume(series_uid="1.2.3.5"), "test")
    assert [len(one.slices) for one in dicom.find_series(folder)] == [12, 12]


def remove(folder: Path) -> None:
    (folder / "1-005.dcm").unlink()


def duplicate(folder: Path) -> None:
    shutil.copy(folder / "1-005.dcm", folder / "copy.dcm")


def truncate(folder: Path) -> None:
    path = folder / "1-005.dcm"
    path.write_bytes(path.read_bytes()[:-300])


def scout(folder: Path) -> None:
    edit(folder / "1-005.dcm", lambda dataset: setattr(dataset, "ImageOrientationPatient", [1, 0, 0, 0, 0, -1]))


def tilt(folder: Path) -> None:
    cosine, sine = np.cos(np.deg2rad(15)), np.sin(np.deg2rad(15))
    for path in folder.iterdir():
        edit(path, lambda dataset: setattr(dataset, "ImageOrientationPatient", [1, 0, 0, 0, cosine, -sine]))


def shift_one(folder: Path) -> None:
    def shift(dataset: pydicom.Dataset) -> None:
        dataset.ImagePositionPatient[2] += 0.5

    edit(folder / "1-005.dcm", shift)


def other_spacing(folder: Path) -> None:
    edit(folder / "1-005.dcm", lambda dataset: setattr(dataset, "PixelSpacing", [2, 2]))


def other_rows(folder: Path) -> None:
    edit(folder / "1-005.dcm", lambda dataset: setattr(dataset, "Rows", 15))


def no_position(folder: Path) -> None:
    def delete(dataset: pydicom.Dataset) -> None:
        del dataset.ImagePositionPatient

    edit(folder / "1-005.dcm", delete)


def no_unit_vectors(folder: Path) -> None:
    for path in folder.iterdir():
        edit(path, lambda dataset: setattr(dataset, "ImageOrientationPatient", [1, 0, 0, 0.5, 1, 0]))


def huge(folder: Path) -> None:
    for path in folder.iterdir():
        edit(path, lambda dataset: setattr(dataset, "Rows", 60000))


def one_slice(folder: Path) -> None:
    for path in list(folder.iterdir())[1:]:
        path.unlink()


def set_tag(name: str, value: object, every: bool = False) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for path in folder.iterdir() if every else [folder / "1-005.dcm"]:
            edit(path, lambda dataset: setattr(dataset, name, value))

    return damage


def delete_tag(name: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "1-005.dcm", lambda dataset: delattr(dataset, name))


def raw_slope(folder: Path) -> None:
    """Not a number, in letters that pydicom itself would not write."""
    path = folder / "1-005.dcm"
    edit(path, lambda dataset: setattr(dataset, "RescaleSlope", "1.375"))
    path.write_bytes(path.read_bytes().replace(b"1.375", b"nan  "))


def cut_header(folder: Path) -> None:
    """The end slice, so that no gap betrays it."""
    path = folder / "1-001.dcm"
    path.write_bytes(path.read_bytes()[:300])


def eight_bit(folder: Path) -> None:
    def change(dataset: pydicom.Dataset) -> None:
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
        dataset.PixelData = dataset.PixelData[::2]

    edit(folder / "1-005.dcm", change)


def deflated(folder: Path) -> None:
    path = folder / "1-005.dcm"
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    dataset.save_as(path)


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (remove, "missing-slices"),
        (duplicate, "duplicate-position"),
        (truncate, "undecodable-file"),
        (scout, "mixed-orientation"),
        (tilt, "gantry-tilt"),
        (shift_one, "non-uniform-spacing"),
        (other_spacing, "mixed-spacing"),
        (other_rows, "mixed-shape"),
        (no_position, "missing-tags"),
        (no_unit_vectors, "bad-orientation"),
        (huge, "absurd-size"),
        (one_slice, "too-few-slices"),
        (deflated, "undecodable-file"),
        (cut_header, "unreadable-file"),
        (eight_bit, "undecodable-file"),
        (raw_slope, "undecodable-file"),
        (delete_tag("RescaleIntercept"), "undecodable-file"),
        (delete_tag("PixelData"), "undecodable-file"),
        (set_tag("RescaleSlope", "0"), "undecodable-file"),
        (set_tag("RescaleSlope", "-1"), "undecodable-file"),
        (set_tag("RescaleSlope", None), "undecodable-file"),
        (set_tag("RescaleSlope", ["1", "2"]), "undecodable-file"),
        (set_tag("NumberOfFrames", 2), "undecodable-file"),
        (set_tag("PatientID", "SOMEBODY ELSE"), "mixed-patient"),
        (set_tag("PixelSpacing", ["1e30", "1e30"], every=True), "absurd-size"),
        (set_tag("PixelSpacing", ["0", "0"], every=True), "absurd-size"),
        (set_tag("Rows", 0, every=True), "absurd-size"),
        (set_tag("SeriesInstanceUID", "", every=True), "missing-tags"),
    ],
)
def test_defects_are_refused_with_their_code(folder: Path, damage: Callable[[Path], None], code: str) -> None:
    damage(folder)
    (series,) = dicom.find_series(folder)
    with pytest.raises(SeriesRejected) as refusal:
        dicom.read(series)
    assert refusal.value.code == code
    assert "\n" not in str(refusal.value)


def test_a_damaged_file_is_named(folder: Path) -> None:
    truncate(folder)
    with pytest.raises(SeriesRejected, match=r"1-005\.dcm"):
        read_only_series(folder)


def test_a_damaged_file_among_many_series_does_not_reject_them_all(folder: Path) -> None:
    """Flat downloads hold many series in one folder: whose slice a damaged file was cannot be told."""
    dicom.write_series(folder.parent / "other", volume(series_uid="1.2.3.5"), "test")
    for path in (folder.parent / "other").iterdir():
        path.rename(folder / f"other-{path.name}")
    (folder / "damaged.dcm").write_bytes((folder / "1-001.dcm").read_bytes()[:300])
    unknown, one, two = sorted(dicom.find_series(folder), key=lambda series: series.origin.series_uid)
    assert dicom.read(one).hu.shape == dicom.read(two).hu.shape
    with pytest.raises(SeriesRejected, match=r"unreadable-file.*damaged\.dcm"):
        dicom.read(unknown)


def test_texts_are_made_safe_for_one_line(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(b"TEST-01", b"T\n\x00T-01"))
    (series,) = dicom.find_series(folder)
    assert series.origin.patient_id == "TT-01"


def test_a_series_that_is_written_again_leaves_nothing_of_the_old_one(folder: Path) -> None:
    dicom.write_series(folder, volume(shape=(5, 16, 20)), "test")
    assert len(list(folder.iterdir())) == 5
    assert [path.name for path in folder.parent.iterdir()] == ["series"]


def test_hidden_folders_are_passed_over(folder: Path) -> None:
    """An interrupted writer leaves one."""
    folder.rename(folder.parent / ".series.tmp-1")
    with pytest.raises(InputError, match="no DICOM CT"):
        dicom.find_series(folder.parent)


def test_folders_without_ct_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no DICOM CT"):
        dicom.find_series(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        dicom.find_series(tmp_path / "nowhere")


def test_symbolic_links_are_not_followed(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "link").symlink_to(folder)
    (elsewhere / "link.dcm").symlink_to(folder / "1-001.dcm")
    with pytest.raises(InputError, match="no DICOM CT"):
        dicom.find_series(elsewhere)


def test_lidc_0001_is_read_as_it_is_known(real_data: Path) -> None:
    (series,) = dicom.find_series(real_data / "lidc-idri-0001")
    lidc.check_complete(series)
    volume = dicom.read(series)
    assert volume.hu.shape == (133, 512, 512)
    assert volume.spacing_mm == pytest.approx([0.703125, 0.703125, 2.5])
    assert (volume.hu.min(), volume.hu.max()) == dicom.HU_CLAMP
    assert volume.origin.patient_id == "LIDC-IDRI-0001"


def test_interrupted_downloads_of_lidc_are_incomplete(real_data: Path) -> None:
    found = dicom.find_series(real_data / "lidc-tcia-layout-partial")
    assert [len(one.slices) for one in found] == [84, 24, 16]
    for one, expected in zip(found, (133, 261, 140), strict=True):
        assert lidc.expected_slices(one.origin.series_uid) == expected
        with pytest.raises(SeriesRejected, match=f"of {expected} slices"):
            lidc.check_complete(one)


def test_a_series_that_is_not_lidc_has_no_expectation(folder: Path) -> None:
    (series,) = dicom.find_series(folder)
    assert lidc.expected_slices(series.origin.series_uid) is None
    lidc.check_complete(series)
