"""What drrgen writes is what the document says and what svdrr reads; anything else is refused with the cure."""

import hashlib
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from tests.contract import schema

import drrgen.errors
import drrgen.shards
import svdrr.errors
import svdrr.shards

GOLDEN = Path(__file__).parent / "golden"


def test_one_version_in_document_writer_and_reader() -> None:
    assert schema.version() == drrgen.shards.VERSION == svdrr.shards.SCHEMA_VERSION


def test_the_document_has_tables() -> None:
    """A checker that reads nothing finds nothing wrong."""
    assert sum(row.required == "MUST" for row in schema.datasets()) == 6
    assert sum(row.required == "MUST" for row in schema.attributes()) > 15


def test_drrgen_writes_what_the_document_says(shard_path: Path) -> None:
    with h5py.File(shard_path) as file:
        assert schema.violations(file) == []
        name = hashlib.sha256(file["ct"].attrs["series_uid"].encode()).hexdigest()[:8]
        assert shard_path.name == f"PHANTOM-0000_{name}.h5"
        for size in file["views"].attrs["levels"]:
            assert file[f"images/{size}"].chunks == (1, size, size)


def test_the_checker_and_validate_find_the_same(shard_path: Path, tmp_path: Path) -> None:
    """Whatever MUST is taken away, the document's checker and `drrgen validate` both notice."""
    datasets = [row.path.replace("<size>", "32") for row in schema.datasets() if row.required == "MUST"]
    attributes = [
        (row.on.replace("<size>", "32"), name)
        for row in schema.attributes()
        if row.required == "MUST"
        for name in re.findall(r"`(\w+)`", row.names)
    ]
    # a rendered shard must have all that is known of its CT
    attributes += [("ct", name) for name in ("study_uid", "series_uid", "spacing_mm", "shape", "world_from_voxel")]
    attributes += [("ct", name) for name in ("hu_clamp", "table_removed", "defects", "repairs", "volume_sha256")]
    for number, what in enumerate([*datasets, *attributes]):
        path = tmp_path / f"{number}.h5"
        shutil.copy(shard_path, path)
        with h5py.File(path, "r+") as file:
            if isinstance(what, str):
                del file[what]
            else:
                del file[what[0]].attrs[what[1]]
        if what not in attributes or what[0] != "ct":
            with h5py.File(path) as file:
                assert schema.violations(file), what
        assert drrgen.shards.violations(path), what


def test_svdrr_reads_what_drrgen_wrote(shard_path: Path) -> None:
    theirs = svdrr.shards.open_shard(shard_path)
    with drrgen.shards.Shard(shard_path) as ours:
        assert theirs.patient_id == ours.patient_id
        assert list(theirs.levels) == ours.levels
        assert np.array_equal(theirs.azimuth_deg, ours.azimuth_deg)
        assert np.array_equal(theirs.elevation_deg, ours.elevation_deg)
        for size in ours.levels:
            images = theirs.images(size)
            for view in (0, 5, len(ours) - 1):
                assert np.array_equal(images[view], ours.line_integrals(size, view))
    assert (theirs.sdd_mm, theirs.sod_mm) == (1800, 1640)
    assert theirs.detector_mm == pytest.approx(432)


def test_a_zstd_shard_is_the_same_to_every_reader(shard_path: Path, zstd_path: Path) -> None:
    import hdf5plugin  # noqa: F401

    assert drrgen.shards.violations(zstd_path) == []
    with h5py.File(shard_path) as deflated, h5py.File(zstd_path) as zstd:
        assert schema.violations(zstd) == []
        for path in (f"{name}/{size}" for name in ("images", "truncation") for size in (64, 32)):
            assert [codes(file[path]) for file in (deflated, zstd)] == [[2, 1], [2, 32015]]
            assert np.array_equal(deflated[path][:], zstd[path][:])
    with drrgen.shards.Shard(shard_path) as deflated, drrgen.shards.Shard(zstd_path) as zstd:
        assert np.array_equal(deflated.line_integrals(64, 5), zstd.line_integrals(64, 5))
        assert np.array_equal(deflated.truncation(32, 5), zstd.truncation(32, 5))
    theirs = [svdrr.shards.open_shard(path) for path in (shard_path, zstd_path)]
    assert theirs[0].digest == theirs[1].digest
    for size in (64, 32):
        assert np.array_equal(*(shard.images(size) for shard in theirs))


def codes(dataset: h5py.Dataset) -> list[int]:
    """The numbers of its filters, as the document has them."""
    made = dataset.id.get_create_plist()
    return [made.get_filter(number)[0] for number in range(made.get_nfilters())]


READERS = [
    "import drrgen.shards; drrgen.shards.Shard(path).line_integrals(64, 3)",
    "import drrgen.shards; assert drrgen.shards.violations(path) == []",
    "import svdrr.shards; svdrr.shards.open_shard(path).images(64, [3])",
    "import pickle; pickle.loads({}).images(64, [3])",
]


