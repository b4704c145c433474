"""The slab projector `cpu` beside Joseph ray by ray, in one run: ms per view, and the error to the pixel's area.

`python tests/benchmarks/projectors.py [FOLDER OF A CT]` prints Markdown tables. Without a CT the volume is a phantom
with the shape of a chest CT. The truth is the mean of 4 x 4 rays of float64 Joseph over each pixel. With `--sphere` it
casts the 2522 views of `5deg` at 512 pixels, with one thread and with all.
"""

import argparse
import time
from pathlib import Path

import numba
import numpy as np
from tests.drrgen import joseph

from drrgen import anatomy, body, dicom, grid, phantom, projectors
from drrgen.attenuation import mu_per_mm
from drrgen.geometry import PRESETS, Detector, Views

SHAPE, SPACING_MM = (133, 512, 512), (0.703, 0.703, 2.5)
SIZES = (256, 512, 1024)
ANGLES_DEG = [(0, 0), (90, 0), (45, 0), (30, 30), (0, 80)]
REPEATS = 5
# Neighbours of each view, 5 degrees apart, that are cast with it: what a view of a sphere costs.
NEIGHBOURS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ct", nargs="?", type=Path)
    parser.add_argument("--sphere", action="store_true")
    args = parser.parse_args()
    if args.ct:
        volume = dicom.read(dicom.find_series(args.ct)[0])
        volume = volume.with_hu(body.remove_table(volume))
    else:
        volume = phantom.voxelise(anatomy.thorax(0), SHAPE, SPACING_MM)
    mu, frame, setup = mu_per_mm(volume.hu), volume.voxel_from_world, PRESETS["chest"]
    began = time.perf_counter()
    project = projectors.get("cpu")(mu, frame)
    project(_views(volume.centre_mm, [(0, 0), (90, 0), (0, 90)]), Detector(64, setup.detector_mm / 64))
    print(f"first call, with what it compiles or finds compiled: {time.perf_counter() - began:.1f} s\n")
    if args.sphere:
        _sphere(project, volume.centre_mm)
        return
    print(f"{numba.get_num_threads()} threads; errors are rms (max), of the peak\n")
    print("| pixels | view | ms, ray by ray | ms, one view | times | ms, of many | times | error | of central rays |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size in SIZES:
        detector = Detector(size, setup.detector_mm / size)
        for azimuth, elevation in ANGLES_DEG:
            one = _views(volume.centre_mm, [(azimuth, elevation)])
            near = _views(volume.centre_mm, [(azimuth + 5 * i, elevation) for i in range(NEIGHBOURS)])
            truth = joseph.over_area(mu, frame, one, detector)
            by_ray, rays = _best(lambda one=one, detector=detector: joseph.project(mu, frame, one, detector), 2)
            single, image = _best(lambda one=one, detector=detector: project(one, detector), REPEATS)
            many = _best(lambda near=near, detector=detector: project(near, detector), REPEATS)[0] / NEIGHBOURS
            print(
                f"| {size} | ({azimuth}, {elevation}) | {by_ray:.0f} | {single:.1f} | {by_ray / single:.0f} "
                f"| {many:.1f} | {by_ray / many:.0f} | {_error(image, truth)} | {_error(rays, truth)} |",
                flush=True,
            )


def _views(centre_mm, angles_deg) -> Views:
    azimuth_deg, elevation_deg = np.array(angles_deg, dtype=float).T
    return Views(azimuth_deg, elevation_deg, centre_mm, PRESETS["chest"].sdd_mm, PRESETS["chest"].sod_mm)


def _best(call, repeats: int):
    """(milliseconds of the fastest of some calls, the last one's result)."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - began)
    return 1000 * min(seconds[1:]), result


def _error(image, truth) -> str:
    error = (image - truth) / truth.max()
    return f"{np.sqrt((error**2).mean()):.1e} ({np.abs(error).max():.1e})"


def _sphere(project, centre_mm) -> None:
    setup = PRESETS["chest"]
    azimuth_deg, elevation_deg = grid.directions("5deg")
    views = Views(azimuth_deg, elevation_deg, centre_mm, setup.sdd_mm, setup.sod_mm)
    for threads in sorted({1, numba.config.NUMBA_NUM_THREADS}):
        numba.set_num_threads(threads)
        began, busy = time.perf_counter(), time.process_time()
        for start in range(0, len(views), 64):
            project(views[start : start + 64], Detector(512, setup.detector_mm / 512))
        wall, busy = time.perf_counter() - began, time.process_time() - busy
        print(
            f"{len(views)} views of 512 pixels, {threads} threads: {wall:.1f} s, processor {busy:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
