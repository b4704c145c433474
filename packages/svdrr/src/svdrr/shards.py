"""Reads shards of docs/shard-schema.md, and refuses what is not one. The only module here that opens HDF5."""

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from svdrr.errors import InputError

SCHEMA = "drr-sphere"
SCHEMA_VERSION = "1.3"
# HDF5's number of that filter.
_ZSTD = 32015


@dataclass(frozen=True)
class Shard:
    """All views of one patient volume. Holds no file handle: `images` opens the file, reads and closes it.

    kind: `rendered` or `synthesised`. azimuth_deg, elevation_deg: [V]. levels: sides of the stored images in pixels,
    largest first. digest: SHA-256 of what the file shows (images by their checksums, whether it has marks of
    truncation, which have no checksum, angles, distances, patient), not of how it is stored.
    """

    path: Path
    kind: str
    patient_id: str
    azimuth_deg: NDArray[np.float64]
    elevation_deg: NDArray[np.float64]
    sdd_mm: float
    sod_mm: float
    detector_mm: float
    levels: tuple[int, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.azimuth_deg)

    def check_level(self, size: int) -> None:
        """Raises InputError where the shard has no images of this size."""
        if size not in self.levels:
            stored = ", ".join(map(str, self.levels))
            raise InputError(
                f"{self.path} has images of {stored} pixels, not {size}: render it again with {size} among --levels"
            )

    def nearest_view(self, azimuth_deg: float, elevation_deg: float) -> int:
        """The index of the view whose direction is nearest to these angles."""
        a, b = np.deg2rad(elevation_deg), np.deg2rad(self.elevation_deg)
        away = np.deg2rad(self.azimuth_deg - azimuth_deg)
        return int((np.sin(a) * np.sin(b) + np.cos(a) * np.cos(b) * np.cos(away)).argmax())

    def images(self, size: int, views: Sequence[int] | None = None) -> NDArray[np.float32]:
        """Line integrals [views, size, size] of the given views (all of them by default), each checked by its CRC.

        Raises InputError where the level is missing or an image is damaged.
        """
        self.check_level(size)
        wanted = range(len(self)) if views is None else views
        try:
            with h5py.File(self.path) as file:
                stored = file[f"images/{size}"]
                _require_filter(self.path, stored)
                crc32 = file[f"checks/{size}/crc32"][:]
                counts = np.stack([stored[view] for view in wanted])
                scale, offset = float(stored.attrs["scale"]), float(stored.attrs["offset"])
        except (OSError, KeyError) as error:
            raise InputError(f"{self.path} cannot be read ({error}): {_CURE_MIDWAY}") from error
        for view, image in zip(wanted, counts, strict=True):
            if zlib.crc32(image.astype("<u2").tobytes()) != crc32[view]:
                raise InputError(f"{self.path}: image {view} of level {size} fails its checksum: {_CURE_MIDWAY}")
        return counts.astype(np.float32) * np.float32(scale) + np.float32(offset)

    def truncation(self, size: int, views: Sequence[int]) -> NDArray[np.uint8] | None:
        """Marks [views, size, size], 1 where the line integral lacks what lies beyond the scan; None: no marks.

        Raises InputError where they cannot be read.
        """
        name = f"truncation/{size}"
        try:
            with h5py.File(self.path) as file:
                if name not in file:
                    return None
                stored = file[name]
                if stored.dtype != np.uint8 or stored.shape != (len(self), size, size):
                    raise InputError(f"{self.path}: {name} is {stored.dtype} {stored.shape}: {_CURE_MIDWAY}")
                _require_filter(self.path, stored)
                return np.stack([stored[view] for view in views])
        except (OSError, KeyError) as error:
            raise InputError(f"{self.path} cannot be read ({error}): {_CURE_MIDWAY}") from error


_CURE = "render it again, or move it out of the folder"
_CURE_MIDWAY = (
    "delete it and give the same `drrgen render` and then the same command again, "
    "or move it out of the folder and train with another --out"
)
"""A run that has begun knows its shards by their digests, and an image that is rendered again has the same."""


def open_folder(folder: Path) -> list[Shard]:
    """Every shard `*.h5` of the folder, in the order of their names. Raises InputError where there is none."""
    if not folder.is_dir():
        raise InputError(f"no folder {folder}: give --shards the folder that `drrgen render --out` wrote")
    paths = sorted(path for path in folder.glob("*.h5") if not path.name.startswith("."))
    if not paths:
        raise InputError(f"no shard (*.h5) in {folder}: write some with `drrgen render --ct-dir CT --out {folder}`")
    return [open_shard(path) for path in paths]


