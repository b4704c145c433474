"""What was measured, as Markdown tables, as a picture, and between the markers of a document."""

import math
import os
import platform
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np

VERSIONS = "drrgen numba numpy itk-rtk itk plastimatch nanodrr diffdrr torch".split()
# (marker, colour): different in shape and in lightness, so that a grey print will do
LOOKS = {
    "`cpu`": ("o", "#000000"),
    "RTK Joseph": ("s", "#d55e00"),
    "plastimatch exact": ("^", "#e69f00"),
    "plastimatch uniform": ("v", "#f0b93d"),
    "nanodrr": ("D", "#0072b2"),
    "DiffDRR trilinear": ("P", "#56b4e9"),
    "DiffDRR Siddon": ("X", "#8fd0f5"),
    "`siddon`": ("*", "#777777"),
}
PICTURE = """![Error beside time](img/benchmarks.png)

*Left is faster, down is more exact. Each point is one of five views. Grey: the error of the central ray itself.*"""


def machine(threads: int, packages: Sequence[str] = VERSIONS) -> str:
    """The machine, the system and the versions that a measurement depends on."""
    versions = []
    for name in packages:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{name} not installed")
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    system = f"{platform.system()} {platform.release().split('-')[0]}"
    return (
        f"{_processor()}, {os.cpu_count()} cores, {memory_gb:.0f} GB; {system}; "
        f"Python {platform.python_version()}; {threads} threads; {', '.join(versions)}."
    )


def _processor() -> str:
    if Path("/proc/cpuinfo").exists():
        text = Path("/proc/cpuinfo").read_text()
        found = [re.search(rf"^{key}\s*: (.*)$", text, re.MULTILINE) for key in ("model name", "cpu family", "model")]
        if all(found):
            name, family, model = (one[1] for one in found if one)
            sets = [one for one in ("avx2", "avx512f") if re.search(rf"\b{one}\b", text)]
            return f"{name} (family {family}, model {model}, {' '.join(sets) or 'no AVX2'})"
    return platform.processor() or platform.machine()


def views_tables(rows) -> str:
    """The comparison with RTK, and every row."""
    found = {(row.size, row.azimuth_deg, row.elevation_deg, row.projector): row for row in rows}
    heads, lines = ["size", "view"], []
    heads += ["`cpu`, ms one view", "RTK", "times", "`cpu`, views/s of many", "RTK", "times"]
    heads += ["rms of `cpu`", "of central rays", "max of `cpu`", "of central rays"]
    places = list(dict.fromkeys((row.size, row.azimuth_deg, row.elevation_deg) for row in rows))
    for place in places:
        fast, other, ray = (found[(*place, name)] for name in ("`cpu`", "RTK Joseph", "central ray"))
        lines.append(
            [place[0], f"({place[1]}, {place[2]})", _ms(fast.one_ms), _ms(other.one_ms)]
            + [_number(other.one_ms / fast.one_ms), _number(fast.many_per_s), _number(other.many_per_s)]
            + [_number(fast.many_per_s / other.many_per_s), *map(_error, (fast.rms, ray.rms, fast.max, ray.max))]
        )
    compared = table(heads, lines)
    heads = ["size", "view", "projector", "ms, one view", "views/s of many", "of them", "times RTK", "Msamples/s"]
    lines = []
    for row in rows:
        other = found[row.size, row.azimuth_deg, row.elevation_deg, "RTK Joseph"]
        lines.append(
            [row.size, f"({row.azimuth_deg}, {row.elevation_deg})", row.projector]
            + ([row.note] if row.note else [_ms(row.one_ms)])
            + [_number(row.many_per_s), row.many if row.many_per_s > 0 else "-"]
            + [_number(row.many_per_s / other.many_per_s), _number(row.mega_samples_per_s)]
            + [_error(row.rms), _error(row.max), _error(row.rms_to_ray)]
        )
    heads += ["rms", "max", "rms to the central ray"]
    return f"{compared}\n\n<details><summary>Every projector</summary>\n\n{table(heads, lines)}\n\n</details>"


