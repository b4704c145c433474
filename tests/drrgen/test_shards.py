"""Shards are whole or absent, say what they hold, and betray every change."""

import json
import sys
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from tests.drrgen.test_cli import drrgen as command
from tests.drrgen.volumes import create, volume

from drrgen import anatomy, beam, chunks, dicom, phantom, shards, truncation
from drrgen.errors import InputError
from drrgen.geometry import Detector, Views
from drrgen.nodules import RATINGS, AnnotatedNodule
from drrgen.render import quantised, render
from drrgen.volume import Volume

DETECTORS = [Detector(16, 4.0), Detector(8, 8.0)]
KINDS = ("images", "images_soft", "images_bone")
VIEWS = Views(np.array([0.0, 30, 60]), np.array([0.0, 10, 20]), np.zeros(3), 1800.0, 1640.0)


def pyramid(num_views: int = 3, seed: int = 0) -> dict[int, shards.Images]:
    fine = np.random.default_rng(seed).integers(0, 65536, (num_views, 16, 16)).astype(np.uint16)
    fine[0, :2, :3] = 65535  # six saturated pixels, and one at the level below
    return {16: fine, 8: shards.halved(fine)}


def begin(path: Path, about: Volume | None = None, **known):
    return create(
        path,
        about or volume(),
        VIEWS,
        DETECTORS,
        table_removed=True,
        config_json='{"grid": "x"}',
        licence="none",
        attribution="nobody",
        **known,
    )


def write(path: Path, **known) -> Path:
    with begin(path, **known) as writer:
        for batch in (slice(0, 2), slice(2, 3)):
            writer.append({size: images[batch] for size, images in pyramid().items()})
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "a.h5")


def nodule(x: float, num_readers: int) -> AnnotatedNodule:
    """A cube of 20 mm around (x, 0, 0)."""
    corners = np.stack(np.meshgrid([x - 10, x + 10], [-10, 10], [-10.0, 10]), -1).reshape(-1, 3)
    ratings = {name: tuple(range(1, num_readers + 1)) for name in RATINGS}
    return AnnotatedNodule(corners, np.array([x, 0, 0]), 28.3, num_readers, ratings)


@pytest.fixture
def with_nodules(tmp_path: Path) -> Path:
    """The second nodule lies beyond the images."""
    return write(tmp_path / "nodules.h5", nodules=[nodule(0, 3), nodule(100, 1)], dataset="LIDC-IDRI")


def test_nodules_are_written_for_every_view_and_level(with_nodules: Path) -> None:
    assert shards.violations(with_nodules) == []
    with shards.Shard(with_nodules) as shard:
        fine, coarse = shard.boxes(16), shard.boxes(8)
    # the face at the source is magnified by 1800 / (1640 - 10), to 11.04 mm or 2.76 pixels
    assert fine[0, 0] == pytest.approx(7.5 + 1800 / 1630 * 10 / 4 * np.array([-1, -1, 1, 1]))
    assert coarse[0, 0] == pytest.approx(3.5 + 1800 / 1630 * 10 / 8 * np.array([-1, -1, 1, 1]))
    assert fine[0, 1, 0] > 16
    assert fine.shape == coarse.shape == (3, 2, 4)
    with h5py.File(with_nodules) as file:
        assert file["nodules/readers"][:].tolist() == [3, 1]
        assert file["nodules/ratings/malignancy"][:].tolist() == [[1, 2, 3, 0], [1, 0, 0, 0]]
        assert file["nodules/centroid_mm"][:].tolist() == [[0, 0, 0], [100, 0, 0]]
        assert file["nodules/diameter_mm"][:].tolist() == [28.3, 28.3]
        assert file.attrs["dataset"] == "LIDC-IDRI"


def test_no_nodules_are_not_the_same_as_nothing_known(path: Path, tmp_path: Path) -> None:
    none = write(tmp_path / "none.h5", nodules=[])
    assert shards.violations(none) == []
    with shards.Shard(path) as unknown, shards.Shard(none) as known:
        assert unknown.boxes(16) is None
        assert known.boxes(8).shape == (3, 0, 4)
    with h5py.File(path) as file:
        assert "nodules" not in file
        assert "dataset" not in file.attrs


