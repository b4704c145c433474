"""One slice's pixels in Hounsfield units: uncompressed by pydicom, compressed by SimpleITK's GDCM."""

import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.encaps import get_frame
from pydicom.uid import RLELossless

from drrgen.defects import Defect, SeriesRejected, printable
from drrgen.dicom.headers import MAX_FILE_BYTES, BoundedFile, geometry, number, silent
from drrgen.dicom.series import Slice
from drrgen.volume import HU_CLAMP
from drrgen.worker import Crashed, Worker

# Start of frame, in JPEG for every kind of coding, and in JPEG-LS.
_JPEG_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}

Decode = Callable[[Iterable[Slice]], Iterator[NDArray[np.int16]]]


def decode(slices: Iterable[Slice]) -> Iterator[NDArray[np.int16]]:
    """The slices in HU, [row, column], clamped to HU_CLAMP, one at a time. Raises SeriesRejected at a damaged one."""
    for one in slices:
        try:
            with silent():
                yield _hounsfield(one)
        except FileNotFoundError as error:
            gone = Defect("unreadable-file", "it is gone since it was indexed", file=printable(one.path.name))
            raise SeriesRejected(gone) from error
        except Exception as error:  # on damaged and hostile files pydicom raises whatever it stumbles over
            reason = printable(" ".join(str(error).split()))[:200]
            raise _undecodable(one.path, reason or type(error).__name__) from error


def decoder(worker: Worker) -> Decode:
    """`decode`, in another process."""

    def decode_there(slices: Iterable[Slice]) -> Iterator[NDArray[np.int16]]:
        ones = list(slices)
        images = worker.run(decode, ones)
        for one in ones:
            try:
                yield next(images)
            except Crashed as error:
                raise _undecodable(one.path, str(error)) from error
        next(images, None)  # to its end, so that the worker is free again

    return decode_there


def _undecodable(path: Path, reason: str) -> SeriesRejected:
    return SeriesRejected(Defect("undecodable-file", reason, file=printable(path.name)))


def _hounsfield(one: Slice) -> NDArray[np.int16]:
    """Reads the file anew: its header was checked when it was indexed, but may have changed since."""
    with BoundedFile(one.path, MAX_FILE_BYTES) as file:
        dataset = pydicom.dcmread(file)
    slope, intercept = number(dataset.get("RescaleSlope")), number(dataset.get("RescaleIntercept"))
    if slope is None or intercept is None or geometry(one.path, dataset) != one:
        raise ValueError("it is not the slice any more that it was when it was indexed")
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_compressed and syntax != RLELossless:
        if (shape := _stream_shape(get_frame(dataset.PixelData, 0, number_of_frames=1))) != one.shape:
            raise ValueError(f"its compressed image says {shape} pixels, its tags {one.shape}")
        hu = _decompressed(one)
    else:
        hu = dataset.pixel_array * slope + intercept
    if hu.shape != one.shape:
        raise ValueError(f"{hu.shape} pixels instead of {one.shape}")
    return np.rint(np.clip(hu, *HU_CLAMP)).astype(np.int16)


def _stream_shape(stream: bytes) -> tuple[int, int] | None:
    """(rows, columns) of a JPEG, JPEG-LS or JPEG 2000 image, by its own header; None where it has none.

    A decoder asks for memory by these, not by the DICOM tags. JPEG 2000: ISO 15444-1 A.5.1; JPEG: ISO 10918-1 B.2.2.
    """
    if stream[:4] == b"\xff\x4f\xff\x51":
        right, bottom, left, top = struct.unpack(">4I", stream[8:24])
        return bottom - top, right - left
    place = 2
    while place + 9 <= len(stream) and stream[place] == 0xFF:
        marker, length = stream[place + 1], int.from_bytes(stream[place + 2 : place + 4], "big")
        if marker in _JPEG_FRAMES:
            rows, columns = struct.unpack(">2H", stream[place + 5 : place + 9])
            return rows, columns
        place += 2 + max(length, 2)
    return None


def _decompressed(one: Slice) -> NDArray[np.float64]:
    """JPEG, JPEG-LS and JPEG 2000; GDCM applies slope and intercept itself. What it says of geometry must agree."""
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(one.path))
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise ValueError("its compressed pixels are damaged") from error
    rows, columns = one.shape
    if image.GetSize() != (columns, rows, 1) or image.GetNumberOfComponentsPerPixel() != 1:
        raise ValueError(f"decodes to {image.GetSize()} pixels instead of {(columns, rows, 1)}")
    between_rows, between_columns = one.spacing_mm
    if not (
        np.allclose(image.GetSpacing()[:2], (between_columns, between_rows), rtol=1e-4)
        and np.allclose(image.GetOrigin(), one.position_mm, atol=1e-2)
    ):
        raise ValueError("GDCM and the tags disagree about position or spacing")
    return SimpleITK.GetArrayFromImage(image)[0].astype(np.float64)
