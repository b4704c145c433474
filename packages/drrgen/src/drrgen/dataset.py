"""A folder of shards as a data set: which shards it has, which series were refused, and who is trained on.

Four files beside the shards, those of docs/shard-schema.md (Beside the shards). Many processes on many machines may
write them at once: whoever changes them holds the folder's lock, and a reader sees each file whole, old or new.
"""

import fcntl
import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from drrgen import __version__, shards, splits, temporary
from drrgen.errors import InputError
from drrgen.shards import Shard

SCHEMA = "drr-dataset"
VERSION = "1.0"

MANIFEST, REJECTED, SPLITS, DATASET = "manifest.jsonl", "rejected.jsonl", "splits.json", "dataset.json"
_LOCK = ".lock"
_CURE = "the same `drrgen render` makes it again"


@dataclass(frozen=True)
class Line:
    """What is known of one finished shard. seconds: spent on it, None where it was found as it is; finished: UTC."""

    file: str
    sha256: str
    bytes: int
    modified_ns: int
    patient_id: str
    series_uid: str
    views: int
    levels: list[int]
    saturated: int
    config_sha256: str
    dataset: str
    licence: str
    attribution: str
    seconds: float | int | None
    finished: str

    def __post_init__(self) -> None:
        if self.finished_at.tzinfo is None:
            raise ValueError(f"finished is {self.finished!r}, without a time zone")

    @property
    def finished_at(self) -> datetime:
        return datetime.fromisoformat(self.finished)


@dataclass(frozen=True)
class Rejection:
    """A series of which there is no shard. file: the shard that it would be; path: where the CT is, below --ct-dir."""

    file: str
    patient_id: str
    series_uid: str
    path: str
    codes: list[str]
    message: str

    def __post_init__(self) -> None:
        if not self.codes:
            raise ValueError("codes is []")


@dataclass(frozen=True)
class Records:
    """What the four files say. lines and rejected: by the shard's file name; patients: the split of each.

    rule: that of the splits, None before the first run; planned: the files of all shards that runs meant to have;
    config: the settings of the run that began last.
    """

    lines: dict[str, Line]
    rejected: dict[str, Rejection]
    rule: str | None
    patients: dict[str, str]
    planned: frozenset[str]
    config: dict[str, Any] | None


def files(folder: Path) -> list[Path]:
    """The folder's shards, or what is named like one, sorted."""
    return sorted(path for path in folder.glob("*.h5") if not path.name.startswith("."))


def glance(path: Path) -> Line:
    """What a shard says of itself, finished when it was changed last. Its sha256 is '': that takes reading it all.

    Raises InputError where it is no finished shard.
    """
    stat = path.stat()
    with Shard(path) as shard:
        return Line(
            file=path.name,
            sha256="",
            bytes=stat.st_size,
            modified_ns=stat.st_mtime_ns,
            patient_id=shard.patient_id,
            series_uid=shard.series_uid,
            views=len(shard),
            levels=shard.levels,
            saturated=shard.saturated,
            config_sha256=shard.config_sha256,
            dataset=shard.dataset,
            licence=shard.licence,
            attribution=shard.attribution,
            seconds=None,
            finished=_utc(stat.st_mtime),
        )


def line_of(path: Path, seconds: float | None = None) -> Line:
    """The line of a finished shard, which is read whole. Raises InputError where it is none.

    seconds: what it took to make it, until now; None where it was found as it is.
    """
    line = replace(glance(path), sha256=_sha256(path))
    return line if seconds is None else replace(line, seconds=round(seconds, 3), finished=_utc(time.time()))


def confirmed(path: Path, line: Line) -> Line | None:
    """The line of a finished shard as it is now; None where it is not the file that its line tells of.

    Bytes are counted and not read again where the time of change is the one of the line.
    """
    stat = path.stat()
    if stat.st_size != line.bytes:
        return None
    if stat.st_mtime_ns == line.modified_ns:
        return line
    return replace(line, modified_ns=stat.st_mtime_ns) if _sha256(path) == line.sha256 else None


def listed(paths: Iterable[Path]) -> Iterator[tuple[Path, Line | None]]:
    """Shards with what their folder's manifest says of each; of a folder all of them, those that are gone included.

    Raises InputError where a folder has none.
    """
    for path in paths:
        lines = read(path if path.is_dir() else path.parent).lines
        if not path.is_dir():
            yield path, lines.get(path.name)
            continue
        names = sorted({one.name for one in files(path)} | lines.keys())
        if not names:
            raise InputError(
                f"{path}: no shards in there; name files, or the folder that `drrgen render --out` writes to"
            )
        yield from ((path / name, lines.get(name)) for name in names)


