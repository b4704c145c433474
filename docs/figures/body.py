"""Draws the picture of docs/rendering.md's "The body" from a real CT: `python docs/figures/body.py CT_DIR docs/img`."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from drrgen import body, dicom, projectors
from drrgen.attenuation import mu_per_mm
from drrgen.geometry import PRESETS, Detector, Views

OUTLINE = "#e67e22"
# Line integrals of this much and more are white; the root of them is shown, so that cloth is seen beside bone.
WHITE = 8.0
SHAPE = 720


def draw(ct: Path, path: Path) -> None:
    volume = dicom.read(dicom.find_series(ct)[0])
    mask = body.body_mask(volume)
    setup = PRESETS["chest"]
    lateral = Views(np.array([90.0]), np.array([0.0]), volume.centre_mm, setup.sdd_mm, setup.sod_mm)
    detector = Detector(SHAPE, setup.detector_mm / SHAPE)

    figure, (before, after, axial) = plt.subplots(1, 3, figsize=(13, 4.7), layout="constrained")
    for axes, hu, name in ((before, volume.hu, "as scanned"), (after, body.remove_table(volume), "the body alone")):
        image = projectors.get("cpu")(mu_per_mm(hu), volume.voxel_from_world)(lateral, detector)[0]
        axes.imshow(np.sqrt(image), cmap="gray", vmin=0, vmax=np.sqrt(WHITE))
        axes.set_title(f"Left lateral, {name}", fontsize=10)
    middle = len(volume.hu) // 2
    axial.imshow(
        volume.hu[middle], cmap="gray", vmin=-1000, vmax=300, aspect=volume.spacing_mm[1] / volume.spacing_mm[0]
    )
    axial.contour(mask[middle], [0.5], colors=OUTLINE, linewidths=1.1)
    axial.set_title("The middle slice and the body's outline", fontsize=10)
    for axes in (before, after, axial):
        axes.axis("off")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]) / "body.png")
