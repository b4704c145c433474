"""Headers that were read before, kept in the user's cache folder: an unchanged file is not opened a second time."""

import hashlib
import json
import logging
import os
import sqlite3
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any

from drrgen.defects import Defect
from drrgen.dicom.headers import Header
from drrgen.dicom.series import Slice, Unusable
from drrgen.volume import Origin

# Raise it whenever a header would be read differently: older caches are then begun anew.
_VERSION = 2

_log = logging.getLogger(__name__)

# What a file is known by: a changed file has another size or time of change.
Stamp = tuple[int, int]


def folder() -> Path:
    """Where caches are kept: $XDG_CACHE_HOME/drrgen, or the platform's own place for such files."""
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen, "drrgen")
    places = {"darwin": "Library/Caches", "win32": "AppData/Local"}
    return Path.home() / places.get(sys.platform, ".cache") / "drrgen"


class Cache:
    """Headers of the files below one folder, by path and stamp. One that cannot be used is no error: it stays empty."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def close(self) -> None:
        self._connection.close()

    def known(self) -> Iterator[tuple[bytes, Stamp, str]]:
        """All that is kept: path below the folder, stamp, header as `restored` understands it."""
        with self._or_without() as connection:
            for path, size, mtime_ns, header in connection.execute("SELECT path, size, mtime_ns, header FROM files"):
                yield path, (size, mtime_ns), header

    def add(self, rows: Iterable[tuple[bytes, Stamp, Header | None]]) -> None:
        """Unreadable files are not kept: a cure such as a permission leaves their stamp as it is."""
        values = [(path, *stamp, _kept(one)) for path, stamp, one in rows if one is None or one.origin is not None]
        with self._or_without() as connection, connection:
            connection.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", values)

    def forget(self, paths: Iterable[bytes]) -> None:
        with self._or_without() as connection, connection:
            connection.executemany("DELETE FROM files WHERE path = ?", [(path,) for path in paths])

    @contextmanager
    def _or_without(self) -> Iterator[sqlite3.Connection]:
        """The connection; at its first error an empty one in memory takes its place, and a line says so."""
        try:
            yield self._connection
        except sqlite3.Error as error:
            _log.warning("the index cannot be kept for the next time (%s)", error)
            self._connection.close()
            self._connection = _prepared(":memory:")


@contextmanager
def opened(directory: Path) -> Iterator[Cache]:
    """The cache of one folder's files."""
    name = f"index-{hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:16]}.sqlite"
    try:
        folder().mkdir(parents=True, exist_ok=True)
        cache = Cache(_connected(folder() / name))
    except (OSError, RuntimeError, sqlite3.Error) as error:  # RuntimeError: there is no home
        _log.warning("the index cannot be kept for the next time (%s)", error)
        cache = Cache(_prepared(":memory:"))
    try:
        yield cache
    finally:
        cache.close()


def _connected(path: Path) -> sqlite3.Connection:
    try:
        return _prepared(path)
    except sqlite3.DatabaseError:
        path.unlink()  # damaged, and made again at no loss
        return _prepared(path)


def _prepared(path: Path | str) -> sqlite3.Connection:
    connection = sqlite3.connect(path)
    try:
        with connection:
            if connection.execute("PRAGMA user_version").fetchone() != (_VERSION,):
                connection.execute("DROP TABLE IF EXISTS files")
                connection.execute(f"PRAGMA user_version = {_VERSION}")
            connection.execute(
                "CREATE TABLE IF NOT EXISTS files (path BLOB PRIMARY KEY, size INT, mtime_ns INT, header TEXT)"
            )
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _kept(header: Header | None) -> str:
    """A header as JSON, without its path; "null" for a file that is no CT slice."""
    if header is None:
        return "null"
    origin = header.origin and astuple(header.origin)
    if isinstance(header.content, Slice):
        return json.dumps([origin, "slice", *astuple(header.content)[1:]])
    return json.dumps([origin, "unusable", *astuple(header.content.defect)])


def restored(path: Path, kept: str, shared: dict[tuple, Any]) -> Header | None:
    """The header that `_kept` wrote. shared: what the thousands of slices of a series have in common, kept once.

    Raises IndexError, KeyError, TypeError or ValueError where the text is something else.
    """
    if kept == "null":
        return None
    origin, kind, *values = json.loads(kept)
    common = None if origin is None else shared.setdefault(tuple(origin), Origin(*origin))
    if kind == "unusable":
        return Header(common, Unusable(path, Defect(*values)))
    sop_uid, position_mm, *geometry = values
    orientation, spacing_mm, shape = (shared.setdefault(tuple(value), tuple(value)) for value in geometry)
    return Header(common, Slice(path, sop_uid, tuple(position_mm), orientation, spacing_mm, shape))
