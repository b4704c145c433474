"""Chunks made outside HDF5 are those that its own filters would read; what is none is refused, and never grows."""

import sys
import tracemalloc
import zlib
from pathlib import Path

import h5py
import hdf5plugin  # noqa: F401
import numpy as np
import pytest
import zstandard

from drrgen import chunks
from drrgen.errors import InputError

SHAPE, WORDS = (64, 64), np.dtype(np.uint16)
NUM_BYTES = 64 * 64 * 2


@pytest.mark.parametrize("compression", chunks.FILTERS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (64, 64)])
def test_hdf5_and_we_read_them(tmp_path: Path, compression: str, dtype: type, shape: tuple[int, int]) -> None:
    images = np.random.default_rng(1).integers(0, np.iinfo(dtype).max, (3, *shape), dtype, endpoint=True)
    images[1] = 0
    payloads = [chunks.encode(image, compression).payload for image in images]
    with h5py.File(tmp_path / "chunks.h5", "w") as file:
        options = chunks.FILTERS[compression]
        dataset = file.create_dataset("images", images.shape, dtype, chunks=(1, *shape), **options)
        for view, payload in enumerate(payloads):
            dataset.id.write_direct_chunk((view, 0, 0), payload)
    with h5py.File(tmp_path / "chunks.h5") as file:
        assert np.array_equal(file["images"][:], images)
    for image, payload in zip(images, payloads, strict=True):
        assert np.array_equal(chunks.decode(payload, 0, compression, shape, np.dtype(dtype)), image)


@pytest.mark.parametrize("compression", chunks.FILTERS)
def test_chunks_that_hdf5_wrote_are_read(tmp_path: Path, compression: str) -> None:
    images = noise()[None]
    with h5py.File(tmp_path / "chunks.h5", "w") as file:
        options = chunks.FILTERS[compression]
        dataset = file.create_dataset("images", data=images, chunks=images.shape, **options)
        left_out, payload = dataset.id.read_direct_chunk((0, 0, 0))
    assert np.array_equal(chunks.decode(payload, left_out, compression, SHAPE, WORDS), images[0])


def test_a_chunk_knows_its_image() -> None:
    image = np.array([[0, 1], [65535, 65535]], np.uint16)
    chunk = chunks.encode(image)
    assert chunk.saturated == 2
    assert chunk.crc32 == zlib.crc32(b"\x00\x00\x01\x00\xff\xff\xff\xff")


@pytest.mark.parametrize("compression", chunks.FILTERS)
def test_what_is_stored_does_not_depend_on_the_memory_order(compression: str) -> None:
    image = np.arange(12, dtype=np.uint16).reshape(3, 4) * 999
    expected = chunks.encode(image, compression)
    assert chunks.encode(np.asfortranarray(image), compression) == expected
    assert chunks.encode(image.astype(">u2"), compression) == expected


def noise() -> np.ndarray:
    """Of the lowest 12 bits, so that the high bytes can be compressed."""
    return np.random.default_rng(0).integers(0, 4096, SHAPE).astype(np.uint16)


def compressed(plain: bytes, compression: str) -> bytes:
    return zlib.compress(plain, 1) if compression == "deflate" else zstandard.ZstdCompressor().compress(plain)


def test_filters_that_a_chunk_left_out() -> None:
    """HDF5 lets a chunk say so, a bit for each filter."""
    image = noise()
    plain = image.astype("<u2").tobytes()
    shuffled = plain[::2] + plain[1::2]
    for compression in chunks.FILTERS:
        for left_out, payload in enumerate([compressed(shuffled, compression), compressed(plain, compression)]):
            assert np.array_equal(chunks.decode(payload, left_out, compression, SHAPE, WORDS), image)
        for left_out, payload in ((2, shuffled), (3, plain)):
            assert np.array_equal(chunks.decode(payload, left_out, compression, SHAPE, WORDS), image)
            with pytest.raises(ValueError, match="8191 bytes instead of 8192"):
                chunks.decode(payload[:-1], left_out, compression, SHAPE, WORDS)


@pytest.mark.parametrize("compression", chunks.FILTERS)
def test_every_truncation_and_flipped_bit_is_found(compression: str) -> None:
    """By the checksum that both formats carry; but some bits of a header say nothing about pixels."""
    image = noise()
    payload = chunks.encode(image, compression).payload
    for end in range(0, len(payload), 97):
        with pytest.raises(ValueError, match=r"missing|bytes|error"):
            chunks.decode(payload[:end], 0, compression, SHAPE, WORDS)
    unharmed = 0
    for byte in range(0, len(payload), 41):
        flipped = bytearray(payload)
        flipped[byte] ^= 1 << byte % 8
        try:
            assert np.array_equal(chunks.decode(bytes(flipped), 0, compression, SHAPE, WORDS), image)
            unharmed += 1
        except ValueError:
            pass
    assert unharmed <= 1


@pytest.mark.parametrize("compression", chunks.FILTERS)
@pytest.mark.parametrize("num_bytes", [0, 1, NUM_BYTES - 1, NUM_BYTES + 1, 2 * NUM_BYTES])
def test_more_or_fewer_bytes_than_an_image_are_refused(compression: str, num_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"bytes instead of {NUM_BYTES}"):
        chunks.decode(compressed(bytes(num_bytes), compression), 0, compression, SHAPE, WORDS)


@pytest.mark.parametrize("compression", chunks.FILTERS)
def test_a_bomb_does_not_go_off(compression: str) -> None:
    bomb = compressed(bytes(50_000_000), compression)
    assert len(bomb) < 300_000
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"bytes instead of {NUM_BYTES}"):
            chunks.decode(bomb, 0, compression, SHAPE, WORDS)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # what is left of the bomb, the state of the decoder and an image, but not the 50 MB
    assert peak < 1_000_000


def test_a_frame_of_unknown_length_is_refused_as_hdf5_does() -> None:
    stream = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(NUM_BYTES))
    with pytest.raises(ValueError, match="an unknown number of bytes"):
        chunks.decode(stream, 0, "zstd", SHAPE, WORDS)


@pytest.mark.parametrize("missing", ["zstandard", "hdf5plugin"])
def test_a_missing_package_is_named_with_the_command_that_brings_it(monkeypatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    chunks.require("deflate")
    with pytest.raises(InputError, match=rf"zstd needs {missing}, .*: pip install 'drrgen\[zstd\]'"):
        chunks.require("zstd")
