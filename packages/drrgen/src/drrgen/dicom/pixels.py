"""One slice's pixels in Hounsfield units: uncompressed by pydicom, compressed by SimpleITK's GDCM."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.uid import RLELossless

from drrgen.defects import Defect, SeriesRejected, printable
from drrgen.dicom.headers import MAX_FILE_BYTES, BoundedFile, number, silent
from drrgen.dicom.series import Slice
from drrgen.volume import HU_CLAMP
from drrgen.worker import Crashed, Worker

Decode = Callable[[Iterable[Slice]], Iterator[NDArray[np.int16]]]


def decode(slices: Iterable[Slice]) -> Iterator[NDArray[np.int16]]:
    """The slices in HU, [row, column], clamped to HU_CLAMP, one at a time. Raises SeriesRejected at a damaged one."""
    for one in slices:
        try:
            with silent():
                yield _hounsfield(one)
        except Exception as error:  # on damaged and hostile files pydicom raises whatever it stumbles over
            reason = printable(" ".join(str(error).split()))[:200]
            raise _undecodable(one.path, reason or type(error).__name__) from error


def decoder(worker: Worker) -> Decode:
    """`decode`, in another process."""

    def decode_there(slices: Iterable[Slice]) -> Iterator[NDArray[np.int16]]:
        ones = list(slices)
        images = worker.images(decode, ones)
        for one in ones:
            try:
                yield next(images)
            except Crashed as error:
                raise _undecodable(one.path, str(error)) from error
        next(images, None)  # to its end, so that the worker is free again

    return decode_there


def _undecodable(path: Path, reason: str) -> SeriesRejected:
    return SeriesRejected(Defect("undecodable-file", f"{printable(path.name)}: {reason}"))


def _hounsfield(one: Slice) -> NDArray[np.int16]:
    """Reads the file anew: its header was checked when it was indexed, but may have changed since."""
    with BoundedFile(one.path) as file:
        if file.size > MAX_FILE_BYTES:
            raise ValueError(f"{file.size} bytes are no slice")
        dataset = pydicom.dcmread(file)
    slope, intercept = number(dataset.get("RescaleSlope")), number(dataset.get("RescaleIntercept"))
    if slope is None or intercept is None or (dataset.Rows, dataset.Columns) != one.shape:
        raise ValueError("the file has changed since it was indexed")
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_compressed and syntax != RLELossless:
        hu = _decompressed(one)
    else:
        hu = dataset.pixel_array * slope + intercept
    if hu.shape != one.shape:
        raise ValueError(f"{hu.shape} pixels instead of {one.shape}")
    return np.rint(np.clip(hu, *HU_CLAMP)).astype(np.int16)


def _decompressed(one: Slice) -> NDArray[np.float64]:
    """JPEG, JPEG-LS and JPEG 2000; GDCM applies slope and intercept itself. What it says of geometry must agree."""
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(one.path))
    image = reader.Execute()
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
