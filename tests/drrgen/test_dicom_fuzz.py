"""Damaged and hostile files: a slice, or a reason in one line; no trace, no hang, no memory for what is not there."""

import os
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.drrgen import damage
from tests.drrgen.volumes import volume

from drrgen import dicom
from drrgen.defects import SeriesRejected
from drrgen.dicom import pixels
from drrgen.dicom.headers import BoundedFile, read_header
from drrgen.worker import Worker

# Peak of one file, which here has 2 KB; the largest honest slice has 2 x 4096 x 4096 bytes.
MEMORY_BYTES = 4 << 20


def fuzz(examples: int) -> settings:
    """Deadline in ms: generous for a busy machine, and far from what a quadratic search through a file takes."""
    return settings(max_examples=examples, deadline=2000, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "series"
    dicom.write_series(folder, volume(), "test")
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> bytes:
    return (folder / "1-005.dcm").read_bytes()


@pytest.fixture
def read(tmp_path: Path) -> Iterator[Callable[[bytes], None]]:
    """Reads a file with these bytes, header and pixels, in little memory."""

    def read_bytes(data: bytes) -> None:
        path = tmp_path / "1-005.dcm"
        path.write_bytes(data)
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        header = read_header(path)
        if header is not None:
            judge(header.content, pixels.decode)
        assert tracemalloc.get_traced_memory()[1] - before < MEMORY_BYTES

    VALUES.validate()  # hypothesis lists all characters once, which takes a second, and a minute where memory is traced
    tracemalloc.start()
    yield read_bytes
    tracemalloc.stop()


def judge(content: dicom.Slice | dicom.Unusable, decode) -> None:
    refusal = str(content.defect) if isinstance(content, dicom.Unusable) else ""
    if not refusal:
        try:
            (image,) = decode([content])
            assert image.shape == content.shape
        except SeriesRejected as error:
            refusal = str(error)
    assert refusal.isprintable()
    assert len(refusal) < 400


def judge_all(folder: Path) -> None:
    """Under both policies a volume of the size that was found, or a rejection."""
    for one in dicom.find_series(folder):
        for policy in ("reject", "repair"):
            refusal = ""
            try:
                assert dicom.read(one, policy).hu.size < 100_000
            except SeriesRejected as error:
                refusal = str(error)
            assert refusal.isprintable()


def changed(whole: bytes, changes: list[tuple[int, int]], start: int = 0) -> bytes:
    data = bytearray(whole)
    for place, value in changes:
        data[start + place % (len(data) - start)] = value
    return bytes(data)


CHANGES = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8)


@fuzz(200)
@given(length=st.integers(0, 1300))
def test_truncated_anywhere(read, whole: bytes, length: int) -> None:
    read(whole[:length])


@fuzz(250)
@given(changes=CHANGES)
def test_any_bytes_changed(read, whole: bytes, changes: list[tuple[int, int]]) -> None:
    read(changed(whole[:1300], changes) + whole[1300:])


@fuzz(60)
@given(changes=CHANGES)
def test_any_bytes_changed_in_a_series(folder: Path, whole: bytes, changes: list[tuple[int, int]]) -> None:
    """What passes as a slice is still judged with the others."""
    (folder / "1-005.dcm").write_bytes(changed(whole[:1300], changes) + whole[1300:])
    judge_all(folder)
    (folder / "1-005.dcm").write_bytes(whole)


TAGS = [
    *(("ImagePositionPatient", "DS"), ("ImageOrientationPatient", "DS"), ("PixelSpacing", "DS"), ("KVP", "DS")),
    *(("RescaleSlope", "DS"), ("RescaleIntercept", "DS"), ("PatientID", "LO"), ("Manufacturer", "LO")),
    *(("SeriesInstanceUID", "UI"), ("SOPInstanceUID", "UI"), ("SOPClassUID", "UI"), ("ImageType", "CS")),
    *(("Rows", "US"), ("Columns", "US"), ("BitsAllocated", "US"), ("BitsStored", "US"), ("HighBit", "US")),
    *(("PixelRepresentation", "US"), ("SamplesPerPixel", "US"), ("PhotometricInterpretation", "CS")),
]
NUMBERS = st.one_of(
    st.floats(width=32).map(lambda value: f"{value:.6g}"),
    st.sampled_from(["1e400", "-1e-400", "nan", "inf", "", " ", "1\\2", "--1", "0x10", "9" * 40, "1_000", "1,5"]),
)
VALUES = st.one_of(NUMBERS, st.text(max_size=80), st.lists(NUMBERS, max_size=8).map("\\".join))


def with_tag(whole: bytes, name: str, vr: str, value: str, number: int) -> bytes:
    """Raw bytes: pydicom would refuse to write most of them."""
    element = struct.pack("<HH", *divmod(pydicom.datadict.tag_for_keyword(name), 65536)) + vr.encode()
    data = struct.pack("<H", number) if vr == "US" else value.encode("utf-8", "surrogatepass")[:200]
    data += b" " * (len(data) % 2)
    at = whole.index(element) + 6
    (length,) = struct.unpack("<H", whole[at : at + 2])
    return whole[:at] + struct.pack("<H", len(data)) + data + whole[at + 2 + length :]


@fuzz(250)
@given(tag=st.sampled_from(TAGS), value=VALUES, number=st.integers(0, 65535))
def test_any_value_in_any_tag(read, whole: bytes, tag: tuple[str, str], value: str, number: int) -> None:
    read(with_tag(whole, *tag, value, number))


