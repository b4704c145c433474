"""One DICOM file's header: is it a slice of a CT, whose, where does it lie, and are all of its pixels there."""

import io
import math
import os
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.tag import Tag
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
)

from drrgen.defects import Defect, printable
from drrgen.dicom.series import Slice, Unusable
from drrgen.volume import MAX_SIDE, Origin

# More than any slice of a CT has.
MAX_FILE_BYTES = 64 << 20

# Repairing a series without a damaged file means to do without it.
LEFT_OUT = "left out"

# The only tags that are looked at; of these, those of `Origin` are the only ones that reach a shard.
_NAMES = (
    "SOPClassUID SOPInstanceUID ImageType StudyInstanceUID SeriesInstanceUID PatientID Manufacturer ConvolutionKernel "
    "KVP SliceThickness ImagePositionPatient ImageOrientationPatient PixelSpacing Rows Columns BitsAllocated "
    "BitsStored HighBit SamplesPerPixel NumberOfFrames RescaleSlope RescaleIntercept"
)
_TAGS = [Tag(name) for name in _NAMES.split()]

# Most headers are shorter than this, and read at once.
_HEAD_BYTES = 16 << 10
# None of the tags that are read is longer; the others are skipped, whatever their length.
_MAX_TAG_BYTES = 1 << 20
# A frame is compressed into one item, or a few.
_MAX_ITEMS = 10_000
_DICM_AT = 128
# How DICOM without the 128 bytes and the mark before it begins: with one of the first tags that an image has.
_BARE_DICOM = tuple(b"\x08\x00" + element for element in (b"\0\0", b"\1\0", b"\5\0", b"\10\0", b"\22\0", b"\26\0"))
# Derived from a CT, in its format, and no CT: maximum and minimum intensity projections.
_PROJECTIONS = {"MIP", "MINIP", "PROJECTION IMAGE"}
_LONG_VR = (b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"UN")
_UNDEFINED_LENGTH = 0xFFFFFFFF
_ITEM, _END_OF_SEQUENCE = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"


@dataclass(frozen=True, slots=True)
class Header:
    """What one CT file says of itself. origin: None where nobody can tell."""

    origin: Origin | None
    content: Slice | Unusable


class BoundedFile(io.BufferedReader):
    """A file for pydicom: a length in a header is a claim, and no read asks for more bytes than there are, or `most`.

    pydicom reads without a length only to inflate a deflated file, at once and however large: that is refused here.
    """

    def __init__(self, path: Path, most: int) -> None:
        super().__init__(io.FileIO(path))
        self.size = os.fstat(self.fileno()).st_size
        self._most = most

    def read(self, size: int | None = None, /) -> bytes:
        if size is None or size < 0:
            raise ValueError("the deflated transfer syntax is not accepted")
        there = min(size, max(0, self.size - self.tell()))
        if there > self._most:
            raise ValueError(f"a tag of {there} bytes")
        return super().read(there)


def silent() -> warnings.catch_warnings:
    """pydicom warns of every value that breaks DICOM's rules; what matters here is checked, and refused in one line."""
    return warnings.catch_warnings(action="ignore")


def read_header(path: Path) -> Header | None:
    """What a file says of itself; None where it is no CT slice: another kind of file or image, or a scout."""
    try:
        with BoundedFile(path, _MAX_TAG_BYTES) as file:
            start = file.peek(_DICM_AT + 4)
            if start[_DICM_AT : _DICM_AT + 4] == b"DICM":
                with silent():
                    return _ct_header(path, file)
            if start.startswith(_BARE_DICOM):
                raise ValueError("DICOM without its preamble is not read: write it anew")
            if path.suffix.lower() == ".dcm":
                # so an interrupted download leaves it: empty, or of its full size and full of zeros
                raise ValueError("no DICOM, under a slice's name: get it again")
            return None
    except Exception as error:  # on damaged and hostile files pydicom raises whatever it stumbles over
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        return Header(
            None, _unusable(path, "unreadable-file", printable(reason)[:200] or type(error).__name__, LEFT_OUT)
        )


def _unusable(path: Path, code: str, reason: str, repair: str | None = None) -> Unusable:
    return Unusable(path, Defect(code, reason, repair, printable(path.name)))


def _ct_header(path: Path, file: BoundedFile) -> Header | None:
    header, end = _parsed(file)
    sop_class = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
    # tags are in ascending order: one that is cut short lies at the end, and what comes before Rows is whole
    if not sop_class or (sop_class == CTImageStorage and "Rows" not in header and end >= file.size):
        raise ValueError("the file ends in its header")
    if sop_class in (EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage):
        reason = "Enhanced (multi-frame) CT is not read: export it as single-frame CT images"
        return Header(_origin(header), _unusable(path, "multi-frame", reason))
    kinds = set(_texts(header.get("ImageType")))
    if sop_class != CTImageStorage or "LOCALIZER" in kinds:
        return None
    if kinds & _PROJECTIONS:
        return Header(_origin(header), _unusable(path, "projection", "an intensity projection (MIP) is no CT"))
    file.seek(end)
    return Header(_origin(header), _slice(path, header, file))


