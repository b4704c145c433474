"""The writer's half of docs/shard-schema.md: shards are written whole or not at all, checked, and read for viewing."""

import hashlib
import json
import os
import re
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import TracebackType

import h5py
import numpy as np
from numpy.typing import NDArray

from drrgen import __version__, attenuation
from drrgen.dicom import HU_CLAMP
from drrgen.errors import InputError
from drrgen.geometry import Detector, Views
from drrgen.volume import Origin, Volume

SCHEMA = "drr-sphere"
VERSION = "1.0"
SCALE = 1 / 4096

Images = NDArray[np.uint16]

# path -> dtype, axes; the MUST rows of the schema's table of datasets, but for those that each level has
_DATASETS = {
    "views/azimuth_deg": ("float64", ("V",)),
    "views/elevation_deg": ("float64", ("V",)),
    "views/source_mm": ("float64", ("V", 3)),
    "views/projection": ("float64", ("V", 3, 4)),
}
_ATTRIBUTES = {
    "/": (
        "schema schema_version complete kind created_by config_json config_sha256 patient_id licence attribution"
    ).split(),
    "views": "sdd_mm sod_mm isocentre_mm levels pixel_spacing_mm".split(),
}
_LEVEL_ATTRIBUTES = "scale offset quantity saturated_count energy_kev mu_water_per_mm bone_factor".split()
_CT_ATTRIBUTES = "study_uid series_uid spacing_mm shape world_from_voxel hu_clamp table_removed volume_sha256".split()


def file_name(origin: Origin) -> str:
    """The name of a series' shard: readable, unique per series, safe whatever the PatientID holds."""
    patient = re.sub(r"[^A-Za-z0-9._-]", "_", origin.patient_id).lstrip(".") or "_"
    return f"{patient}_{hashlib.sha256(origin.series_uid.encode()).hexdigest()[:8]}.h5"


class Writer:
    """Appends batches of views to a shard under way; made by `create`."""

    def __init__(self, file: h5py.File) -> None:
        self._file = file
        self._num_done = 0
        self.saturated = 0

    def append(self, images: dict[int, Images], saturated: int) -> None:
        """The next views, {size: [views, size, size]}, and how many pixels of the largest level exceed the scale."""
        for size, batch in images.items():
            rows = slice(self._num_done, self._num_done + len(batch))
            self._file[f"images/{size}"][rows] = batch
            self._file[f"checks/{size}/crc32"][rows] = [_crc32(image) for image in batch]
        self.saturated += saturated
        self._num_done += len(batch)