def smooth_table(rows) -> str:
    """Errors on the smooth phantom, and how fast they fall with the size of the voxels."""
    heads = [
        "voxels, mm",
        "projector",
        "rms to the central ray",
        "max",
        "order",
        "rms to the pixel's area",
        "max",
        "order",
    ]
    lines = []
    before = {}
    for row in rows:
        height_mm = float(row.voxel_mm.split()[-1])
        orders = ["-", "-"]
        if row.projector in before and row.rms_ray > 0:
            last, last_mm = before[row.projector]
            steps = math.log(last_mm / height_mm)
            orders = [
                f"{math.log(getattr(last, name) / getattr(row, name)) / steps:.2f}" for name in ("rms_ray", "rms_area")
            ]
        before[row.projector] = row, height_mm
        lines.append(
            [row.voxel_mm, row.projector, row.note or _error(row.rms_ray), _error(row.max_ray), orders[0]]
            + [_error(row.rms_area), _error(row.max_area), orders[1]]
        )
    return table(heads, lines)


def sphere_table(rows) -> str:
    first = rows[0]
    lines = [
        [row.threads, f"{row.wall_s:.1f}", f"{row.processor_s:.1f}", f"{row.views / row.wall_s:.0f}"]
        + [f"{first.wall_s / row.wall_s:.2f}"]
        for row in rows
    ]
    heads = ["threads", "s", "processor s", "views/s", "times one thread"]
    return f"{first.views} views of {first.size} pixels.\n\n{table(heads, lines)}"


def beams_table(rows) -> str:
    lines = [[row.what, _ms(row.processor_ms), f"{row.processor_ms / rows[0].processor_ms:.2f}"] for row in rows]
    return table(["", "processor ms a view", "times one energy"], lines)


def start_table(rows) -> str:
    lines = [[f"`{row.what}`" if " " in row.what and "import" in row.what else row.what] for row in rows]
    for line, row in zip(lines, rows, strict=True):
        line += [f"{row.empty_cache_s:.2f}", f"{row.warm_cache_s:.2f}"]
    return table(["", "s, nothing compiled before", "s, next process"], lines)


def plot(rows, path: Path) -> None:
    """A panel for each size: time of a view across, error up, a point for each view."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = list(dict.fromkeys(row.size for row in rows))
    figure, panels = pyplot.subplots(
        1, len(sizes), figsize=(4.2 * len(sizes), 4.6), sharex=True, sharey=True, squeeze=False
    )
    for size, panel in zip(sizes, panels[0], strict=True):
        here = [row for row in rows if row.size == size]
        rays = [row.rms for row in here if row.projector == "central ray"]
        panel.axhspan(min(rays), max(rays), color="0.9", zorder=0, label="central ray, in every view")
        for name, (marker, colour) in LOOKS.items():
            points = np.array([(1e3 / row.many_per_s, row.rms) for row in here if row.projector == name])
            if len(points) and np.isfinite(points).any():
                label = name.replace("`cpu`", "drrgen cpu").replace("`siddon`", "drrgen siddon")
                panel.loglog(
                    *points.T, marker, color=colour, markersize=8, markeredgecolor="white", mew=0.5, label=label
                )
        panel.set(title=f"{size} x {size} pixels", xlabel="ms a view, of many")
        panel.grid(which="major", color="0.85", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("rms error to the pixel's area, of the peak")
    handles = dict(zip(*reversed(panels[0][0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="lower center", ncols=5, frameon=False)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def publish(document: Path, part: str, text: str) -> None:
    """Put the text between the document's markers of this part."""
    between = re.compile(rf"(<!-- {part}: begin -->\n).*(<!-- {part}: end -->)", re.DOTALL)
    old = document.read_text()
    assert between.search(old), f"{document} has no markers for {part}"
    document.write_text(between.sub(lambda found: f"{found[1]}\n{text}\n\n{found[2]}", old))


def table(heads: Sequence, lines: Sequence[Sequence]) -> str:
    """A Markdown table."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _ms(value: float) -> str:
    return _number(value)


def _error(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2e}"
