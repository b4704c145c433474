"""Reading sound series: what is written comes back, in whatever order, orientation and encoding it is stored."""

import os
import signal
import tracemalloc
from pathlib import Path

import numpy as np
import pydicom
import pytest
from tests.drrgen import damage
from tests.drrgen.volumes import volume

from drrgen import dicom
from drrgen.defects import SeriesRejected
from drrgen.volume import HU_CLAMP, Volume
from drrgen.worker import Crashed, Worker


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


def test_round_trip(folder: Path, written: Volume) -> None:
    back = read_only_series(folder)
    assert np.array_equal(back.hu, written.hu)
    assert np.allclose(back.world_from_voxel, written.world_from_voxel, atol=1e-6)  # decimal strings of 8 digits
    assert back.origin == written.origin
    assert back.defects == back.repairs == ()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(damage.shuffled_names, id="shuffled names"),
        pytest.param(damage.feet_first, id="feet first"),
        pytest.param(damage.junk, id="other files beside them"),
        pytest.param(damage.compressed("JPEG"), id="lossless JPEG"),
        pytest.param(damage.compressed("JPEG2000"), id="JPEG 2000"),
        pytest.param(damage.run_length, id="run length"),
        pytest.param(damage.uncompressed_syntax("1.2.840.10008.1.2"), id="implicit VR"),
        pytest.param(damage.uncompressed_syntax("1.2.840.10008.1.2.2"), id="big endian"),
        pytest.param(damage.set_tag("SliceThickness", "9", every=True), id="another slice thickness"),
        pytest.param(damage.set_tag("SpacingBetweenSlices", "9", every=True), id="another SpacingBetweenSlices"),
    ],
)
def test_the_volume_does_not_depend_on_how_it_is_stored(folder: Path, written: Volume, change) -> None:
    change(folder)
    back = read_only_series(folder)
    assert np.array_equal(back.hu, written.hu)
    assert np.allclose(back.world_from_voxel, written.world_from_voxel, atol=1e-6)


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
    """Every second slice has a slope of its own, as PET/CT scanners write them."""
    expected = written.hu.astype(int)
    for number, path in enumerate(sorted(folder.iterdir())[::-1]):
        if number % 2:
            damage.edit(path, lambda dataset: setattr(dataset, "RescaleSlope", "2"))
            expected[number] = (expected[number] + 1000) * 2 - 1000
    assert np.array_equal(read_only_series(folder).hu, np.clip(expected, *HU_CLAMP))


def test_signed_pixels(folder: Path, written: Volume) -> None:
    for path in folder.iterdir():

        def to_signed(dataset: pydicom.Dataset) -> None:
            stored = dataset.pixel_array.astype(np.int32) + HU_CLAMP[0]
            dataset.PixelRepresentation, dataset.RescaleIntercept = 1, 0
            dataset.PixelData = stored.astype("<i2").tobytes()

        damage.edit(path, to_signed)
    assert np.array_equal(read_only_series(folder).hu, written.hu)


def test_padding_outside_the_scanners_circle_is_air(folder: Path) -> None:
    """GE writes -2000 there and names it in PixelPaddingValue, or does not: after the clamp both are -1000 HU."""

    def pad(dataset: pydicom.Dataset) -> None:
        stored = np.full((16, 20), -2000, "<i2")
        stored[8:12] = 1024  # somebody
        dataset.PixelRepresentation, dataset.RescaleIntercept, dataset.PixelData = 1, -1024, stored.tobytes()

    damage.edit_all(folder.iterdir(), pad)
    hu = read_only_series(folder).hu
    assert (hu[:, :8] == -1000).all()
    assert (hu[:, 8:12] == 0).all()


def test_a_series_that_is_written_again_leaves_nothing_of_the_old_one(folder: Path) -> None:
    dicom.write_series(folder, volume(shape=(9, 16, 20)), "test")
    assert len(list(folder.iterdir())) == 9
    assert [path.name for path in folder.parent.iterdir()] == ["series"]


def test_another_process_decodes_the_same(folder: Path, written: Volume) -> None:
    (series,) = dicom.find_series(folder)
    with Worker() as worker:
        for _ in range(2):  # the process serves any number of series
            assert np.array_equal(dicom.read(series, decode=dicom.decoder(worker)).hu, written.hu)