def changed(path: str, change):
    """Another dataset in the place of one."""

    def damage(file: h5py.File) -> None:
        old = file[path][:]
        del file[path]
        file[path] = change(old)

    return damage


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (changed("nodules/readers", lambda old: old.astype(np.int64)), "nodules/readers: not uint8 (2,)"),
        (changed("nodules/diameter_mm", lambda old: old[:1]), "nodules/diameter_mm: not float64 (2,)"),
        (changed("nodules/centroid_mm", lambda old: old[0]), "nodules/centroid_mm: not float64"),
        (changed("nodules/ratings/margin", lambda old: old[:, :3]), "nodules/ratings/margin: not uint8 (2, 4)"),
        (changed("nodules/boxes/8", lambda old: old[:2]), "nodules/boxes/8: not float32 (3, 2, 4)"),
        (changed("nodules/boxes/16", lambda old: old * np.nan), "nodules/boxes/16: not finite"),
        (changed("nodules/boxes/8", lambda old: old + 1), "nodules/boxes/8: not the boxes of the largest level"),
        (changed("nodules/centroid_mm", lambda old: old + 20), "nodules/boxes/16: a centroid is not in its box"),
        (changed("nodules/boxes/16", lambda old: old[..., [2, 3, 0, 1]]), "a centroid is not in its box"),
        (lambda file: file.attrs.__setitem__("dataset", 1), "attribute dataset is"),
    ],
)
def test_every_damage_to_nodules_is_named(with_nodules: Path, damage, expected: str) -> None:
    with h5py.File(with_nodules, "r+") as file:
        damage(file)
    assert any(expected in line for line in shards.violations(with_nodules)), shards.violations(with_nodules)


def test_part_of_what_may_be_known_of_nodules_is_sound(with_nodules: Path) -> None:
    """As schema 1.0 had it: each dataset MAY be there."""
    with h5py.File(with_nodules, "r+") as file:
        for name in ("centroid_mm", "readers", "ratings", "boxes/16"):
            del file["nodules"][name]
    assert shards.violations(with_nodules) == []


def test_a_finished_shard_is_sound_and_alone(path: Path) -> None:
    assert shards.violations(path) == []
    assert [one.name for one in path.parent.iterdir()] == ["a.h5"]


def test_what_is_written_comes_back(path: Path) -> None:
    with shards.Shard(path) as shard:
        assert shard.levels == [16, 8]
        assert shard.patient_id == "TEST-01"
        assert np.array_equal(shard.azimuth_deg, VIEWS.azimuth_deg)
        for size, images in pyramid().items():
            for view in range(3):
                assert np.array_equal(shard.line_integrals(size, view), images[view] / np.float32(4096))
    with h5py.File(path) as file:
        assert [file[f"images/{size}"].attrs["saturated_count"] for size in (16, 8)] == [6, 1]
        assert file["ct"].attrs["series_uid"] == "1.2.3.4"


def test_the_same_input_gives_the_same_bytes(path: Path, tmp_path: Path) -> None:
    assert write(tmp_path / "again.h5").read_bytes() == path.read_bytes()


def test_nothing_remains_of_an_interrupted_write(tmp_path: Path) -> None:
    def interrupted() -> None:
        with begin(tmp_path / "a.h5") as writer:
            writer.append(pyramid())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_forgets_views_leaves_nothing(tmp_path: Path) -> None:
    """Fill values would pass for images; their checksums, never written, do not."""
    with pytest.raises(OSError, match="CRC-32"), begin(tmp_path / "a.h5") as writer:
        writer.append({size: images[:2] for size, images in pyramid().items()})
    assert list(tmp_path.iterdir()) == []


def put(path: str, *where: int):
    """Change one number of a dataset."""

    def change(file: h5py.File) -> None:
        file[path][where] = file[path][where] + 100

    return change


def attribute(path: str, name: str, value: object):
    return lambda file: file[path].attrs.__setitem__(name, value)


def without(path: str, name: str):
    return lambda file: file[path].attrs.__delitem__(name)


def as_external(file: h5py.File) -> None:
    """Values that lie in another file: a reader would show whatever is there."""
    del file["images/16"]
    file.create_dataset("images/16", (3, 16, 16), np.uint16, external=[("/etc/passwd", 0, 3 * 16 * 16 * 2)])


