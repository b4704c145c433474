"""Images to the bytes of their chunks in a shard, and back: what HDF5's own filters would make of them.

Made outside HDF5, which does one thing at a time, so that all cores can help. First byte shuffle, then one of two:
deflate, by ISA-L several times as fast as by zlib, which plain h5py reads; or Zstandard, HDF5's registered filter
32015, which h5py reads where hdf5plugin is imported.
"""

import math
import threading
from dataclasses import dataclass

import numpy as np
from isal import isal_zlib
from isal.igzip_lib import IsalError
from numpy.typing import NDArray

from drrgen.errors import InputError

# Of ISA-L's levels 0 to 3: as small as zlib's level 1.
_DEFLATE_LEVEL = 1
# A 512 pixel chest takes 4 % less than deflated, twice the time to write and a third of the time to read; level 5 is
# smaller by 2 % more and takes twice as long again, level 1 is no smaller than deflate.
_ZSTD_LEVEL = 3
# The options of an HDF5 dataset that holds such chunks, one image to a chunk, by compression.
FILTERS = {
    "deflate": dict(shuffle=True, compression="gzip", compression_opts=1),
    "zstd": dict(shuffle=True, compression=32015, compression_opts=(_ZSTD_LEVEL,)),
}
# HDF5's numbers of these filters.
SHUFFLE, COMPRESSION = 2, {1: "deflate", 32015: "zstd"}

Pixels = NDArray[np.uint16] | NDArray[np.uint8]

_of_thread = threading.local()


def require(compression: str) -> None:
    """Make it usable here, by HDF5 too. Raises InputError where a package is missing."""
    if compression == "zstd":
        try:
            # HDF5 knows the filter from then on
            import hdf5plugin  # noqa: F401
            import zstandard  # noqa: F401
        except ModuleNotFoundError as error:
            raise InputError(
                f"compression zstd needs {error.name}, which is not installed: pip install 'drrgen[zstd]'"
            ) from error


@dataclass(frozen=True)
class Chunk:
    """An image as it is stored. crc32: of its bytes before. saturated: pixels at the end of the scale."""

    payload: bytes
    crc32: int
    saturated: int


def encode(image: Pixels, compression: str = "deflate") -> Chunk:
    """One image, [row, column], little endian whatever the machine."""
    compress = _deflate if compression == "deflate" else _zstd
    payload = compress(_shuffled(image) if image.itemsize > 1 else np.ascontiguousarray(image))
    saturated = np.count_nonzero(image == 256**image.itemsize - 1)
    return Chunk(payload, crc32(image), int(saturated))


def decode(payload: bytes, left_out: int, compression: str, shape: tuple[int, ...], dtype: np.dtype) -> Pixels:
    """The image of such a chunk. left_out: its filter mask, 1 where the shuffle was skipped, 2 for the compression.

    Raises ValueError where the bytes are not those of one image. Whatever they are, it makes no more bytes of them.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    expand = _inflate if compression == "deflate" else _unzstd
    plain = payload if left_out & 2 else expand(payload, num_bytes)
    if len(plain) != num_bytes:
        raise ValueError(f"{'at least ' * (len(plain) > num_bytes)}{len(plain)} bytes instead of {num_bytes}")
    if dtype.itemsize == 1 or left_out & 1:
        return np.frombuffer(plain, dtype.newbyteorder("<")).reshape(shape)
    return _unshuffled(np.frombuffer(plain, np.uint8).reshape(2, *shape))


def crc32(image: Pixels) -> int:
    """CRC-32 of the pixels' little-endian bytes."""
    return int(isal_zlib.crc32(np.ascontiguousarray(image, image.dtype.newbyteorder("<")).data))


def _shuffled(image: Pixels) -> NDArray[np.uint8]:
    """All low bytes, then all high bytes."""
    planes = np.empty((2, *image.shape), np.uint8)
    np.copyto(planes[0], image, casting="unsafe")
    np.right_shift(image, 8, out=planes[1], dtype=np.uint16, casting="unsafe")
    return planes


def _unshuffled(planes: NDArray[np.uint8]) -> NDArray[np.uint16]:
    image = np.multiply(planes[1], 256, dtype=np.uint16)
    image += planes[0]
    return image


def _deflate(plain: NDArray[np.uint8]) -> bytes:
    return isal_zlib.compress(plain.data, _DEFLATE_LEVEL)


def _inflate(payload: bytes, num_bytes: int) -> bytes:
    """All of it, or as much as tells that it is too much."""
    inflater = isal_zlib.decompressobj()
    try:
        plain = inflater.decompress(payload, num_bytes + 1)
    except IsalError as error:  # type: ignore[misc]   # its types take it for an instance
        raise ValueError(str(error)) from error
    if not inflater.eof and len(plain) <= num_bytes:
        raise ValueError("its end is missing")
    return plain


def _zstd(plain: NDArray[np.uint8]) -> bytes:
    import zstandard

    # a compressor must not be shared by threads, and takes time to make
    if not hasattr(_of_thread, "compressor"):
        # a checksum of its own, as deflate has one: h5py refuses a damaged chunk, whether or not its reader checks CRCs
        _of_thread.compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True)
    return _of_thread.compressor.compress(plain.data)


def _unzstd(payload: bytes, num_bytes: int) -> bytes:
    import zstandard

    try:
        # memory for what the frame says of itself would be asked for, whatever that is
        if (said := zstandard.frame_content_size(payload)) != num_bytes:
            raise ValueError(f"{said if said >= 0 else 'an unknown number of'} bytes instead of {num_bytes}")
        return zstandard.ZstdDecompressor().decompress(payload, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
