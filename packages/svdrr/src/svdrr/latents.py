"""Every view as latents: encoded once per shard, VAE and level, then memory-mapped; or as an image, to be encoded.

Both are read by N pairs of indices, of shards and of their views. No model is at work in reading, and two threads may
read at once. What is read of either is checked first: no damaged byte of a disk is trained on.
"""

import functools
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from tokenize import TokenError
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from svdrr.durable import give_name
from svdrr.errors import InputError
from svdrr.shards import Shard

MAX_BATCH, MAX_PIXELS = 32, 2**18
"""Views and pixels encoded at once. More leave a CPU's caches: 32 of 256 pixels take 2.6 times as long as four."""

LAYOUT = 2
"""Of the files. Those of another are never found; they stay, and may be deleted."""

MAX_OPEN = 256
"""Files that are mapped at once. Each takes one of the process's file handles, of which 1024 are usual."""


class Latents(NamedTuple):
    """Of N views: latents [N, C, h, w] and truncated [N, h, w], 0 to 1, how much of each cell's pixels are marked.

    Where a shard has no marks, truncated is 0. embedding: [N, E], where there is an image encoder.
    """

    values: Tensor
    truncated: Tensor
    embedding: Tensor | None = None


Reader = Callable[[NDArray[np.int64], NDArray[np.int64]], Latents]


def latent_path(folder: Path, shard: Shard, size: int, digest: str) -> Path:
    """Both digests are in the name: what is of another shard content, or was encoded otherwise, is never found."""
    return folder / f"layout-{LAYOUT}" / digest[:16] / str(size) / f"{shard.digest[:32]}.npy"


def cached(
    shards: Sequence[Shard],
    size: int,
    encode: Callable[[Tensor], Tensor],
    digest: str,
    folder: Path,
    part: tuple[int, int] = (0, 1),
    is_over: Callable[[], bool] = lambda: False,
    embed: Callable[[Tensor], Tensor] | None = None,
) -> Reader:
    """Reads latents of these shards at this level from the folder, after encoding what is not there yet.

    encode: line integrals [B, 1, size, size] to latents [B, C, h, w]. digest: of what encodes and embeds. part: (index,
    count) of the processes that share this work; each encodes its own shards only. is_over: asked after each shard that
    was encoded, whether to leave the others to the next call. embed: line integrals, likewise, to embeddings [B, E],
    which are then kept with the latents. Raises InputError where the folder takes no more; the reader does where a file
    is damaged.
    """
    paths = [latent_path(folder, shard, size, digest) for shard in shards]
    index, count = part
    by_path = dict(zip(paths, shards, strict=True))  # one of shards with the same content: two would write one file
    mine = list(by_path.items())[index::count]
    for path, shard in tqdm(mine, desc=f"latents {size}px", unit="shard", disable=index > 0 or not shards):
        if not _whole(path, shard, size, digest):
            _write(path, shard, size, digest, encode, embed)
            if is_over():
                break

    # What is mapped is read from the disk when a view of it is asked for, and forgotten when memory is short.
    @functools.lru_cache(MAX_OPEN)
    def mapped(path: Path) -> tuple[NDArray, int]:
        return _mapped(path, by_path[path], size, digest)

    def record(path: Path, view: int) -> np.void:
        try:
            return _intact(*mapped(path), view)
        except ValueError as error:
            raise InputError(
                f"{path} is damaged ({error}): delete it and run the same command, which encodes it again"
            ) from error

    def read(shard: NDArray[np.int64], view: NDArray[np.int64]) -> Latents:
        rows = [record(paths[s], v) for s, v in zip(shard, view, strict=True)]
        values = np.stack([row["latents"] for row in rows]).astype(np.float32)
        marks = np.stack([row["truncated"] for row in rows]).astype(np.float32) / 255
        if embed is None:
            return Latents(torch.from_numpy(values), torch.from_numpy(marks))
        embedding = np.stack([row["embedding"] for row in rows]).astype(np.float32)
        return Latents(torch.from_numpy(values), torch.from_numpy(marks), torch.from_numpy(embedding))

    return read


