"""Projectors against closed forms, against one another, and against the laws that line integrals obey."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numba
import numpy as np
import pytest
from tests.drrgen import joseph

from drrgen import anatomy, body, dicom, phantom, projectors
from drrgen.attenuation import mu_per_mm
from drrgen.errors import InputError
from drrgen.geometry import PRESETS, Detector, Views, project
from drrgen.projectors import slab
from drrgen.volume import Volume

# `cuda` where there is a GPU; in Triton's interpreter it has smaller tests of its own.
NAMES = [
    pytest.param(name, id=name) for name in projectors.NAMES if name != "cuda" or projectors.resolve("auto") == "cuda"
]
DETECTOR = Detector(shape=64, pixel_mm=432 / 64)
# all quadrants, steep and shallow, the poles, and angles at which the main axis changes within one image
AZIMUTH_DEG = [0.0, 30, 90, 135, 180, -90, -45, -120, 0, 60, 20, 0]
ELEVATION_DEG = [0.0, 20, 0, -30, 10, 45, -45, 30, 90, -60, 80, -90]


def views(isocentre_mm=(0.0, 0.0, 0.0), azimuth_deg=AZIMUTH_DEG, elevation_deg=ELEVATION_DEG, setup="chest") -> Views:
    angles = np.array(azimuth_deg, dtype=float), np.array(elevation_deg, dtype=float)
    return Views(*angles, np.array(isocentre_mm, dtype=float), PRESETS[setup].sdd_mm, PRESETS[setup].sod_mm)


def pixel_centres(looks: Views, detector: Detector) -> np.ndarray:
    """[view, row, column, 3], mm."""
    _, first, column_step, row_step = (part[:, None, None] for part in looks.rays(detector, np.eye(4)))
    index = np.arange(detector.shape)
    return first + index[:, None] * column_step + index[:, None, None] * row_step


def pixels(name: str, line_integrals: Callable[[Detector], np.ndarray], detector: Detector) -> np.ndarray:
    """What a projector calls a pixel: `cpu` the mean over its area (here of 4 x 4 rays), the others its centre."""
    if name != "cpu":
        return line_integrals(detector)
    finer = line_integrals(Detector(4 * detector.shape, detector.pixel_mm / 4))
    return finer.reshape(-1, detector.shape, 4, detector.shape, 4).mean(axis=(2, 4))


def grid(shape, spacing_mm) -> np.ndarray:
    """voxel_from_world of a volume [slice, row, column] that is centred on the origin."""
    world_from_voxel = np.diag([*spacing_mm, 1.0])
    world_from_voxel[:3, 3] = -(np.array(shape[::-1]) - 1) / 2 * np.array(spacing_mm)
    return np.linalg.inv(world_from_voxel)


@pytest.mark.parametrize("name", NAMES)
def test_thorax_converges_to_its_closed_form(name: str) -> None:
    """A painted phantom has sharp edges: partial-volume voxels of h mm blur each by about h, so the error falls like h.

    Measured: rms 0.0018 h of the peak at h = 8 and 4 mm; 0.0045 h and more with the grid off by half a voxel.
    """
    thorax = anatomy.thorax(1)
    looks = views(thorax.isocentre_mm)
    truth = pixels(name, lambda detector: phantom.line_integrals(thorax, looks, detector), DETECTOR)
    for spacing_mm in (8, 4):
        counts = (344 // spacing_mm, 400 // spacing_mm, 400 // spacing_mm)
        volume = phantom.voxelise(thorax, counts, (spacing_mm,) * 3)
        cast = projectors.get(name)(mu_per_mm(volume.hu), volume.voxel_from_world)(looks, DETECTOR)
        error = (cast - truth) / truth.max()
        rms_per_view = np.sqrt((error**2).mean(axis=(1, 2)))
        assert np.sqrt((error**2).mean()) < 0.0020 * spacing_mm
        assert rms_per_view.max() < 0.0030 * spacing_mm
        assert np.abs(error.mean()) < 0.0002 * spacing_mm


def test_joseph_converges_with_the_square_of_the_voxel_on_a_smooth_phantom() -> None:
    """A Gaussian ball's closed form is w sqrt(2 pi) s exp(-d^2 / 2 s^2) at distance d; interpolation errs like h^2.

    Measured: rms 6.9e-4, 2.4e-4, 5.6e-5 of the peak at h = 6, 3, 1.5 mm.
    """
    centre_mm, sigma_mm = np.array([20.0, -10.0, 30.0]), 20.0
    looks = views()

    def closed_form(detector: Detector) -> np.ndarray:
        source = looks.source_mm[:, None, None]
        along = pixel_centres(looks, detector) - source
        along /= np.linalg.norm(along, axis=-1, keepdims=True)
        offset = source - centre_mm
        distance_squared = (offset**2).sum(-1) - (offset * along).sum(-1) ** 2
        return 0.02 * np.sqrt(2 * np.pi) * sigma_mm * np.exp(-distance_squared / 2 / sigma_mm**2)

    truth = pixels("cpu", closed_form, DETECTOR)

    errors = []
    for spacing_mm in (6.0, 3.0, 1.5):
        counts = (round(240 / spacing_mm),) * 3
        axis = (np.arange(counts[0]) - (counts[0] - 1) / 2) * spacing_mm
        z, y, x = np.meshgrid(axis - centre_mm[2], axis - centre_mm[1], axis - centre_mm[0], indexing="ij")
        mu = (0.02 * np.exp(-(x**2 + y**2 + z**2) / 2 / sigma_mm**2)).astype(np.float32)
        cast = projectors.get("cpu")(mu, grid(counts, (spacing_mm,) * 3))(looks, DETECTOR)
        errors.append(np.sqrt(((cast - truth) ** 2).mean()) / truth.max())
    assert errors[2] < 1e-4
    # two halvings: a factor of 16 in theory; 8 leaves room for the coarse end, where h^4 still counts
    assert errors[0] / errors[2] > 8


def test_siddon_is_exact_for_one_voxel() -> None:
    """The path through a box is a closed form: the ray's overlap with three slabs."""
    spacing_mm = np.array([3.0, 4.0, 5.0])
    mu = np.zeros((5, 5, 5), np.float32)
    mu[2, 2, 2] = 0.5
    detector = Detector(shape=32, pixel_mm=0.5)
    looks = views()
    cast = projectors.get("siddon")(mu, grid(mu.shape, spacing_mm))(looks, detector)
    source = looks.source_mm[:, None, None]
    direction = pixel_centres(looks, detector) - source
    direction[direction == 0] = 1e-300
    ends = [(side * spacing_mm / 2 - source) / direction for side in (-1, 1)]
    enter, leave = np.minimum(*ends).max(-1), np.maximum(*ends).min(-1)
    truth = 0.5 * np.maximum(leave - enter, 0) * np.linalg.norm(direction, axis=-1)
    # float32 results of up to 3; rays that graze a face may fall to either side of it
    assert np.quantile(np.abs(cast - truth), 0.999) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_uniform_slab_is_its_thickness(name: str) -> None:
    """Central pixels of the PA view through 40 mm of mu = 0.02 / mm: 0.8 along the axis, more by 1/cos off it."""
    mu = np.full((60, 20, 60), 0.02, np.float32)
    detector = Detector(shape=8, pixel_mm=4.0)
    image = projectors.get(name)(mu, grid(mu.shape, (2.0, 2.0, 2.0)))(views([0, 0, 0], [0.0], [0.0]), detector)[0]
    offset = (np.arange(8) - 3.5) * 4.0
    obliquity = np.sqrt(1 + (offset[:, None] ** 2 + offset**2) / 1800**2)
    # float32; the cumulative sums of `cpu` drift by a few parts in a million
    assert np.allclose(image, 0.8 * obliquity, rtol=1e-5 if name == "cpu" else 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_linearity(name: str) -> None:
    rng = np.random.default_rng(1)
    one, two = rng.uniform(0, 0.03, (2, 12, 14, 16)).astype(np.float32)
    frame, looks = grid(one.shape, (6.0, 7.0, 8.0)), views()
    cast = projectors.get(name)
    whole = cast(2 * one + two, frame)(looks, DETECTOR)
    parts = 2 * cast(one, frame)(looks, DETECTOR) + cast(two, frame)(looks, DETECTOR)
    # a few float32 roundings of values up to 10; `cpu` rounds voxels to steps of 5.5e-6 / mm, here of 7 mm, at random
    assert np.allclose(whole, parts, atol=2e-4 if name == "cpu" else 1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("turn_deg", [90, 37])
def test_turning_the_volume_is_turning_the_view(name: str, turn_deg: float) -> None:
    """A turn about z adds to azimuth: the same voxels on a turned, oblique grid give the same image."""
    rng = np.random.default_rng(2)
    mu = rng.uniform(0, 0.03, (10, 12, 14)).astype(np.float32)
    frame = grid(mu.shape, (6.0, 7.0, 8.0))
    cosine, sine = np.cos(np.deg2rad(turn_deg)), np.sin(np.deg2rad(turn_deg))
    turned = np.array([[cosine, -sine, 0, 0], [sine, cosine, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    cast = projectors.get(name)
    before = cast(mu, frame)(views(), DETECTOR)
    turned_views = views(azimuth_deg=np.array(AZIMUTH_DEG) + turn_deg)
    after = cast(mu, frame @ np.linalg.inv(turned))(turned_views, DETECTOR)
    # rays at exactly 45 degrees may choose the other main axis after rounding, and rays on faces the other voxel
    assert np.quantile(np.abs(after - before), 0.99) < 1e-5 * before.max()


@pytest.mark.parametrize("name", NAMES)
def test_rays_that_miss_and_sources_inside(name: str) -> None:
    mu = np.full((20, 20, 20), 0.02, np.float32)
    far_away = grid(mu.shape, (2.0, 2.0, 2.0)) @ np.array([[1.0, 0, 0, 5000], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    cast = projectors.get(name)
    assert not cast(mu, far_away)(views(), DETECTOR).any()
    # a source in the middle of a cube of 8 m: half of the cube lies ahead, the detector and what is behind it included
    inside = Views(np.zeros(1), np.zeros(1), np.array([0.0, -1640.0, 0.0]), 1800.0, 1640.0)
    image = cast(mu, grid(mu.shape, (400.0, 400.0, 400.0)))(inside, Detector(shape=2, pixel_mm=1.0))
    # Joseph counts whole slices: of 400 mm
    assert image == pytest.approx(4000 * 0.02, abs=1e-3 if name == "siddon" else 400 * 0.02)


@cache
def volumes_of_beads() -> list[Volume]:
    """One for each bead of `phantom.beads`, on one grid."""
    beads = phantom.beads()
    alone = [phantom.Phantom("one", [one], beads.isocentre_mm) for one in beads.ellipsoids]
    return [phantom.voxelise(one, (90, 60, 75), (2.0, 2.0, 2.0)) for one in alone]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("azimuth_deg", "elevation_deg"),
    [(0, 0), (180, 0), (90, 0), (-90, 0), (0, 45), (0, -45), (60, 45), (-120, -45)],
)
def test_markers_land_where_the_documentation_says(name: str, azimuth_deg: float, elevation_deg: float) -> None:
    """Beads at the patient's left, front and head: their blobs' centroids lie where the stored matrix P puts the balls.

    In PA left is right of the middle, in the left lateral the front is left of it; at elevation 0 the head is up.
    """
    beads = phantom.beads()
    looks = views(beads.isocentre_mm, [azimuth_deg], [elevation_deg])
    detector = Detector(shape=128, pixel_mm=432 / 128)
    middle = (detector.shape - 1) / 2
    matrix = looks.projection(detector)[0]
    for one, volume in zip(beads.ellipsoids, volumes_of_beads(), strict=True):
        image = projectors.get(name)(mu_per_mm(volume.hu), volume.voxel_from_world)(looks, detector)[0]
        rows, columns = np.indices(image.shape)
        centroid = np.array([(image * columns).sum(), (image * rows).sum()]) / image.sum()
        expected = project(matrix, one.centre_mm)
        # 0.2 pixels are 0.6 mm on the body: a third of a voxel, for rays that sample a ball of five voxels unevenly
        assert centroid == pytest.approx(expected, abs=0.2)
    left, front, head = (project(matrix, one.centre_mm) - middle for one in beads.ellipsoids)
    # said in words, not by the matrix; the beads lie 45 mm and more from the isocentre, 3.4 mm a pixel
    assert {
        (0, 0): left[0] > 10,
        (180, 0): left[0] < -10,
        (90, 0): front[0] < -10,
        (-90, 0): front[0] > 10,
        # with the detector above and in front, what is in front lies lower than the isocentre; from below, higher
        (0, 45): front[1] > 5 and left[0] > 10,
        (0, -45): front[1] < -5 and left[0] > 10,
        # two thirds of the way to the left lateral, left is still on the right; beyond the right lateral, on the left
        (60, 45): left[0] > 5 and front[0] < -5,
        (-120, -45): left[0] < -5 and front[0] > 5,
    }[azimuth_deg, elevation_deg]
    assert head[1] < -10


def rms(difference: np.ndarray, reference: np.ndarray) -> float:
    """As a fraction of the largest line integral."""
    return float(np.sqrt((difference**2).mean()) / reference.max())


def test_on_a_real_ct(real_data: Path) -> None:
    """Joseph interpolates where Siddon has steps: on 0.7 x 0.7 x 2.5 mm they differ by texture, not by level.

    Measured: rms 2.2e-3 of the peak over three views, mean difference 1.1e-5; pixels of 9 mm integrated over their area
    2.2e-4 by `cpu`, 7.4e-3 by central rays.
    """
    volume = dicom.read(dicom.find_series(real_data / "lidc-idri-0001")[0])
    mu = mu_per_mm(body.remove_table(volume))
    looks = views(volume.centre_mm, [0.0, 90, 30], [0.0, 0, 30])
    detector = Detector(shape=48, pixel_mm=432 / 48)
    central = joseph.project(mu, volume.voxel_from_world, looks, detector)
    exact = projectors.get("siddon")(mu, volume.voxel_from_world)(looks, detector)
    assert rms(central - exact, exact) < 4e-3
    assert abs((central - exact).mean()) < 5e-5 * exact.max()
    fast = projectors.get("cpu")(mu, volume.voxel_from_world)(looks, detector)
    area = joseph.over_area(mu, volume.voxel_from_world, looks, detector, rays=16)
    assert rms(fast - area, area) < 1e-3


@pytest.mark.parametrize("size", [64, 128])
def test_cpu_is_nearer_to_the_pixels_area_than_central_rays_are(size: int) -> None:
    """In five views: along an axis, between two (two passes), oblique, steep (two passes again)."""
    thorax = anatomy.thorax(2)
    volume = phantom.voxelise(thorax, (100, 200, 200), (2.0, 2.0, 3.0))
    mu, detector = mu_per_mm(volume.hu), Detector(size, 432 / size)
    looks = views(volume.centre_mm, [0.0, 90, 45, 30, 0], [0.0, 0, 0, 30, 80])
    fast = projectors.get("cpu")(mu, volume.voxel_from_world)(looks, detector)
    central = joseph.project(mu, volume.voxel_from_world, looks, detector)
    area = joseph.over_area(mu, volume.voxel_from_world, looks, detector)
    for image, ray, truth in zip(fast, central, area, strict=True):
        assert rms(image - truth, truth) < rms(ray - truth, truth)


FRAMES = {
    "straight": np.eye(3),
    "turned": np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])
    @ np.array([[1, 0, 0], [0, 0.96, -0.28], [0, 0.28, 0.96]]),
    "sheared": np.array([[1, 0, 0.1], [0, 1, 0.2], [0, 0, 1.0]]),
    "mirrored": np.diag([-1.0, 1, -1]),
}


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("shape", [(12, 14, 16), (1, 14, 16), (12, 1, 16), (12, 14, 1), (1, 1, 1)])
@pytest.mark.parametrize(("sdd_mm", "sod_mm"), [(1800.0, 1640.0), (300.0, 200.0), (120.0, 60.0), (100.0, 1.0)])
def test_cpu_agrees_with_its_twin(frame: str, shape: tuple[int, int, int], sdd_mm: float, sod_mm: float) -> None:
    """Where pixels are much smaller than voxels, area and central ray are one: noise, seen from afar and from within.

    The volume is 84 x 98 x 112 mm. Grazing rays, its edges and corners, and every main axis are in the image.
    """
    mu = np.random.default_rng(3).uniform(0, 0.03, shape).astype(np.float32)
    looks = Views(np.array(AZIMUTH_DEG), np.array(ELEVATION_DEG), np.zeros(3), sdd_mm, sod_mm)
    world_from_voxel = np.linalg.inv(grid(shape, (7.0, 7.0, 7.0)))
    world_from_voxel[:3] = FRAMES[frame] @ world_from_voxel[:3]
    voxel_from_world = np.linalg.inv(world_from_voxel)
    detector = Detector(96, 160 / 96 * sdd_mm / 1800)
    fast = projectors.get("cpu")(mu, voxel_from_world)(looks, detector)
    twin = joseph.over_area(mu, voxel_from_world, looks, detector, rays=2)
    error = np.abs(fast - twin) / twin.max()
    # where the main axis changes within a pixel, one of few samples stands for another part of it than one of 16 rays
    assert np.quantile(error, 0.98) < 4e-3
    assert rms(fast - twin, twin) < 2e-3


def test_views_do_not_depend_on_the_batch_or_on_the_number_of_threads() -> None:
    """To the last bit: every sum is made by one thread, in one order."""
    thorax = anatomy.thorax(1)
    volume = phantom.voxelise(thorax, (86, 100, 100), (4.0, 4.0, 4.0))
    looks = views(thorax.isocentre_mm)
    project = projectors.get("cpu")(mu_per_mm(volume.hu), volume.voxel_from_world)
    threads = numba.get_num_threads()
    together = project(looks, DETECTOR)
    alone = [project(looks[i : i + 1], DETECTOR)[0] for i in range(len(looks))]
    try:
        numba.set_num_threads(1)
        by_one_thread = project(looks, DETECTOR)
    finally:
        numba.set_num_threads(threads)
    assert (together == alone).all()
    assert (together == by_one_thread).all()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6, -1.0])
def test_cpu_scales_values_of_any_size(scale: float) -> None:
    """16 bits hold any range: nothing wraps, whatever the unit and the sign."""
    mu = np.random.default_rng(4).uniform(0, 0.03, (10, 12, 14)).astype(np.float32)
    frame = grid(mu.shape, (6.0, 7.0, 8.0))
    one = projectors.get("cpu")(mu, frame)(views(), DETECTOR)
    scaled = projectors.get("cpu")(np.float32(scale) * mu, frame)(views(), DETECTOR)
    assert np.allclose(scaled / scale, one, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(name: str, value: float) -> None:
    mu = np.zeros((4, 4, 4), np.float32)
    mu[1, 2, 3] = value
    with pytest.raises(InputError, match="not finite"):
        projectors.get(name)(mu, np.eye(4))


def test_nothing_is_cast_of_nothing() -> None:
    assert not projectors.get("cpu")(np.zeros((4, 5, 6), np.float32), np.eye(4))(views(), DETECTOR).any()


@pytest.mark.parametrize("step", [1.0, 0.9, 1.1, 0.7, 1.35, 0.55])
def test_columns_together_are_columns_one_by_one(step: float) -> None:
    """The explicit vectors of `drrgen.projectors.lanes` beside plain loops."""
    rng = np.random.default_rng(5)
    num_strips, num_kinks = 3, 20
    flat = rng.integers(-3000, 3000, num_strips * num_kinks * (slab.STRIP + slab.OVERLAP)).astype(np.int16)
    strips = flat.reshape(num_strips, num_kinks, -1)
    strips[:-1, :, slab.STRIP :] = strips[1:, :, : slab.OVERLAP]
    where = (slab.WIDTH * np.arange(16)).astype(np.int32)
    weights = rng.uniform(0, 1, (2, 16)).astype(np.float32)
    layout = flat, 0, num_strips, num_kinks
    for left, right in ((3.25, 11.5), (20.0, 28.0), (30.9, 31.3), (50.5, 57.75)):
        together, apart = np.zeros((2, slab.WIDTH * 18), np.float32)
        slab._add_rows(*layout, left, right, step, 2, where, weights, together, np.uint64(0))
        slab._add_rows_apart(*layout, left, step, 2, where, weights, apart, np.uint64(0))
        slab._add_rows_apart(*layout, right, step, 2, where, weights, apart, np.uint64(8))
        assert together.any()
        assert np.allclose(together, apart, atol=0.01)  # float32 of values up to 6000


def test_unknown_projectors_are_refused_with_the_choices() -> None:
    with pytest.raises(InputError, match="auto, cpu, cuda, siddon"):
        projectors.resolve("opencl")


def in_another_process(code: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


RENDER = "sys.argv = ['drrgen', 'render', '--ct-dir', 'none', '--dry-run', '--projector', '{}']; cli.main()"


def test_torch_is_imported_for_cuda_only() -> None:
    code = f"""if 1:
        import atexit, sys
        atexit.register(lambda: print("torch" in sys.modules or "triton" in sys.modules))
        from drrgen import cli, run, view
        {RENDER.format("cpu")}
    """
    done = in_another_process(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


def test_cuda_without_torch_is_one_line() -> None:
    done = in_another_process(
        f"import sys; sys.modules['torch'] = None; from drrgen import cli; {RENDER.format('cuda')}"
    )
    assert done.returncode == 2
    assert done.stderr == (
        "drrgen: --projector cuda needs torch, which is not installed: pip install 'drrgen[cuda]', or --projector cpu\n"
    )


def test_auto_without_torch_is_cpu() -> None:
    done = in_another_process(
        f"import sys; sys.modules['torch'] = None; from drrgen import cli; {RENDER.format('auto')}"
    )
    assert '"projector": "cpu"' in done.stdout


@pytest.mark.skipif(projectors.resolve("auto") == "cuda", reason="there is a GPU")
def test_cuda_without_a_gpu_is_one_line() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    done = in_another_process(f"import sys; from drrgen import cli; {RENDER.format('cuda')}")
    assert done.returncode == 2
    assert "finds no GPU" in done.stderr
    assert done.stderr.count("\n") == 1


WITH_TWIN = [*NAMES, pytest.param("joseph", id="joseph")]


def caster(name: str, mu: np.ndarray, frame: np.ndarray) -> Callable[[Views, Detector], np.ndarray]:
    """A projector, or the twin, made ready for a volume."""
    if name == "joseph":
        return lambda looks, detector: joseph.project(mu, frame, looks, detector)
    return projectors.get(name)(mu, frame)


@pytest.mark.parametrize("name", WITH_TWIN)
def test_a_ray_is_the_same_backwards(name: str) -> None:
    """Source and detector change places. A cone has one ray that stays: the central one, here of 72 views.

    The volume lies wholly between them, so that it does not matter that rays run on behind the detector.
    """
    rng = np.random.default_rng(6)
    mu = rng.uniform(0, 0.03, (10, 12, 14)).astype(np.float32)
    frame = grid(mu.shape, (6.0, 7.0, 8.0))
    cast, one_pixel = caster(name, mu, frame), Detector(1, 0.01)
    azimuth_deg, elevation_deg = rng.uniform(-180, 180, 24), rng.uniform(-90, 90, 24)
    for isocentre_mm in ([0.0, 0, 0], [11.0, -8, 5], [-30.0, 20, 10]):
        there = Views(azimuth_deg, elevation_deg, np.array(isocentre_mm), 500.0, 300.0)
        back = Views(azimuth_deg + 180, -elevation_deg, np.array(isocentre_mm), 500.0, 200.0)
        assert back.source_mm == pytest.approx(there.detector_mm)
        onward, backward = cast(there, one_pixel), cast(back, one_pixel)
        assert onward.max() > 1
        # float32. The planes of `cpu` lie elsewhere and so do their grids, which blur over a pixel: 1/600 of a voxel
        assert np.allclose(onward, backward, rtol=1e-5 if name == "cpu" else 1e-6, atol=1e-6)


def tiny() -> tuple[tuple[int, int, int], np.ndarray, Views, Detector]:
    """Every main axis, a ray from within the volume's shadow to beyond it; no ray at exactly 45 degrees."""
    shape = (4, 5, 6)
    return (
        shape,
        grid(shape, (9.0, 8.0, 7.0)),
        views((1.0, 2, 3), [3.0, 100, 40, 200], [2.0, -10, 30, 75]),
        Detector(7, 11.0),
    )


def matrix(name: str) -> np.ndarray:
    """[pixels, voxels]: the images of unit voxels, all that a linear projector is."""
    shape, frame, looks, detector = tiny()
    units = np.eye(np.prod(shape), dtype=np.float32).reshape(-1, *shape)
    return np.stack([caster(name, unit, frame)(looks, detector).ravel() for unit in units], axis=1).astype(np.float64)


def test_the_transpose_of_the_twin_is_the_back_projection() -> None:
    """<A x, y> = <x, A' y>, with an A' that spreads pixels over voxels and knows nothing of A."""
    shape, frame, looks, detector = tiny()
    rng = np.random.default_rng(7)
    x = rng.uniform(0, 1, shape).astype(np.float32)
    y = rng.uniform(-1, 1, (len(looks), detector.shape, detector.shape))
    back = joseph.back_project(y, shape, frame, looks, detector)
    forward = joseph.project(x, frame, looks, detector).astype(np.float64)
    assert forward.any(axis=(1, 2)).all()
    # float32 results of up to 60 in a sum of 196 of either sign: 60 * 6e-8 * sqrt(196) = 5e-5
    assert (forward * y).sum() == pytest.approx((x * back).sum(), abs=2e-4)
    # float32 entries of up to 12, 196 of them
    assert matrix("joseph").T @ y.ravel() == pytest.approx(back.ravel(), abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_projector_is_its_matrix(name: str) -> None:
    """<A x, y> = <x, A^T y>, where A is made of unit voxels: nothing depends on what else is in the volume."""
    shape, frame, looks, detector = tiny()
    rng = np.random.default_rng(8)
    x = rng.uniform(0, 1, shape).astype(np.float32)
    y = rng.uniform(-1, 1, len(looks) * detector.shape**2)
    A = matrix(name)
    forward = caster(name, x, frame)(looks, detector).ravel()
    # float32 results of up to 60. `cpu` rounds voxels to 1 / 16382, an error of 1.8e-5 rms each; a pixel reads about
    # ten at weights of about 4 mm: 2e-4
    assert np.allclose(forward, A @ x.ravel(), atol=1e-3 if name == "cpu" else 2e-5)
    # 196 of these with |y| of 0.6: 14 * 0.6 as much
    difference = forward.astype(np.float64) @ y - x.ravel() @ (A.T @ y)
    assert abs(difference) < (5e-3 if name == "cpu" else 2e-4)


# the view that looks along an axis, and the axis of [slice, row, column]
ALONG = {"back": (0, 0, 1), "front": (180, 0, 1), "right": (90, 0, 2), "left": (-90, 0, 2), "up": (0, 90, 0)}
ALONG["down"] = (0, -90, 0)


@pytest.mark.parametrize("name", WITH_TWIN)
@pytest.mark.parametrize("direction", ALONG)
def test_rays_along_axes_edges_and_faces(name: str, direction: str) -> None:
    """A ray through voxel centres is the sum of these voxels. Between voxels Joseph takes the mean, Siddon either.

    On the outermost face the neighbours are air; a voxel further out nothing is left. sin and cos of 90 degrees are
    not exact: rays lean by 1e-16.
    """
    azimuth_deg, elevation_deg, axis = ALONG[direction]
    mu = np.random.default_rng(9).uniform(0.01, 0.03, (6, 8, 10)).astype(np.float32)
    spacing_mm = 7.0
    cast = caster(name, mu, grid(mu.shape, (spacing_mm,) * 3))
    across = [one for one in range(3) if one != axis]
    padded = np.pad(mu, 2)

    def central_ray(place: list[float]) -> float:
        """Along the axis, at this place (voxels) across it."""
        at = np.full(3, (mu.shape[axis] - 1) / 2)
        at[across] = place
        isocentre_mm = (at - (np.array(mu.shape) - 1) / 2)[::-1] * spacing_mm
        look = views(isocentre_mm, [azimuth_deg], [elevation_deg])
        return float(cast(look, Detector(1, 0.001))[0, 0, 0])

    def columns(*places: tuple[int, int]) -> np.ndarray:
        """[place, voxel]: the voxels of whole columns."""
        moved = np.moveaxis(padded, axis, 2)
        return np.array([moved[2 + row, 2 + column] for row, column in places])

    def expect(place: list[float], *neighbours: tuple[int, int]) -> None:
        near = columns(*neighbours) * spacing_mm
        result = central_ray(place)
        # a few roundings of float32; `cpu` rounds up to ten voxels of 7 mm to 2e-6 / mm, and blurs the kink that the
        # interpolation has at a voxel's centre over a pixel of 1/7000 of a voxel
        slack = 5e-5 if name == "cpu" else 1e-6
        if name == "siddon":
            assert near.min(axis=0).sum() - slack <= result <= near.max(axis=0).sum() + slack
        else:
            assert result == pytest.approx(near.mean(axis=0).sum(), abs=slack)

    expect([2, 3], (2, 3))
    expect([2, 3.5], (2, 3), (2, 4))
    expect([2.5, 3], (2, 3), (3, 3))
    expect([2.5, 3.5], (2, 3), (2, 4), (3, 3), (3, 4))
    expect([-0.5, 3], (-1, 3), (0, 3))
    expect([2, mu.shape[across[1]] - 0.5], (2, mu.shape[across[1]] - 1), (2, mu.shape[across[1]]))
    assert central_ray([-1.01, 3]) == 0
    assert central_ray([2, mu.shape[across[1]] + 0.01]) == 0


@pytest.mark.parametrize("name", WITH_TWIN)
@pytest.mark.parametrize("direction", ["front", "left", "up"])
def test_a_single_slice_is_its_thickness(name: str, direction: str) -> None:
    """Seen from in front of it: 7 mm of mu = 0.02 / mm, more by 1/cos off the axis."""
    azimuth_deg, elevation_deg, axis = ALONG[direction]
    shape = [30, 30, 30]
    shape[axis] = 1
    detector = Detector(8, 4.0)
    look = views(azimuth_deg=[azimuth_deg], elevation_deg=[elevation_deg])
    image = caster(name, np.full(shape, 0.02, np.float32), grid(shape, (7.0,) * 3))(look, detector)[0]
    offset = (np.arange(8) - 3.5) * 4.0
    # float32; `cpu` takes the mean over a pixel of 1/cos, here another 1e-6
    assert np.allclose(image, 0.14 * np.sqrt(1 + (offset[:, None] ** 2 + offset**2) / 1800**2), rtol=1e-5)


@pytest.mark.parametrize("distance", [1e-12, 1e-9, 1e-7, 1e-5, 1e-3])
def test_a_source_close_before_a_slice(distance: float) -> None:
    """A slice's shadow is then larger than any integer; what it adds to each ray is one voxel's attenuation."""
    mu = np.random.default_rng(10).uniform(0, 0.03, (9, 9, 9)).astype(np.float32)
    frame, detector = grid(mu.shape, (1.0, 1.0, 1.0)), Detector(32, 0.5)
    looks = Views(np.array([0.0, 180.0]), np.zeros(2), np.zeros(3), 20.0, 3.0 + distance)
    error = projectors.get("cpu")(mu, frame)(looks, detector) - joseph.over_area(mu, frame, looks, detector, 8)
    # pixels of 1 / 13 voxel at the plane, of white noise, whose kinks the second interpolation rounds
    assert np.abs(error).max() < 0.01 * joseph.project(mu, frame, looks, detector).max()


def test_rays_of_a_view_that_run_along_a_plane_are_left_out() -> None:
    """A fan of 90 degrees from within: some pixels are seen by one plane and run parallel to another one."""
    voxel_from_world = np.array([[0, -1.25, 0, 19.5], [0, 0, -0.35, 8], [-0.9, 0, 0, 2], [0, 0, 0, 1.0]])
    mu = np.full((5, 17, 40), 0.02, np.float32)
    project = projectors.get("cpu")(mu, voxel_from_world)
    for azimuth_deg in np.linspace(0, 90, 19):
        for pixel_mm in (0.7, 0.8, 0.9):
            looks = Views(np.array([azimuth_deg, 45.0]), np.array([90.0, 90.0]), np.zeros(3), 27.84, 19.35)
            detector = Detector(64, pixel_mm)
            twin = joseph.project(mu, voxel_from_world, looks, detector)
            # the volume has an edge, which falls to 0 within a voxel: a few pixels
            assert np.abs(project(looks, detector) - twin).max() < 0.1 * twin.max()


def test_any_geometry_gives_what_its_rays_could_see() -> None:
    """Random boxes, frames (turned, sheared), fans and sources, most of them inside: finite, and no more than there is.

    Line integrals of mu in 0..1 are at most the box's diagonal, with the border in which mu falls to 0.
    """
    rng = np.random.default_rng(11)
    for _ in range(300):
        shape = rng.choice([1, 2, 3, 5, 13, 31], 3)
        spacing_mm = rng.uniform(0.5, 8, 3)
        turn = np.linalg.qr(rng.normal(size=(3, 3)))[0] if rng.random() < 0.5 else np.eye(3)[rng.permutation(3)]
        shear = np.eye(3) + np.triu(rng.uniform(-0.5, 0.5, (3, 3)), 1) * (rng.random() < 0.3)
        world_from_voxel = np.eye(4)
        world_from_voxel[:3, :3] = turn @ shear @ np.diag(spacing_mm)
        world_from_voxel[:3, 3] = -world_from_voxel[:3, :3] @ (shape[::-1] - 1) / 2
        corners = np.array(list(itertools.product(*((-1, count) for count in shape[::-1]))))
        corners_mm = corners @ world_from_voxel[:3, :3].T
        diagonal_mm = np.linalg.norm(corners_mm[:, None] - corners_mm, axis=-1).max()
        sod_mm = diagonal_mm * rng.choice([0.05, 0.2, 0.5, 3.0])
        looks = Views(
            rng.choice([0.0, 45.0, 90.0, 33.0], 2), rng.choice([90.0, -90.0, 45.0, 0.0, 12.0], 2), np.zeros(3),
            1.5 * sod_mm, sod_mm,
        )  # fmt: skip
        size = int(rng.choice([1, 3, 16, 33]))
        detector = Detector(size, 1.5 * sod_mm * rng.choice([0.1, 1.0, 4.0]) / size)
        mu = rng.uniform(0, 1, shape).astype(np.float32)
        images = projectors.get("cpu")(mu, np.linalg.inv(world_from_voxel))(looks, detector)
        assert np.isfinite(images).all()
        assert images.min() >= -1e-3 * diagonal_mm  # float32 sums of changes that cancel
        assert images.max() <= 1.001 * diagonal_mm
