"""Projectors beside one another, in one run: views per second, and the error to the closed form.

`python tests/benchmarks/projectors.py` prints a Markdown table. The volume is a phantom with the shape of a chest CT.
"""

import time

import numpy as np

from drrgen import anatomy, phantom, projectors
from drrgen.attenuation import mu_per_mm
from drrgen.geometry import PRESETS, Detector, Views

SHAPE, SPACING_MM = (133, 512, 512), (0.703, 0.703, 2.5)
SIZES = (128, 256)
ANGLES_DEG = [(0, 0), (90, 0), (45, 0), (30, 30), (0, 80)]
REPEATS = 3


def main() -> None:
    thorax = anatomy.thorax(0)
    volume = phantom.voxelise(thorax, SHAPE, SPACING_MM)
    mu, setup = mu_per_mm(volume.hu), PRESETS["chest"]
    azimuth_deg, elevation_deg = np.array(ANGLES_DEG, dtype=float).T
    views = Views(azimuth_deg, elevation_deg, volume.centre_mm, setup.sdd_mm, setup.sod_mm)
    print("| projector | pixels | views/s | times siddon | rms error, of peak |\n|---|---|---|---|---|")
    for size in SIZES:
        detector = Detector(size, setup.detector_mm / size)
        truth = phantom.line_integrals(thorax, views, detector)
        rates = {}
        for name in ("siddon", "cpu"):
            project = projectors.get(name)
            image = project(mu, volume.voxel_from_world, views, detector)
            seconds = []
            for _ in range(REPEATS):
                began = time.perf_counter()
                project(mu, volume.voxel_from_world, views, detector)
                seconds.append(time.perf_counter() - began)
            rates[name] = len(views) / np.median(seconds)
            error = np.sqrt(((image - truth) ** 2).mean()) / truth.max()
            print(f"| {name} | {size} | {rates[name]:.2f} | {rates[name] / rates['siddon']:.1f} | {error:.1e} |")


if __name__ == "__main__":
    main()