@pytest.mark.parametrize("reader", READERS)
def test_a_process_that_has_not_read_zstd_before_does(zstd_path: Path, reader: str) -> None:
    """Here HDF5 may have the filter from another test. A process that loads data gets its shard by pickle."""
    code = reader.format(repr(pickle.dumps(svdrr.shards.open_shard(zstd_path))))
    subprocess.run(
        [sys.executable, "-c", f"import pathlib; path = pathlib.Path({str(zstd_path)!r}); {code}"], check=True
    )


def test_a_damaged_zstd_chunk_is_found_by_both(zstd_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.h5"
    shutil.copy(zstd_path, path)
    with h5py.File(path, "r+") as file:
        stored = file["images/64"].id
        _, payload = stored.read_direct_chunk((7, 0, 0))
        stored.write_direct_chunk((7, 0, 0), payload[:200] + bytes([payload[200] ^ 1]) + payload[201:])
    assert drrgen.shards.violations(path)[0].startswith("images/64: view 7 is damaged")
    with drrgen.shards.Shard(path) as ours:
        ours.line_integrals(64, 6)
        with pytest.raises(drrgen.errors.InputError, match="view 7 of level 64 is damaged: render it again"):
            ours.line_integrals(64, 7)
    theirs = svdrr.shards.open_shard(path)
    theirs.images(64, [6])
    with pytest.raises(svdrr.errors.InputError, match=r"cannot be read .*: delete it and give"):
        theirs.images(64, [7])


def test_svdrr_without_hdf5plugin_says_how_to_get_it(zstd_path: Path, shard_path: Path, monkeypatch) -> None:
    shard = svdrr.shards.open_shard(zstd_path)
    monkeypatch.setitem(sys.modules, "hdf5plugin", None)
    for attempt in (lambda: svdrr.shards.open_shard(zstd_path), lambda: shard.images(64, [0])):
        with pytest.raises(svdrr.errors.InputError, match=r"needs hdf5plugin, .*: pip install 'svdrr\[zstd\]'"):
            attempt()
    svdrr.shards.open_shard(shard_path).images(64, [0])


def test_the_documents_reader_works_as_printed(shard_path: Path) -> None:
    text = (schema.DOCS / "shard-schema.md").read_text()
    scope: dict = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], scope)
    image = scope["line_integrals"](shard_path, 64, 3)
    assert np.array_equal(image, svdrr.shards.open_shard(shard_path).images(64, [3])[0])


def delete(path: str):
    return lambda file: file.__delitem__(path)


def attribute(path: str, name: str, value: object):
    return lambda file: file[path].attrs.__setitem__(name, value)


def replace(path: str, array: np.ndarray):
    def change(file: h5py.File) -> None:
        del file[path]
        file[path] = array

    return change


REFUSALS = [
    (attribute("/", "schema_version", "2.0"), r"2\.0.*1\.|1\..*2\.0", "install"),
    (attribute("/", "schema", "other"), "drr-sphere", "render"),
    (attribute("/", "complete", False), "complete", "render"),
    (lambda file: file.attrs.__delitem__("complete"), "complete", "render"),
]


@pytest.mark.parametrize(("damage", "what", "cure"), REFUSALS)
def test_both_refuse_what_is_no_finished_shard_of_this_version(shard_path, tmp_path, damage, what, cure) -> None:
    path = tmp_path / "bad.h5"
    shutil.copy(shard_path, path)
    with h5py.File(path, "r+") as file:
        damage(file)
    with pytest.raises(drrgen.errors.InputError, match=what) as ours:
        drrgen.shards.Shard(path)
    with pytest.raises(svdrr.errors.InputError, match=what) as theirs:
        svdrr.shards.open_shard(path)
    for refusal in (ours, theirs):
        assert cure in str(refusal.value)
        assert "bad.h5" in str(refusal.value)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (delete("views/azimuth_deg"), "views/azimuth_deg"),
        (delete("views/projection"), "views/projection"),
        (delete("images/32"), "images/32"),
        (delete("checks/64/crc32"), "checks/64/crc32"),
        (replace("views/source_mm", np.zeros((24, 3), np.float32)), "views/source_mm"),
        (replace("images/64", np.zeros((24, 64, 64), np.int16)), "images/64"),
        (replace("images/64", np.zeros((23, 64, 64), np.uint16)), "images/64"),
        (lambda file: file["views"].attrs.__delitem__("sdd_mm"), "sdd_mm"),
    ],
)
def test_the_reader_refuses_missing_and_misshapen_parts(shard_path, tmp_path, damage, what: str) -> None:
    path = tmp_path / "bad.h5"
    shutil.copy(shard_path, path)
    with h5py.File(path, "r+") as file:
        damage(file)
    with pytest.raises(svdrr.errors.InputError, match=what) as refusal:
        svdrr.shards.open_shard(path)
    assert "render it again" in str(refusal.value)
    with pytest.raises(drrgen.errors.InputError, match=what):
        drrgen.shards.Shard(path)
    assert any(what in line for line in drrgen.shards.violations(path))


