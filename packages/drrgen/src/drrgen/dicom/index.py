"""Which CT series lie below a folder: in any layout, by tags alone, headers only, and remembered for the next time."""

import logging
import multiprocessing
import os
import signal
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from drrgen.defects import printable
from drrgen.dicom import cache
from drrgen.dicom.headers import Header, read_header
from drrgen.dicom.series import Series, Slice, Unusable
from drrgen.errors import InputError
from drrgen.volume import Origin
from drrgen.worker import shielded

# One task of a reading process, and of one transaction of the cache.
_CHUNK = 256
# Starting processes takes about a second: for fewer files than this it is not worth it.
_MIN_PARALLEL = 2000

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class File:
    """A regular file. name: its path below the folder; stamp: its size, and the time of its last change in ns."""

    path: Path
    name: str
    stamp: cache.Stamp


def walk(directory: Path) -> Iterator[File]:
    """Regular files below a folder. Links are not followed; what is hidden is passed over.

    Raises InputError where it is no folder. A folder below that cannot be listed, and links, are named in the log.
    """
    if not directory.is_dir():
        raise InputError(
            f"--ct-dir {directory}: {'a file: give its folder' if directory.exists() else 'there is no such folder'}"
        )
    num_links = 0
    folders = [(str(directory), "")]
    while folders:
        folder, prefix = folders.pop()
        try:
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            _log.warning("%s: cannot be listed (%s): what is in it goes unseen", printable(folder), error.strerror)
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_symlink():
                num_links += 1
            elif entry.is_dir(follow_symlinks=False):
                folders.append((entry.path, f"{prefix}{entry.name}/"))
            elif entry.is_file(follow_symlinks=False):
                status = entry.stat(follow_symlinks=False)
                yield File(Path(entry.path), prefix + entry.name, (status.st_size, status.st_mtime_ns))
    if num_links:
        _log.warning("%s: %d symbolic links are not followed: give the folder that they lead to", directory, num_links)


def find_series(directory: Path, files: Iterable[File] | None = None) -> list[Series]:
    """All series of CT images below a folder, sorted by patient and series. files: those that `walk` found, if known.

    Files that are no CT images (CR and DX, scouts, XML, licences) are passed over. Unreadable DICOM files count to the
    series that has their folder for itself; where there is none, they are a series of an unknown patient. A folder all
    of whose slices lie in another one, too, is a copy; folders of which each has some of its own are one series.
    """
    headers = _headers(directory, walk(directory) if files is None else files)
    by_series: dict[str, dict[str, list[Header]]] = defaultdict(lambda: defaultdict(list))
    lost: dict[str, list[Unusable]] = defaultdict(list)
    for header in headers:
        if header.origin is not None:
            by_series[header.origin.series_uid][_folder(header)].append(header)
        elif isinstance(header.content, Unusable):
            lost[_folder(header)].append(header.content)
    groups = [group for folders in by_series.values() for group in _copies(folders)]

    owners: dict[str, list[int]] = defaultdict(list)
    for number, group in enumerate(groups):
        for folder in {_folder(header) for header in group}:
            owners[folder].append(number)
    unusable: dict[int, list[Unusable]] = defaultdict(list)
    found = []
    for folder, ones in lost.items():
        if len(owners[folder]) == 1:
            unusable[owners[folder][0]] += ones
        else:
            found.append(Series((Origin("unknown", "", ""),), (), tuple(ones)))
    found += [_series(group, unusable[number]) for number, group in enumerate(groups)]
    return sorted(found, key=lambda one: (one.origin.patient_id, one.origin.series_uid, one.folder))


def _folder(header: Header) -> str:
    return os.path.dirname(header.content.path)  # faster than `parent`, and there are 240,000 files


def _series(headers: list[Header], lost: list[Unusable]) -> Series:
    # manufacturer, kernel and the like may vary within a series; whose scan it is may not
    origins = {(one.origin.patient_id, one.origin.study_uid): one.origin for one in headers if one.origin is not None}
    contents = [header.content for header in headers]
    return Series(
        origins=tuple(origins.values()),
        slices=tuple(one for one in contents if isinstance(one, Slice)),
        unusable=tuple(one for one in contents if isinstance(one, Unusable)) + tuple(lost),
    )


def _copies(folders: dict[str, list[Header]]) -> list[list[Header]]:
    """The headers of one SeriesInstanceUID, put together but for folders whose every slice another one has.

    Which slices are the same SOPInstanceUIDs tell, where each slice has one of its own.
    """
    copies: list[tuple[set[str], list[Header]]] = []
    for _, headers in sorted(folders.items(), key=lambda folder: (-len(folder[1]), folder[0])):
        uids = [header.content.sop_uid for header in headers if isinstance(header.content, Slice)]
        can_tell = len(set(uids)) == len(uids) and "" not in uids
        is_copy = bool(uids) and can_tell and any(known.issuperset(uids) for known, _ in copies)
        # a copy may lie in several folders itself, each with slices of its own
        place = next(((known, group) for known, group in copies if not is_copy or known.isdisjoint(uids)), None)
        if place is None:
            copies.append((set(uids), headers))
        else:
            place[0].update(uids)
            place[1].extend(headers)
    return [group for _, group in copies]


def _headers(directory: Path, files: Iterable[File]) -> list[Header]:
    """The headers of all CT files, those unchanged since the last time from the cache."""
    new = {os.fsencode(file.name): file for file in files}
    headers: list[Header | None] = []
    shared: dict[tuple, Any] = {}
    with cache.opened(directory) as kept:
        gone = []
        for name, stamp, text in kept.known():
            if name not in new:
                gone.append(name)
            elif new[name].stamp == stamp:
                try:
                    headers.append(cache.restored(new[name].path, text, shared))
                except (IndexError, KeyError, TypeError, ValueError):
                    continue  # not as it was written: read the file again
                del new[name]
        kept.forget(gone)
        with tqdm(total=len(new), unit="file", desc="indexing", delay=1) as bar:
            for chunk, read in _read(new):
                kept.add((name, new[name].stamp, header) for name, header in zip(chunk, read, strict=True))
                headers += read
                bar.update(len(chunk))
    return [header for header in headers if header is not None]


def _read(files: dict[bytes, File]) -> Iterator[tuple[list[bytes], list[Header | None]]]:
    """Chunks of names with their headers, read by one process per core where there are many."""
    names = list(files)
    chunks = [names[start : start + _CHUNK] for start in range(0, len(names), _CHUNK)]
    paths = [[files[name].path for name in chunk] for chunk in chunks]
    if len(names) < _MIN_PARALLEL:
        yield from zip(chunks, map(_read_chunk, paths), strict=True)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(mp_context=context, initializer=_end_with_parent) as pool:
        try:
            with shielded(signal.SIGINT):
                reading = pool.map(_read_chunk, paths)
            yield from zip(chunks, reading, strict=True)
        finally:
            pool.shutdown(cancel_futures=True)


def _read_chunk(paths: Iterable[Path]) -> list[Header | None]:
    return [read_header(path) for path in paths]


def _end_with_parent() -> None:
    """A process of a pool waits for work for ever, also where who would give it was killed."""

    def end() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()