@contextmanager
def create(
    path: Path,
    volume: Volume,
    views: Views,
    detectors: list[Detector],
    *,
    table_removed: bool,
    config_json: str,
    licence: str,
    attribution: str,
) -> Iterator[Writer]:
    """Open a shard for writing. It gets its name when the block ends well, complete and checked, or never.

    detectors: one per level, the largest first.
    """
    temporary = path.with_name(f".{path.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    try:
        with h5py.File(temporary, "w") as file:
            _describe(file, volume, views, detectors, table_removed)
            file.attrs.update(
                schema=SCHEMA,
                schema_version=VERSION,
                kind="rendered",
                created_by=f"drrgen {__version__}",
                config_json=config_json,
                config_sha256=hashlib.sha256(config_json.encode()).hexdigest(),
                patient_id=volume.origin.patient_id,
                licence=licence,
                attribution=attribution,
            )
            writer = Writer(file)
            yield writer
            file[f"images/{detectors[0].shape}"].attrs["saturated_count"] = writer.saturated
            file.attrs["complete"] = True
        if found := violations(temporary):
            raise OSError(f"{path}: what was written is not what was meant: {found[0]}")
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _describe(file: h5py.File, volume: Volume, views: Views, detectors: list[Detector], table_removed: bool) -> None:
    group = file.create_group("views")
    group["azimuth_deg"], group["elevation_deg"] = views.azimuth_deg, views.elevation_deg
    group["source_mm"], group["projection"] = views.source_mm, views.projection(detectors[0])
    group.attrs.update(
        sdd_mm=views.sdd_mm,
        sod_mm=views.sod_mm,
        isocentre_mm=views.isocentre_mm,
        levels=[detector.shape for detector in detectors],
        pixel_spacing_mm=[detector.pixel_mm for detector in detectors],
    )
    for detector in detectors:
        size = detector.shape
        images = file.create_dataset(
            f"images/{size}",
            (len(views), size, size),
            np.uint16,
            chunks=(1, size, size),
            shuffle=True,
            compression="gzip",
            compression_opts=1,
        )
        images.attrs.update(
            scale=SCALE,
            offset=0.0,
            quantity="line integral",
            saturated_count=0,
            energy_kev=attenuation.ENERGY_KEV,
            mu_water_per_mm=attenuation.MU_WATER_PER_MM,
            bone_factor=attenuation.BONE_FACTOR,
        )
        file.create_dataset(f"checks/{size}/crc32", (len(views),), np.uint32)
    origin = volume.origin
    known = dict(
        study_uid=origin.study_uid,
        series_uid=origin.series_uid,
        manufacturer=origin.manufacturer,
        kernel=origin.kernel,
        kvp=origin.kvp,
        slice_thickness_mm=origin.slice_thickness_mm,
        spacing_mm=volume.spacing_mm,
        shape=volume.hu.shape,
        world_from_voxel=volume.world_from_voxel,
        hu_clamp=[float(value) for value in HU_CLAMP],
        table_removed=table_removed,
        defects=json.dumps(volume.defects),
        repairs=json.dumps(volume.repairs),
        volume_sha256=hashlib.sha256(np.ascontiguousarray(volume.hu, "<i2").data).hexdigest(),
    )
    file.create_group("ct").attrs.update({name: value for name, value in known.items() if value is not None})


class Shard:
    """A finished shard, open for reading. Raises InputError where it is none, unfinished or of another version."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _opened(path)
        try:
            attributes, views = self._file.attrs, self._file["views"]
            version, complete = str(attributes.get("schema_version", "none")), bool(attributes.get("complete", False))
            if attributes.get("schema") != SCHEMA or version.split(".")[0] != VERSION.split(".")[0]:
                raise InputError(
                    f"{path}: schema {attributes.get('schema', 'none')} {version}, this drrgen reads {SCHEMA} {VERSION}"
                    ": install the drrgen that fits, or render again"
                )
            if not complete:
                raise InputError(f"{path}: the shard is not complete: render it again")
            self.patient_id, self.config_json = str(attributes["patient_id"]), str(attributes["config_json"])
            self.azimuth_deg, self.elevation_deg = views["azimuth_deg"][:], views["elevation_deg"][:]
            self.levels = [int(size) for size in views.attrs["levels"]]
        except (KeyError, TypeError) as error:
            self._file.close()
            raise InputError(f"{path}: {error}; drrgen validate names all that is wrong") from error
        except InputError:
            self._file.close()
            raise

    def __len__(self) -> int:
        return len(self.azimuth_deg)

    def line_integrals(self, size: int, view: int) -> NDArray[np.float32]:
        """One image of one level, [row, column]."""
        images = self._file[f"images/{size}"]
        return (images[view] * images.attrs["scale"] + images.attrs["offset"]).astype(np.float32)

    def __enter__(self) -> "Shard":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def violations(path: Path) -> list[str]:
    """Every MUST of the schema that a file breaks, a line each, checksums and pyramid included; [] for a sound shard.

    Raises InputError where the file cannot be opened as HDF5.
    """
    with _opened(path) as file:
        try:
            return list(_violations(file))
        except (OSError, TypeError, ValueError) as error:
            return [f"unreadable: {' '.join(str(error).split())}"]


def _violations(file: h5py.File) -> Iterator[str]:
    for group, names in _ATTRIBUTES.items():
        attributes = file[group].attrs if group in file else {}
        yield from (f"{group}: attribute {name} is missing" for name in names if name not in attributes)
    yield from _wrong_values(file)
    num_views = len(file["views/azimuth_deg"]) if "views/azimuth_deg" in file else 0
    levels = [int(size) for size in file["views"].attrs.get("levels", [])] if "views" in file else []
    if not levels or any(large != 2 * small for large, small in pairwise(levels)):
        yield f"views: levels {levels} are not one or more sizes, largest first, each half of the one before"
        return
    datasets = dict(_DATASETS)
    for size in levels:
        datasets[f"images/{size}"] = ("uint16", ("V", size, size))
        datasets[f"checks/{size}/crc32"] = ("uint32", ("V",))
    wrong = []
    for path, (dtype, axes) in datasets.items():
        shape = tuple(num_views if axis == "V" else axis for axis in axes)
        if path not in file:
            wrong.append(f"{path}: missing")
        elif file[path].dtype != dtype or file[path].shape != shape:
            wrong.append(f"{path}: {file[path].dtype} {file[path].shape} instead of {dtype} {shape}")
    yield from wrong
    if not wrong:
        yield from _wrong_images(file, levels, num_views)


def _wrong_values(file: h5py.File) -> Iterator[str]:
    attributes = file.attrs
    if attributes.get("schema") != SCHEMA:
        yield f"/: schema is {attributes.get('schema')!r} instead of {SCHEMA!r}"
    version = str(attributes.get("schema_version"))
    if version.split(".")[0] != VERSION.split(".")[0]:
        yield f"/: schema_version is {version}, this drrgen knows {VERSION}"
    if not bool(attributes.get("complete", False)):
        yield "/: complete is not true: the file was not finished"
    if attributes.get("kind") not in ("rendered", "synthesised"):
        yield f"/: kind is {attributes.get('kind')!r} instead of 'rendered' or 'synthesised'"
    if hashlib.sha256(str(attributes.get("config_json")).encode()).hexdigest() != attributes.get("config_sha256"):
        yield "/: config_sha256 is not that of config_json"
    if attributes.get("kind") == "rendered":
        ct = file["ct"].attrs if "ct" in file else {}
        yield from (f"ct: attribute {name} is missing" for name in _CT_ATTRIBUTES if name not in ct)


def _wrong_images(file: h5py.File, levels: list[int], num_views: int) -> Iterator[str]:
    for size in levels:
        missing = [name for name in _LEVEL_ATTRIBUTES if name not in file[f"images/{size}"].attrs]
        yield from (f"images/{size}: attribute {name} is missing" for name in missing)
    for view in range(num_views):
        expected = None
        for size in levels:
            image = file[f"images/{size}"][view]
            if _crc32(image) != file[f"checks/{size}/crc32"][view]:
                yield f"images/{size}: view {view} does not match its CRC-32"
            elif expected is not None and not np.array_equal(image, expected):
                yield f"images/{size}: view {view} is not the box average of the next larger level"
            expected = halved(image)


def halved(images: Images) -> Images:
    """The next lower level: exact 2 x 2 box averages of [..., row, column], rounded to nearest, halves up."""
    wide = images.astype(np.uint32)
    total = wide[..., ::2, ::2] + wide[..., 1::2, ::2] + wide[..., ::2, 1::2] + wide[..., 1::2, 1::2]
    return ((total + 2) >> 2).astype(np.uint16)


def _crc32(image: Images) -> int:
    return zlib.crc32(np.ascontiguousarray(image, "<u2").data)


def _opened(path: Path) -> h5py.File:
    if not path.is_file():
        raise InputError(f"{path}: there is no such shard")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise InputError(
            f"{path}: not a readable HDF5 file ({' '.join(str(error).split())}): render it again"
        ) from error


def _sync(path: Path) -> None:
    """Force a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