def as_group(file: h5py.File) -> None:
    del file["images/16"]
    file.create_group("images/16")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (put("images/16", 1, 2, 3), "images/16: view 1 does not match its CRC-32"),
        (put("checks/8/crc32", 2), "images/8: view 2 does not match"),
        (put("views/azimuth_deg", 1), "views/source_mm: does not follow"),
        (put("views/source_mm", 1, 1), "views/source_mm: does not follow"),
        (put("views/projection", 1, 1, 1), "views/projection: does not follow"),
        (lambda file: file["views/azimuth_deg"].__setitem__(1, np.nan), "angles are not finite"),
        (attribute("/", "complete", False), "complete is not true"),
        (attribute("/", "complete", "False"), "complete"),
        (attribute("/", "schema_version", "2.0"), "schema_version is '2.0'"),
        (attribute("/", "schema_version", 1.0), "schema_version"),
        (attribute("/", "config_json", "{}"), "config_sha256"),
        (without("/", "licence"), "attribute licence is missing"),
        (without("ct", "spacing_mm"), "attribute spacing_mm is missing"),
        (without("ct", "repairs"), "attribute repairs is missing"),
        (attribute("ct", "shape", "big"), "attribute shape"),
        (attribute("images/16", "scale", 1.0), "scale"),
        (attribute("images/16", "offset", 5.0), "offset"),
        (attribute("images/16", "quantity", "photons"), "photons"),
        (attribute("views", "sdd_mm", -1.0), "sdd_mm"),
        (attribute("views", "isocentre_mm", [1.0, 2.0]), "isocentre_mm"),
        (attribute("views", "pixel_spacing_mm", [4.0, 4.0]), "pixel_spacing_mm"),
        (attribute("views", "levels", [16, 4]), "levels"),
        (attribute("views", "levels", "x"), "levels"),
        (lambda file: file.__delitem__("views/source_mm"), "views/source_mm: missing"),
        (lambda file: file.__delitem__("views"), "views: no such group"),
        (as_external, "kept in another file"),
        (as_group, "images/16: not uint16"),
    ],
)
def test_every_damage_is_named(path: Path, damage, expected: str) -> None:
    with h5py.File(path, "r+") as file:
        damage(file)
    assert any(expected in line for line in shards.violations(path)), shards.violations(path)


@pytest.fixture
def with_materials(tmp_path: Path) -> Path:
    """A shard of a spectrum whose wholes are soft and bone, each rounded; one pixel is beyond the scale."""
    rng = np.random.default_rng(3)
    soft, bone = rng.uniform(0, 5, (3, 16, 16)), rng.uniform(0, 3, (3, 16, 16))
    bone[1, 5, 5] = 15
    fine = quantised(np.stack([soft + bone, soft, bone], axis=1).astype(np.float32))
    path = tmp_path / "materials.h5"
    with begin(path, beam=beam.spectrum("carm80"), materials=True) as writer:
        writer.append({16: fine, 8: shards.halved(fine)})
    return path


def test_materials_and_spectrum_are_written_and_come_back(with_materials: Path, path: Path) -> None:
    assert shards.violations(with_materials) == []
    with shards.Shard(with_materials) as shard:
        assert shard.has_materials
        for size, steps in ((16, 1), (8, 2)):  # each average of rounded values is rounded again
            whole, soft, bone = (shard.line_integrals(size, 2, name) for name in KINDS)
            assert np.abs(whole - soft - bone).max() <= steps * shards.SCALE
            assert min(soft.mean(), bone.mean()) > 1
    with h5py.File(with_materials) as file:
        assert [file[f"{name}/16"].attrs["saturated_count"] for name in KINDS] == [1, 0, 0]
        carm = beam.spectrum("carm80")
        assert file["images/8"].attrs["energy_kev"] == carm.equivalent_kev
        assert np.array_equal(file["spectrum/weight"][:], carm.weight)
        assert file["spectrum"].attrs["kvp"] == 80
        assert "3 mm Al + 0.1 mm Cu" in file["spectrum"].attrs["description"]
    with shards.Shard(path) as plain, h5py.File(path) as file:
        assert not plain.has_materials
        assert "spectrum" not in file
        attributes = file["images/16"].attrs
        assert [attributes[name] for name in ("energy_kev", "mu_water_per_mm", "bone_factor")] == [60, 0.02059, 1.24]


