"""CTs in one file: a place in the patient keeps its value, whatever the format; what is no CT in HU is refused."""

import gzip
import itertools
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st

from drrgen import volumefile
from drrgen.defects import SeriesRejected
from drrgen.volume import HU_CLAMP, Volume

TURN = np.array([[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1]]) @ [[1, 0, 0], [0, 0.8, -0.6], [0, 0.6, 0.8]]
SPACING = np.array([1.5, 1.25, 2.5])
POSITION = np.array([-30.0, 12.0, -240.0])


def noise(shape=(5, 6, 7), dtype=np.int16) -> np.ndarray:
    """HU with a tenth of air."""
    hu = np.random.default_rng(0).integers(-990, 2000, shape)
    hu.flat[:: hu.size // (hu.size // 10)] = -1000
    return hu.astype(dtype)


def image(values: np.ndarray | None = None, direction=TURN) -> SimpleITK.Image:
    made = SimpleITK.GetImageFromArray(noise() if values is None else values)
    made.SetSpacing(SPACING.tolist() + [1.0] * (made.GetDimension() - 3))
    if made.GetDimension() == 3:
        made.SetOrigin(POSITION.tolist())
        made.SetDirection(np.ravel(direction).tolist())
    return made


def nifti(values: np.ndarray | None = None, order: str = "<", **fields: object) -> bytes:
    """NIfTI-1 by hand from nifti1.h: voxel (i, j, k) lies at (2 i + 10, 3 j + 20, 4 k + 30) mm in RAS."""
    values = noise() if values is None else values
    datatype = {"i2": 4, "f4": 16, "u1": 2, "f8": 64}[values.dtype.str[1:]]
    given = {
        "dim": (3, *values.shape[::-1], 1, 1, 1, 1)[:8],
        "datatype": (datatype,),
        "bitpix": (values.itemsize * 8,),
        "pixdim": (1, 2, 3, 4, 1, 1, 1, 1),
        "vox_offset": (352,),
        "scl": (1, 0),
        "units": (2,),
        "codes": (0, 1),
        "quaternion": (0, 0, 0, 10, 20, 30),
        "srow": (2, 0, 0, 10, 0, 3, 0, 20, 0, 0, 4, 30),
        "magic": (b"n+1\0",),
    } | fields
    places = {"dim": "8h 40", "datatype": "h 70", "bitpix": "h 72", "pixdim": "8f 76", "vox_offset": "f 108"}
    places |= {"scl": "2f 112", "units": "B 123", "codes": "2h 252", "quaternion": "6f 256", "srow": "12f 280"}
    header = bytearray(352)
    struct.pack_into(f"{order}i", header, 0, 348)
    for name, place in (places | {"magic": "4s 344"}).items():
        kind, offset = place.split()
        struct.pack_into(order + kind, header, int(offset), *given[name])
    return bytes(header) + values.astype(values.dtype.newbyteorder(order)).tobytes()


META = """ObjectType = Image
NDims = 3
BinaryData = True
BinaryDataByteOrderMSB = False
CompressedData = False
TransformMatrix = 1 0 0 0 1 0 0 0 1
Offset = -198.1 -195 -335.2
CenterOfRotation = 0 0 0
AnatomicalOrientation = RAI
ElementSpacing = 1.5 1.25 2.5
DimSize = 7 6 5
ElementType = MET_SHORT
ElementDataFile = scan.raw
"""
NRRD = """NRRD0004
# a comment
type: short
dimension: 3
space: left-posterior-superior
sizes: 7 6 5
space directions: (1.5,0,0) (0,1.25,0) (0,0,2.5)
kinds: domain domain domain
endian: little
encoding: raw
space origin: (1,2,3)
key:=value

"""


def read(path: Path) -> Volume:
    return volumefile.read(volumefile.examine(path, path.parent))


def write(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path) -> str:
    """The code of the one-line refusal."""
    with pytest.raises(SeriesRejected) as caught:
        read(path)
    (defect,) = caught.value.defects
    assert defect.repair is None
    assert str(caught.value).isprintable()
    assert len(defect.message) < 300
    return caught.value.code


def assert_every_value_is_where_it_was(back: Volume, stored: np.ndarray, world_from_stored: np.ndarray) -> None:
    assert back.hu.dtype == np.int16
    assert back.hu.flags.c_contiguous
    assert back.hu.size == stored.size
    slices, rows, columns = stored.shape
    places = np.stack([*np.meshgrid(range(columns), range(rows), range(slices), indexing="ij")], -1).reshape(-1, 3)
    world = world_from_stored @ np.column_stack([places, np.ones(len(places))]).T
    voxels = (back.voxel_from_world @ world)[:3]
    i, j, k = np.rint(voxels).astype(int)
    assert np.abs(voxels - [i, j, k]).max() < 1e-3  # float32 in NIfTI; a coordinate of 300 mm has 3e-5
    assert np.array_equal(back.hu[k, j, i], stored[places[:, 2], places[:, 1], places[:, 0]])


def assert_turned(back: Volume) -> None:
    """Columns run to the left, rows to posterior, slices to superior."""
    axes = back.world_from_voxel[:3, :3] / back.spacing_mm
    assert (np.abs(axes).argmax(0) == range(3)).all()
    assert (np.diag(axes) > 0).all()


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mha", "a.mhd", "a.nrrd", "A.NII.GZ", "A.MHA", "A.NRRD"])
@pytest.mark.parametrize(("packed", "direction"), [(False, TURN), (True, np.eye(3))])
def test_round_trip(tmp_path: Path, name: str, packed: bool, direction: np.ndarray) -> None:
    made = image(direction=direction)
    SimpleITK.WriteImage(made, str(tmp_path / name.lower()), packed)
    (tmp_path / name.lower()).rename(tmp_path / name)
    file = volumefile.examine(tmp_path / name, tmp_path)
    back = volumefile.read(file)
    assert file.defects == ()
    assert np.allclose(file.spacing_mm, SPACING, rtol=1e-6)
    assert file.shape == back.hu.shape == (5, 6, 7)
    assert_turned(back)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = direction * SPACING, POSITION
    assert np.allclose(back.world_from_voxel, affine, atol=1e-4)
    assert np.array_equal(back.hu, noise())


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("name", ["a.nii", "a.mha", "a.nrrd"])
def test_any_storage_order_keeps_every_voxel_where_it_is(tmp_path: Path, order: tuple[int, ...], name: str) -> None:
    """All 48, half of them left-handed, oblique, and just as ITK itself would turn them."""
    for signs in itertools.product([1, -1], repeat=3):
        direction = TURN[:, order] * signs
        made = image(direction=direction)
        SimpleITK.WriteImage(made, str(tmp_path / name))
        file = volumefile.examine(tmp_path / name, tmp_path)
        back = volumefile.read(file)
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = direction * SPACING, POSITION
        assert_every_value_is_where_it_was(back, noise(), affine)
        assert_turned(back)
        assert file.shape == back.hu.shape
        assert np.allclose(file.spacing_mm, back.spacing_mm)
        turned = SimpleITK.DICOMOrient(made, "LPS")
        assert np.array_equal(back.hu, SimpleITK.GetArrayFromImage(turned))
        assert np.allclose(back.world_from_voxel[:3, 3], turned.GetOrigin(), atol=1e-3)


HALF = np.sqrt(0.5)
# Voxel to RAS by hand. A turn of 90 degrees about the z axis is the quaternion a = d = sqrt(1/2).
NIFTI = {
    "sform only": (dict(codes=(0, 1)), [[2, 0, 0, 10], [0, 3, 0, 20], [0, 0, 4, 30]]),
    "qform only": (dict(codes=(1, 0), srow=[0] * 12), [[2, 0, 0, 10], [0, 3, 0, 20], [0, 0, 4, 30]]),
    "both": (dict(codes=(1, 1)), [[2, 0, 0, 10], [0, 3, 0, 20], [0, 0, 4, 30]]),
    "big-endian": (dict(order=">"), [[2, 0, 0, 10], [0, 3, 0, 20], [0, 0, 4, 30]]),
    "units unknown": (dict(units=(0,)), [[2, 0, 0, 10], [0, 3, 0, 20], [0, 0, 4, 30]]),
    "left-handed qform": (
        dict(codes=(1, 0), pixdim=(-1, 2, 3, 4, 1, 1, 1, 1)),
        [[2, 0, 0, 10], [0, 3, 0, 20], [0, 0, -4, 30]],
    ),
    "turned qform": (
        dict(codes=(2, 0), quaternion=(0, 0, HALF, 10, 20, 30)),
        [[0, -3, 0, 10], [2, 0, 0, 20], [0, 0, 4, 30]],
    ),
    "qform turned by 180 degrees": (  # a = 0, as for every scan stored in LPS
        dict(codes=(1, 0), quaternion=(0, 0, 1, 10, 20, 30)),
        [[-2, 0, 0, 10], [0, -3, 0, 20], [0, 0, 4, 30]],
    ),
    "left-handed sform": (
        dict(srow=(-2, 0, 0, 10, 0, 3, 0, 20, 0, 0, 4, 30)),
        [[-2, 0, 0, 10], [0, 3, 0, 20], [0, 0, 4, 30]],
    ),
    "sagittal": (
        dict(srow=(0, 0, 4, 10, 2, 0, 0, 20, 0, 3, 0, 30)),
        [[0, 0, 4, 10], [2, 0, 0, 20], [0, 3, 0, 30]],
    ),
    "oblique": (
        dict(srow=(1.6, -1.8, 0, 10, 1.2, 2.4, 0, 20, 0, 0, 4, 30)),
        [[1.6, -1.8, 0, 10], [1.2, 2.4, 0, 20], [0, 0, 4, 30]],
    ),
    "metres": (
        dict(
            units=(1,),
            pixdim=(1, 0.002, 0.003, 0.004, 1, 1, 1, 1),
            srow=(0.002, 0, 0, 0.01, 0, 0.003, 0, 0.02, 0, 0, 0.004, 0.03),
        ),
        [[2, 0, 0, 10], [0, 3, 0, 20], [0, 0, 4, 30]],
    ),
    "micrometres": (
        dict(units=(3,), codes=(1, 0), pixdim=(1, 2e3, 3e3, 4e3, 1, 1, 1, 1), quaternion=(0, 0, 0, 1e4, 2e4, 3e4)),
        [[2, 0, 0, 10], [0, 3, 0, 20], [0, 0, 4, 30]],
    ),
    "a fourth dimension of 1": (dict(dim=(4, 7, 6, 5, 1, 1, 1, 1)), [[2, 0, 0, 10], [0, 3, 0, 20], [0, 0, 4, 30]]),
}


@pytest.mark.parametrize("case", NIFTI)
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_nifti_by_hand(tmp_path: Path, case: str, name: str) -> None:
    fields, ras_from_voxel = NIFTI[case]
    content = nifti(**fields)
    path = write(tmp_path, name, gzip.compress(content) if name.endswith("gz") else content)
    lps = np.vstack([np.diag([-1, -1, 1]) @ ras_from_voxel, [0, 0, 0, 1]])
    back = read(path)
    assert_every_value_is_where_it_was(back, noise(), lps)
    assert_turned(back)


def test_slope_and_intercept(tmp_path: Path) -> None:
    stored = ((noise().astype(int) + 1024) // 2).astype(np.int16)
    back = read(write(tmp_path, "a.nii", nifti(stored, scl=(2, -1024))))
    expected = np.clip(stored.astype(int) * 2 - 1024, *HU_CLAMP)
    assert np.array_equal(np.sort(back.hu, axis=None), np.sort(expected, axis=None))


@pytest.mark.parametrize("scl", [(0, 0), (np.nan, np.nan)])
def test_no_slope_means_as_stored(tmp_path: Path, scl) -> None:
    back = read(write(tmp_path, "a.nii", nifti(scl=scl)))
    assert np.array_equal(np.sort(back.hu, axis=None), np.sort(noise(), axis=None))


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.float64])
def test_rounded_to_nearest_and_clamped(tmp_path: Path, dtype: type) -> None:
    values = noise(dtype=dtype)
    values[0, 0, :4] = -3024, 30000, 7, -2
    if np.dtype(dtype).kind == "f":
        values[0, 0, 2:4] = 6.6, -1.6
    SimpleITK.WriteImage(image(values, np.eye(3)), str(tmp_path / "a.mha"))
    back = read(tmp_path / "a.mha")
    assert back.hu[0, 0, :4].tolist() == [-1000, 3071, 7, -2]
    assert np.array_equal(back.hu[1:], values[1:])