def open_shard(path: Path) -> Shard:
    """Checks the file against the schema, without reading its images. Raises InputError saying what is wrong."""
    try:
        with h5py.File(path) as file:
            return _checked(path, file)
    except KeyError as error:
        raise InputError(f"{path} is not a whole shard, {error.args[0]}: {_CURE}") from error
    except OSError as error:
        raise InputError(f"{path} is not a readable HDF5 file ({error}): {_CURE}") from error


def _checked(path: Path, file: h5py.File) -> Shard:
    if file.attrs.get("schema") != SCHEMA:
        raise InputError(f"{path} is HDF5 but not a {SCHEMA} shard: {_CURE}")
    version = str(_attribute(file, "schema_version"))
    if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise InputError(
            f"{path} follows schema {version}, and this svdrr reads {SCHEMA_VERSION.split('.')[0]}.x: "
            f"install the svdrr that reads {version}, or render it again"
        )
    if not file.attrs.get("complete", False):
        raise InputError(f"{path} is incomplete, its writer was stopped: run the same `drrgen render` again")

    azimuth = _dataset(path, file, "views/azimuth_deg", np.float64, (None,))
    count = len(azimuth)
    if count == 0:
        raise InputError(f"{path} holds no views: {_CURE}")
    elevation = _dataset(path, file, "views/elevation_deg", np.float64, (count,))
    _dataset(path, file, "views/source_mm", np.float64, (count, 3))
    _dataset(path, file, "views/projection", np.float64, (count, 3, 4))

    views = file["views"]
    levels = tuple(int(size) for size in _attribute(views, "levels"))
    spacing_mm = _attribute(views, "pixel_spacing_mm")
    sdd_mm, sod_mm = float(_attribute(views, "sdd_mm")), float(_attribute(views, "sod_mm"))
    patient_id = str(_attribute(file, "patient_id"))
    detector_mm = float(spacing_mm[0]) * levels[0]

    digest = hashlib.sha256(repr((patient_id, sdd_mm, sod_mm, detector_mm, levels)).encode())
    digest.update(azimuth[:].astype("<f8").tobytes() + elevation[:].astype("<f8").tobytes())
    for size in levels:
        images = _dataset(path, file, f"images/{size}", np.uint16, (count, size, size))
        _require_filter(path, images)
        digest.update(repr((float(_attribute(images, "scale")), float(_attribute(images, "offset")))).encode())
        digest.update(_dataset(path, file, f"checks/{size}/crc32", np.uint32, (count,))[:].astype("<u4").tobytes())
        if f"truncation/{size}" in file:
            digest.update(b"truncation")
    return Shard(
        path=path,
        kind=str(_attribute(file, "kind")),
        patient_id=patient_id,
        azimuth_deg=azimuth[:],
        elevation_deg=elevation[:],
        sdd_mm=sdd_mm,
        sod_mm=sod_mm,
        detector_mm=detector_mm,
        levels=levels,
        digest=digest.hexdigest(),
    )


def _require_filter(path: Path, images: h5py.Dataset) -> None:
    """HDF5 reads Zstandard once hdf5plugin is imported, in each process. Raises InputError where it is missing."""
    made = images.id.get_create_plist()
    if _ZSTD in [made.get_filter(number)[0] for number in range(made.get_nfilters())]:
        try:
            import hdf5plugin  # noqa: F401
        except ModuleNotFoundError as error:
            raise InputError(
                f"{path} is compressed by zstd, which needs {error.name}, which is not installed: "
                "pip install 'svdrr[zstd]'"
            ) from error


def _attribute(node: h5py.Group | h5py.Dataset, name: str) -> Any:
    if name not in node.attrs:
        raise KeyError(f"attribute {name} of {node.name} is missing")
    return node.attrs[name]


def _dataset(path: Path, file: h5py.File, name: str, dtype: type, shape: tuple[int | None, ...]) -> h5py.Dataset:
    if name not in file:
        raise KeyError(f"dataset {name} is missing")
    dataset = file[name]
    fits = len(dataset.shape) == len(shape) and all(
        want in (None, have) for want, have in zip(shape, dataset.shape, strict=True)
    )
    if dataset.dtype != dtype or not fits:
        raise InputError(
            f"{path}: {name} is {dataset.dtype} {dataset.shape}, the schema wants {np.dtype(dtype)} "
            f"{tuple('V' if side is None else side for side in shape)}: {_CURE}"
        )
    return dataset
