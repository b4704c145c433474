"""The `cuda` projector against its twin: on a GPU where there is one, else in Triton's interpreter on the CPU.

`tests/conftest.py` chooses. The interpreter takes some 0.1 s for a tile of 8 x 16 pixels, so everything here is small.
"""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tests.drrgen import joseph
from tests.drrgen.test_projectors import FRAMES, grid

from drrgen import projectors, render
from drrgen.errors import InputError
from drrgen.geometry import Detector, Views
from drrgen.shards import halved

pytest.importorskip("torch", reason="the cuda projector needs torch")
pytest.importorskip("triton", reason="the cuda projector needs triton")

from drrgen.projectors import cuda

# One tile high and two wide, all quadrants, the poles, and angles at which the main axis changes within a tile.
SIZE = 16
ANGLES_DEG = np.array([(0, 0), (30, 20), (90, 0), (135, -30), (-45, -45), (0, 90), (20, 80), (0, -90)], float)
# float32 has 24 bits: a few roundings of 6e-8 of the peak. Measured: at most 3e-7.
TOLERANCE = 1e-6


def views(sdd_mm=1800.0, sod_mm=1640.0, angles_deg=ANGLES_DEG, isocentre_mm=(0.0, 0.0, 0.0)) -> Views:
    angles = np.array(angles_deg, float)
    return Views(angles[:, 0], angles[:, 1], np.array(isocentre_mm), sdd_mm, sod_mm)


def detector(sdd_mm=1800.0, size=SIZE) -> Detector:
    """160 mm wide at a distance of 1800 mm, which a volume of 84 x 98 x 112 mm does not fill."""
    return Detector(size, 160 / size * sdd_mm / 1800)


def noise(shape: tuple[int, int, int], seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 0.03, shape).astype(np.float32)


def error(mu: np.ndarray, frame: np.ndarray, looks: Views, panel: Detector) -> float:
    """The largest difference to the twin, as a fraction of the peak."""
    twin = joseph.project(mu, frame, looks, panel)
    return float(np.abs(projectors.get("cuda")(mu, frame)(looks, panel) - twin).max() / twin.max())


@pytest.mark.parametrize(
    ("frame", "shape", "sdd_mm", "sod_mm"),
    [
        ("straight", (12, 14, 16), 1800.0, 1640.0),
        ("turned", (12, 14, 16), 300.0, 200.0),
        ("sheared", (12, 14, 16), 120.0, 60.0),  # the source lies within
        ("mirrored", (12, 14, 16), 100.0, 1.0),  # rays leave in every direction
        ("turned", (1, 14, 16), 1800.0, 1640.0),
        ("mirrored", (12, 1, 16), 1800.0, 1640.0),
        ("sheared", (12, 14, 1), 300.0, 200.0),
        ("straight", (1, 1, 1), 300.0, 200.0),
    ],
)
def test_kernel_agrees_with_its_twin(frame: str, shape: tuple[int, int, int], sdd_mm: float, sod_mm: float) -> None:
    world_from_voxel = np.linalg.inv(grid(shape, (7.0, 7.0, 7.0)))
    world_from_voxel[:3] = FRAMES[frame] @ world_from_voxel[:3]
    assert error(noise(shape), np.linalg.inv(world_from_voxel), views(sdd_mm, sod_mm), detector(sdd_mm)) < TOLERANCE


def test_at_the_size_of_a_ct() -> None:
    """400 voxels along a ray, nearly equal: where positions and sums lose what float32 cannot hold."""
    mu = noise((4, 400, 400)) / 30 + np.float32(0.02)
    assert (
        error(mu, grid(mu.shape, (0.7, 0.7, 30.0)), views(angles_deg=[(30, 0), (45, 0)]), Detector(8, 40.0)) < TOLERANCE
    )


def test_rays_along_the_axes() -> None:
    """The middle ray of an odd detector: slopes of 0, and samples that fall on voxels."""
    mu = noise((5, 7, 9))
    looks = views(angles_deg=[(0, 0), (90, 0), (180, 0), (-90, 0), (0, 90), (0, -90)])
    panel = Detector(3, 8.0)
    assert error(mu, grid(mu.shape, (7.0, 7.0, 7.0)), looks, panel) < TOLERANCE
    # between two rows of voxels, and on the border of the volume
    assert (
        error(mu, grid(mu.shape, (7.0, 7.0, 7.0)), views(angles_deg=[(0, 0)], isocentre_mm=(3.5, 0, 21)), panel)
        < TOLERANCE
    )


def test_a_tile_with_every_main_axis() -> None:
    """From the corner of a cube, seen along its diagonal, the three faces meet in the middle of the detector."""
    mu = noise((10, 10, 10))
    looks = views(300.0, 200.0, [(45.0, np.rad2deg(np.arctan(np.sqrt(0.5))))])
    panel = Detector(8, 24.0)
    source, first, column_step, row_step = (part[0] for part in looks.rays(panel, np.eye(4)))
    index = np.arange(8)[:, None]
    rays = first + index * column_step + index[:, None] * row_step - source
    assert set(np.abs(rays).argmax(axis=-1).flat) == {0, 1, 2}
    assert error(mu, grid(mu.shape, (7.0, 7.0, 7.0)), looks, panel) < TOLERANCE