def violations(path: Path, line: Line | None, num_threads: int = 1) -> list[str]:
    """All that `shards.violations` finds, and whether the file is the one that its line, if any, tells of.

    Raises InputError where the file cannot be opened as HDF5.
    """
    if line is None:
        return shards.violations(path, num_threads)
    if not path.exists():
        return [f"{MANIFEST} lists it, and it is gone: {_CURE}"]
    if _sha256(path) != line.sha256:  # HDF5 is not asked: there are flipped bits over which it never ends
        return [f"its sha256 is not that of {MANIFEST}: delete it, and {_CURE}"]
    return shards.violations(path, num_threads)


def read(folder: Path) -> Records:
    """What the folder's files say; those that are not there say nothing. Raises InputError where one is damaged."""
    named = _object(folder / SPLITS) or {"rule": None, "patients": {}}
    rule, patients = named.get("rule", 0), named.get("patients")
    if (
        not isinstance(rule, str | None)
        or not isinstance(patients, dict)
        or any(one not in splits.SPLITS for one in patients.values())
    ):
        raise InputError(
            f"{folder / SPLITS}: it does not say `rule`, and one of {', '.join(splits.SPLITS)} of each of `patients`: "
            f"delete the file, and {_CURE}"
        )
    about = _object(folder / DATASET) or {"schema": SCHEMA, "schema_version": VERSION, "planned": []}
    schema, version, planned = (about.get(name) for name in ("schema", "schema_version", "planned"))
    if schema != SCHEMA or str(version).split(".")[0] != VERSION.split(".")[0]:
        raise InputError(
            f"{folder / DATASET}: it is {schema} {version}, and this drrgen knows {SCHEMA} {VERSION}: "
            "install the one that fits, or choose another folder"
        )
    if not isinstance(planned, list) or any(not isinstance(one, str) for one in planned):
        raise InputError(f"{folder / DATASET}: `planned` is not a list of files: delete the file, and {_CURE}")
    return Records(
        lines={one.file: one for one in _lines(folder / MANIFEST, Line)},
        rejected={one.file: one for one in _lines(folder / REJECTED, Rejection)},
        rule=rule,
        patients=patients,
        planned=frozenset(planned),
        config=about.get("config"),
    )


def begin(
    folder: Path,
    rule: str,
    config_json: str,
    *,
    planned: Iterable[str],
    finished: Iterable[Line],
    todo: Iterable[str],
) -> None:
    """Write down what a run is about to do, before it renders.

    planned: the files of all shards that the run means to have, of all its parts; finished: the lines of those that
    are there, as `confirmed` gives them; todo: those that this process is going to make, over what was known of them.
    Raises InputError where the folder's patients are split by another rule.
    """
    with _changing(folder) as (records, change):
        if records.rule not in (None, rule):
            raise InputError(
                f"{folder / SPLITS}: its patients are split by the rule {records.rule}, not {rule}: give "
                f"--splits {records.rule}, or choose another --out"
            )
        again = set(todo)
        lines = {name: line for name, line in records.lines.items() if name not in again}
        for line in finished:
            known = lines.get(line.file)
            if known is None or known.sha256 == line.sha256:  # else it was made anew since it was looked at
                lines[line.file] = line
        change(
            replace(
                records,
                rule=rule,
                config=json.loads(config_json),
                planned=records.planned | frozenset(planned),
                lines=lines,
                rejected={name: one for name, one in records.rejected.items() if name not in again},
            )
        )


def add(folder: Path, line: Line) -> None:
    """Write down a finished shard. Raises InputError where the folder's splits.json is gone since `begin`."""
    with _changing(folder) as (records, change):
        if _is_of(line, folder / line.file):  # else another process made it, too, and tells of its own
            change(replace(records, lines=records.lines | {line.file: line}))


def reject(folder: Path, *rejections: Rejection) -> None:
    """Write down series that were refused; those whose shard is there, from another copy or before, are not."""
    with _changing(folder) as (records, change):
        change(replace(records, rejected=records.rejected | {one.file: one for one in rejections}))


def by_split(records: Records, lines: Iterable[Line]) -> dict[str, dict[str, int]]:
    """How many patients, shards and views there are of each split."""
    of: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        of[records.patients.get(line.patient_id) or splits.split(line.patient_id, records.rule or "hash")].append(line)
    return {name: count(of[name]) for name in splits.SPLITS}


