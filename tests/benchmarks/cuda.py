"""The `cuda` projector on this machine's GPU beside nanodrr's, in one run: wall clock, memory, and errors.

`make bench-gpu`, or `python tests/benchmarks/cuda.py [FOLDER OF A CT]`, prints a Markdown table and writes the same as
CSV. Without a CT the volume is a phantom of 300 slices of 512 x 512. nanodrr 0.1.7 takes part if it is installed. All
get the same volume, geometry and pixels. Errors are fractions of the peak of each view: to the twin, which is the
central ray in float64, and to the mean of 4 x 4 rays over each pixel. With `--interpret` the same code runs without a
GPU, on a few voxels and pixels: that tries the benchmark, and its times mean nothing. `--precision` prints errors to
the twin only, of the kernel in Triton's interpreter and of voxels of 16 bits: without a GPU, in a minute or two.
"""

import argparse
import csv
import importlib.util
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from tests.drrgen import joseph

from drrgen import anatomy, body, dicom, phantom, projectors
from drrgen.attenuation import mu_per_mm
from drrgen.errors import InputError
from drrgen.geometry import PRESETS, Detector, Views
from drrgen.shards import SCALE

SETUP = PRESETS["chest"]
SIZES = (256, 512, 1024)
ANGLES_DEG = [(0, 0), (90, 0), (45, 0), (30, 30), (0, 80)]
# Neighbours 5 degrees apart, that are cast together: what a view of a sphere costs.
NEIGHBOURS = 64
SHAPE, SPACING_MM = (300, 512, 512), (0.7, 0.7, 1.2)
WARM_UPS, REPEATS = 2, 7
COLUMNS = [
    "projector", "pixels", "view", "views/s", "views/s, not copied", "samples/s", "MB on the GPU",
    "rms to twin", "max to twin", "rms to area", "max to area",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ct", nargs="?", type=Path)
    parser.add_argument("--csv", type=Path, default=Path("bench-gpu.csv"))
    parser.add_argument("--interpret", action="store_true")
    parser.add_argument("--precision", action="store_true")
    args = parser.parse_args()
    if args.interpret or args.precision:
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        projectors.resolve("cuda")
    except InputError as error:
        sys.exit(str(error))
    import torch

    if args.interpret:
        volume = phantom.voxelise(anatomy.thorax(0), (15, 20, 20), (18.0, 18.0, 24.0))
    elif args.ct:
        volume = dicom.read(dicom.find_series(args.ct)[0])
        volume = volume.with_hu(body.remove_table(volume))
    elif args.precision:
        volume = phantom.voxelise(anatomy.thorax(0), (133, 512, 512), (0.703, 0.703, 2.5))
    else:
        volume = phantom.voxelise(anatomy.thorax(0), SHAPE, SPACING_MM)
    mu, frame = mu_per_mm(volume.hu), volume.voxel_from_world
    if args.precision:
        _print_precision(mu, frame, _views(volume.centre_mm, ANGLES_DEG))
        return
    sizes, neighbours = ((16,), 2) if args.interpret else (SIZES, NEIGHBOURS)
    device = "Triton's interpreter: the times mean nothing" if args.interpret else torch.cuda.get_device_name()
    print(f"{device}; torch {torch.__version__}; {' x '.join(map(str, mu.shape))} voxels\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    with args.csv.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for row in _rows(mu, frame, volume.centre_mm, sizes, neighbours):
            table.writerow(row)
            print(f"| {' | '.join(str(row.get(name, '')) for name in COLUMNS)} |", flush=True)


def _print_precision(mu, frame, views: Views) -> None:
    def line(name: str, images, twin, pixels: int) -> None:
        error = np.abs(images - twin.astype(np.float64)) / twin.max(axis=(1, 2), keepdims=True)
        print(f"| {name} | {pixels} | {np.sqrt((error**2).mean()):.1e} | {error.max():.1e} |", flush=True)

    print("| | pixels | rms to twin | max to twin |\n|---|---|---|---|")
    detector = Detector(16, SETUP.detector_mm / 16)
    twin = joseph.project(mu, frame, views, detector)
    line("`cuda`", projectors.get("cuda")(mu, frame)(views, detector), twin, 16)
    detector = Detector(256, SETUP.detector_mm / 256)
    twin = joseph.project(mu, frame, views, detector)
    step = mu.max() / np.float32(np.iinfo(np.int16).max)
    for name, voxels in {"int16": np.rint(mu / step) * step, "float16": mu.astype(np.float16)}.items():
        line(f"{name} voxels", joseph.project(voxels.astype(np.float32), frame, views, detector), twin, 256)


def _rows(mu, frame, centre_mm, sizes, neighbours):
    import torch

    _restart_memory(torch)
    ours = projectors.get("cuda")(mu, frame)
    for size in sizes:
        detector = Detector(size, SETUP.detector_mm / size)
        many = _views(centre_mm, [(5 * i, 0) for i in range(neighbours)])
        truths = []
        for angles in ANGLES_DEG:
            one = _views(centre_mm, [angles])
            truths.append((joseph.project(mu, frame, one, detector), joseph.over_area(mu, frame, one, detector)))
            row = {"projector": "cuda", "pixels": size, "view": f"({angles[0]}, {angles[1]})"}
            yield (
                row
                | _timed(torch, ours, one, detector, _samples(mu, frame, one, detector))
                | _errors(ours(one, detector), *truths[-1])
            )
        row = {"projector": "cuda", "pixels": size, "view": f"{len(many)} together"}
        yield row | _timed(torch, ours, many, detector, _samples(mu, frame, many, detector))
        levels = [size // 2**level for level in range(4)]
        stored = _seconds(torch, lambda d=detector, m=many, n=levels: ours.stored(m, d, n, 1 / SCALE))
        yield row | {"view": f"{len(many)}, as stored", "views/s": _round(len(many) / stored)}
        if importlib.util.find_spec("nanodrr"):
            yield from _nanodrr_rows(torch, mu, frame, centre_mm, detector, truths, neighbours)


def _timed(torch, ours, views, detector, num_samples) -> dict:
    _restart_memory(torch)
    copied = _seconds(torch, lambda: ours(views, detector))

    def cast() -> None:
        for _ in ours._cast(views, detector):
            pass

    alone = _seconds(torch, cast)
    return {
        "views/s": _round(len(views) / copied),
        "views/s, not copied": _round(len(views) / alone),
        "samples/s": f"{num_samples / alone:.2e}",
        "MB on the GPU": _memory(torch),
    }


def _nanodrr_rows(torch, mu, frame, centre_mm, detector, truths, neighbours):
    """nanodrr 0.1.7 as its users would run it for speed: its Triton kernel, compiled, float32, no gradients."""
    for num_samples in (500, 1000):
        _restart_memory(torch)
        cast = _nanodrr(torch, mu, frame, detector, num_samples)
        name = f"nanodrr, {num_samples} samples"
        for angles, truth in zip(ANGLES_DEG, truths, strict=True):
            one = _views(centre_mm, [angles])
            row = {"projector": name, "pixels": detector.shape, "view": f"({angles[0]}, {angles[1]})"}
            yield (
                row | _timed_nanodrr(torch, cast, one, detector, num_samples) | _errors(cast(one).cpu().numpy(), *truth)
            )
        some = _views(centre_mm, [(5 * i, 0) for i in range(min(16, neighbours))])
        row = {"projector": name, "pixels": detector.shape, "view": f"{len(some)} together"}
        yield row | _timed_nanodrr(torch, cast, some, detector, num_samples)


def _timed_nanodrr(torch, cast, views, detector, num_samples) -> dict:
    copied, alone = _seconds(torch, lambda: cast(views).cpu()), _seconds(torch, lambda: cast(views))
    return {
        "views/s": _round(len(views) / copied),
        "views/s, not copied": _round(len(views) / alone),
        "samples/s": f"{len(views) * detector.shape**2 * num_samples / alone:.2e}",
        "MB on the GPU": _memory(torch),
    }


def _nanodrr(torch, mu, frame, detector, num_samples):
    """views -> [view, row, column] on the GPU. Its rays end at the detector, ours do not: its detector is moved to
    twice the distance and is twice as large, which leaves the rays as they are.
    """
    from nanodrr.camera import make_k_inv
    from nanodrr.data import Subject
    from nanodrr.drr import render

    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = "triton" if device == "cuda" else "torch"
    image = torch.from_numpy(np.ascontiguousarray(mu))[None, None]
    counts = np.array(mu.shape[::-1])
    grid_from_voxel = np.eye(4)
    grid_from_voxel[:3] = np.column_stack([np.diag(2 / counts), 1 / counts - 1])
    transforms = [torch.tensor(one, dtype=torch.float32) for one in (np.linalg.inv(frame), frame, grid_from_voxel)]
    isocentre, labels = torch.zeros(3), torch.zeros_like(image)
    subject = Subject(image, labels, *transforms, isocentre, max_label=0, convert_to_mu=False).to(device)
    far_mm, pixel_mm, size = 2 * SETUP.sdd_mm, 2 * detector.pixel_mm, detector.shape
    k_inv = make_k_inv(far_mm, pixel_mm, pixel_mm, 0.0, 0.0, size, size, device=device)

    def call(pose, k_inv, sdd):
        return render(subject, k_inv, pose, sdd, size, size, num_samples, backend=backend)

    fast = torch.compile(call, mode="reduce-overhead") if device == "cuda" else call

    def cast(views: Views):
        pose = np.tile(np.eye(4), (len(views), 1, 1))
        pose[:, :3] = np.stack([*views.axes, views.source_mm], axis=-1)
        on_device = torch.tensor(pose, dtype=torch.float32, device=device)
        with torch.no_grad():
            sdd = torch.full((len(views),), far_mm, device=device)
            return fast(on_device, k_inv.expand(len(views), 3, 3), sdd)[:, 0]

    return cast


def _views(centre_mm, angles_deg) -> Views:
    azimuth_deg, elevation_deg = np.array(angles_deg, dtype=float).T
    return Views(azimuth_deg, elevation_deg, centre_mm, SETUP.sdd_mm, SETUP.sod_mm)


def _seconds(torch, call) -> float:
    """The median of some calls, after some that compile and warm up; to the end of what they started on the GPU."""
    seconds = []
    for _ in range(WARM_UPS + REPEATS if torch.cuda.is_available() else WARM_UPS + 1):
        _synchronise(torch)
        began = time.perf_counter()
        call()
        _synchronise(torch)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[WARM_UPS:])


def _synchronise(torch) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _restart_memory(torch) -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _memory(torch) -> str:
    return f"{torch.cuda.max_memory_allocated() / 1e6:.0f}" if torch.cuda.is_available() else ""


def _round(views_per_s: float) -> str:
    return f"{views_per_s:.3g}"


def _errors(images, twin, area) -> dict:
    found = {}
    for name, truth in (("twin", twin), ("area", area)):
        error = (images - truth.astype(np.float64)) / truth.max()
        found |= {f"rms to {name}": f"{np.sqrt((error**2).mean()):.1e}", f"max to {name}": f"{np.abs(error).max():.1e}"}
    return found


def _samples(mu, frame, views: Views, detector: Detector) -> int:
    """How many samples Joseph's method takes: slices that rays cross within the box of voxels that are not 0."""
    others = ((0, 1), (0, 2), (1, 2))
    low, high = np.array([np.nonzero(mu.any(axis=axes))[0][[0, -1]] for axes in others]).T
    index = np.arange(detector.shape)[:, None]
    total = 0
    for source, first, column_step, row_step in zip(*views.rays(detector, frame), strict=True):
        direction = first + index * column_step + index[:, None] * row_step - source
        direction[direction == 0] = 1e-12
        ends = (low - 1 - source) / direction, (high + 1 - source) / direction
        enter, leave = np.minimum(*ends).max(axis=-1), np.maximum(*ends).min(axis=-1)
        total += (np.maximum(0, leave - np.maximum(0, enter)) * np.abs(direction).max(axis=-1)).sum()
    return int(total)


if __name__ == "__main__":
    main()
