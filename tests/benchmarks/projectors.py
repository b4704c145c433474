"""`cpu` beside other projectors on the same CT, rays, pixels and threads, in one run: error beside time.

`make bench` runs it and renews docs/benchmarks.md, which says what is compared and how. The input is a CT's folder, or
without one a phantom of a chest CT's shape. `--only` runs parts of it:

    views    time and error of every projector, at 256, 512 and 1024 pixels, in five views
    smooth   error against closed forms on Gaussian blobs, at three sizes of voxels
    sphere   the 2522 views of `5deg` at 512 pixels, with one thread and with all
    beams    what spectra and materials cost beside one energy, and which part of them
    start    what the first call costs: importing, compiling, finding compiled
"""

import argparse
import csv
import itertools
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numba
import numpy as np
from numpy.typing import NDArray
from tests.benchmarks import blobs, peers, report
from tests.drrgen import joseph
from tqdm import tqdm

from drrgen import anatomy, beam, body, dicom, exposure, grid, phantom, projectors
from drrgen.attenuation import dense_part, mu_per_mm, water_part
from drrgen.geometry import Detector, Float, Setup, Views

# The rays of the preset `chest`, to a detector 1.2 times as far away: behind any patient. Some peers end rays there.
SETUP = Setup(sdd_mm=1.2 * 1800, sod_mm=1640.0, detector_mm=1.2 * 432)
SHAPE, SPACING_MM = (133, 512, 512), (0.7, 0.7, 2.5)
SIZES = (256, 512, 1024)
ANGLES_DEG = ((0, 0), (45, 0), (90, 0), (30, 30), (0, 80))
# Neighbours of each view, 5 degrees apart in azimuth, that are cast with it, as `drrgen render` does at 512 pixels:
# what a view of a sphere costs.
NEIGHBOURS = 16
# A call is repeated until these seconds are over, six times at most; the fastest counts. Of one view, of many.
ONE_S, MANY_S = 3.0, 7.0
# Of a sphere, for the part `beams`.
BEAM_VIEWS = 62
# A projector that needs longer for a view is not waited for.
VIEW_S = 20.0
SLOW = f"not run: over {VIEW_S:.0f} s a view"
# Voxels of the smooth phantom, of the same box: twice as large, the CT's, and 1.4 times smaller.
FINER = (0.5, 1.0, 1.4)


def ours(name: str, mu: peers.Image, world_from_voxel: Float, threads: int) -> peers.Plan:
    project = projectors.get(name)(mu, np.linalg.inv(world_from_voxel))
    return lambda views, detector: peers.timed(lambda: project(views, detector))


def central_ray(mu: peers.Image, world_from_voxel: Float, threads: int) -> peers.Plan:
    """The tests' Joseph ray by ray in float64. Its time says nothing: it copies the volume in every call."""
    voxel_from_world = np.linalg.inv(world_from_voxel)
    return lambda views, detector: lambda: (math.nan, joseph.project(mu, voxel_from_world, views, detector))


def rays_over_pixel(mu: peers.Image, world_from_voxel: Float, threads: int) -> peers.Plan:
    """The same, 4 x 4 rays to a pixel: the truth of the part `views`."""
    voxel_from_world = np.linalg.inv(world_from_voxel)
    return lambda views, detector: lambda: (math.nan, joseph.over_area(mu, voxel_from_world, views, detector))


PROJECTORS: dict[str, Callable[[peers.Image, Float, int], peers.Plan]] = {
    "central ray": central_ray,
    "`cpu`": partial(ours, "cpu"),
    "RTK Joseph": peers.rtk,
    "plastimatch exact": partial(peers.plastimatch, algorithm="exact"),
    "plastimatch uniform": partial(peers.plastimatch, algorithm="uniform"),
    "nanodrr": peers.nanodrr,
    "DiffDRR trilinear": partial(peers.diffdrr, renderer="Trilinear"),
    "DiffDRR Siddon": partial(peers.diffdrr, renderer="Siddon"),
    "`siddon`": partial(ours, "siddon"),
}
# Those that cast several views in one call. To the others many views are one after another.
MANY = ("`cpu`", "RTK Joseph")
# On the smooth phantom; on voxels of other sizes than the CT's only some.
SMOOTH = PROJECTORS | {"4 x 4 rays": rays_over_pixel}
SMOOTH_FEW = ("`cpu`", "central ray", "4 x 4 rays", "RTK Joseph")


