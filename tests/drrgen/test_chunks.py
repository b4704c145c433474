"""Chunks made outside HDF5 are those that its own filters would read."""

import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from drrgen import chunks


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (64, 64)])
def test_plain_hdf5_reads_them(tmp_path: Path, dtype: type, shape: tuple[int, int]) -> None:
    images = np.random.default_rng(1).integers(0, np.iinfo(dtype).max, (3, *shape), dtype, endpoint=True)
    images[1] = 0
    with h5py.File(tmp_path / "chunks.h5", "w") as file:
        dataset = file.create_dataset("images", images.shape, dtype, chunks=(1, *shape), **chunks.FILTERS)
        for view, image in enumerate(images):
            dataset.id.write_direct_chunk((view, 0, 0), chunks.encode(image).payload)
    with h5py.File(tmp_path / "chunks.h5") as file:
        assert np.array_equal(file["images"][:], images)


def test_a_chunk_knows_its_image() -> None:
    image = np.array([[0, 1], [65535, 65535]], np.uint16)
    chunk = chunks.encode(image)
    assert chunk.saturated == 2
    assert chunk.crc32 == zlib.crc32(b"\x00\x00\x01\x00\xff\xff\xff\xff")


def test_what_is_stored_does_not_depend_on_the_memory_order() -> None:
    image = np.arange(12, dtype=np.uint16).reshape(3, 4)
    assert chunks.encode(image) == chunks.encode(np.asfortranarray(image)) == chunks.encode(image.astype(">u2"))
