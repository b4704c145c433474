"""What a scan found: a table for people, JSON for programs."""

import json
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from drrgen.catalog import Entry, summary
from drrgen.defects import printable

_COLOURS = {"complete": "green", "accepted": "green", "repairable": "yellow", "copy": "dim"}
# Of a page that goes to a file or another program: no line of the table is broken.
_PAGE_COLUMNS = 200


def print_table(entries: list[Entry], directory: Path) -> None:
    """A row per CT, then a line per CT that has defects, then the summary, to the standard output."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = _PAGE_COLUMNS
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("patient", "series", "slices", "spacing mm", "extent mm", "kVp", "kernel", "defects", "verdict"):
        table.add_column(name, justify="right" if name == "kVp" else "left", overflow="fold")
    for one in entries:
        table.add_row(*map(printable, _cells(one)), Text(one.verdict, style=_COLOURS.get(one.verdict, "red")))
    console.print(table)
    for one in entries:
        if one.defects or one.copy_of:
            console.print(Text(f"{one.origin.patient_id}, {_below(one.path, directory)}:", style="bold"))
        if one.copy_of:
            console.print(f"  the same series as in {_below(one.copy_of, directory)}, which is used")
        for defect in one.defects:
            cure = f" [--on-defect repair: {defect.repair}]" if defect.repair else ""
            console.print(f"  {printable(defect)}{cure}")
    console.print(summary(entries))


def _cells(one: Entry) -> list[str]:
    expected = "?" if one.num_expected is None else str(one.num_expected)
    files = "" if one.num_files == one.num_slices or one.num_files == 1 else f" ({one.num_files} files)"
    return [
        one.origin.patient_id,
        f"..{one.origin.series_uid[-12:]}" if len(one.origin.series_uid) > 14 else one.origin.series_uid,
        f"{one.num_slices}/{expected}{files}",
        " x ".join(f"{step:.3g}" for step in one.spacing_mm or ()),
        " x ".join(f"{side:.0f}" for side in one.extent_mm or ()),
        "" if one.origin.kvp is None else f"{one.origin.kvp:g}",
        one.origin.kernel or "",
        ", ".join(defect.code for defect in one.defects),
    ]


def _below(path: Path, directory: Path) -> str:
    return printable(path.relative_to(directory))


def to_json(entries: list[Entry]) -> str:
    """One object: the series in the table's order, and how many there are of each verdict."""
    verdicts = [one.verdict for one in entries]
    counts = {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)}
    return json.dumps({"series": [_object(one) for one in entries], "verdicts": counts}, indent=1)


def _object(one: Entry) -> dict:
    origin = one.origin
    return {
        "patient_id": origin.patient_id,
        "study_uid": origin.study_uid,
        "series_uid": origin.series_uid,
        "path": str(one.path),
        "verdict": one.verdict,
        "num_files": one.num_files,
        "num_slices": one.num_slices,
        "num_expected": one.num_expected,
        "shape": one.shape,
        "spacing_mm": one.spacing_mm,
        "extent_mm": one.extent_mm,
        "slice_thickness_mm": origin.slice_thickness_mm,
        "kvp": origin.kvp,
        "kernel": origin.kernel,
        "manufacturer": origin.manufacturer,
        "copy_of": one.copy_of and str(one.copy_of),
        "defects": [
            {"code": one.code, "message": one.message, "file": one.file, "repair": one.repair} for one in one.defects
        ],
    }