@dataclass(frozen=True)
class Measured:
    """One projector on one view. Errors are fractions of the largest line integral of the truth.

    rms, max: to the pixel's area. rms_to_ray: to the central ray; a peer whose geometry were off by a part of a pixel
    would show it there.
    """

    size: int
    azimuth_deg: float
    elevation_deg: float
    projector: str
    one_ms: float
    many: int
    many_per_s: float
    mega_samples_per_s: float
    rms: float
    max: float
    rms_to_ray: float
    note: str = ""


@dataclass(frozen=True)
class Smooth:
    """One projector on the smooth phantom, all views together, against both closed forms."""

    voxel_mm: str
    projector: str
    rms_ray: float
    max_ray: float
    rms_area: float
    max_area: float
    note: str = ""


@dataclass(frozen=True)
class Sphere:
    views: int
    size: int
    threads: int
    wall_s: float
    processor_s: float


@dataclass(frozen=True)
class Beam:
    what: str
    processor_ms: float


@dataclass(frozen=True)
class Start:
    what: str
    empty_cache_s: float
    warm_cache_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ct", nargs="?", type=Path)
    parser.add_argument("--only", nargs="+", choices=["views", "smooth", "sphere", "beams", "start"])
    parser.add_argument(
        "--sphere", action="store_const", dest="only", const=["sphere"], help="the same as --only sphere"
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="pixels, of the part `views`")
    parser.add_argument("--threads", type=int, default=numba.config.NUMBA_NUM_THREADS)
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder for the CSV files, tables and the plot")
    parser.add_argument("--document", type=Path, help="put the tables between this document's markers")
    args = parser.parse_args()
    parts = args.only or ["start", "sphere", "beams", "smooth", "views"]
    args.out.mkdir(parents=True, exist_ok=True)
    numba.set_num_threads(args.threads)
    if {"views", "sphere", "beams"} & set(parts):
        hu, world_from_voxel, name = read(args.ct)
        mu = mu_per_mm(hu)
    for part in parts:
        if part == "start":
            text = report.start_table(_written(args.out, part, measure_start()))
        elif part == "sphere":
            rows = _written(args.out, part, measure_sphere(mu, world_from_voxel, args.threads))
            text = f"{name}. {report.sphere_table(rows)}"
        elif part == "beams":
            rows = _written(args.out, part, measure_beams(hu, world_from_voxel))
            text = f"{name}. {BEAM_VIEWS} views of 512 pixels, one thread.\n\n{report.beams_table(rows)}"
        elif part == "smooth":
            text = report.smooth_table(_written(args.out, part, measure_smooth(args.threads)))
        else:
            rows = _written(args.out, part, measure_views(mu, world_from_voxel, args.threads, args.sizes))
            report.plot(rows, args.out / "benchmarks.png")
            text = f"{report.PICTURE}\n\n{name}.\n\n{report.views_tables(rows)}"
        text = f"{report.machine(args.threads)}\n\n{text}"
        print(f"\n## {part}\n\n{text}", flush=True)
        if args.document:
            report.publish(args.document, part, text)


def _written(folder: Path, part: str, rows: Iterator) -> list:
    """The rows, each written to the part's CSV file as soon as it is there."""
    written: list = []
    with Path(folder, f"{part}.csv").open("w", newline="") as file:
        for row in rows:
            values = asdict(row)
            if not written:
                csv.writer(file).writerow(values)
            csv.writer(file).writerow(values.values())
            file.flush()
            written.append(row)
    return written