def count(lines: Iterable[Line]) -> dict[str, int]:
    """How many patients, shards and views."""
    lines = list(lines)
    return {
        "patients": len({line.patient_id for line in lines}),
        "shards": len(lines),
        "views": sum(line.views for line in lines),
    }


@contextmanager
def _changing(folder: Path) -> Iterator[tuple[Records, Callable[[Records], None]]]:
    """What the files say, and a function that writes what they shall say, while nobody else can."""
    with open(folder / _LOCK, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise OSError(
                error.errno,
                f"no locks on this file system ({error.strerror}); choose an --out that has them",
                str(folder),
            ) from error
        yield read(folder), lambda records: _write(folder, records)


def _write(folder: Path, records: Records) -> None:
    if records.rule is None:
        raise InputError(f"{folder / SPLITS} is gone: {_CURE}")
    lines = sorted(records.lines.values(), key=lambda line: line.file)
    rejected = [one for name, one in sorted(records.rejected.items()) if name not in records.lines]
    # once listed, always: whose shard is being made again is read meanwhile, and nobody is moved
    patients = {line.patient_id: splits.split(line.patient_id, records.rule) for line in lines} | records.patients
    records = replace(records, patients=patients)
    told = {
        "schema": SCHEMA,
        "schema_version": VERSION,
        "created_by": f"drrgen {__version__}",
        "config": records.config,
        **{
            name: sorted({getattr(line, name) for line in lines} - {""})
            for name in ("dataset", "licence", "attribution")
        },
        "counts": {
            "planned": len(records.planned),
            "rejected": len(rejected),
            **count(lines),
            "splits": by_split(records, lines),
        },
        "bytes": sum(line.bytes for line in lines),
        "statistics": {
            "saturated_pixels": sum(line.saturated for line in lines),
            "saturated_shards": sum(line.saturated > 0 for line in lines),
            "seconds": round(sum(line.seconds or 0 for line in lines), 3),
        },
        "planned": sorted(records.planned),
    }
    # the manifest first: whatever else is lost by a kill in between follows from it
    _replace(folder / MANIFEST, "".join(json.dumps(vars(one)) + "\n" for one in lines))
    _replace(folder / REJECTED, "".join(json.dumps(vars(one)) + "\n" for one in rejected))
    named = {"rule": records.rule, "patients": dict(sorted(patients.items()))}
    _replace(folder / SPLITS, json.dumps(named, indent=1) + "\n")
    _replace(folder / DATASET, json.dumps(told, indent=1) + "\n")


def _replace(path: Path, text: str) -> None:
    """A file is whole after a loss of power, too; that the older one may be there again costs a line at most."""
    if path.exists() and _text(path) == text:
        return
    partial = temporary.name_for(path)
    try:
        with open(partial, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_of(line: Line, path: Path) -> bool:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return False
    return (stat.st_size, stat.st_mtime_ns) == (line.bytes, line.modified_ns)


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text in UTF-8: delete it, and {_CURE}") from error


def _object(path: Path) -> dict[str, Any]:
    """The one object in a file; {} where there is no file."""
    if not path.exists():
        return {}
    try:
        found = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: {error.msg}: delete the file, and {_CURE}") from error
    if not isinstance(found, dict) or not found:
        raise InputError(f"{path}, line 1: not an object: delete the file, and {_CURE}")
    return found


Record = TypeVar("Record", Line, Rejection)


def _lines(path: Path, kind: type[Record]) -> Iterator[Record]:
    """The objects of a file, one to a line; fields that are not ours are passed over."""
    for number, text in enumerate(_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            yield kind(**_values(json.loads(text), kind))
        except ValueError as error:
            what = getattr(error, "msg", str(error))  # not where in the line, which reads like another line's number
            raise InputError(f"{path}, line {number}: {what}: delete this line, and {_CURE}") from error


def _values(found: Any, kind: type) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ValueError("not an object")
    for field in fields(kind):
        if field.name not in found:
            raise ValueError(f"no {field.name}")
        if not _is_a(found[field.name], field.type):
            raise ValueError(f"{field.name} is {found[field.name]!r}")
    return {field.name: found[field.name] for field in fields(kind)}


def _is_a(value: Any, kind: Any) -> bool:
    if get_origin(kind) is list:
        return isinstance(value, list) and all(isinstance(one, get_args(kind)) for one in value)
    return isinstance(value, kind)
