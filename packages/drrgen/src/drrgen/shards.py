"""The writer's half of docs/shard-schema.md: shards are written whole or not at all, checked, and read for viewing."""

import functools
import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import TracebackType

import h5py
import numpy as np
from numpy.typing import NDArray

from drrgen import __version__, attenuation, chunks, temporary, truncation
from drrgen.beam import Beam, mono
from drrgen.errors import InputError
from drrgen.geometry import Detector, Views, project
from drrgen.nodules import MAX_READERS, RATINGS, AnnotatedNodule, boxes, lower_level
from drrgen.stages import Stages
from drrgen.volume import HU_CLAMP, Origin, Volume

SCHEMA = "drr-sphere"
VERSION = "1.3"
SCALE = 1 / 4096

Images = NDArray[np.uint16]

# The MUST rows of the schema's tables, as (kind, shape). "V" is the number of views, "L" of levels.
_TEXT, _FLAG, _INT, _REAL = str, np.bool_, np.integer, np.floating
_ROOT_ATTRIBUTES = {
    **dict.fromkeys(("schema", "schema_version", "kind", "created_by", "config_json", "config_sha256"), (_TEXT, ())),
    **dict.fromkeys(("patient_id", "licence", "attribution"), (_TEXT, ())),
    "complete": (_FLAG, ()),
}
_VIEWS_ATTRIBUTES = {
    "sdd_mm": (_REAL, ()),
    "sod_mm": (_REAL, ()),
    "isocentre_mm": (_REAL, (3,)),
    "levels": (_INT, ("L",)),
    "pixel_spacing_mm": (_REAL, ("L",)),
}
_IMAGE_ATTRIBUTES = {
    **dict.fromkeys(("scale", "offset"), (_REAL, ())),
    "quantity": (_TEXT, ()),
    "saturated_count": (_INT, ()),
}
_BEAM_ATTRIBUTES = dict.fromkeys(("energy_kev", "mu_water_per_mm", "bone_factor"), (_REAL, ()))
_SPECTRUM_ATTRIBUTES = {"name": (_TEXT, ()), "description": (_TEXT, ()), "kvp": (_REAL, ()), "mean_kev": (_REAL, ())}
_SPECTRUM_DATASETS = ("energy_kev", "weight", "mu_water_per_mm", "bone_factor")
_CT_ATTRIBUTES = {
    **dict.fromkeys(("study_uid", "series_uid", "defects", "repairs", "volume_sha256"), (_TEXT, ())),
    "spacing_mm": (_REAL, (3,)),
    "shape": (_INT, (3,)),
    "world_from_voxel": (_REAL, (4, 4)),
    "hu_clamp": (_REAL, (2,)),
    "table_removed": (_FLAG, ()),
}
_VIEWS_DATASETS = {
    "views/azimuth_deg": ("float64", ("V",)),
    "views/elevation_deg": ("float64", ("V",)),
    "views/source_mm": ("float64", ("V", 3)),
    "views/projection": ("float64", ("V", 3, 4)),
}
# What MAY be known of nodules, of which there are "N"; boxes are said per level.
_NODULE_DATASETS = {
    "nodules/centroid_mm": ("float64", ("N", 3)),
    "nodules/diameter_mm": ("float64", ("N",)),
    "nodules/readers": ("uint8", ("N",)),
    **{f"nodules/ratings/{name}": ("uint8", ("N", MAX_READERS)) for name in RATINGS},
}
# What is stored of a view, as (images, checksums); the two materials together or not at all.
_WHOLE, _SOFT, _BONE = ("images", "crc32"), ("images_soft", "crc32_soft"), ("images_bone", "crc32_bone")
# Boxes are float32, and of a few thousand pixels at most where they matter: that is 0.0002 pixels.
_BOX_TOLERANCE_PX = 1e-3
# Shares of a spectrum may have been written with seven decimals.
_SHARES_TOLERANCE = 1e-5
# Source and projection follow from angles and distances; both are written in float64, by whatever order of operations.
_GEOMETRY_TOLERANCE = 1e-6