def read(folder: Path | None) -> tuple[NDArray[np.int16], Float, str]:
    """(HU [slice, row, column], world_from_voxel, what it is).

    The outermost voxels are set to air, so that it does not matter what a projector makes of a volume that ends in a
    patient: it is a matter of definition, and differs between them.
    """
    if folder and folder.is_dir():
        volume = dicom.read(dicom.find_series(folder)[0])
        volume, name = volume.with_hu(body.remove_table(volume)), folder.name
    else:
        volume, name = phantom.voxelise(anatomy.thorax(0), SHAPE, SPACING_MM), "phantom `thorax(0)`"
    world_from_voxel = np.linalg.inv(volume.voxel_from_world)
    spacing_mm = np.diag(world_from_voxel)[:3]
    if not (np.allclose(world_from_voxel[:3, :3], np.diag(spacing_mm)) and (spacing_mm > 0).all()):
        sys.exit(f"{folder}: not all peers can cast a CT whose axes are not the patient's")
    hu = np.full(volume.hu.shape, -1000, np.int16)
    hu[1:-1, 1:-1, 1:-1] = volume.hu[1:-1, 1:-1, 1:-1]
    across = " x ".join(f"{one:.3g}" for one in spacing_mm)
    return hu, world_from_voxel, f"Volume: {name}, {' x '.join(map(str, hu.shape[::-1]))} voxels of {across} mm"


def look(mu: peers.Image, world_from_voxel: Float, angles_deg) -> Views:
    """Views around the volume's centre, with the detector behind the whole volume."""
    counts = np.array(mu.shape[::-1])
    half_mm = np.linalg.norm(np.diag(world_from_voxel)[:3] * counts) / 2
    assert half_mm < SETUP.sdd_mm - SETUP.sod_mm, (
        "the detector would lie in the volume, where some peers end their rays"
    )
    centre_mm = (world_from_voxel @ [*(counts - 1) / 2, 1])[:3]
    azimuth_deg, elevation_deg = np.array(angles_deg, dtype=float).T
    return Views(azimuth_deg, elevation_deg, centre_mm, SETUP.sdd_mm, SETUP.sod_mm)


def measure_views(mu: peers.Image, world_from_voxel: Float, threads: int, sizes) -> Iterator[Measured]:
    plans, missing = _prepare(mu, world_from_voxel, threads)
    voxel_from_world = np.linalg.inv(world_from_voxel)
    one = {angles: look(mu, world_from_voxel, [angles]) for angles in ANGLES_DEG}
    near = {
        (azimuth, elevation): look(mu, world_from_voxel, [(azimuth + 5 * i, elevation) for i in range(NEIGHBOURS)])
        for azimuth, elevation in ANGLES_DEG
    }
    crossings = {1: _crossings(mu, voxel_from_world, one), NEIGHBOURS: _crossings(mu, voxel_from_world, near)}
    pixel_s: dict = {}
    progress = tqdm(total=len(sizes) * len(ANGLES_DEG) * len(PROJECTORS), unit="run", disable=None)
    for size, angles in itertools.product(sorted(sizes), ANGLES_DEG):
        detector = Detector(size, SETUP.detector_mm / size)
        progress.set_description(f"{size} px {angles} truth")
        area = joseph.over_area(mu, voxel_from_world, one[angles], detector)
        for name in PROJECTORS:
            progress.set_description(f"{size} px {angles} {name}")
            # as long per pixel as at the size before
            too_slow = size**2 * pixel_s.get((name, angles), 0.0) > VIEW_S
            if name in missing or too_slow:
                note = missing.get(name, SLOW)
                yield Measured(size, *angles, name, math.nan, 0, *[math.nan] * 5, note)
            else:
                one_s, image = _best(plans[name](one[angles], detector), ONE_S)
                pixel_s[name, angles] = one_s / size**2
                if name == "central ray":
                    rays = image
                many, many_s = 1, one_s
                if name in MANY:
                    many, many_s = NEIGHBOURS, _best(plans[name](near[angles], detector), MANY_S)[0]
                speed = 1e3 * one_s, many, many / many_s, 1e-6 * crossings[many][angles] * many * size**2 / many_s
                yield Measured(size, *angles, name, *speed, *_error(image, area), _error(image, rays)[0])
            progress.update()
    progress.close()


