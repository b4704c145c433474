"""Images to the bytes of their chunks in a shard: what HDF5's own filters, byte shuffle and deflate, make of them.

Made outside HDF5, which does one thing at a time, so that all cores can help; and by ISA-L, whose deflate is several
times as fast as zlib's. Plain h5py reads them: any reader inflates what any writer deflated.
"""

import zlib
from dataclasses import dataclass

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

# The options of an HDF5 dataset that holds such chunks, one image to a chunk.
FILTERS = dict(shuffle=True, compression="gzip", compression_opts=1)
# Of ISA-L's levels 0 to 3: as small as zlib's level 1.
_LEVEL = 1


@dataclass(frozen=True)
class Chunk:
    """An image as it is stored. crc32: of its bytes before. saturated: pixels at the end of the scale."""

    payload: bytes
    crc32: int
    saturated: int


def encode(image: NDArray[np.uint16] | NDArray[np.uint8]) -> Chunk:
    """One image, [row, column], little endian whatever the machine."""
    stored = np.ascontiguousarray(image, image.dtype.newbyteorder("<"))
    shuffled = stored.view(np.uint8).reshape(-1, stored.itemsize).T.copy() if stored.itemsize > 1 else stored
    payload = isal_zlib.compress(shuffled.data, _LEVEL)
    saturated = np.count_nonzero(stored == 256**stored.itemsize - 1)
    return Chunk(payload, zlib.crc32(stored.data), int(saturated))