def read_images(
    shards: Sequence[Shard], size: int, shard: NDArray[np.int64], view: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Line integrals [N, size, size] of these views of these shards."""
    images = np.empty((len(shard), size, size), np.float32)
    for row, (s, v) in enumerate(zip(shard, view, strict=True)):
        images[row] = shards[s].images(size, [v])[0]
    return images


def read_truncated(
    shards: Sequence[Shard], size: int, side: int, shard: NDArray[np.int64], view: NDArray[np.int64]
) -> Tensor:
    """Of these views, how much of each of side x side cells is marked: as Latents.truncated."""
    fractions = np.zeros((len(shard), side, side), np.float32)
    for row, (s, v) in enumerate(zip(shard, view, strict=True)):
        marks = shards[s].truncation(size, [v])
        if marks is not None:
            fractions[row] = _fraction(marks, side)[0]
    return torch.from_numpy(fractions)


def encoded(images: NDArray[np.float32], encode: Callable[[Tensor], Tensor]) -> Tensor:
    """Line integrals [N, size, size] to latents [N, C, h, w] in float32, a few at a time; or to embeddings [N, E].

    encode: as `encode` or `embed` in `cached`.
    """
    batches = torch.from_numpy(images)[:, None].split(_batch(images.shape[-1]))
    with torch.no_grad():
        return torch.cat([encode(batch) for batch in batches]).float()


def _write(
    path: Path,
    shard: Shard,
    size: int,
    digest: str,
    encode: Callable[[Tensor], Tensor],
    embed: Callable[[Tensor], Tensor] | None,
) -> None:
    """One record per view, latents and embedding as float16, the marks in steps of 1/255; named when it is whole."""
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            _write_records(file, shard, size, digest, encode, embed)
        give_name(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"cannot write {path} ({error}): make room and run the same command") from error


def _write_records(
    file: BinaryIO,
    shard: Shard,
    size: int,
    digest: str,
    encode: Callable[[Tensor], Tensor],
    embed: Callable[[Tensor], Tensor] | None,
) -> None:
    step = _batch(size)
    for begin in range(0, len(shard), step):
        views = range(begin, min(begin + step, len(shard)))
        images = shard.images(size, views)
        latents = encoded(images, encode).cpu().numpy()
        fields: list[tuple] = [("latents", "<f2", latents.shape[1:]), ("truncated", "u1", latents.shape[2:])]
        if embed is not None:
            embeddings = encoded(images, embed).cpu().numpy()
            fields.append(("embedding", "<f2", embeddings.shape[1:]))
        record = np.dtype([("crc32", "<u4"), ("content", fields)])
        rows = np.zeros(len(views), record)
        content = rows["content"]
        content["latents"] = latents
        if embed is not None:
            content["embedding"] = embeddings
        marks = shard.truncation(size, views)
        if marks is not None:
            content["truncated"] = np.rint(255 * _fraction(marks, latents.shape[-1]))
        start = _start(record, shard, size, digest)
        rows["crc32"] = [zlib.crc32(one, start) for one in content]
        if begin == 0:
            header = {"descr": np.lib.format.dtype_to_descr(record), "fortran_order": False, "shape": (len(shard),)}
            np.lib.format.write_array_header_1_0(file, header)
        rows.tofile(file)


def _start(record: np.dtype, shard: Shard, size: int, digest: str) -> int:
    """What the checksums of a file's records start from: one of another file, or read as another type, fits none."""
    return zlib.crc32(repr((digest, size, shard.digest, np.lib.format.dtype_to_descr(record))).encode())


def _whole(path: Path, shard: Shard, size: int, digest: str) -> bool:
    """Whether the file is there, with all its bytes; a disk that was repaired may have cut it."""
    try:
        _mapped(path, shard, size, digest)
    except (OSError, ValueError):
        return False
    return True


def _mapped(path: Path, shard: Shard, size: int, digest: str) -> tuple[NDArray, int]:
    """The file's records, of which no more than the first is read, and where their checksums start.

    Raises ValueError where they are not those of this shard, size and digest.
    """
    try:
        records = np.asarray(np.load(path, mmap_mode="r"))
    except (EOFError, SyntaxError, TokenError) as error:  # numpy reads the header as Python, and raises what that does
        raise ValueError("its header cannot be read") from error
    if records.dtype.names != ("crc32", "content") or records.shape != (len(shard),):
        raise ValueError(f"it does not hold {len(shard)} views")
    start = _start(records.dtype, shard, size, digest)
    _intact(records, start, 0)
    return records, start


def _intact(records: NDArray, start: int, view: int) -> np.void:
    """What is kept of a view. Raises ValueError where it fails its checksum."""
    record = records[view]
    if zlib.crc32(record["content"], start) != record["crc32"]:
        raise ValueError(f"view {view} fails its checksum")
    return record["content"]


def _batch(size: int) -> int:
    return max(1, min(MAX_BATCH, MAX_PIXELS // size**2))


def _fraction(marks: NDArray, side: int) -> NDArray[np.float64]:
    """Marks [N, size, size] to the share of pixels marked in each cell [N, side, side]."""
    cell = marks.shape[-1] // side
    return marks.reshape(-1, side, cell, side, cell).mean(axis=(2, 4), dtype=np.float64)