@fuzz(50)
@given(tag=st.sampled_from(TAGS), value=VALUES, number=st.integers(0, 65535))
def test_any_value_in_any_tag_of_all_slices(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, tag: tuple[str, str], value: str, number: int
) -> None:
    everywhere = tmp_path_factory.mktemp("all")
    for path in folder.iterdir():
        (everywhere / path.name).write_bytes(with_tag(path.read_bytes(), *tag, value, number))
    judge_all(everywhere)


LENGTHS = st.sampled_from([0, 1, 0xFFFE, 0xFFFFFFFE, 0xFFFFFFFF, 0x7FFFFFFF, 3_000_000_000])


@fuzz(120)
@given(at=st.integers(132, 1100), length=LENGTHS)
def test_any_claimed_length(read, whole: bytes, at: int, length: int) -> None:
    read(whole[:at] + struct.pack("<I", length) + whole[at + 4 :])


def test_a_claim_of_gigabytes_allocates_nothing(tmp_path: Path, whole: bytes) -> None:
    """PatientID as UT, a text with 32 bits of length, that claims 3 GB."""
    at = whole.index(b"\x10\x00\x20\x00LO")
    path = tmp_path / "claim.dcm"
    path.write_bytes(whole[: at + 4] + b"UT\0\0" + struct.pack("<I", 3_000_000_000) + whole[at + 8 :])
    tracemalloc.start()
    header = read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(header.content, dicom.Unusable)
    assert peak < 1 << 20


def test_a_sparse_file_that_has_the_gigabytes_is_refused_before_they_are_read(tmp_path: Path, whole: bytes) -> None:
    """3 GB that take no place on the disk, and a Manufacturer that is all of them."""
    at = whole.index(b"\x08\x00\x70\x00LO")
    path = tmp_path / "sparse.dcm"
    path.write_bytes(whole[: at + 4] + b"UT\0\0" + struct.pack("<I", 2_999_990_000))
    os.truncate(path, 3_000_000_000)
    tracemalloc.start()
    header = read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(header.content, dicom.Unusable)
    assert peak < 1 << 20


def test_a_deflated_file_is_refused_before_it_is_inflated(tmp_path: Path, whole: bytes) -> None:
    """A file of 100 KB that would become 100 MB."""
    path = tmp_path / "bomb.dcm"
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    plain, deflated = b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99"
    meta = whole[: whole.index(b"\x08\x00\x08\x00CS")].replace(
        b"UI" + struct.pack("<H", len(plain)) + plain, b"UI" + struct.pack("<H", len(deflated)) + deflated
    )
    assert deflated in meta
    path.write_bytes(meta + deflate.compress(b"\0" * 100_000_000) + deflate.flush())
    tracemalloc.start()
    header = read_header(path)
    with BoundedFile(path, 1 << 20) as file, pytest.raises(ValueError, match="deflated"):
        pydicom.dcmread(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "deflated" in header.content.defect.message
    assert peak < 1 << 20


def test_sequences_within_sequences_do_not_exhaust_the_stack(tmp_path: Path, whole: bytes) -> None:
    """Ten thousand sequences, each the only item of the one around it, in a private tag before the pixels."""
    opening = b"\x29\x00\x10\x10SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    at = whole.index(b"\xe0\x7f\x10\x00")
    path = tmp_path / "nested.dcm"
    path.write_bytes(whole[:at] + opening * 10_000 + whole[at:])
    assert isinstance(read_header(path).content, dicom.Unusable)


@pytest.fixture(scope="module")
def decode() -> Iterator[dicom.Decode]:
    with Worker(limit_s=30.0) as worker:
        yield dicom.decoder(worker)


@pytest.fixture(scope="module", params=["JPEG", "JPEG2000"])
def encoded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoded") / "series"
    dicom.write_series(folder, volume(), "test")
    damage.compressed(request.param)(folder)
    return folder / "1-005.dcm"


@fuzz(80)
@given(changes=CHANGES)
def test_damaged_code_streams(encoded: Path, decode: dicom.Decode, changes: list[tuple[int, int]]) -> None:
    """In a process of its own: it is GDCM's C++ that reads them."""
    whole = encoded.read_bytes()
    damaged = encoded.with_name("damaged")
    damaged.write_bytes(changed(whole, changes, start=whole.index(b"\xe0\x7f\x10\x00") + 12))
    judge(read_header(damaged).content, decode)


def test_a_code_stream_that_claims_gigabytes_is_refused(tmp_path: Path) -> None:
    """30,000 x 30,000 pixels in one tile, where Rows and Columns say 16 x 20: GDCM would ask for 4 GB."""
    dicom.write_series(tmp_path / "series", volume(), "test")
    damage.compressed("JPEG2000")(tmp_path / "series")
    path = tmp_path / "series" / "1-005.dcm"
    data = bytearray(path.read_bytes())
    at = data.index(b"\xff\x4f\xff\x51")
    struct.pack_into(">6I", data, at + 8, 30_000, 30_000, 0, 0, 30_000, 30_000)
    path.write_bytes(data)
    with pytest.raises(SeriesRejected, match=r"its compressed image says \(30000, 30000\) pixels"):
        list(pixels.decode([read_header(path).content]))


def test_the_undamaged_files_pass_all_of_this(folder: Path, whole: bytes, encoded: Path) -> None:
    assert (folder / "1-005.dcm").read_bytes() == whole
    assert dicom.read(*dicom.find_series(folder)).hu.shape == (12, 16, 20)
    assert isinstance(read_header(encoded).content, dicom.Slice)
