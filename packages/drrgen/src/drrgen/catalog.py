"""What lies in a folder of CTs: every series and volume file, judged, and read if it is fit to be."""

import logging
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from drrgen import dicom, lidc, volumefile
from drrgen.defects import Defect, SeriesRejected
from drrgen.errors import InputError
from drrgen.volume import Origin, Volume
from drrgen.worker import Worker

VERDICTS = ("complete", "accepted", "repairable", "incomplete", "rejected", "copy")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One CT and what is to be thought of it. num_expected: slices that LIDC-IDRI has of it; None where unknown.

    shape: slices, rows, columns of the volume it makes, and spacing_mm: along column, row, slice; None where it makes
    none. copy_of: the folder or file of an entry of the same series that is used instead.
    """

    source: dicom.Series | volumefile.VolumeFile
    origin: Origin
    path: Path
    num_files: int
    num_slices: int
    num_expected: int | None
    shape: tuple[int, int, int] | None
    spacing_mm: tuple[float, ...] | None
    defects: tuple[Defect, ...]
    stack: dicom.Stack | None = None
    copy_of: Path | None = None

    @property
    def verdict(self) -> str:
        """One of VERDICTS. complete: as in LIDC-IDRI; accepted: nothing is wrong, as far as the CT itself can tell."""
        if self.copy_of is not None:
            return "copy"
        if not self.defects:
            return "accepted" if self.num_expected is None else "complete"
        if all(one.repair for one in self.defects):
            return "repairable"
        return "incomplete" if any(one.code == "incomplete" for one in self.defects) else "rejected"

    @property
    def extent_mm(self) -> tuple[float, ...] | None:
        """Along column, row and slice."""
        if self.shape is None or self.spacing_mm is None:
            return None
        return tuple(count * step for count, step in zip(reversed(self.shape), self.spacing_mm, strict=True))

    @property
    def num_distinct(self) -> int:
        """Slices at different places, of those that can be used."""
        return self.num_slices if self.stack is None else len(self.stack.slices)

    def refused(self, on_defect: str) -> list[Defect]:
        """The defects that forbid its use under a policy, "reject" or "repair"."""
        return [one for one in self.defects if on_defect == "reject" or one.repair is None]


def scan(directory: Path) -> list[Entry]:
    """Every CT below a folder, sorted by patient, series and path. Raises InputError where there is none."""
    if problem := lidc.problem():
        _log.warning(problem)
    files = list(dicom.walk(directory))
    with Worker() as worker:
        entries = [_series_entry(one, dicom.decoder(worker)) for one in dicom.find_series(directory, files)]
        paths = [one.path for one in files if volumefile.is_volume_file(one.path)]
        entries += [_file_entry(path, directory, worker) for path in paths]
    if not entries:
        raise InputError(f"--ct-dir {directory}: no CT in there; point it at a folder of DICOM series or NIfTI files")
    return _without_copies(sorted(entries, key=lambda one: (one.origin.patient_id, one.origin.series_uid, one.path)))


def read(entry: Entry, on_defect: str, worker: Worker) -> Volume:
    """The volume of an entry. Raises SeriesRejected where it has defects that the policy, or nothing, can cure."""
    if refused := entry.refused(on_defect):
        raise SeriesRejected(*refused)
    if isinstance(entry.source, volumefile.VolumeFile):
        return replace(volumefile.read(entry.source, worker), origin=entry.origin)
    return dicom.read_stack(entry.source, entry.stack, entry.defects, on_defect, dicom.decoder(worker))


def copies(entries: list[Entry], of: Entry) -> list[Entry]:
    """What can be used instead of an entry: copies of it that are no fragments."""
    return [one for one in entries if one.copy_of == of.path and one.num_distinct >= of.num_distinct]


def read_first(entries: list[Entry], on_defect: str, worker: Worker) -> tuple[Volume, Entry]:
    """The first of these that turns out to be fit when its pixels are read, and which. Raises the first's rejection."""
    rejections = []
    for one in entries:
        try:
            return read(one, on_defect, worker), one
        except SeriesRejected as error:
            rejections.append(error)
    raise rejections[0]


def summary(entries: list[Entry]) -> str:
    """One line: how many there are of each verdict."""
    counts = Counter(one.verdict for one in entries)
    patients = len({one.origin.patient_id for one in entries})
    parts = [f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict]]
    return f"{len(entries)} CT series of {patients} patients: {', '.join(parts)}"


def _series_entry(series: dicom.Series, decode: dicom.Decode) -> Entry:
    defects, stack = dicom.examine(series, decode)
    uid = series.origin.series_uid
    expected = lidc.expected_slices(uid)
    slices, _ = dicom.without_strays(list(series.slices))
    if incomplete := lidc.incomplete(uid, [one.position_mm[2] for one in slices]):
        if stack is None or stack.shape[0] != expected:
            incomplete = replace(incomplete, repair=None)  # interpolation does not put back what is missing
        defects.insert(0, incomplete)
    return Entry(
        source=series,
        origin=series.origin,
        path=series.folder,
        num_files=series.num_files,
        num_slices=len(series.slices),
        num_expected=expected,
        shape=None if stack is None else stack.shape,
        spacing_mm=None if stack is None else tuple(np.linalg.norm(stack.world_from_voxel[:3, :3], axis=0).tolist()),
        defects=tuple(defects),
        stack=stack,
    )


def _file_entry(path: Path, directory: Path, worker: Worker) -> Entry:
    file = volumefile.examine(path, directory, worker)
    known_patient = lidc.patient_id(file.origin.series_uid)
    return Entry(
        source=file,
        origin=replace(file.origin, patient_id=known_patient) if known_patient else file.origin,
        path=path,
        num_files=1,
        num_slices=file.shape[0],
        num_expected=None,  # a file may be resampled: it does not have to have the slices of the scan
        shape=file.shape if not file.defects else None,
        spacing_mm=file.spacing_mm if not file.defects else None,
        defects=file.defects,
    )


def _without_copies(entries: list[Entry]) -> list[Entry]:
    """Of several entries of one series one is used, and the others that could be are marked as copies of it.

    DICOM before a file made of it, if it can be used; then the one with the most slices, even if it has defects: what
    has fewer is a fragment.
    """

    def rank(one: Entry) -> tuple:
        is_file = isinstance(one.source, volumefile.VolumeFile)
        return is_file, -one.num_distinct, len(one.defects), one.path

    chosen: dict[str, Entry] = {}
    for one in sorted(entries, key=rank):
        best = chosen.setdefault(one.origin.series_uid, one)
        if best.refused("repair") and not one.refused("repair") and isinstance(one.source, volumefile.VolumeFile):
            chosen[one.origin.series_uid] = one

    def marked(one: Entry) -> Entry:
        best = chosen[one.origin.series_uid]
        return one if best is one or one.refused("repair") else replace(one, copy_of=best.path)

    return [marked(one) for one in entries]