def test_only_the_box_that_is_not_zero_is_kept() -> None:
    mu = np.zeros((20, 22, 24), np.float32)
    mu[5:9, 12:20, 3:5] = noise((4, 8, 2)) - np.float32(0.01)
    assert error(mu, grid(mu.shape, (4.0, 4.0, 4.0)), views(angles_deg=ANGLES_DEG[1:4]), detector()) < TOLERANCE
    assert cuda.prepare(mu, np.eye(4))._layouts.numel() == 2 * (4 + 4) * (8 + 4) * (2 + 4)


def test_nothing_is_cast_of_nothing_and_rays_that_miss_are_zero() -> None:
    looks = views(angles_deg=[(0, 0), (30, 30)])
    assert not projectors.get("cuda")(np.zeros((4, 5, 6), np.float32), np.eye(4))(looks, detector()).any()
    far_away = np.eye(4) + np.pad([[5000.0]], ((0, 3), (3, 0)))
    assert not projectors.get("cuda")(noise((4, 5, 6)), far_away)(looks, detector()).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    mu = np.zeros((4, 4, 4), np.float32)
    mu[1, 2, 3] = value
    with pytest.raises(InputError, match="not finite"):
        projectors.get("cuda")(mu, np.eye(4))


def test_views_do_not_depend_on_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit: three views together, and one to a launch; sizes that tiles do not divide."""
    mu, looks, panel = noise((6, 7, 8)), views(angles_deg=ANGLES_DEG[1:4]), detector(size=18)
    project = projectors.get("cuda")(mu, grid(mu.shape, (7.0, 7.0, 7.0)))
    together = project(looks, panel)
    monkeypatch.setattr(cuda, "_LAUNCH_PIXELS", 1)
    assert (project(looks, panel) == together).all()
    assert (project(looks[1:2], panel)[0] == together[1]).all()


def test_what_render_stores_is_what_it_stores_of_line_integrals(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, on every level; the last view is in a launch of its own."""
    mu = noise((6, 7, 8)) * np.float32(60) - np.float32(0.6)
    looks, panel = views(angles_deg=ANGLES_DEG[1:4]), detector()
    project = projectors.get("cuda")(mu, grid(mu.shape, (7.0, 7.0, 7.0)))
    monkeypatch.setattr(cuda, "_LAUNCH_PIXELS", 2 * SIZE**2)
    (stored,) = render.render(project, looks, panel, [16, 8, 4])
    expected = render.quantised(project(looks, panel))
    assert 0 < (expected == 0).mean() < 1
    assert (expected == 65535).any()
    for size in (16, 8, 4):
        assert stored[size].dtype == np.uint16
        assert (stored[size] == expected).all()
        expected = halved(expected)


def test_rounding_and_halving_are_those_of_the_schema() -> None:
    """Halves of a step, the ends of the scale and beyond, and every stored value."""
    halves = (np.arange(-8, 65536 + 8, 0.5) / 4096).astype(np.float32)
    random = np.random.default_rng(6).normal(4, 8, 2**18 - len(halves)).astype(np.float32)
    random[:4] = 1e6, -1e6, 1e30, -0.0
    line_integrals = np.concatenate([halves, random]).reshape(4, 256, 256)
    images = cuda._pyramid(cuda.torch.from_numpy(line_integrals.copy()), [256, 128, 64], 4096.0)
    expected = render.quantised(line_integrals)
    assert (images[0].numpy() == expected).all()
    for larger, smaller in pairwise(images):
        assert (smaller.numpy() == halved(larger.numpy())).all()


COMPILE = """
import subprocess, sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from drrgen.projectors import cuda
kernel = cuda._march_tiles
types = dict.fromkeys(cuda._SIZES, "i32") | dict(layouts="*fp32", rays="*fp64", out="*fp32")
types |= dict(sdd_mm="fp32", pixel_mm="fp32")
signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
source = ASTSource(kernel, signature, cuda._CONSTANTS)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=cuda._OPTIONS)
cubin = Path(sys.argv[1])
cubin.write_bytes(compiled.asm["cubin"])
tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
print(subprocess.run([tools / "cuobjdump", "--dump-resource-usage", cubin], capture_output=True, text=True).stdout)
"""


def test_kernel_compiles_for_a_gpu_without_spilling(tmp_path: Path) -> None:
    """Ahead of time, for sm_90: what the interpreter accepts, the compiler may refuse. In a process of its own, because
    Triton has either its interpreter or its compiler.

    Measured: 48 registers with Triton 3.7, 56 with 3.9. With 64 a multiprocessor holds 1024 rays.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, "-c", COMPILE, str(tmp_path / "kernel.cubin")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    usage = dict(word.split(":") for word in done.stdout.split("_march_tiles:")[1].split() if ":" in word)
    assert int(usage["STACK"]) == int(usage["LOCAL"]) == 0
    assert int(usage["REG"]) <= 64