def _parsed(file: BoundedFile) -> tuple[pydicom.FileDataset, int]:
    """The header's tags, and where they end: at the pixels, or the file's end."""
    data = file.read(_HEAD_BYTES)
    if DeflatedExplicitVRLittleEndian.encode() in data:
        raise ValueError("the deflated transfer syntax is not accepted")
    head = io.BytesIO(data)
    header = pydicom.dcmread(head, stop_before_pixels=True, specific_tags=_TAGS)
    if head.tell() < len(data) or file.size <= len(data):
        return header, head.tell()
    file.seek(0)
    header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_TAGS)
    return header, file.tell()


def geometry(path: Path, header: pydicom.Dataset) -> Slice:
    """A file's place in the series. Raises AttributeError, TypeError, ValueError or OverflowError where it has none."""
    return Slice(
        path=path,
        sop_uid=_text(header.get("SOPInstanceUID")) or "",
        position_mm=_vector(header.ImagePositionPatient, 3),
        orientation=_vector(header.ImageOrientationPatient, 6),
        spacing_mm=_vector(header.PixelSpacing, 2),
        shape=(int(header.Rows), int(header.Columns)),
    )


def _slice(path: Path, header: pydicom.FileDataset, file: BoundedFile) -> Slice | Unusable:
    try:
        one = geometry(path, header)
    except (AttributeError, OverflowError, TypeError, ValueError):
        return _unusable(path, "missing-tags", "position, orientation, spacing or size is missing or no number")
    slope, intercept = number(header.get("RescaleSlope")), number(header.get("RescaleIntercept"))
    # both are required of a CT (PS3.3 C.8.2.1); guessing them would shift every value
    if slope is None or intercept is None or slope <= 0:
        return _unusable(
            path, "missing-tags", "RescaleSlope and RescaleIntercept are not two numbers, the slope above 0"
        )
    if not all(0 < side <= MAX_SIDE for side in one.shape) or file.size > MAX_FILE_BYTES:
        return _unusable(path, "absurd-size", f"a slice of {one.shape} pixels in {file.size} bytes")
    layout = tuple(header.get(name, 1) for name in ("BitsAllocated", "SamplesPerPixel", "NumberOfFrames"))
    if layout != (16, 1, 1):
        return _unusable(path, "unsupported-pixels", "not one frame of one 16-bit sample per pixel")
    bits = header.get("BitsStored", 16)
    if header.get("HighBit", bits - 1) != bits - 1:
        return _unusable(
            path, "unsupported-pixels", "HighBit is not BitsStored - 1: values are shifted within their 16 bits"
        )
    found, wanted = _pixel_bytes(header, file), 2 * one.shape[0] * one.shape[1]
    if found is None:
        return _unusable(path, "truncated-file", "the file ends before its pixels do: get it again", LEFT_OUT)
    if found != wanted and not header.file_meta.TransferSyntaxUID.is_compressed:
        return _unusable(path, "wrong-pixel-length", f"{found} bytes of pixels instead of {wanted}", LEFT_OUT)
    return one


def _pixel_bytes(header: pydicom.FileDataset, file: BoundedFile) -> int | None:
    """The length of PixelData, at whose tag the file stands; None where the file ends before it does.

    Compressed pixels come in items, whose lengths are followed to the end without reading them (PS3.5 A.4).
    """
    implicit, little = header.original_encoding
    order = "<" if little else ">"
    head = file.read(12)
    if len(head) < 12 or struct.unpack(f"{order}HH", head[:4]) != (0x7FE0, 0x0010):
        return None
    if implicit:
        file.seek(-4, os.SEEK_CUR)
        (length,) = struct.unpack(f"{order}I", head[4:8])
    elif head[4:6] in _LONG_VR:
        (length,) = struct.unpack(f"{order}I", head[8:])
    else:
        return None
    if length != _UNDEFINED_LENGTH:
        return length if file.tell() + length <= file.size else None
    total = 0
    for _ in range(_MAX_ITEMS):
        item = file.read(8)
        if item[:4] != _ITEM or len(item) < 8:
            return total if item[:4] == _END_OF_SEQUENCE else None
        (length,) = struct.unpack("<I", item[4:])
        file.seek(length, os.SEEK_CUR)
        total += length
    return None


def _origin(header: pydicom.Dataset) -> Origin:
    return Origin(
        patient_id=_text(header.get("PatientID")) or "unknown",
        study_uid=_text(header.get("StudyInstanceUID")) or "",
        series_uid=_text(header.get("SeriesInstanceUID")) or "",
        manufacturer=_text(header.get("Manufacturer")),
        kernel=_text(header.get("ConvolutionKernel")),
        kvp=number(header.get("KVP")),
        slice_thickness_mm=number(header.get("SliceThickness")),
    )


def _vector(values: Any, length: int) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in values)
    if len(numbers) != length or not np.isfinite(numbers).all():
        raise ValueError(f"{length} finite numbers expected")
    return numbers


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(part) for part in value or ()]


def _text(value: object) -> str | None:
    """A tag's text as far as it can be printed on one line; DICOM allows such texts (LO, UI) 64 characters."""
    return printable(value or "")[:64] or None


def number(value: Any) -> float | None:
    """A tag's value as a finite number; None where it is none."""
    try:
        one = float(value)
    except (OverflowError, TypeError, ValueError):
        return None
    return one if math.isfinite(one) else None