def file_name(origin: Origin) -> str:
    """The name of a series' shard: readable, unique per series, safe whatever the PatientID holds."""
    patient = re.sub(r"[^A-Za-z0-9._-]", "_", origin.patient_id).lstrip(".") or "_"
    return f"{patient}_{hashlib.sha256(origin.series_uid.encode()).hexdigest()[:8]}.h5"


def config_sha256(config_json: str) -> str:
    """What a shard of these settings has as its attribute of this name."""
    return hashlib.sha256(config_json.encode()).hexdigest()


class Writer:
    """Appends batches of views to a shard under way; made by `draft`.

    partial: where it is, until it is published as `path`. saturated: pixels at the scale's end by dataset, such as
    images/512.
    """

    def __init__(
        self,
        path: Path,
        partial: Path,
        file: h5py.File,
        levels: list[int],
        compression: str,
        pool: ThreadPoolExecutor,
        stages: Stages,
    ) -> None:
        self.path, self.partial = path, partial
        self._file = file
        self._compression = compression
        self._pool = pool
        self._stages = stages
        self._num_done = 0
        self._kinds = _kinds(file)
        self.saturated = {f"{images}/{size}": 0 for images, _ in self._kinds for size in levels}

    def append(self, images: dict[int, Images], truncated: NDArray[np.uint8] | None = None) -> None:
        """The next views at every level, {size: [views, size, size]}, and the largest level's truncation marks.

        With materials a view has three images, the whole, soft and bone: {size: [views, 3, size, size]}.
        """
        datasets: dict[str, tuple[str | None, NDArray[np.uint16] | NDArray[np.uint8]]] = {}
        for size, batch in images.items():
            by_kind = batch.reshape(len(batch), len(self._kinds), size, size).swapaxes(0, 1)
            for (folder, check), stored in zip(self._kinds, by_kind, strict=True):
                datasets[f"{folder}/{size}"] = f"checks/{size}/{check}", stored
        if truncated is not None:
            for size in images:
                truncated = truncated if truncated.shape[-1] == size else truncation.halved(truncated)
                datasets[f"truncation/{size}"] = None, truncated
        with self._stages("compress"):
            encode = functools.partial(chunks.encode, compression=self._compression)
            under_way = {path: self._pool.map(encode, pixels) for path, (_, pixels) in datasets.items()}
            encoded = {path: list(made) for path, made in under_way.items()}
        with self._stages("write"):
            self._write(datasets, encoded)
        self._num_done += len(next(iter(images.values())))

    def _write(
        self,
        datasets: dict[str, tuple[str | None, NDArray[np.uint16] | NDArray[np.uint8]]],
        encoded: dict[str, list[chunks.Chunk]],
    ) -> None:
        for path, (checks, pixels) in datasets.items():
            if path not in self._file:
                num_views = self._file["views/azimuth_deg"].shape[0]
                options = _options(pixels.shape[-1], self._compression)
                self._file.create_dataset(path, (num_views, *pixels.shape[1:]), np.uint8, **options)
            stored, made = self._file[path], encoded[path]
            for view, chunk in enumerate(made, self._num_done):
                stored.id.write_direct_chunk((view, 0, 0), chunk.payload)
            if checks:
                self._file[checks][self._num_done : self._num_done + len(made)] = [chunk.crc32 for chunk in made]
                self.saturated[path] += sum(chunk.saturated for chunk in made)


