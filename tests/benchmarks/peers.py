"""Other projectors behind one signature, each given exactly the rays of `drrgen.geometry`.

    plan = prepare(mu, world_from_voxel, threads)
    seconds, line_integrals = plan(views, detector)()

mu: float32 [slice, row, column], 1/mm. world_from_voxel: [4, 4], voxel (column, row, slice) to LPS mm, of a grid along
the axes. Result: float32 [view, row, column], as docs/geometry.md has it. What depends on the volume alone is done in
`prepare`; what a program that casts the same geometry again could keep is done in `plan`; `seconds` is the rest.

Several of them end a ray at the detector. It must lie behind the volume: see `tests.benchmarks.projectors`.
"""

import importlib
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from drrgen.geometry import Detector, Float, Views

Image = NDArray[np.float32]
Plan = Callable[[Views, Detector], Callable[[], tuple[float, Image]]]

# Samples that the peers written in torch hold at a time. Larger blocks are slower: each is new memory from the system.
_SAMPLES_AT_ONCE = 1 << 20


def timed(cast: Callable[[], Image]) -> Callable[[], tuple[float, Image]]:
    """The same with the seconds that it took."""

    def run() -> tuple[float, Image]:
        began = time.perf_counter()
        image = cast()
        return time.perf_counter() - began, image

    return run


def rtk(mu: Image, world_from_voxel: Float, threads: int) -> Plan:
    """RTK's JosephForwardProjectionImageFilter: Joseph along the central ray, all views in one call of the filter.

    RTK's detector is right-handed as seen from the source, ours is left-handed: its rows go up, and are turned over.
    """
    itk = importlib.import_module("itk")
    itk.MultiThreaderBase.SetGlobalMaximumNumberOfThreads(threads)
    volume = itk.image_from_array(mu)
    volume.SetSpacing(np.diag(world_from_voxel)[:3].tolist())
    volume.SetOrigin(world_from_voxel[:3, 3].tolist())
    kind = itk.Image[itk.F, 3]

    def plan(views: Views, detector: Detector) -> Callable[[], tuple[float, Image]]:
        geometry = itk.RTK.ThreeDCircularProjectionGeometry.New()
        u, v, _ = views.axes
        for each in zip(views.source_mm, views.detector_mm, u, -v, strict=True):
            assert geometry.AddProjection(*(vector.tolist() for vector in each))
        first_mm = -(detector.shape - 1) / 2 * detector.pixel_mm
        empty = itk.RTK.ConstantImageSource[kind].New()
        empty.SetOrigin([first_mm, first_mm, 0.0])
        empty.SetSpacing([detector.pixel_mm, detector.pixel_mm, 1.0])
        empty.SetSize([detector.shape, detector.shape, len(views)])
        empty.SetConstant(0.0)
        empty.Update()
        project = itk.RTK.JosephForwardProjectionImageFilter[kind, kind].New()
        project.SetInput(0, empty.GetOutput())
        project.SetInput(1, volume)
        project.SetGeometry(geometry)
        project.SetInPlace(False)

        def run() -> tuple[float, Image]:
            project.Modified()
            began = time.perf_counter()
            project.Update()
            return time.perf_counter() - began, itk.array_view_from_image(project.GetOutput())[:, ::-1].copy()

        return run

    return plan


def plastimatch(mu: Image, world_from_voxel: Float, threads: int, algorithm: str) -> Plan:
    """`plastimatch drr`, a process per view; the seconds are those that it reports without its files.

    It integrates in cm. Its columns run the other way: its images are seen from the source.
    """
    import SimpleITK

    program = importlib.import_module("plastimatch")._lookup("plastimatch")
    folder = tempfile.TemporaryDirectory()
    volume = SimpleITK.GetImageFromArray(mu)
    volume.SetSpacing(np.diag(world_from_voxel)[:3].tolist())
    volume.SetOrigin(world_from_voxel[:3, 3].tolist())
    SimpleITK.WriteImage(volume, str(Path(folder.name, "volume.mha")))

    def words(vector: Float) -> str:
        return " ".join(f"{number:.17g}" for number in vector)

    def plan(views: Views, detector: Detector) -> Callable[[], tuple[float, Image]]:
        size_mm = detector.shape * detector.pixel_mm

        def run() -> tuple[float, Image]:
            seconds, images = 0.0, []
            for up, normal in zip(-views.axes[1], -views.axes[2], strict=True):
                report = subprocess.run(
                    [program, "drr", "--algorithm", algorithm, "--hu-conversion", "none", "--output-format", "pfm"]
                    + [
                        "--sad",
                        repr(views.sod_mm),
                        "--sid",
                        repr(views.sdd_mm),
                        "--isocenter",
                        words(views.isocentre_mm),
                    ]
                    + ["--nrm", words(normal), "--vup", words(up), "--detector-size", words(np.full(2, size_mm))]
                    + ["--dim", f"{detector.shape} {detector.shape}", "--input", "volume.mha", "--output", "view_"],
                    cwd=folder.name,
                    env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                    capture_output=True,
                    check=True,
                    text=True,
                ).stdout
                files, total = (float(re.search(rf"{name} time: (\S+)", report)[1]) for name in ("I/O", "Total"))
                seconds += total - files
                (path,) = Path(folder.name).glob("view_*.pfm")
                pixels = np.frombuffer(path.read_bytes()[-4 * detector.shape**2 :], "<f4")
                images.append(10 * pixels.reshape(detector.shape, -1)[:, ::-1])
            return seconds, np.array(images)

        return run

    return plan