def test_a_flipped_bit_is_found_when_the_image_is_read(shard_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.h5"
    shutil.copy(shard_path, path)
    with h5py.File(path, "r+") as file:
        file["images/64"][7, 30, 30] ^= 1
    shard = svdrr.shards.open_shard(path)
    shard.images(64, [6])
    with pytest.raises(svdrr.errors.InputError, match="image 7 of level 64"):
        shard.images(64, [7])


def test_later_minor_versions_are_read_and_their_additions_ignored(shard_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "later.h5"
    shutil.copy(shard_path, path)
    with h5py.File(path, "r+") as file:
        file.attrs["schema_version"] = "1.7"
        file["images_metal/64"] = np.zeros(3)
        file.attrs["mood"] = "good"
    assert len(svdrr.shards.open_shard(path)) == len(svdrr.shards.open_shard(shard_path))
    drrgen.shards.Shard(path).__exit__(None, None, None)
    assert drrgen.shards.violations(path) == []


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*/*.h5")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_golden_shards_stay_readable(path: Path) -> None:
    """Files of released versions are kept for ever and never made anew; their pixels are known by their sum."""
    assert drrgen.shards.violations(path) == []
    shard = svdrr.shards.open_shard(path)
    known = dict(line.split(": ") for line in path.with_suffix(".txt").read_text().splitlines())
    assert shard.patient_id == known["patient"]
    assert len(shard) == int(known["views"])
    images = shard.images(max(shard.levels))
    assert images.sum(dtype=np.float64) == pytest.approx(float(known["sum of line integrals"]), rel=1e-9)
    with h5py.File(path) as file:
        assert schema.violations(file) == []


def test_the_golden_shard_of_1_1_has_nodules_in_every_dataset_of_the_document() -> None:
    with h5py.File(GOLDEN / "1.1" / "tiny.h5") as file:
        paths = [row.path for row in schema.datasets() if row.path.startswith("/nodules/")]
        assert len(paths) == 13
        for path in paths:
            for size in (64, 32):
                assert file[path.replace("<size>", str(size))].size > 0
        assert file["nodules/readers"][:].tolist() == [4, 1]
        assert file["nodules/ratings/malignancy"][:].tolist() == [[5, 4, 4, 3], [2, 0, 0, 0]]
        assert file.attrs["dataset"] == "drrgen phantoms"


def test_the_golden_shard_of_1_2_has_what_that_version_adds() -> None:
    """By the document alone: its line integrals of water, its sum of soft and bone, its energy."""
    with h5py.File(GOLDEN / "1.2" / "tiny.h5") as file:
        for path in (row.path for row in schema.datasets()):
            if path.startswith(("/spectrum/", "/images_", "/checks/")):
                for size in (64, 32):
                    assert file[path.replace("<size>", str(size))].size > 0
        for name in (row.names.strip("`") for row in schema.attributes() if row.on == "/spectrum"):
            assert name in file["spectrum"].attrs
        assert file["spectrum"].attrs["name"] == "chest120"
        energy_kev, weight, mu_water, _ = (
            file[f"spectrum/{name}"][:] for name in ("energy_kev", "weight", "mu_water_per_mm", "bone_factor")
        )
        assert weight @ energy_kev == pytest.approx(file["spectrum"].attrs["mean_kev"])
        # 0.1 keV is 0.1 % of water's attenuation
        effective = -np.log(weight @ np.exp(-200 * mu_water)) / 200
        assert file["images/64"].attrs["mu_water_per_mm"] == pytest.approx(effective, rel=1e-3)
        whole, soft, bone = (file[f"{name}/64"][:].astype(int) for name in ("images", "images_soft", "images_bone"))
        assert np.abs(whole - soft - bone).max() <= 1
        assert bone.max() > 4096


def test_the_golden_shard_of_1_3_is_of_the_filter_that_it_adds() -> None:
    with h5py.File(GOLDEN / "1.3" / "tiny.h5") as file:
        for size in (64, 32):
            assert codes(file[f"images/{size}"]) == codes(file[f"truncation/{size}"]) == [2, 32015]


def test_nodules_are_cut_out_as_the_document_prints_it() -> None:
    """The first nodule's box is columns 39.8 to 43.1, rows 33.2 to 36.5; the second's lies left of the image."""
    text = (schema.DOCS / "how-to" / "nodules.md").read_text()
    scope: dict = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], scope)
    path = GOLDEN / "1.1" / "tiny.h5"
    found = scope["cut_out"](path, 64, 0, 0, margin=1)
    assert np.array_equal(found, svdrr.shards.open_shard(path).images(64, [0])[0][32:38, 39:45])
    assert scope["cut_out"](path, 64, 0, 1, margin=1).size == 0


def test_there_is_a_golden_shard_of_this_version() -> None:
    assert list((GOLDEN / schema.version()).glob("*.h5"))
