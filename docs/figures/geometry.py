"""Draws the two pictures of docs/geometry.md with drrgen's own geometry: `python docs/figures/geometry.py docs/img`."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Arc, Ellipse

from drrgen import phantom, projectors
from drrgen.attenuation import mu_per_mm
from drrgen.geometry import PRESETS, Detector, Views, project

SOURCE, DETECTOR, BODY, AXIS = "#c0392b", "#1f618d", "#d7dbdd", "#7f8c8d"
# Shorter than any room, so that source and body fit one picture.
SDD_MM, SOD_MM, DETECTOR_MM = 760.0, 480.0, 400.0


def draw_view(
    axes: plt.Axes, azimuth_deg: float, elevation_deg: float, across: int, up: int, sign: tuple[int, int]
) -> None:
    """One view in the plane of two LPS axes (`across`, `up`; `sign` flips them on paper)."""
    view = Views(np.array([azimuth_deg]), np.array([elevation_deg]), np.zeros(3), SDD_MM, SOD_MM)
    plane = np.array([across, up])
    source, centre = view.source_mm[0][plane] * sign, view.detector_mm[0][plane] * sign
    # the detector's axis that lies in this plane
    along = next(axis[0][plane] for axis in view.axes[:2] if np.linalg.norm(axis[0][plane]) > 0.99) * sign
    ends = np.stack([centre - along * DETECTOR_MM / 2, centre + along * DETECTOR_MM / 2])
    for end in ends:
        axes.plot(*np.stack([source, end]).T, color=SOURCE, lw=0.6, alpha=0.6)
    axes.plot(*np.stack([source, centre]).T, color=SOURCE, lw=0.8, ls="--")
    axes.plot(*ends.T, color=DETECTOR, lw=4, solid_capstyle="butt")
    axes.plot(*source, "o", color=SOURCE, ms=7)
    axes.annotate("S", source, xytext=(8, 4), textcoords="offset points", color=SOURCE)
    axes.annotate("D", centre, xytext=(0, 9), textcoords="offset points", color=DETECTOR)


def draw_arrow(axes: plt.Axes, to: tuple[float, float], label: str, alignment: tuple[str, str]) -> None:
    axes.annotate("", to, (0, 0), arrowprops=dict(arrowstyle="-|>", color=AXIS))
    horizontal, vertical = alignment
    axes.annotate(label, to, color=AXIS, ha=horizontal, va=vertical)


def angles(path: Path) -> None:
    figure, (axial, sagittal) = plt.subplots(1, 2, figsize=(11, 5.6))
    axial.add_patch(Ellipse((0, 0), 330, 220, color=BODY))
    draw_arrow(axial, (210, 0), " Left, +x", ("left", "center"))
    draw_arrow(axial, (0, -160), "  Posterior, +y", ("left", "top"))
    draw_view(axial, 0, 0, 0, 1, (1, -1))
    draw_view(axial, 40, 0, 0, 1, (1, -1))
    axial.add_patch(Arc((0, 0), 250, 250, theta1=50, theta2=90, color="k", lw=1.2))
    axial.text(50, 135, "θ = +40°")
    axial.set_title("Seen from the feet: azimuth θ, LAO positive", fontsize=10)
    sagittal.add_patch(Ellipse((0, 0), 220, 480, color=BODY))
    draw_arrow(sagittal, (0, 290), "Superior, +z", ("center", "bottom"))
    draw_arrow(sagittal, (180, 0), "Posterior, +y", ("center", "bottom"))
    draw_view(sagittal, 0, 0, 1, 2, (1, 1))
    draw_view(sagittal, 0, 25, 1, 2, (1, 1))
    sagittal.add_patch(Arc((0, 0), 300, 300, theta1=155, theta2=180, color="k", lw=1.2))
    sagittal.text(-160, 105, "φ = +25°", ha="right")
    sagittal.set_title("Seen from the patient's left: elevation φ, cranial positive", fontsize=10, y=1.05)
    for axes in (axial, sagittal):
        axes.set_aspect("equal")
        axes.axis("off")
    figure.text(
        0.5, 0.02, "S: source, SOD behind the isocentre.  D: centre of the detector, SDD from the source.", ha="center"
    )
    figure.savefig(path, dpi=110, bbox_inches="tight")


def markers(path: Path) -> None:
    """Beads to the Left, Anterior and Superior, rendered; circles show where the stored matrix P puts their centres."""
    beads = phantom.beads()
    volume = phantom.voxelise(beads, (180, 120, 150), (1.0, 1.0, 1.0))
    looks = [(0, 0, "PA"), (90, 0, "left lateral"), (180, 0, "AP, from behind"), (-90, 0, "right lateral")]
    looks += [(0, 45, "cranial"), (0, -45, "caudal")]
    azimuth_deg, elevation_deg, names = zip(*looks, strict=True)
    setup = PRESETS["chest"]
    views = Views(
        np.array(azimuth_deg, float), np.array(elevation_deg, float), volume.centre_mm, setup.sdd_mm, setup.sod_mm
    )
    detector = Detector(256, 256 / 256)
    images = projectors.get("cpu")(mu_per_mm(volume.hu), volume.voxel_from_world)(views, detector)
    figure, all_axes = plt.subplots(1, len(looks), figsize=(14, 2.7))
    for axes, image, matrix, name, theta, phi in zip(
        all_axes, images, views.projection(detector), names, azimuth_deg, elevation_deg, strict=True
    ):
        axes.imshow(image, cmap="gray")
        axes.set_title(f"{name}\nθ = {theta}°, φ = {phi}°", fontsize=9)
        axes.axis("off")
        for one, letter in zip(beads.ellipsoids, "LAS", strict=True):
            column, row = project(matrix, one.centre_mm)
            axes.plot(column, row, "o", mfc="none", mec="#e67e22", ms=16)
            axes.annotate(letter, (column, row), xytext=(9, 6), textcoords="offset points", color="#e67e22")
    figure.savefig(path, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    angles(folder / "geometry.png")
    markers(folder / "geometry-views.png")