def nanodrr(mu: Image, world_from_voxel: Float, threads: int, num_samples: int = 500) -> Plan:
    """nanodrr's `render` on its CPU path: as many trilinear samples on every ray, evenly spread over its way inside.

    Its camera's axes may be left-handed, so that ours are given to it as they are. Blocks of rows keep memory small.
    """
    import torch

    torchio = importlib.import_module("torchio")
    subject_of = importlib.import_module("nanodrr.data").Subject.from_images
    render = importlib.import_module("nanodrr.drr").render
    torch.set_num_threads(threads)
    image = torchio.ScalarImage(tensor=torch.from_numpy(mu.transpose(2, 1, 0)[None]), affine=world_from_voxel)
    subject = subject_of(image, convert_to_mu=False)

    def plan(views: Views, detector: Detector) -> Callable[[], tuple[float, Image]]:
        shape = detector.shape
        camera = np.zeros((len(views), 4, 4))
        camera[:, :3] = np.stack([*views.axes, views.source_mm], axis=2)
        camera[:, 3, 3] = 1
        world_from_camera = torch.tensor(camera, dtype=torch.float32)
        sdd_mm = torch.tensor([views.sdd_mm], dtype=torch.float32)
        per_pixel = detector.pixel_mm / views.sdd_mm
        rows = max(1, min(shape, _SAMPLES_AT_ONCE // (num_samples * shape)))

        def cast() -> Image:
            images = np.empty((len(views), shape, shape), np.float32)
            for view in range(len(views)):
                for top in range(0, shape, rows):
                    height = min(rows, shape - top)
                    across, down = -shape / 2 * per_pixel, (top - shape / 2) * per_pixel
                    inverse = torch.tensor([[[per_pixel, 0, across], [0, per_pixel, down], [0, 0, 1]]])
                    images[view, top : top + height] = render(
                        subject, inverse, world_from_camera[view : view + 1], sdd_mm, height, shape, num_samples
                    )[0, 0].numpy()
            return images

        return timed(torch.inference_mode()(cast))

    return plan


def diffdrr(mu: Image, world_from_voxel: Float, threads: int, renderer: str) -> Plan:
    """DiffDRR's renderers, called in patches as its DRR module calls them. Trilinear: 500 samples on a ray."""
    import torch

    renderers = importlib.import_module("diffdrr.renderers")
    torch.set_num_threads(threads)
    render = getattr(renderers, renderer)()
    density = torch.from_numpy(np.ascontiguousarray(mu.transpose(2, 1, 0)))
    voxel_from_world = np.linalg.inv(world_from_voxel)
    samples = sum(mu.shape) + 3 if renderer == "Siddon" else 500

    def plan(views: Views, detector: Detector) -> Callable[[], tuple[float, Image]]:
        shape = detector.shape
        rows = max(1, min(shape, _SAMPLES_AT_ONCE // (samples * shape)))
        rays = [torch.tensor(part, dtype=torch.float32) for part in views.rays(detector, voxel_from_world)]
        offset = (np.arange(shape) - (shape - 1) / 2) * detector.pixel_mm
        length_mm = np.sqrt(views.sdd_mm**2 + offset[:, None] ** 2 + offset**2).astype(np.float32)
        lengths = torch.from_numpy(length_mm)
        index = torch.arange(shape)[:, None]

        def cast() -> Image:
            images = np.empty((len(views), shape, shape), np.float32)
            for image, source, first, column, row in zip(images, *rays, strict=True):
                for top in range(0, shape, rows):
                    down = index[top : top + rows, :, None] * row
                    target = (first + index * column + down).reshape(1, -1, 3)
                    length = lengths[top : top + rows].reshape(1, 1, -1)
                    image[top : top + rows] = render(density, source[None, None], target, length).reshape(-1, shape)
            return images

        return timed(torch.inference_mode()(cast))

    return plan