def test_a_file_that_goes_bad_after_it_was_indexed_is_named(folder: Path) -> None:
    (series,) = dicom.find_series(folder)
    damage.truncate(folder)
    with Worker() as worker:
        with pytest.raises(SeriesRejected, match=r"undecodable-file: .* \(1-005\.dcm\)"):
            dicom.read(series, decode=dicom.decoder(worker))
        with pytest.raises(SeriesRejected, match=r"undecodable-file: .* \(1-005\.dcm\)"):
            dicom.read(series)


def test_a_crash_of_the_decoder_costs_one_series(folder: Path, written: Volume, tmp_path: Path) -> None:
    (series,) = dicom.find_series(folder)
    with Worker() as worker:
        images = dicom.decoder(worker)(series.slices)
        next(images)
        worker._process.kill()
        with pytest.raises(SeriesRejected, match=r"undecodable-file: .*crashed"):
            list(images)
        assert np.array_equal(dicom.read(series, decode=dicom.decoder(worker)).hu, written.hu)


def test_what_a_terminal_or_a_scheduler_sends_to_all_does_not_reach_the_decoder(folder: Path, written: Volume) -> None:
    (series,) = dicom.find_series(folder)
    with Worker() as worker:
        images = dicom.decoder(worker)(series.slices)
        next(images)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker._process.pid, number)
        assert len(list(images)) == len(series.slices) - 1
    with pytest.raises(Crashed):  # nor is a process left behind by a thread that reads on
        next(worker.run(damage.hang, None))


def test_a_decoder_that_hangs_is_ended(folder: Path, written: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what hangs has little time: on a busy machine the start of the process alone takes seconds."""
    with Worker() as worker:
        assert np.array_equal(dicom.read(*dicom.find_series(folder), decode=dicom.decoder(worker)).hu, written.hu)
        process = worker._process
        with monkeypatch.context() as hurried:
            hurried.setattr(worker, "_limit_s", 0.5)
            with pytest.raises(Crashed, match=r"did not finish in 0\.5 seconds"):
                next(worker.run(damage.hang, None))
        assert not process.is_alive()
        assert np.array_equal(dicom.read(*dicom.find_series(folder), decode=dicom.decoder(worker)).hu, written.hu)


def test_a_file_that_is_another_slice_by_now_is_refused(folder: Path) -> None:
    """Files swapped between index and reading, size and all: the volume would be scrambled."""
    (series,) = dicom.find_series(folder)
    one, other = folder / "1-003.dcm", folder / "1-009.dcm"
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    with pytest.raises(SeriesRejected, match="not the slice any more"):
        dicom.read(series)


def test_lidc_0001_is_read_as_it_is_known(real_data: Path) -> None:
    (series,) = dicom.find_series(real_data / "lidc-idri-0001")
    volume = dicom.read(series)
    assert volume.hu.shape == (133, 512, 512)
    assert volume.spacing_mm == pytest.approx([0.703125, 0.703125, 2.5])
    assert (volume.hu.min(), volume.hu.max()) == HU_CLAMP
    assert volume.origin.patient_id == "LIDC-IDRI-0001"


@pytest.mark.parametrize("policy", ["reject", "repair"])
def test_memory_is_the_volume_and_a_slice(tmp_path: Path, policy: str) -> None:
    """One slice at a time, each for a while as float64 and as the bytes of its file; repairs hold two as float32."""
    written = volume(shape=(64, 256, 256))
    dicom.write_series(tmp_path / "series", written, "test")
    if policy == "repair":
        damage.remove(tmp_path / "series")
    (series,) = dicom.find_series(tmp_path)
    with Worker() as worker:
        tracemalloc.start()
        hu = dicom.read(series, policy, dicom.decoder(worker)).hu
        there = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        del hu
        hu = dicom.read(series, policy).hu
        here = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    slice_bytes = 256 * 256 * 2
    assert hu.nbytes == 64 * slice_bytes
    assert there < hu.nbytes + 16 * slice_bytes
    assert here < hu.nbytes + 24 * slice_bytes
