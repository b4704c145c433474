"""Reads X-ray images as line integrals and writes them as 16-bit PNG; pads to a square, never squashes."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from svdrr.errors import InputError

SCALE_KEY = "line-integral-per-count"
"""The tEXt chunk that says what a count means; a PNG with it is read back as it was written."""

PNG_SCALE = 16 / 65535
"""Line integral per count of the PNGs that we write: black is 0, white is 16, as far as a shard's values go."""


@dataclass(frozen=True)
class Radiograph:
    """An image [rows, columns]: of line integrals, or, where `is_film`, of grey values in 0 .. 1, bright for bone."""

    pixels: NDArray[np.float32]
    is_film: bool


def read(path: Path) -> Radiograph:
    """Reads a PNG or JPEG of 8 or 16 bit, grey or colour. Raises InputError where that is not what the file is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG", "JPEG")) as image:
                scale = image.info.get(SCALE_KEY)
                upright = ImageOps.exif_transpose(image)
                deep = upright.mode.startswith("I")
                pixels = np.asarray(upright if deep else upright.convert("L"), dtype=np.float32)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError(f"no file {path}: give --image an X-ray as PNG or JPEG") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is neither PNG nor JPEG: give --image an X-ray in one of these formats") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(f"{path} has over {Image.MAX_IMAGE_PIXELS} pixels: make it smaller") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}): export it again") from error
    if scale is not None:
        try:
            per_count = float(scale)
        except ValueError:
            per_count = math.nan
        if not 0 < per_count < 1:  # PNG_SCALE is far below
            raise InputError(f"{path}: its text {SCALE_KEY} is {scale!r}, not a number of 0 to 1: remove it")
        return Radiograph(pixels * np.float32(per_count), is_film=False)
    return Radiograph(pixels / np.float32(65535 if deep else 255), is_film=True)


def from_film(
    film: NDArray[np.float32], percentiles: Sequence[float], line_integrals: Sequence[float]
) -> NDArray[np.float32]:
    """Grey values to line integrals, by the monotone curve that takes the film's percentiles to `line_integrals`.

    A film says nothing about absolute attenuation: this makes its histogram that of a typical training view, linear
    between the percentiles and clipped beyond. Raises InputError for a film of one grey.
    """
    knots, first = np.unique(np.percentile(film, percentiles), return_index=True)
    if len(knots) == 1:
        raise InputError("the image is of one grey: give --image an X-ray")
    return np.interp(film, knots, np.asarray(line_integrals)[first]).astype(np.float32)


def to_square(line_integrals: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Pads the shorter side with air, evenly, and resizes to size x size.

    Smaller: the mean over the area of each new pixel, as the shards' levels are made. Larger: bicubic.
    """
    rows, columns = line_integrals.shape
    side = max(rows, columns)
    above, left = (side - rows) // 2, (side - columns) // 2
    square = np.pad(line_integrals, ((above, side - rows - above), (left, side - columns - left)))
    method = Image.Resampling.BOX if side >= size else Image.Resampling.BICUBIC
    return np.array(Image.fromarray(square.astype(np.float32)).resize((size, size), method))


def write_png(path: Path, line_integrals: NDArray[np.float32], text: dict[str, str]) -> None:
    """Writes [N, N] as 16-bit PNG of PNG_SCALE, clipped to 0 .. 16, with the scale and `text` as tEXt chunks."""
    counts = np.round(line_integrals / PNG_SCALE).clip(0, 65535).astype(np.uint16)
    info = PngInfo()
    for key, value in {SCALE_KEY: repr(PNG_SCALE), **text}.items():
        info.add_text(key, value)
    partial = path.with_name(f".{path.name}.partial")
    Image.fromarray(counts).save(partial, format="PNG", pnginfo=info)
    partial.replace(path)