def with_right_sum(path: str, size: int, *where: int):
    """Change a pixel and the checksum of its image: only a law that it breaks betrays it."""

    def change(file: h5py.File) -> None:
        put(f"{path}/{size}", *where)(file)
        name = path.replace("images", "crc32")
        image = np.ascontiguousarray(file[f"{path}/{size}"][where[0]], "<u2")
        file[f"checks/{size}/{name}"][where[0]] = zlib.crc32(image.data)

    return change


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (put("images_soft/16", 1, 2, 3), "images_soft/16: view 1 does not match its CRC-32"),
        (put("images_bone/8", 2, 2, 3), "images_bone/8: view 2 does not match its CRC-32"),
        (put("checks/8/crc32_bone", 0), "images_bone/8: view 0 does not match"),
        (with_right_sum("images_soft", 16, 1, 2, 3), "images_soft/16: view 1 and its bone image do not add up"),
        (with_right_sum("images_bone", 16, 2, 0, 0), "images_soft/16: view 2 and its bone image do not add up"),
        (with_right_sum("images_bone", 8, 2, 0, 0), "images_bone/8: view 2 is not the box average"),
        (lambda file: file.__delitem__("images_soft"), "images_soft/16: missing"),
        (lambda file: file.__delitem__("images_bone"), "images_bone/16: missing"),
        (lambda file: file.__delitem__("images_bone/8"), "images_bone/8: missing"),
        (lambda file: file.__delitem__("checks/16/crc32_soft"), "checks/16/crc32_soft: missing"),
        (attribute("images_soft/8", "scale", 1.0), "images_soft/8: quantity, scale, offset"),
        (without("images_bone/8", "saturated_count"), "saturated_count is missing"),
        (lambda file: file.__delitem__("spectrum/weight"), "spectrum/weight: missing"),
        (lambda file: file["spectrum/weight"].__setitem__(3, 0.5), "spectrum/weight: not shares"),
        (lambda file: file["spectrum/weight"].__setitem__(3, np.nan), "spectrum/weight: not shares"),
        (lambda file: file["spectrum/energy_kev"].__setitem__(3, 1.0), "spectrum: energies"),
        (lambda file: file["spectrum/mu_water_per_mm"].__setitem__(0, np.nan), "spectrum: energies"),
        (without("spectrum", "name"), "attribute name is missing"),
        (attribute("spectrum", "kvp", "80"), "attribute kvp is '80'"),
    ],
)
def test_every_damage_to_materials_and_spectrum_is_named(with_materials: Path, damage, expected: str) -> None:
    with h5py.File(with_materials, "r+") as file:
        damage(file)
    assert any(expected in line for line in shards.violations(with_materials)), shards.violations(with_materials)


def put_chunk(compression: str, payload, left_out: int = 0):
    """Another chunk in the place of one, behind HDF5's back."""

    def change(file: h5py.File) -> None:
        stored = file["images/16"].id
        _, old = stored.read_direct_chunk((1, 0, 0))
        # in between one of another size, without which HDF5 would keep the mask as it was
        for new in (b"between", payload(old, compression)):
            stored.write_direct_chunk((1, 0, 0), new, left_out)

    return change


def flipped(payload: bytes, compression: str) -> bytes:
    return payload[:100] + bytes([payload[100] ^ 16]) + payload[101:]


def of_size(side: int):
    return lambda payload, compression: chunks.encode(np.full((side, side), 77, np.uint16), compression).payload


DAMAGED_CHUNKS = [
    (flipped, 0, "view 1 is damaged"),
    (lambda payload, compression: payload[:-1], 0, "view 1 is damaged"),
    (lambda payload, compression: payload[:10], 0, "view 1 is damaged"),
    (lambda payload, compression: b"\0", 0, "view 1 is damaged"),
    (of_size(15), 0, "bytes instead of 512"),
    (of_size(17), 0, "bytes instead of 512"),
    (of_size(2000), 0, "bytes instead of 512"),
    (of_size(16), 0, "view 1 does not match its CRC-32"),
    (lambda payload, compression: payload, 1, "view 1 does not match its CRC-32"),
    (lambda payload, compression: payload, 2, "bytes instead of 512"),
    (lambda payload, compression: payload, 3, "bytes instead of 512"),
    (lambda payload, compression: bytes(512), 3, "view 1 does not match its CRC-32"),
]


