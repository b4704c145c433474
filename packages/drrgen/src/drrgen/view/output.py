"""What all pictures share: the views' pixels at any size, directions, and files that are whole or absent."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from drrgen import temporary
from drrgen.errors import InputError
from drrgen.geometry import Float, view_axes
from drrgen.shards import Shard

# Bright enough for bone and not spent on the few densest pixels.
WHITE_PERCENTILE = 99.8


def check_suffix(option: str, path: Path, *suffixes: str) -> None:
    """Raises InputError where the file's name does not say what is written to it."""
    if path.suffix.lower() not in suffixes:
        raise InputError(f"{option} {path}: name the file so that it ends with {suffixes[0]}")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name to write to that becomes `path` at the end, or vanishes where writing fails."""
    partial = temporary.name_for(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def level_for(shard: Shard, size: int) -> int:
    """The smallest level with at least `size` pixels a side, or else the largest."""
    return min((level for level in shard.levels if level >= size), default=max(shard.levels))


def frame(shard: Shard, view: int, size: int) -> NDArray[np.float32]:
    """Line integrals of one view, [row, column], averaged to size x size pixels, at most those of the largest level."""
    image = shard.line_integrals(level_for(shard, size), view)
    return (
        image if len(image) == size else np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BOX))
    )


def grey(line_integrals: NDArray, top: float) -> NDArray[np.uint8]:
    """0 to `top` as 0 to 255, rounded; what is beyond is cut."""
    return np.clip(np.rint(line_integrals * np.float32(255 / top)), 0, 255).astype(np.uint8)


def white_level(images: NDArray) -> float:
    """The line integral to show as white beside 0 as black."""
    return max(float(np.percentile(images, WHITE_PERCENTILE)), 1e-6)


def directions(shard: Shard) -> Float:
    """Unit vectors from the isocentre to the detectors' centres, [V, 3], LPS."""
    return view_axes(shard.azimuth_deg, shard.elevation_deg)[2]


def between_deg(first: Float, second: Float) -> Float:
    """Great-circle angles between unit vectors, [..., 3], in degrees."""
    # of chords: the arc cosine of 1 knows no small angles
    return np.rad2deg(2 * np.arcsin(np.clip(np.linalg.norm(first - second, axis=-1) / 2, 0, 1)))