def measure_smooth(threads: int) -> Iterator[Smooth]:
    drawn = blobs.draw(seed=0)
    detector = Detector(512, SETUP.detector_mm / 512)
    truth = None
    progress = tqdm(total=2 * len(SMOOTH_FEW) + len(SMOOTH), unit="run", disable=None)
    for finer in FINER:
        shape = tuple(round(count * finer) for count in SHAPE)
        spacing_mm = tuple(
            step * count / new for step, count, new in zip(SPACING_MM, SHAPE[::-1], shape[::-1], strict=True)
        )
        world_from_voxel = np.diag([*spacing_mm, 1.0])
        world_from_voxel[:3, 3] = -(np.array(shape[::-1]) - 1) / 2 * spacing_mm
        mu = blobs.voxelise(drawn, shape, spacing_mm)
        views = look(mu, world_from_voxel, ANGLES_DEG)
        truth = truth or blobs.line_integrals(drawn, views, detector)
        voxel_mm = " x ".join(f"{step:.3g}" for step in spacing_mm)
        chosen = {name: SMOOTH[name] for name in (SMOOTH if finer == 1 else SMOOTH_FEW)}
        plans, missing = _prepare(mu, world_from_voxel, threads, chosen)
        for name in chosen:
            progress.set_description(f"blobs, {voxel_mm} mm, {name}")
            note = missing.get(name, "")
            if not note:
                quick = plans[name](views[:1], Detector(128, SETUP.detector_mm / 128))
                # twice: the first call may compile
                quick_s = min(_best(quick, repeat_s=0)[0] for _ in range(2))
                note = SLOW if 16 * quick_s > VIEW_S else ""
            if note:
                yield Smooth(voxel_mm, name, *[math.nan] * 4, note)
            else:
                cast = plans[name](views, detector)()[1]
                by_ray, by_area = (np.array([_error(*pair) for pair in zip(cast, each, strict=True)]) for each in truth)
                yield Smooth(voxel_mm, name, *_together(by_ray), *_together(by_area))
            progress.update()
    progress.close()


def measure_sphere(mu: peers.Image, world_from_voxel: Float, threads: int) -> Iterator[Sphere]:
    views = look(mu, world_from_voxel, np.transpose(grid.directions("5deg")))
    project = projectors.get("cpu")(mu, np.linalg.inv(world_from_voxel))
    detector = Detector(512, SETUP.detector_mm / 512)
    # compiles, and lays the volume out along each axis
    project(look(mu, world_from_voxel, ANGLES_DEG), detector)
    for number in sorted({1, threads}):
        numba.set_num_threads(number)
        began, busy = time.perf_counter(), time.process_time()
        for start in tqdm(range(0, len(views), NEIGHBOURS), f"sphere, {number} threads", unit="batch", disable=None):
            project(views[start : start + NEIGHBOURS], detector)
        yield Sphere(len(views), 512, number, time.perf_counter() - began, time.process_time() - busy)
    numba.set_num_threads(threads)


def measure_beams(hu: NDArray[np.int16], world_from_voxel: Float) -> Iterator[Beam]:
    """In batches, as `drrgen render` casts them."""
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    cast, frame, tube = projectors.get("cpu"), np.linalg.inv(world_from_voxel), beam.spectrum("chest120")
    views = look(hu, world_from_voxel, np.transpose(grid.directions(f"fibonacci:{BEAM_VIEWS}")))
    detector = Detector(512, SETUP.detector_mm / 512)
    water, dense = (cast(part(hu), frame) for part in (water_part, dense_part))
    batches = [views[start : start + NEIGHBOURS] for start in range(0, len(views), NEIGHBOURS)]
    casts = {
        "60 keV": exposure.prepare(cast, hu, frame, beam.mono(60)),
        "`chest120`": exposure.prepare(cast, hu, frame, tube),
        "of it: water part": water,
        "of it: dense part": dense,
        "`chest120` with materials": exposure.prepare(cast, hu, frame, tube, materials=True),
    }
    for what, project in casts.items():
        yield Beam(what, _processor_ms(lambda project=project: [project(batch, detector) for batch in batches]))
    look_up, integrals_mm = (
        beam.LineIntegrals(tube),
        [(water(batch, detector), dense(batch, detector)) for batch in batches],
    )
    yield Beam("one look-up", _processor_ms(lambda: [look_up(*pair) for pair in integrals_mm]))
    numba.set_num_threads(threads)