@contextmanager
def draft(
    path: Path,
    volume: Volume,
    views: Views,
    detectors: list[Detector],
    *,
    table_removed: bool,
    config_json: str,
    licence: str,
    attribution: str,
    dataset: str = "",
    nodules: list[AnnotatedNodule] | None = None,
    beam: Beam | None = None,
    materials: bool = False,
    compression: str = "deflate",
    num_threads: int = 1,
    stages: Stages | None = None,
) -> Iterator[Writer]:
    """Open a shard for writing, under a temporary name: complete when the block ends well, else gone. Then `publish`.

    path: what it will be called. detectors: one per level, the largest first. nodules: [] where readers found none,
    None where nothing is known; the same for a `dataset` of no name. beam: None for one of 60 keV. materials: whether
    soft and bone images follow. compression: one of chunks.FILTERS. Raises InputError where a package is missing for
    it.
    """
    chunks.require(compression)
    beam = mono(attenuation.ENERGY_KEV) if beam is None else beam
    partial = temporary.name_for(path)
    with (
        _removed_on_failure(partial, path),
        h5py.File(partial, "w") as file,
        ThreadPoolExecutor(num_threads) as pool,
    ):
        _describe(file, volume, views, detectors, table_removed)
        for kind in (_WHOLE, _SOFT, _BONE) if materials else (_WHOLE,):
            _make_room(file, kind, len(views), detectors, compression)
        _describe_beam(file, beam, [detector.shape for detector in detectors])
        if nodules is not None:
            _describe_nodules(file, nodules, views, detectors)
        if dataset:
            file.attrs["dataset"] = dataset
        file.attrs.update(
            schema=SCHEMA,
            schema_version=VERSION,
            kind="rendered",
            created_by=f"drrgen {__version__}",
            config_json=config_json,
            config_sha256=config_sha256(config_json),
            patient_id=volume.origin.patient_id,
            licence=licence,
            attribution=attribution,
        )
        sizes = [detector.shape for detector in detectors]
        writer = Writer(path, partial, file, sizes, compression, pool, stages or Stages())
        yield writer
        for images, count in writer.saturated.items():
            file[images].attrs["saturated_count"] = count
        file.attrs["complete"] = True


def publish(writer: Writer, num_threads: int = 1) -> None:
    """Check what was drafted, bring it to disk, and give it its name. Raises OSError where it is not what was meant."""
    with _removed_on_failure(writer.partial, writer.path):
        if found := violations(writer.partial, num_threads):
            raise OSError(f"{writer.path}: what was written is not what was meant: {found[0]}")
        _sync(writer.partial)
        os.replace(writer.partial, writer.path)
        _sync(writer.path.parent)


@contextmanager
def _removed_on_failure(partial: Path, path: Path) -> Iterator[None]:
    """A file that goes when the block fails, with an error that names what it was to become."""
    try:
        yield
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if not isinstance(error, OSError | RuntimeError):
            raise
        # on a full disk closing the file fails as well, and HDF5 says why in words only
        said = re.search(r"errno = (\d+)", str(error))
        number = getattr(error, "errno", None) or (int(said[1]) if said else None)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


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


def _make_room(
    file: h5py.File, kind: tuple[str, str], num_views: int, detectors: list[Detector], compression: str
) -> None:
    for detector in detectors:
        size, options = detector.shape, _options(detector.shape, compression)
        images = file.create_dataset(f"{kind[0]}/{size}", (num_views, size, size), np.uint16, **options)
        images.attrs.update(scale=SCALE, offset=0.0, quantity="line integral", saturated_count=0)
        file.create_dataset(f"checks/{size}/{kind[1]}", (num_views,), np.uint32)


def _options(size: int, compression: str) -> dict:
    """Of a dataset with an image of this size to a chunk."""
    return dict(chunks=(1, size, size), **chunks.FILTERS[compression])


def _describe_beam(file: h5py.File, beam: Beam, levels: list[int]) -> None:
    energy_kev = beam.equivalent_kev
    for size in levels:
        file[f"images/{size}"].attrs.update(
            energy_kev=energy_kev,
            mu_water_per_mm=float(attenuation.water_per_mm(energy_kev)),
            bone_factor=float(attenuation.bone_factor(energy_kev)),
        )
    if beam.is_spectrum:
        group = file.create_group("spectrum")
        group.attrs.update(name=beam.name, description=beam.description, kvp=beam.kvp, mean_kev=beam.mean_kev)
        lines = (beam.energy_kev, beam.weight, beam.water_per_mm, beam.bone_factor)
        for name, values in zip(_SPECTRUM_DATASETS, lines, strict=True):
            group[name] = values


