"""The reader gives what the closed forms say, and refuses each broken shard in one line with the cure."""

import pickle
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from tests.svdrr.shards_for_tests import ANGLES_DEG, cast, random_body, write_shard

from svdrr.errors import InputError
from svdrr.shards import open_folder, open_shard

HALF_A_COUNT = 0.5 / 4096 + 1e-6
"""What counts of 1/4096 lose, and float32 after them."""


def test_reads_what_was_written(a_shard: Path) -> None:
    shard = open_shard(a_shard)
    assert (shard.patient_id, shard.levels, len(shard)) == ("P-00", (32, 16), 2)
    assert (shard.sdd_mm, shard.sod_mm, shard.detector_mm) == (1800, 1640, 432)
    truth = cast(random_body(np.random.default_rng(0)), *ANGLES_DEG[4], 32)
    assert np.abs(shard.images(32, [1])[0] - truth).max() < HALF_A_COUNT
    boxes = truth.reshape(16, 2, 16, 2).mean(axis=(1, 3))
    assert np.abs(shard.images(16, [1])[0] - boxes).max() < 2 * HALF_A_COUNT
    assert shard.images(16).shape == (2, 16, 16)


def test_finds_the_nearest_view(a_shard: Path) -> None:
    shard = open_shard(a_shard)
    assert [shard.nearest_view(azimuth, 0) for azimuth in (-30, 10, 20, 350)] == [0, 0, 1, 0]


def test_goes_through_pickle_without_a_file_handle(a_shard: Path) -> None:
    shard = pickle.loads(pickle.dumps(open_shard(a_shard)))
    assert shard.images(16, [0]).shape == (1, 16, 16)


def test_the_digest_is_of_the_content_not_of_the_file(a_shard: Path, tmp_path: Path) -> None:
    body = random_body(np.random.default_rng(0))
    again = write_shard(tmp_path / "other name.h5", "P-00", body, ANGLES_DEG[3:5], (32, 16))
    assert open_shard(again).digest == open_shard(a_shard).digest
    with h5py.File(again, "a") as file:
        file["checks/16/crc32"][0] += 1
    assert open_shard(again).digest != open_shard(a_shard).digest


def test_newer_minor_versions_and_unknown_things_are_ignored(a_shard: Path) -> None:
    with h5py.File(a_shard, "a") as file:
        file.attrs["schema_version"] = "1.7"
        file["views/weather"] = ["sunny", "dull"]
    assert len(open_shard(a_shard)) == 2


def _set(name: str, value: object) -> Callable[[h5py.File], None]:
    return lambda file: file.attrs.__setitem__(name, value)


def _replace(path: str, data: np.ndarray) -> Callable[[h5py.File], None]:
    def damage(file: h5py.File) -> None:
        del file[path]
        file[path] = data

    return damage


def _delete(path: str) -> Callable[[h5py.File], None]:
    return lambda file: file.__delitem__(path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_set("schema", "something"), "not a drr-sphere shard"),
        (_set("schema_version", "2.0"), "schema 2.0, and this svdrr reads 1.x: install the svdrr that reads 2.0"),
        (_set("complete", False), "incomplete, its writer was stopped: run the same `drrgen render` again"),
        (lambda file: file.attrs.__delitem__("patient_id"), "attribute patient_id of / is missing: render it again"),
        (lambda file: file["views"].attrs.__delitem__("sdd_mm"), "attribute sdd_mm of /views is missing"),
        (lambda file: file["images/16"].attrs.__delitem__("scale"), "attribute scale of /images/16 is missing"),
        (_delete("views/azimuth_deg"), "dataset views/azimuth_deg is missing"),
        (_delete("images/16"), "dataset images/16 is missing"),
        (_delete("checks/32/crc32"), "dataset checks/32/crc32 is missing"),
        (_replace("images/16", np.zeros((2, 16, 16))), "images/16 is float64 .* the schema wants uint16"),
        (_replace("images/16", np.zeros((2, 16, 8), np.uint16)), r"images/16 is uint16 \(2, 16, 8\)"),
        (_replace("views/elevation_deg", np.zeros(3)), r"views/elevation_deg is float64 \(3,\)"),
        (_replace("views/azimuth_deg", np.zeros(0)), "holds no views"),
    ],
)
def test_refuses(a_shard: Path, damage: Callable[[h5py.File], None], words: str) -> None:
    with h5py.File(a_shard, "a") as file:
        damage(file)
    with pytest.raises(InputError, match=words) as refusal:
        open_shard(a_shard)
    assert str(refusal.value).startswith(str(a_shard))
    assert "\n" not in str(refusal.value)


def test_refuses_a_truncated_file_and_one_that_is_no_hdf5(a_shard: Path) -> None:
    whole = a_shard.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no HDF5"):
        a_shard.write_bytes(content)
        with pytest.raises(InputError, match="not a readable HDF5 file"):
            open_shard(a_shard)


def test_refuses_a_damaged_image(a_shard: Path) -> None:
    with h5py.File(a_shard, "a") as file:
        file["images/32"][1, 5, 5] += 1
    shard = open_shard(a_shard)
    assert shard.images(32, [0]).shape == (1, 32, 32)
    with pytest.raises(
        InputError, match="image 1 of level 32 fails its checksum: delete it and give the same `drrgen render`"
    ):
        shard.images(32)


def test_refuses_a_level_that_is_not_there(a_shard: Path) -> None:
    with pytest.raises(InputError, match="has images of 32, 16 pixels, not 64: render it again with 64"):
        open_shard(a_shard).images(64)


def test_refuses_no_folder_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no shard .* write some with `drrgen render"):
        open_folder(tmp_path)


def test_truncation_is_read_where_there_is_any(a_shard: Path) -> None:
    """Marks belong to the digest by being there: the schema has no checksum of them."""
    before = open_shard(a_shard)
    assert before.truncation(32, [0, 1]) is None
    marks = np.random.default_rng(0).integers(0, 2, (2, 32, 32)).astype(np.uint8)
    with h5py.File(a_shard, "r+") as file:
        file.create_dataset("truncation/32", data=marks, chunks=(1, 32, 32), compression="gzip")
        file["truncation/16"] = marks[:, :16]
    shard = open_shard(a_shard)
    assert np.array_equal(shard.truncation(32, [1, 0, 1]), marks[[1, 0, 1]])
    assert shard.digest != before.digest
    with pytest.raises(InputError, match=r"truncation/16 is uint8 \(2, 16, 32\): delete it"):
        shard.truncation(16, [0])