def test_luna16_header(tmp_path: Path) -> None:
    uid = "1.3.6.1.4.1.14519.5.2.1.6279.6001.105756658031515062000744821260"
    (tmp_path / "subset0").mkdir()
    path = write(tmp_path / "subset0", f"{uid}.mhd", META.replace("scan.raw", f"{uid}.raw"))
    write(tmp_path / "subset0", f"{uid}.raw", noise().tobytes())
    file = volumefile.examine(path, tmp_path)
    assert (file.origin.series_uid, file.origin.study_uid) == (uid, "")
    assert file.origin.patient_id == f"subset0/{uid}"[-64:]
    assert np.array_equal(volumefile.read(file).hu, noise())


@pytest.mark.parametrize(
    ("name", "patient", "series"),
    [
        ("case.nii.gz", "case", "file:case.nii.gz"),
        ("imagesTr/case_001.nii.gz", "imagesTr/case_001", "file:imagesTr/case_001.nii.gz"),
        ("CASE.NII", "CASE", "file:CASE.NII"),
        ("1.2.3.mha", "1.2.3", "file:1.2.3.mha"),  # three components are a version, not a UID
        ("1.2.3.4.mha", "1.2.3.4", "1.2.3.4"),
        ("1.2..4.mha", "1.2..4", "file:1.2..4.mha"),
        (f"1.2.3.{'4' * 59}.nrrd", f"1.2.3.{'4' * 59}"[-64:], f"file:1.2.3.{'4' * 59}.nrrd"),
        ("a\n\x1b[31mb.nii", "a[31mb", "file:a[31mb.nii"),
        (f"{'x' * 70}/{'y' * 40}.nii", f"{'x' * 23}/{'y' * 40}", f"file:{'x' * 70}/{'y' * 40}.nii"),
        ("\n.nii", "unknown", "file:.nii"),
    ],
)
def test_identity(tmp_path: Path, name: str, patient: str, series: str) -> None:
    """The UID of a file that cannot be read is known all the same."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
    file = volumefile.examine(path, tmp_path)
    assert (file.origin.patient_id, file.origin.series_uid) == (patient, series)
    assert [defect.code for defect in file.defects] == ["unreadable-file"]


def test_suffixes() -> None:
    for name in ("a.nii", "a.NII.GZ", "1.2.3.mhd", "a.mha", "a.Nrrd"):
        assert volumefile.is_volume_file(Path(name))
    for name in ("a.raw", "a.gz", "a.nii.gz.part", "nii", "a.dcm", "a.hdr", "a.zraw"):
        assert not volumefile.is_volume_file(Path(name))


SHEARED = (2, 0.5, 0, 10, 0, 3, 0, 20, 0, 0, 4, 30)
REFUSED_NIFTI = {
    "no forms": (dict(codes=(0, 0)), "bad-orientation"),
    "sheared sform": (dict(srow=SHEARED), "bad-orientation"),
    "sheared sform, good qform": (dict(srow=SHEARED, codes=(1, 1)), "bad-orientation"),
    "sform of nothing": (dict(srow=[0] * 12), "bad-orientation"),
    "sform not finite": (dict(srow=[np.nan] * 12), "bad-orientation"),
    "two places": (dict(codes=(1, 1), quaternion=(0, 0, 0, 10, 20, 40)), "bad-orientation"),
    "two turns": (dict(codes=(1, 1), quaternion=(0, 0, 1, 10, 20, 30)), "bad-orientation"),
    "sform and pixdim": (dict(pixdim=(1, 2, 3, 5, 1, 1, 1, 1)), "bad-orientation"),
    "qform and no pixdim": (dict(codes=(1, 0), pixdim=(1, 0, 3, 4, 1, 1, 1, 1)), "bad-orientation"),
    "unit": (dict(units=(5,)), "absurd-size"),
    "metres that are mm": (dict(units=(1,)), "absurd-size"),
    "long": (dict(dim=(3, 30000, 6, 5, 1, 1, 1, 1)), "absurd-size"),
    "large": (dict(dim=(3, 4000, 4000, 4000, 1, 1, 1, 1)), "absurd-size"),
    "more than the file": (dict(dim=(3, 7, 6, 4000, 1, 1, 1, 1)), "truncated-file"),
    "one slice": (dict(dim=(3, 7, 30, 1, 1, 1, 1, 1)), "too-few-slices"),
    "two dimensions": (dict(dim=(2, 7, 6, 1, 1, 1, 1, 1)), "not-a-volume"),
    "in time": (dict(dim=(4, 7, 3, 5, 2, 1, 1, 1)), "not-a-volume"),
    "vectors": (dict(dim=(5, 7, 3, 5, 1, 2, 1, 1)), "not-a-volume"),
    "colours": (dict(datatype=(128,), bitpix=(24,)), "not-a-volume"),
    "complex": (dict(datatype=(32,), bitpix=(64,)), "not-a-volume"),
    "two files": (dict(magic=(b"ni1\0",)), "unreadable-file"),
    "Analyze": (dict(magic=(b"\0\0\0\0",)), "unreadable-file"),
    "offset": (dict(vox_offset=(1e9,)), "unreadable-file"),
    "intercept without slope": (dict(scl=(0, -1024)), "not-hounsfield"),
    "normalised": (dict(scl=(0.001, 0)), "not-hounsfield"),
    "offset of 1024": (dict(scl=(1, 1024)), "not-hounsfield"),
    "all air": (dict(scl=(1, -9999)), "not-hounsfield"),
}


@pytest.mark.parametrize("case", REFUSED_NIFTI)
def test_refused_nifti(tmp_path: Path, case: str) -> None:
    fields, code = REFUSED_NIFTI[case]
    assert refusal(write(tmp_path, "a.nii", nifti(**fields))) == code


REFUSED_META = [
    ("scan.raw", "absent.raw", "external-data"),
    ("scan.raw", "folder", "external-data"),
    ("scan.raw", "link.raw", "external-data"),
    ("scan.raw", "../scan.raw", "external-data"),
    ("scan.raw", "/etc/passwd", "external-data"),
    ("scan.raw", "..", "external-data"),
    ("scan.raw", "", "external-data"),
    ("scan.raw", "LIST\nscan.raw", "external-data"),
    ("scan.raw", "scan%03d.raw 1 5 1", "external-data"),
    ("ElementDataFile = scan.raw\n", "", "unreadable-file"),
    ("DimSize = 7 6 5", "DimSize = 7 6 6", "truncated-file"),
    ("DimSize = 7 6 5", "DimSize = 60000 60000 60000", "absurd-size"),
    ("DimSize = 7 6 5", "DimSize = -7 6 5", "unreadable-file"),
    ("DimSize = 7 6 5", "DimSize = 7 6", "unreadable-file"),
    ("DimSize = 7 6 5", "DimSize = 7 30 1", "too-few-slices"),
    ("NDims = 3", "NDims = 100", "not-a-volume"),  # crashes MetaIO, as do -1 and a second one
    ("NDims = 3", "NDims = -1", "not-a-volume"),
    ("NDims = 3", "NDims = 3\nNDims = 100", "unreadable-file"),
    ("NDims = 3", "NDims = 3\nComment = a\rNDims = 100", "unreadable-file"),
    ("MET_SHORT", "MET_SHORT_ARRAY", "not-a-volume"),
    ("ElementType", "ElementNumberOfChannels = 2\nElementType", "not-a-volume"),
    ("TransformMatrix = 1 0 0", "TransformMatrix = 1 0.1 0", "bad-orientation"),
    ("TransformMatrix = 1 0 0", "TransformMatrix = 0 1 0", "bad-orientation"),
    ("TransformMatrix = 1 0 0", "TransformMatrix = 1e300 0 0", "bad-orientation"),
    ("TransformMatrix = 1 0 0 0 1 0 0 0 1\n", "", "bad-orientation"),
    ("1.5 1.25 2.5", "1.5 1.25 25", "absurd-size"),
    ("1.5 1.25 2.5", "-1.5 1.25 2.5", "absurd-size"),
    ("1.5 1.25 2.5", "nan 1.25 2.5", "unreadable-file"),
    ("ElementSpacing", "ElementSize", "absurd-size"),
    ("ElementType", "DistanceUnits = cm\nElementType", "absurd-size"),
    ("ElementType", "ElementToIntensityFunctionOffset = -1024\nElementType", "not-hounsfield"),
    ("ElementType", "HeaderSize = 99999\nElementType", "unreadable-file"),  # ITK would hand out unset memory
    ("CompressedData = False", "CompressedData = True\nCompressedDataSize = 90000000000", "truncated-file"),
    ("CompressedData = False", "CompressedData = True", "undecodable-file"),
    ("BinaryData = True", "BinaryData = False", "unreadable-file"),
    ("ObjectType = Image", "ObjectType = " + "x" * 70_000, "unreadable-file"),
    ("ObjectType = Image", "\0" * 100, "unreadable-file"),
]


@pytest.mark.parametrize(("old", "new", "code"), REFUSED_META)
def test_refused_meta_image(tmp_path: Path, old: str, new: str, code: str) -> None:
    write(tmp_path, "scan.raw", noise().tobytes())
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.raw").symlink_to(tmp_path / "scan.raw")
    assert old in META
    assert refusal(write(tmp_path, "a.mhd", META.replace(old, new, 1))) == code


REFUSED_NRRD = [
    ("NRRD0004", "NIFTI", "unreadable-file"),
    ("key:=value", "data file: scan.raw", "external-data"),
    ("key:=value", "DataFile: scan.raw", "external-data"),
    ("\n\n", "\n", "unreadable-file"),
    ("space: left-posterior-superior\n", "", "bad-orientation"),
    ("left-posterior-superior", "scanner-xyz", "bad-orientation"),
    ("(1.5,0,0)", "(1.5,0.5,0)", "bad-orientation"),
    ("(1.5,0,0)", "none", "bad-orientation"),
    ("(1.5,0,0)", "(nan,0,0)", "unreadable-file"),
    ("key:=value", 'space units: "cm" "cm" "cm"', "absurd-size"),
    ("sizes: 7 6 5", "sizes: 60000 60000 60000", "absurd-size"),
    ("sizes: 7 6 5", "sizes: 7 6 6", "truncated-file"),
    ("sizes: 7 6 5", "sizes: 210 1 1", "too-few-slices"),
    ("(1.5,0,0)", "(15,0,0)", None),
    ("(1.5,0,0)", "(25,0,0)", "absurd-size"),
    ("encoding: raw", "encoding: gzip", "undecodable-file"),
    ("encoding: raw", "encoding: ascii", "unreadable-file"),
    ("key:=value", "byte skip: -1", "unreadable-file"),
    ("type: short", "type: block\nblock size: 2", "unreadable-file"),
]


@pytest.mark.parametrize(("old", "new", "code"), REFUSED_NRRD)
def test_refused_nrrd(tmp_path: Path, old: str, new: str, code: str | None) -> None:
    write(tmp_path, "scan.raw", noise().tobytes())
    assert old in NRRD
    path = write(tmp_path, "a.nrrd", NRRD.replace(old, new, 1).encode() + noise().tobytes())
    if code is None:
        assert read(path).spacing_mm[0] == 15
    else:
        assert refusal(path) == code


def test_nrrd_in_another_space(tmp_path: Path) -> None:
    text = NRRD.replace("left-posterior-superior", "right-anterior-superior")
    back = read(write(tmp_path, "a.nrrd", text.encode() + noise().tobytes()))
    affine = np.diag([-1.5, -1.25, 2.5, 1])
    affine[:3, 3] = -1, -2, 3
    assert_every_value_is_where_it_was(back, noise(), affine)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_that_are_no_numbers(tmp_path: Path, value: float, dtype: type) -> None:
    """ITK itself reads them from a NIfTI as 0, which is water."""
    values = noise((20, 31, 33), dtype)
    good = write(tmp_path, "good.nii", nifti(values, order=">"))
    assert read(good).hu.size == values.size
    values[-1, -1, -1] = value
    SimpleITK.WriteImage(image(values), str(tmp_path / "a.nrrd"), True)
    write(tmp_path, "a.nii", nifti(values, order=">"))
    write(tmp_path, "a.nii.gz", gzip.compress(nifti(values)))
    for name in ("a.nrrd", "a.nii", "a.nii.gz"):
        assert refusal(tmp_path / name) == "not-hounsfield"


def test_the_refusal_of_other_values_names_them(tmp_path: Path) -> None:
    path = write(tmp_path, "a.nii", nifti((noise() + 1024).astype(np.int16)))
    with pytest.raises(SeriesRejected, match=r"values of 24 to .* convert to HU"):
        read(path)


def test_a_file_of_another_kind_under_its_name(tmp_path: Path) -> None:
    """ITK alone would look inside and read it."""
    SimpleITK.WriteImage(image(), str(tmp_path / "a.mha"))
    for name in ("b.nii", "b.nii.gz", "b.nrrd"):
        assert refusal(write(tmp_path, name, (tmp_path / "a.mha").read_bytes())) == "unreadable-file"


@pytest.mark.parametrize("name", ["a.nii.gz", "a.mha", "a.nrrd"])
def test_no_corrupt_byte_of_compressed_voxels_goes_unnoticed(tmp_path: Path, name: str) -> None:
    path, codes = tmp_path / name, []
    SimpleITK.WriteImage(image(direction=np.eye(3)), str(path), True)
    whole = path.read_bytes()
    for place in range(len(whole) - 200, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        file = volumefile.examine(path, tmp_path)
        try:
            assert np.array_equal(volumefile.read(file).hu, noise())  # a bit that deflate does not use
        except SeriesRejected as rejected:
            codes.append(rejected.code)
    assert set(codes) <= {"undecodable-file", "unreadable-file"}  # the latter where it shows in the first bytes
    assert len(codes) >= 64


def test_gzip_in_several_members(tmp_path: Path) -> None:
    content = nifti()
    pieces = b"".join(gzip.compress(content[start : start + 100]) for start in range(0, len(content), 100))
    expected = read(write(tmp_path, "a.nii", content))
    assert np.array_equal(read(write(tmp_path, "a.nii.gz", pieces)).hu, expected.hu)


def test_gzip_that_goes_on_and_on(tmp_path: Path) -> None:
    bomb = gzip.compress(nifti() + bytes(10_000_000))
    assert refusal(write(tmp_path, "a.nii.gz", bomb)) == "undecodable-file"


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for content in (nifti(srow=SHEARED), nifti(dim=(0, 0, 0, 0, 0, 0, 0, 0)), nifti()[:400], b"garbage"):
        refusal(write(tmp_path, "a.nii", content))
    refusal(write(tmp_path, "a.mha", META.replace("scan.raw", "LOCAL").replace("MET_SHORT", "MET_FOO") + "x" * 999))
    os.write(2, b"after\n")
    assert capfd.readouterr() == ("", "after\n")


def small_files() -> dict[str, bytes]:
    values = noise((2, 3, 4)).tobytes()
    return {
        "a.nii": nifti(noise((2, 3, 4))),
        "a.nii.gz": gzip.compress(nifti(noise((2, 3, 4))), mtime=0),
        "a.mha": META.replace("scan.raw", "LOCAL").replace("7 6 5", "4 3 2").encode() + values,
        "a.mhd": META.replace("7 6 5", "4 3 2").encode(),
        "a.nrrd": NRRD.replace("7 6 5", "4 3 2").encode() + values,
    }


SMALL = small_files()


def assert_a_volume_or_a_refusal(path: Path) -> None:
    file = volumefile.examine(path, path.parent)
    if file.defects:
        assert "; ".join(map(str, file.defects)).isprintable()
        return
    try:
        back = volumefile.read(file)
    except SeriesRejected:
        return
    assert back.hu.dtype == np.int16
    assert back.hu.size <= 1000
    assert np.isfinite(back.world_from_voxel).all()


@pytest.mark.parametrize("name", SMALL)
def test_truncated_anywhere(tmp_path: Path, name: str) -> None:
    write(tmp_path, "scan.raw", noise((2, 3, 4)).tobytes())
    whole = SMALL[name]
    assert read(write(tmp_path, name, whole)).hu.size == 24
    for length in range(0, len(whole), 5):
        refusal(write(tmp_path, name, whole[:length]))


@pytest.mark.parametrize("name", SMALL)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_changed_anywhere(tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    write(folder, "scan.raw", noise((2, 3, 4)).tobytes())
    content = bytearray(SMALL[name])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=6))
    assert_a_volume_or_a_refusal(write(folder, name, bytes(content)))


@pytest.mark.parametrize("name", SMALL)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(content=st.binary(max_size=600))
def test_garbage(tmp_path_factory: pytest.TempPathFactory, name: str, content: bytes) -> None:
    refusal(write(tmp_path_factory.mktemp("garbage"), name, content))
