"""CTs to shards in one process. Three are under way at once: one is read, one is cast and stored, one is checked."""

import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

from drrgen import body, catalog, dataset, exposure, grid, lidc, projectors, shards
from drrgen.config import RenderConfig
from drrgen.defects import Defect, SeriesRejected
from drrgen.errors import InputError
from drrgen.geometry import Views
from drrgen.render import render
from drrgen.stages import Stages
from drrgen.truncation import truncated
from drrgen.volume import Volume
from drrgen.worker import Worker

PHANTOM_MANUFACTURER = "drrgen phantom"

Item = TypeVar("Item")
Done = TypeVar("Done")


@dataclass(frozen=True)
class Job:
    """A CT to render. path: its shard. sources: the CT and copies of it, in the order in which they are tried."""

    path: Path
    sources: tuple[catalog.Entry, ...]

    @property
    def entry(self) -> catalog.Entry:
        return self.sources[0]


@dataclass(frozen=True)
class Begun:
    """A CT is being cast."""

    patient_id: str


@dataclass(frozen=True)
class Cast:
    """So many views more are done; fewer, where the process died that had them in hand."""

    num_views: int


@dataclass(frozen=True)
class Said:
    """A line for the person who waits."""

    line: str


@dataclass(frozen=True)
class Rendered:
    """A shard is finished, checked, named, and in the manifest. stages: seconds by stage."""

    path: Path
    num_views: int
    num_bytes: int
    stages: dict[str, float]


@dataclass(frozen=True)
class Refused:
    """A CT was given up. num_cast: views that had been counted as `Cast` before."""

    path: Path
    error: SeriesRejected
    num_cast: int = 0


Event = Begun | Cast | Said | Rendered | Refused
Report = Callable[[Event], None]


def render_jobs(jobs: Iterable[Job], config: RenderConfig, on_defect: str, num_threads: int, report: Report) -> None:
    """Render every CT, or give it up: `report` is told, from this thread, of each exactly one `Rendered` or `Refused`.

    The jobs are asked for one ahead. Raises OSError where shards cannot be written: no other CT would fare better.
    """
    numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))
    reader, finisher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
    with Worker() as worker:
        try:
            finishing: Future[Rendered] | None = None
            for job, reading in _one_ahead(reader, lambda job: _read(job, config, on_defect, worker), jobs):
                drafted = _draft(job, reading, config, num_threads, report)
                # handed on before anything is waited for: an interrupt must not leave it behind
                coming = finisher.submit(_finish, drafted, num_threads) if drafted else None
                if finishing:
                    report(finishing.result())
                finishing = coming
            if finishing:
                report(finishing.result())
        finally:
            # what has been cast in whole is worth the seconds until it has its name
            finisher.shutdown()
            reader.shutdown(wait=False, cancel_futures=True)


def _one_ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Done], items: Iterable[Item]
) -> Iterator[tuple[Item, Future[Done]]]:
    """Each item and what the function makes of it in the pool, where the next one is under way by then."""
    coming: deque[tuple[Item, Future[Done]]] = deque()
    for item in items:
        coming.append((item, pool.submit(function, item)))
        if len(coming) > 1:
            yield coming.popleft()
    yield from coming


@dataclass(frozen=True)
class _Ready:
    """A CT in memory. mask: the body's, where all else was removed; entry: what the CT was read from in the end."""

    volume: Volume
    mask: NDArray[np.bool_] | None
    entry: catalog.Entry
    stages: Stages


@dataclass(frozen=True)
class _Draft:
    """A shard that is written but for its name. begun: when nothing else was cast any more."""

    writer: shards.Writer
    stages: Stages
    begun: float