@pytest.mark.parametrize("compression", chunks.FILTERS)
def test_every_damaged_chunk_is_named_and_nothing_else(tmp_path: Path, compression: str) -> None:
    path = write(tmp_path / "a.h5", compression=compression)
    whole = path.read_bytes()
    for payload, left_out, expected in DAMAGED_CHUNKS:
        path.write_bytes(whole)
        with h5py.File(path, "r+") as file:
            put_chunk(compression, payload, left_out)(file)
        found = shards.violations(path)
        assert expected in found[0]
        # and, where the chunk holds an image, that the level below is not its average
        assert all("view 1" in line for line in found), found
        assert len(found) <= 2


@pytest.mark.parametrize("compression", chunks.FILTERS)
def test_filters_may_be_left_out_of_a_chunk(tmp_path: Path, compression: str) -> None:
    path = write(tmp_path / "a.h5", compression=compression)
    with h5py.File(path, "r+") as file:
        put_chunk(compression, lambda *_: pyramid()[16][1].astype("<u2").tobytes(), 3)(file)
    assert shards.violations(path) == []


@pytest.mark.parametrize(
    "layout",
    [
        {},
        dict(chunks=(1, 16, 16)),
        dict(chunks=(2, 8, 16), shuffle=True, compression="gzip"),
        dict(chunks=(1, 16, 16), compression="gzip"),
        dict(chunks=(1, 16, 16), compression="lzf"),
        dict(chunks=(1, 16, 16), shuffle=True, compression="gzip", fletcher32=True),
        dict(chunks=(1, 16, 16), compression=32015),
    ],
    ids=str,
)
def test_other_layouts_that_hdf5_knows_are_sound_and_checked(path: Path, layout: dict) -> None:
    with h5py.File(path, "r+") as file:
        old, attributes = file["images/16"][:], dict(file["images/16"].attrs)
        del file["images/16"]
        file.create_dataset("images/16", data=old, **layout).attrs.update(attributes)
    assert shards.violations(path) == []
    with h5py.File(path, "r+") as file:
        put("images/16", 1, 2, 3)(file)
    assert shards.violations(path)[0] == "images/16: view 1 does not match its CRC-32"


def test_a_chunk_that_was_never_written_is_air(path: Path) -> None:
    """HDF5 reads its fill value; the checksum says whether that is the image."""
    with h5py.File(path, "r+") as file:
        for size in (16, 8):
            old, attributes = file[f"images/{size}"][:], dict(file[f"images/{size}"].attrs)
            del file[f"images/{size}"]
            new = file.create_dataset(
                f"images/{size}", old.shape, np.uint16, chunks=(1, size, size), **chunks.FILTERS["deflate"]
            )
            new.attrs.update(attributes)
            for view in (0, 2):
                new[view] = old[view]
    assert shards.violations(path)[0] == "images/16: view 1 does not match its CRC-32"
    with h5py.File(path, "r+") as file:
        for size in (16, 8):
            file[f"checks/{size}/crc32"][1] = zlib.crc32(bytes(2 * size * size))
    assert shards.violations(path) == []


