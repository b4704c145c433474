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

from drrgen.defects import Defect
from drrgen.dicom.headers import Header
from drrgen.dicom.series import Slice, Unusable
from drrgen.volume import Origin

# Raise it whenever a header would be read differently: older caches are then begun anew.
_VERSION = 1

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

    def __init__(self, connection: sqlite3.Connection | None) -> None:
        self._connection = connection

    def known(self) -> dict[bytes, tuple[Stamp, str]]:
        """All that is kept: path below the folder -> stamp, header as `restored` understands it."""
        rows = self._run("SELECT path, size, mtime_ns, header FROM files")
        return {path: ((size, mtime_ns), header) for path, size, mtime_ns, header in rows}

    def add(self, rows: Iterable[tuple[bytes, Stamp, Header | None]]) -> None:
        """Unreadable files are not kept: a cure such as a permission leaves their stamp as it is."""
        values = [(path, *stamp, _kept(one)) for path, stamp, one in rows if one is None or one.origin is not None]
        self._run("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", values)

    def forget(self, paths: Iterable[bytes]) -> None:
        self._run("DELETE FROM files WHERE path = ?", [(path,) for path in paths])

    def _run(self, statement: str, values: list[tuple] | None = None) -> list[tuple]:
        if self._connection is None:
            return []
        try:
            with self._connection:
                if values is not None:
                    self._connection.executemany(statement, values)
                    return []
                return self._connection.execute(statement).fetchall()
        except sqlite3.Error as error:
            _log.warning("the index cannot be kept for the next time (%s)", error)
            self._connection = None
            return []


@contextmanager
def opened(directory: Path) -> Iterator[Cache]:
    """The cache of one folder's files."""
    path = folder() / f"index-{hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]}.sqlite"
    connection = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = _connected(path)
    except (OSError, sqlite3.Error) as error:
        _log.warning("the index cannot be kept for the next time: %s (%s)", path, error)
    try:
        yield Cache(connection)
    finally:
        if connection is not None:
            connection.close()


def _connected(path: Path) -> sqlite3.Connection:
    try:
        return _prepared(path)
    except sqlite3.DatabaseError:
        path.unlink()  # damaged, and made again at no loss
        return _prepared(path)


def _prepared(path: Path) -> sqlite3.Connection:
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


def restored(path: Path, kept: str, origins: dict[tuple, Origin]) -> Header | None:
    """The header that `_kept` wrote. origins: shares equal values between the thousands of slices of a series.

    Raises ValueError, TypeError or KeyError where the text is something else.
    """
    if kept == "null":
        return None
    origin, kind, *values = json.loads(kept)
    shared = None if origin is None else origins.setdefault(tuple(origin), Origin(*origin))
    if kind == "unusable":
        return Header(shared, Unusable(path, Defect(*values)))
    sop_uid, *vectors = values
    return Header(shared, Slice(path, sop_uid, *(tuple(vector) for vector in vectors)))
