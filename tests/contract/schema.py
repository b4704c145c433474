"""The schema and the worked rows, read from their documents: documents and tests cannot drift apart."""

import re
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

DOCS = Path(__file__).parents[2] / "docs"


class Dataset(NamedTuple):
    path: str
    dtype: str
    shape: str
    unit: str
    required: str


class Attribute(NamedTuple):
    on: str
    names: str
    kind: str
    meaning: str
    required: str


class WorkedRow(NamedTuple):
    azimuth_deg: float
    elevation_deg: float
    source_mm: tuple[float, ...]
    point_mm: tuple[float, ...]
    pixel: tuple[float, ...]


def tables(document: str) -> dict[tuple[str, ...], list[list[str]]]:
    """Every Markdown table of a document: header -> rows of cells."""
    found: dict[tuple[str, ...], list[list[str]]] = {}
    header: tuple[str, ...] | None = None
    for line in (DOCS / document).read_text().splitlines():
        if not line.startswith("|"):
            header = None
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if header is None:
            header = tuple(cells)
            found[header] = []
        elif not set("".join(cells)) <= set("-:"):
            found[header].append(cells)
    return found


def datasets() -> list[Dataset]:
    rows = tables("shard-schema.md")["path", "dtype", "shape", "unit", "required"]
    return [Dataset(row[0].strip("`"), *row[1:]) for row in rows]


def attributes() -> list[Attribute]:
    rows = tables("shard-schema.md")["on", "attribute", "type", "meaning", "required"]
    return [Attribute(row[0].strip("`"), *row[1:]) for row in rows]


def version() -> str:
    return re.search(r"version (\d+\.\d+)", (DOCS / "shard-schema.md").read_text())[1]


def worked_rows() -> list[WorkedRow]:
    rows = tables("geometry.md")["θ", "φ", "source (mm, LPS)", "point (mm, LPS)", "column, row"]
    vectors = [[tuple(float(part) for part in cell.split(",")) for cell in row] for row in rows]
    return [WorkedRow(row[0][0], row[1][0], *row[2:]) for row in vectors]


def violations(file: h5py.File) -> list[str]:
    """What the document's tables say against an open file."""
    sizes: dict[str, int] = {}
    levels = [str(size) for size in file["views"].attrs.get("levels", [])]
    found = [] if levels else ["no levels"]
    for row in datasets():
        for path in [row.path.replace("<size>", level) for level in levels] if "<size>" in row.path else [row.path]:
            level = path.split("/")[-1] if path.split("/")[-1].isdigit() else path.split("/")[-2]
            if path not in file:
                if row.required == "MUST":
                    found.append(f"{path}: missing")
                continue
            dataset = file[path]
            if dataset.dtype != row.dtype:
                found.append(f"{path}: {dataset.dtype}, not {row.dtype}")
            axes = [level if axis == "size" else axis for axis in row.shape.split()]
            if len(axes) != dataset.ndim:
                found.append(f"{path}: {dataset.ndim} axes, not {row.shape}")
                continue
            for axis, length in zip(axes, dataset.shape, strict=True):
                if (int(axis) if axis.isdigit() else sizes.setdefault(axis, length)) != length:
                    found.append(f"{path}: axis {axis} has {length}")
    kinds = {"string": str, "bool": np.bool_, "float": np.floating, "int": np.integer}
    for row in attributes():
        for group in [row.on.replace("<size>", level) for level in levels] if "<size>" in row.on else [row.on]:
            for name in re.findall(r"`(\w+)`", row.names):
                value = file[group].attrs.get(name) if group in file else None
                if value is None:
                    if row.required == "MUST":
                        found.append(f"{group}: attribute {name} is missing")
                    continue
                kind, *shape = row.kind.split()
                scalar = value if isinstance(value, str) else np.asarray(value).ravel()[0]
                if not isinstance(scalar, kinds[kind]):
                    found.append(f"{group}: attribute {name} is {type(scalar).__name__}, not {kind}")
                expected = tuple(len(levels) if side == "L" else int(side) for side in shape)
                if not isinstance(value, str) and np.shape(value) != expected:
                    found.append(f"{group}: attribute {name} has shape {np.shape(value)}, not {expected}")
    return found