def test_a_mistake_of_ours_is_found_by_hdf5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding and decoding that are wrong alike agree with one another, and with no other reader."""
    right = chunks._shuffled, chunks._unshuffled
    monkeypatch.setattr(chunks, "_shuffled", lambda image: right[0](image)[::-1].copy())
    monkeypatch.setattr(chunks, "_unshuffled", lambda planes: right[1](planes[::-1]))
    with pytest.raises(OSError, match="images/16: HDF5 reads another view 0"):
        write(tmp_path / "a.h5")


@pytest.mark.parametrize("missing", ["zstandard", "hdf5plugin"])
def test_a_zstd_shard_without_its_packages_is_one_line(tmp_path: Path, monkeypatch, missing: str) -> None:
    path = write(tmp_path / "a.h5", compression="zstd")
    monkeypatch.setitem(sys.modules, missing, None)
    for attempt in (shards.Shard, shards.violations, lambda path: write(path, compression="zstd")):
        with pytest.raises(InputError, match=rf"zstd needs {missing}, .*: pip install 'drrgen\[zstd\]'"):
            attempt(path)
    assert [one.name for one in tmp_path.iterdir()] == ["a.h5"]


def test_a_pyramid_that_is_no_average_is_named(tmp_path: Path) -> None:
    wrong = {16: pyramid()[16], 8: pyramid(seed=1)[8]}
    with pytest.raises(OSError, match="box average"), begin(tmp_path / "a.h5") as writer:
        writer.append(wrong)


@pytest.mark.parametrize("cut", [100, 5000])
def test_a_truncated_file_is_no_shard(path: Path, cut: int) -> None:
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(InputError, match="render it again"):
        shards.Shard(path)


def test_names_are_safe_and_unique() -> None:
    def name(patient_id: str, series_uid: str) -> str:
        origin = volume(series_uid=series_uid).origin
        return shards.file_name(type(origin)(patient_id, origin.study_uid, series_uid))

    assert name("LIDC-IDRI-0001", "1.2") == "LIDC-IDRI-0001_77ac319b.h5"
    assert "/" not in name("../../etc/passwd", "1.2")
    assert not name("../x", "1.2").startswith(".")
    assert name("same", "1.2") != name("same", "1.3")


def test_halving_rounds_halves_up_without_overflow() -> None:
    images = np.array([[[1, 0, 65535, 65535], [1, 0, 65535, 65535]]], np.uint16)
    assert shards.halved(images).tolist() == [[[1, 65535]]]


def test_quantisation_is_to_nearest_and_stops_at_the_end_of_the_scale() -> None:
    images = quantised(np.array([-1.0, 0.0, 1.0, 1.4 / 4096, 15.9999, 16.5, 99.0], np.float32))
    assert images.tolist() == [0, 0, 4096, 1, 65535, 65535, 65535]


@pytest.mark.parametrize("levels", [[65], [66, 33], [64, 32, 16]])
def test_render_makes_the_levels_that_are_asked_for(levels: list[int]) -> None:
    def ones(views: Views, detector: Detector):
        return np.ones((len(views), detector.shape, detector.shape), np.float32)

    (pyramid,) = render(ones, VIEWS, Detector(levels[0], 1.0), levels)
    assert {size: images.shape for size, images in pyramid.items()} == {size: (3, size, size) for size in levels}
    assert all((images == 4096).all() for images in pyramid.values())


def test_render_hands_out_every_view_once_in_order() -> None:
    """A projector that returns its view's azimuth: batches cover the views, levels are averages of one another."""

    def azimuth(views: Views, detector: Detector):
        return np.broadcast_to(views.azimuth_deg[:, None, None], (len(views), 1024, 1024)).astype(np.float32) / 4096

    views = Views(np.arange(40.0), np.zeros(40), np.zeros(3), 1800.0, 1640.0)
    batches = list(render(azimuth, views, Detector(1024, 0.4), [1024, 512]))
    assert len(batches) > 1
    for size in (1024, 512):
        assert np.concatenate([images[size][:, 0, 0] for images in batches]).tolist() == list(range(40))


def test_json_lists_in_ct_attributes(path: Path) -> None:
    with h5py.File(path) as file:
        assert json.loads(file["ct"].attrs["defects"]) == []


def test_truncation_marks_are_stored_at_every_level_and_checked(tmp_path: Path) -> None:
    """A shard rendered by `run` has them; a lower level that loses a mark, or another value, is a violation."""
    chest = phantom.voxelise(anatomy.thorax(0), (30, 64, 64), (6.0, 6.0, 6.0))  # 180 of its 340 mm
    dicom.write_series(tmp_path / "ct" / "series", chest, "chest")
    settings = ("--grid", "90deg", "--size", 64, "--levels", "64,32", "--out", tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        assert command("render", "--ct-dir", tmp_path / "ct", *settings, monkeypatch=patch) == 0
    (path,) = (tmp_path / "out").glob("*.h5")
    assert shards.violations(path) == []
    with h5py.File(path, "r+") as file:
        marks = file["truncation/64"][:]
        pa = int(np.flatnonzero((file["views/azimuth_deg"][:] == 0) & (file["views/elevation_deg"][:] == 0))[0])
        above = int(np.flatnonzero(file["views/elevation_deg"][:] == 90)[0])
        # from above every ray through the body leaves through an end; from the front only those near the ends
        assert 0 < marks[pa].mean() < 0.1 < marks[above].mean()
        assert np.array_equal(file["truncation/32"][:], truncation.halved(marks))
        row, column = np.argwhere(file["truncation/32"][above])[0]
        file["truncation/32"][above, row, column] = 0
    assert shards.violations(path) == [f"truncation/32: view {above} does not mark what the next larger level marks"]
    with h5py.File(path, "r+") as file:
        file["truncation/64"][0, 0, 0] = 7
    assert f"truncation/64: view {0} has other values than 0 and 1" in shards.violations(path)