def _describe_nodules(
    file: h5py.File, nodules: Sequence[AnnotatedNodule], views: Views, detectors: list[Detector]
) -> None:
    group = file.create_group("nodules")
    group["centroid_mm"] = np.array([one.centroid_mm for one in nodules], np.float64).reshape(-1, 3)
    group["diameter_mm"] = np.array([one.diameter_mm for one in nodules], np.float64)
    group["readers"] = np.array([one.num_readers for one in nodules], np.uint8)
    for name in RATINGS:
        ratings = np.zeros((len(nodules), MAX_READERS), np.uint8)
        for row, one in zip(ratings, nodules, strict=True):
            row[: one.num_readers] = one.ratings[name]
        group[f"ratings/{name}"] = ratings
    largest = boxes(nodules, views.projection(detectors[0]))
    for detector in detectors:
        group[f"boxes/{detector.shape}"] = lower_level(largest, detectors[0].shape // detector.shape)


class Shard:
    """A finished shard, open for reading.

    Raises InputError where it is none, unfinished or of another version, or needs a package that is missing.
    What is not read here is not checked: `violations` reads every pixel.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _opened(path)
        if found := next(_guarded(_structure(self._file)), None):
            self._file.close()
            raise InputError(f"{path}: {found}; render it again (`drrgen validate` names all that is wrong)")
        try:
            _require_filters(path, self._file)
        except InputError:
            self._file.close()
            raise
        attributes, views = self._file.attrs, self._file["views"]
        self.patient_id, self.config_json = attributes["patient_id"], attributes["config_json"]
        self.kind, self.created_by = attributes["kind"], attributes["created_by"]
        self.config_sha256, self.dataset = attributes["config_sha256"], attributes.get("dataset", "")
        self.licence, self.attribution = attributes["licence"], attributes["attribution"]
        self.azimuth_deg, self.elevation_deg = views["azimuth_deg"][:], views["elevation_deg"][:]
        self.levels = [int(size) for size in views.attrs["levels"]]
        self.saturated = int(self._file[f"images/{self.levels[0]}"].attrs["saturated_count"])
        ct = self._file["ct"].attrs if "ct" in self._file else {}
        self.series_uid = str(ct.get("series_uid", ""))
        self.ct_shape = tuple(int(side) for side in ct.get("shape", ()))
        self.defects = json.loads(ct.get("defects", "[]"))
        self.has_nodules = "nodules" in self._file
        self.has_materials = _SOFT[0] in self._file

    def __len__(self) -> int:
        return len(self.azimuth_deg)

    def line_integrals(self, size: int, view: int, images: str = "images") -> NDArray[np.float32]:
        """One image of one level, [row, column]. Raises InputError where its bytes are damaged.

        images: where the shard has materials, images_soft or images_bone, too.
        """
        try:
            return (self._file[f"{images}/{size}"][view] * SCALE).astype(np.float32)
        except OSError as error:
            raise InputError(f"{self.path}: view {view} of level {size} is damaged: render it again") from error

    def truncation(self, size: int, view: int) -> NDArray[np.uint8] | None:
        """One view's marks of one level, [row, column]; None where nothing is known. Raises InputError as above."""
        path = f"truncation/{size}"
        try:
            return self._file[path][view] if path in self._file else None
        except OSError as error:
            raise InputError(f"{self.path}: {path} of view {view} is damaged: render it again") from error

    def boxes(self, size: int) -> NDArray[np.float32] | None:
        """[V, N, 4]: first column, first row, last column, last row of each nodule; None where nothing is known."""
        path = f"nodules/boxes/{size}"
        return self._file[path][:] if path in self._file else None

    def __enter__(self) -> "Shard":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def violations(path: Path, num_threads: int = 1) -> list[str]:
    """Every MUST of the schema that a file breaks, a line each, geometry, checksums and pyramid included.

    [] for a sound shard. Raises InputError where the file cannot be opened as HDF5, or needs a package that is missing.
    """
    with _opened(path) as file:
        if found := list(_guarded(_structure(file))):
            return found
        _require_filters(path, file)
        return list(_guarded(_wrong_images(file, num_threads)))


def _guarded(found: Iterator[str]) -> Iterator[str]:
    """The same lines, and one more where HDF5 itself stumbles over the file."""
    try:
        yield from found
    except (AttributeError, KeyError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        yield f"unreadable: {' '.join(str(error).split())}"


def _structure(file: h5py.File) -> Iterator[str]:
    """All that can be said without reading a pixel. What is said later may rest on what was said before."""
    version = file.attrs.get("schema_version")
    if not isinstance(version, str) or version.split(".")[0] != VERSION.split(".")[0]:
        yield f"/: schema_version is {version!r} and this drrgen reads {VERSION}: install the one that fits"
        return
    for group in ("views", "images", "checks"):
        if not isinstance(file.get(group), h5py.Group):
            yield f"{group}: no such group"
            return
    wrong = [*_wrong_attributes(file["/"], _ROOT_ATTRIBUTES), *_wrong_attributes(file["views"], _VIEWS_ATTRIBUTES)]
    yield from wrong
    if wrong:
        return
    yield from _wrong_values(file)

    levels = [int(size) for size in file["views"].attrs["levels"]]
    if levels[-1] < 1 or any(large != 2 * small for large, small in pairwise(levels)):
        yield f"views: levels {levels} are not one or more sizes, largest first, each half of the one before"
        return
    azimuth = file.get("views/azimuth_deg")
    num_views = azimuth.shape[0] if isinstance(azimuth, h5py.Dataset) and azimuth.ndim == 1 else 0
    if num_views == 0:
        yield "views/azimuth_deg: no views"
        return
    datasets = dict(_VIEWS_DATASETS)
    for size in levels:
        for images, check in _kinds(file):
            datasets[f"{images}/{size}"] = ("uint16", ("V", size, size))
            datasets[f"checks/{size}/{check}"] = ("uint32", ("V",))
    wrong = [line for path, what in datasets.items() for line in _wrong_dataset(file, path, *what, {"V": num_views})]
    yield from wrong
    if wrong:
        return
    for size in levels:
        yield from _wrong_attributes(file[f"images/{size}"], _BEAM_ATTRIBUTES)
        for images, _ in _kinds(file):
            yield from _wrong_level(file[f"{images}/{size}"])
    if "spectrum" in file:
        yield from _wrong_spectrum(file)
    yield from _wrong_geometry(file, levels)
    yield from _wrong_nodules(file, levels, num_views)
    for size in levels:
        if f"truncation/{size}" in file:
            yield from _wrong_dataset(file, f"truncation/{size}", "uint8", ("V", size, size), {"V": num_views})


def _wrong_attributes(node: h5py.HLObject, wanted: dict) -> Iterator[str]:
    num_levels = np.size(node.attrs.get("levels", ()))
    for name, (kind, shape) in wanted.items():
        value = node.attrs.get(name)
        if value is None:
            yield f"{node.name}: attribute {name} is missing"
            continue
        expected = tuple(num_levels if side == "L" else side for side in shape)
        is_kind = isinstance(value, str) if kind is _TEXT else np.issubdtype(np.asarray(value).dtype, kind)
        if not is_kind or np.shape(value) != expected or 0 in expected:
            yield f"{node.name}: attribute {name} is {value!r}"
        elif kind is _REAL and not np.isfinite(value).all():
            yield f"{node.name}: attribute {name} is not finite"


def _wrong_dataset(file: h5py.File, path: str, dtype: str, axes: tuple, sizes: dict[str, int]) -> Iterator[str]:
    shape = tuple(sizes.get(axis, axis) for axis in axes)
    if path not in file:
        yield f"{path}: missing"
    elif not isinstance(file[path], h5py.Dataset) or file[path].dtype != dtype or file[path].shape != shape:
        yield f"{path}: not {dtype} {shape}"
    elif file[path].external or file[path].is_virtual or not isinstance(file.get(path, getlink=True), h5py.HardLink):
        yield f"{path}: its values are kept in another file"


def _wrong_values(file: h5py.File) -> Iterator[str]:
    attributes = file.attrs
    if attributes["schema"] != SCHEMA:
        yield f"/: schema is {attributes['schema']!r} instead of {SCHEMA!r}"
    if not attributes["complete"]:
        yield "/: complete is not true: the file was not finished"
    if attributes["kind"] not in ("rendered", "synthesised"):
        yield f"/: kind is {attributes['kind']!r} instead of 'rendered' or 'synthesised'"
    if config_sha256(attributes["config_json"]) != attributes["config_sha256"]:
        yield "/: config_sha256 is not that of config_json"
    if not isinstance(attributes.get("dataset", ""), str):
        yield f"/: attribute dataset is {attributes['dataset']!r}"
    if attributes["kind"] == "rendered":
        if isinstance(file.get("ct"), h5py.Group):
            yield from _wrong_attributes(file["ct"], _CT_ATTRIBUTES)
        else:
            yield "ct: no such group"


def _wrong_level(images: h5py.Dataset) -> Iterator[str]:
    wrong = list(_wrong_attributes(images, _IMAGE_ATTRIBUTES))
    yield from wrong
    if not wrong:
        said = tuple(images.attrs[name] for name in ("quantity", "scale", "offset"))
        if said != ("line integral", SCALE, 0.0):
            yield f"{images.name}: quantity, scale, offset are {said} instead of ('line integral', 1/4096, 0)"


def _wrong_spectrum(file: h5py.File) -> Iterator[str]:
    yield from _wrong_attributes(file["spectrum"], _SPECTRUM_ATTRIBUTES)
    sizes = {"K": np.size(file.get("spectrum/weight", ()))}
    paths = [f"spectrum/{name}" for name in _SPECTRUM_DATASETS]
    wrong = [line for path in paths for line in _wrong_dataset(file, path, "float64", ("K",), sizes)]
    yield from wrong
    if not wrong:
        energy_kev, weight, *attenuates = (file[path][:] for path in paths)
        if not (np.diff(energy_kev, prepend=0) > 0).all() or not all((each > 0).all() for each in attenuates):
            yield "spectrum: energies are not positive and ascending, or attenuation is not positive"
        if not ((weight > 0).all() and abs(weight.sum() - 1) <= _SHARES_TOLERANCE):
            yield "spectrum/weight: not shares that add up to 1"


def _wrong_geometry(file: h5py.File, levels: list[int]) -> Iterator[str]:
    """Angles and distances decide source and projection; the four are stored, and must be one geometry."""
    group = file["views"]
    attributes = group.attrs
    azimuth_deg, elevation_deg = group["azimuth_deg"][:], group["elevation_deg"][:]
    if not (np.isfinite(azimuth_deg).all() and np.isfinite(elevation_deg).all()):
        yield "views: angles are not finite"
        return
    if not attributes["sdd_mm"] > attributes["sod_mm"] > 0:
        yield "views: not sdd_mm > sod_mm > 0"
        return
    pixel_mm = attributes["pixel_spacing_mm"]
    if pixel_mm[0] <= 0 or not np.allclose(pixel_mm * levels, pixel_mm[0] * levels[0], rtol=1e-9):
        yield "views: pixel_spacing_mm is not that of one detector"
        return
    views = Views(azimuth_deg, elevation_deg, attributes["isocentre_mm"], attributes["sdd_mm"], attributes["sod_mm"])
    projection = views.projection(Detector(levels[0], pixel_mm[0]))
    for name, expected in (("source_mm", views.source_mm), ("projection", projection)):
        # relative to the largest number: the matrix mixes pixels and millimetres
        if not np.abs(group[name][:] - expected).max() <= _GEOMETRY_TOLERANCE * np.abs(expected).max():
            yield f"views/{name}: does not follow from the angles and distances"


def _wrong_nodules(file: h5py.File, levels: list[int], num_views: int) -> Iterator[str]:
    """Nothing of /nodules need be there, but what is there must fit together."""
    datasets = _NODULE_DATASETS | {f"nodules/boxes/{size}": ("float32", ("V", "N", 4)) for size in levels}
    datasets = {path: what for path, what in datasets.items() if path in file}
    if not datasets:
        return
    first, (_, axes) = next(iter(datasets.items()))
    shape = getattr(file[first], "shape", ())
    sizes = {"V": num_views, "N": shape[axes.index("N")] if len(shape) == len(axes) else 0}
    wrong = [line for path, what in datasets.items() for line in _wrong_dataset(file, path, *what, sizes)]
    yield from wrong
    if not wrong:
        for path in datasets:
            if not np.isfinite(file[path][:]).all():
                yield f"{path}: not finite"
        yield from _wrong_boxes(file, levels)


def _wrong_boxes(file: h5py.File, levels: list[int]) -> Iterator[str]:
    there = {size: file[path][:] for size in levels if (path := f"nodules/boxes/{size}") in file}
    largest = there.pop(levels[0], None)
    if largest is None or largest.size == 0:
        return
    for size, lower in there.items():
        if not np.abs(lower - lower_level(largest, levels[0] // size)).max() <= _BOX_TOLERANCE_PX:
            yield f"nodules/boxes/{size}: not the boxes of the largest level"
    if "nodules/centroid_mm" in file:
        centre = project(file["views/projection"][:][:, None], file["nodules/centroid_mm"][:])
        beyond = np.maximum(largest[..., :2] - centre, centre - largest[..., 2:])
        if not beyond.max() <= _BOX_TOLERANCE_PX:
            yield f"nodules/boxes/{levels[0]}: a centroid is not in its box"


def _wrong_images(file: h5py.File, num_threads: int) -> Iterator[str]:
    """HDF5 hands out one chunk after another; what is in them, and what is wrong, is found out on all threads."""
    levels = [int(size) for size in file["views"].attrs["levels"]]
    crc32 = {(name, size): file[f"checks/{size}/{check}"][:] for name, check in _kinds(file) for size in levels}
    datasets = _stored(file)
    readers = {what: _reader(dataset) for what, dataset in datasets.items()}
    num_ahead = 2 * num_threads
    with ThreadPoolExecutor(num_threads) as pool:
        under_way: deque[Future[list[str]]] = deque()
        for view in range(len(file["views/azimuth_deg"])):
            pixels = {what: read(view) for what, read in readers.items()}
            expected = {what: int(values[view]) for what, values in crc32.items()}
            under_way.append(pool.submit(_wrong_view, view, levels, pixels, expected))
            if len(under_way) > num_ahead:
                yield from under_way.popleft().result()
        for found in under_way:
            yield from found.result()
    for what, dataset in datasets.items():
        yield from _wrong_to_hdf5(dataset, readers[what])


def _stored(file: h5py.File) -> dict[tuple[str, int], h5py.Dataset]:
    """Each dataset of pixels by name and level. To find one takes as long as to read an image."""
    levels = [int(size) for size in file["views"].attrs["levels"]]
    names = [(name, size) for name in (*(name for name, _ in _kinds(file)), "truncation") for size in levels]
    return {(name, size): file[f"{name}/{size}"] for name, size in names if f"{name}/{size}" in file}


def _reader(dataset: h5py.Dataset) -> Callable[[int], Callable[[], NDArray]]:
    """Takes a view, reads it, and returns what makes its image: chunks as we write them are decoded only there.

    All else that HDF5 knows to store it reads itself, at once: other filters or chunks, and a chunk that is not there.
    """
    compression = _compression(dataset)
    if dataset.chunks != (1, *dataset.shape[1:]) or compression is None:
        return lambda view: functools.partial(np.asarray, dataset[view])

    def read(view: int) -> Callable[[], NDArray]:
        try:
            left_out, payload = dataset.id.read_direct_chunk((view, 0, 0))
        except RuntimeError:
            return functools.partial(np.asarray, dataset[view])
        return functools.partial(chunks.decode, payload, left_out, compression, dataset.shape[1:], dataset.dtype)

    return read


def _compression(dataset: h5py.Dataset) -> str | None:
    """Which of chunks.FILTERS made the chunks; None where it was none of them."""
    match _filters(dataset):
        case [(chunks.SHUFFLE, (dataset.dtype.itemsize,)), (code, _)]:
            return chunks.COMPRESSION.get(code)
    return None


def _filters(dataset: h5py.Dataset) -> list[tuple[int, tuple[int, ...]]]:
    """HDF5's numbers of the filters, in the order of writing, and their options."""
    made = dataset.id.get_create_plist()
    found = (made.get_filter(number) for number in range(made.get_nfilters()))
    return [(code, options) for code, _, options, _ in found]


def _require_filters(path: Path, file: h5py.File) -> None:
    """Raises InputError where a package is missing that HDF5 needs to read the pixels."""
    for dataset in _stored(file).values():
        for code, _ in _filters(dataset):
            try:
                chunks.require(chunks.COMPRESSION.get(code, ""))
            except InputError as error:
                raise InputError(f"{path}: {error}") from error


def _wrong_to_hdf5(dataset: h5py.Dataset, read: Callable[[int], Callable[[], NDArray]]) -> Iterator[str]:
    """A mistake of ours we would read as we wrote it, so HDF5 reads a view, too.

    Only one that is sound: of another, HDF5 makes whatever the chunk says, be it gigabytes.
    """
    try:
        ours = read(0)()
    except ValueError:
        return
    if not np.array_equal(ours, dataset[0]):
        yield f"{dataset.name.lstrip('/')}: HDF5 reads another view 0 than drrgen"


def _wrong_view(
    view: int,
    levels: list[int],
    pixels: dict[tuple[str, int], Callable[[], NDArray]],
    crc32: dict[tuple[str, int], int],
) -> list[str]:
    found = []
    images: dict[tuple[str, int], NDArray] = {}
    for (name, size), make in pixels.items():
        try:
            image = images[name, size] = make()
        except ValueError as error:
            found.append(f"{name}/{size}: view {view} is damaged: {' '.join(str(error).split())}")
            continue
        larger = images.get((name, 2 * size))
        if name == "truncation":
            if image.max() > 1:
                found.append(f"truncation/{size}: view {view} has other values than 0 and 1")
            elif larger is not None and not np.array_equal(image, truncation.halved(larger)):
                found.append(f"truncation/{size}: view {view} does not mark what the next larger level marks")
        elif chunks.crc32(image) != crc32[name, size]:
            found.append(f"{name}/{size}: view {view} does not match its CRC-32")
        elif larger is not None and not np.array_equal(image, halved(larger)):
            found.append(f"{name}/{size}: view {view} is not the box average of the next larger level")
    parts = [images.get((name, levels[0])) for name, _ in (_WHOLE, _SOFT, _BONE)]
    if all(part is not None for part in parts):
        whole, soft, bone = (np.asarray(part, np.int32) for part in parts)
        # each is rounded by half a step at most
        if (np.abs(whole - soft - bone) > 1)[whole < np.iinfo(np.uint16).max].any():
            found.append(f"images_soft/{levels[0]}: view {view} and its bone image do not add up to the whole")
    return found


def _kinds(file: h5py.File) -> tuple[tuple[str, str], ...]:
    """What the file has of each view: the whole, or the whole and both materials."""
    return (_WHOLE, _SOFT, _BONE) if _SOFT[0] in file or _BONE[0] in file else (_WHOLE,)


def halved(images: Images) -> Images:
    """The next lower level: exact 2 x 2 box averages of [..., row, column], rounded to nearest, halves up."""
    # neighbours in a row are the halves of one number: sums of whole rows instead of every other pixel
    pairs = np.ascontiguousarray(images, np.uint16).view(np.uint32)
    upper, lower = pairs[..., ::2, :], pairs[..., 1::2, :]
    total = upper & 0xFFFF
    total += upper >> 16
    total += lower & 0xFFFF
    total += lower >> 16
    total += 2
    total >>= 2
    return total.astype(np.uint16)


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