def _read(job: Job, config: RenderConfig, on_defect: str, worker: Worker) -> _Ready:
    stages = Stages()
    try:
        with stages("read"):
            volume, used = catalog.read_first(list(job.sources), on_defect, worker)
    except OSError as error:  # of what is read: that of what is written comes from elsewhere
        raise SeriesRejected(Defect("unreadable-file", error.strerror or "it cannot be read")) from error
    with stages("find body"):
        mask = None if config.keep_table else body.body_mask(volume)
        return _Ready(volume if mask is None else volume.with_hu(body.masked(volume, mask)), mask, used, stages)


def _draft(job: Job, reading: Future[_Ready], config: RenderConfig, num_threads: int, report: Report) -> _Draft | None:
    """The job's views, cast and stored; None where it was given up."""
    num_cast = 0

    def count(num_views: int) -> None:
        nonlocal num_cast
        num_cast += num_views
        report(Cast(num_views))

    report(Begun(job.entry.origin.patient_id))
    begun = time.perf_counter()
    try:
        return _store(job.path, reading.result(), begun, config, num_threads, count, report)
    except SeriesRejected as error:
        report(Refused(job.path, error, num_cast))
    except (InputError, OSError):
        raise
    except MemoryError:
        report(Refused(job.path, SeriesRejected(Defect("out-of-memory", "it needs more than there is")), num_cast))
    except Exception as error:
        # a mistake of ours must not end a night's work, nor be silent
        trace = "".join(traceback.format_exception(error))
        report(Said(f"{job.path.name}: this is a bug in drrgen, please report it:\n{trace}"))
        report(
            Refused(job.path, SeriesRejected(Defect("internal-error", f"{type(error).__name__}: {error}")), num_cast)
        )
    return None


def _store(
    path: Path,
    ready: _Ready,
    begun: float,
    config: RenderConfig,
    num_threads: int,
    count: Callable[[int], None],
    report: Report,
) -> _Draft:
    volume, stages, entry = ready.volume, ready.stages, ready.entry
    azimuth_deg, elevation_deg = grid.directions(config.grid, config.azimuth, config.elevation)
    views = Views(azimuth_deg, elevation_deg, volume.centre_mm, config.setup.sdd_mm, config.setup.sod_mm)
    with stages("prepare"):
        projector = projectors.get(config.projector)
        project = exposure.prepare(projector, volume.hu, volume.voxel_from_world, config.beam, config.materials)
    sizes = [detector.shape for detector in config.detectors]
    with (
        shards.draft(
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
            num_threads=num_threads,
            stages=stages,
            **_terms(entry, config),
        ) as writer,
        ThreadPoolExecutor(1) as storer,
    ):
        storing: Future[None] | None = None
        num_done = 0
        for images in render(project, views, config.detectors[0], sizes, num_threads, stages):
            batch = views[num_done : num_done + len(images[config.size])]
            num_done += len(batch)
            marks = None
            if ready.mask is not None:
                with stages("mark"):
                    marks = truncated(ready.mask, volume.voxel_from_world, batch, config.detectors[0])
            if storing:
                storing.result()
            storing = storer.submit(writer.append, images, marks)
            count(len(batch))
        if storing:
            storing.result()
    if saturated := writer.saturated[f"images/{config.size}"]:
        report(Said(f"{path}: {saturated} pixels are at the end of the scale, a line integral of 16"))
    return _Draft(writer, stages, begun)


def _finish(drafted: _Draft, num_threads: int) -> Rendered:
    path = drafted.writer.path
    with drafted.stages("check"):
        shards.publish(drafted.writer, num_threads)
    with drafted.stages("list"):
        line = dataset.line_of(path, time.perf_counter() - drafted.begun)
        dataset.add(path.parent, line)
    return Rendered(path, line.views, line.bytes, dict(drafted.stages.seconds))


def _terms(entry: catalog.Entry, config: RenderConfig) -> dict[str, str]:
    """Data set, licence and attribution of a CT: as the settings say, or as far as DICOM itself can tell."""
    is_phantom = entry.origin.manufacturer == PHANTOM_MANUFACTURER and entry.origin.patient_id.startswith("PHANTOM-")
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
