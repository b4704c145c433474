"""How far a folder of shards is: what is there, refused or missing, and how long it will take."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from drrgen import dataset, temporary
from drrgen.dataset import Line
from drrgen.defects import printable
from drrgen.errors import InputError
from drrgen.shards import config_sha256

# Enough to level out that series differ in length, few enough to show a slow disk of today.
_LAST = 50
# Names to a line; --json has them all.
_NAMED = 8


@dataclass(frozen=True)
class Status:
    """What `drrgen status --json` prints. Names are those of files in the folder.

    missing: shards that a run meant to have, and that are neither there nor rejected. damaged: those of the missing of
    which a file is there that is no shard or of another size than was written, or that was written and is gone.
    unlisted: shards that are there, of which the manifest says nothing. rejected: series by the first of their codes.
    The rates are of the shards finished last, None where there is nothing to judge by.
    """

    folder: str
    shards: int
    patients: int
    views: int
    bytes: int
    splits: dict[str, dict[str, int]]
    rejected: dict[str, int]
    missing: list[str]
    damaged: list[str]
    unlisted: list[str]
    left_over: list[str]
    views_per_s: float | None
    shards_per_hour: float | None
    hours_left: float | None

    @property
    def is_done(self) -> bool:
        return not self.missing and not self.rejected


def status(folder: Path) -> Status:
    """Looks at names and sizes, and into what the manifest does not list. Raises InputError where nothing is ours."""
    records = dataset.read(folder)
    there = {path.name: path for path in dataset.files(folder)}
    left_over = [path.name for path in temporary.left_over(folder)]
    if not (there or left_over or records.lines or records.rejected or records.rule):
        raise InputError(f"{folder}: no shards in there; name the folder that `drrgen render --out` writes to")
    done = [line for name, line in records.lines.items() if name in there and there[name].stat().st_size == line.bytes]
    damaged = set(records.lines) - {line.file for line in done}
    settings = None if records.config is None else config_sha256(json.dumps(records.config, sort_keys=True))
    unlisted = []
    for name in sorted(there.keys() - records.lines.keys()):
        try:
            line = dataset.glance(there[name])
        except InputError:
            damaged.add(name)
            continue
        # of other settings: `--overwrite` was stopped before it came to this one
        if settings in (None, line.config_sha256):
            done.append(line)
            unlisted.append(name)
    missing = (records.planned - records.rejected.keys() | damaged) - {line.file for line in done}
    views_per_s, shards_per_hour = _rates(done)
    return Status(
        folder=str(folder),
        **dataset.count(done),
        bytes=sum(line.bytes for line in done),
        splits=dataset.by_split(records, done),
        rejected=dict(Counter(one.codes[0] for one in records.rejected.values())),
        missing=sorted(missing),
        damaged=sorted(damaged),
        unlisted=unlisted,
        left_over=left_over,
        views_per_s=views_per_s,
        shards_per_hour=shards_per_hour,
        hours_left=len(missing) / shards_per_hour if shards_per_hour else None,
    )


def _rates(lines: Iterable[Line]) -> tuple[float | None, float | None]:
    """Views per second and shards per hour, of all processes together, in the time in which any of them worked."""
    timed = [(line.finished_at.timestamp(), line.seconds, line.views) for line in lines if line.seconds is not None]
    last = sorted(timed)[-_LAST:]
    busy_s, until_s = 0.0, 0.0
    for begun_s, ended_s in sorted((ended_s - took_s, ended_s) for ended_s, took_s, _ in last):
        busy_s += max(0.0, ended_s - max(begun_s, until_s))
        until_s = max(until_s, ended_s)
    if not busy_s:
        return None, None
    return sum(views for *_, views in last) / busy_s, len(last) / busy_s * 3600


def to_json(found: Status) -> str:
    """One object."""
    return json.dumps(asdict(found), indent=1)


def print_table(found: Status) -> None:
    """What is there by split, then a line for each thing that is to be said, to the standard output."""
    console = Console(highlight=False, markup=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("split", "patients", "shards", "views"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for name, counts in found.splits.items():
        table.add_row(name, *(str(counts[what]) for what in ("patients", "shards", "views")))
    table.add_section()
    table.add_row("all", str(found.patients), str(found.shards), str(found.views))
    console.print(table)
    for line in _sentences(found):
        print(printable(line))


def _sentences(found: Status) -> Iterator[str]:
    yield f"{found.folder}: {found.shards} done, {found.bytes / 1e9:.3g} GB"
    if found.rejected:
        codes = ", ".join(f"{count} {code}" for code, count in sorted(found.rejected.items()))
        yield f"{sum(found.rejected.values())} rejected: {codes}; {dataset.REJECTED} names them"
    if found.missing:
        yield f"{len(found.missing)} missing: the same `drrgen render` makes them"
    if found.damaged:
        yield f"{len(found.damaged)} of the missing are damaged or gone: {_named(found.damaged)}"
    if found.unlisted:
        yield f"{len(found.unlisted)} of the done are not in {dataset.MANIFEST}: the same `drrgen render` adds them"
    if found.left_over:
        yield f"{len(found.left_over)} left over from processes that died: {_named(found.left_over)}"
    if found.views_per_s is not None and found.shards_per_hour is not None:
        left = f"; {found.hours_left:.3g} hours left" if found.missing else ""
        yield f"{found.views_per_s:,.1f} views/s, {found.shards_per_hour:,.1f} shards/hour{left}"


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