def _processor_ms(run: Callable[[], object]) -> float:
    """A view, the least of four calls: the first one compiles and lays the volume out."""
    seconds = []
    for _ in range(4):
        began = time.process_time()
        run()
        seconds.append(time.process_time() - began)
    return 1e3 * min(seconds) / BEAM_VIEWS


_FIRST_CALL = """
import time
began = time.perf_counter()
import drrgen
package = time.perf_counter() - began
import numpy as np
from drrgen.geometry import Detector, Views
from drrgen.projectors import cpu
imported = time.perf_counter() - began
mu = np.zeros((40, 50, 60), np.float32)
mu[10:30, 10:40, 10:40] = 0.02
views = Views(np.array([0.0, 90, 45, 30]), np.array([0.0, 0, 0, 80]), np.array([30.0, 25, 20]), 1800.0, 1640.0)
cpu.prepare(mu, np.eye(4))(views, Detector(64, 2.0))
print(package, imported, time.perf_counter() - began - imported)
"""


def measure_start() -> Iterator[Start]:
    """In new processes, the first with an empty cache of compiled code, the second with what the first one left."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"NUMBA_CACHE_DIR": cache}
        command = [sys.executable, "-c", _FIRST_CALL]
        outputs = [
            subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
            for _ in tqdm(range(2), "first call", disable=None)
        ]
    cold, warm = (map(float, output.split()) for output in outputs)
    for what, *seconds in zip(("import drrgen", "import drrgen.projectors.cpu", "first call"), cold, warm, strict=True):
        yield Start(what, *seconds)


def _prepare(mu, world_from_voxel, threads: int, chosen=PROJECTORS) -> tuple[dict[str, peers.Plan], dict[str, str]]:
    """The projectors that are installed, and why the others are not there."""
    plans, missing = {}, {}
    for name, prepare in chosen.items():
        try:
            plans[name] = prepare(mu, world_from_voxel, threads)
        except (ImportError, OSError):
            missing[name] = "not installed"
    return plans, missing


def _best(run, repeat_s: float) -> tuple[float, peers.Image]:
    """(seconds of the fastest call, the image)."""
    seconds: list[float] = []
    began = time.perf_counter()
    while not seconds or (len(seconds) < 6 and time.perf_counter() - began < repeat_s and not math.isnan(seconds[0])):
        taken, image = run()
        seconds.append(taken)
    return min(seconds), image


def _crossings(mu: peers.Image, voxel_from_world: Float, looks: dict) -> dict:
    """Slices that a pixel's ray crosses within the volume, on average: the samples that Joseph's method takes on it.

    The length within the volume is Joseph's integral over ones; a ray crosses so many slices per mm as it has voxels
    along the axis in which it crosses most. The average is over 128 x 128 rays of each view.
    """
    detector = Detector(128, SETUP.detector_mm / 128)
    index = np.arange(detector.shape)
    offset = (index - (detector.shape - 1) / 2) * detector.pixel_mm
    ray_mm = np.sqrt(SETUP.sdd_mm**2 + offset[:, None] ** 2 + offset**2)
    ones = np.ones_like(mu)
    found = {}
    for angles, views in looks.items():
        length_mm = joseph.project(ones, voxel_from_world, views, detector)
        rays = (part[:, None, None] for part in views.rays(detector, voxel_from_world))
        source, first, column_step, row_step = rays
        ray = first + index[:, None] * column_step + index[:, None, None] * row_step - source
        found[angles] = float((length_mm * np.abs(ray).max(axis=3) / ray_mm).mean())
    return found


def _error(image, truth) -> tuple[float, float]:
    """(rms, max), of the truth's peak."""
    error = (image - truth) / truth.max()
    return float(np.sqrt((error**2).mean())), float(np.abs(error).max())


def _together(errors) -> tuple[float, float]:
    """(rms, max) of several views."""
    return float(np.sqrt((errors[:, 0] ** 2).mean())), float(errors[:, 1].max())


if __name__ == "__main__":
    main()
