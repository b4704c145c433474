"""DICOM CT in and out: files to series by tags, series to volumes by positions; nobody else reads or writes DICOM."""

from drrgen.dicom.index import File, find_series, walk
from drrgen.dicom.pixels import Decode, decode, decoder
from drrgen.dicom.reader import read, read_stack
from drrgen.dicom.series import Series, Slice, Unusable
from drrgen.dicom.stack import Stack, examine, without_strays
from drrgen.dicom.writer import write_series

__all__ = [
    "Decode",
    "File",
    "Series",
    "Slice",
    "Stack",
    "Unusable",
    "decode",
    "decoder",
    "examine",
    "find_series",
    "read",
    "read_stack",
    "walk",
    "without_strays",
    "write_series",
]
