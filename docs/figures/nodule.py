"""Draws the picture of docs/how-to/nodules.md from the CT of LIDC-IDRI-0001: `nodule.py CT_DIR OUT_DIR`."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle

from drrgen import body, dicom, lidc, nodules, projectors
from drrgen.attenuation import mu_per_mm
from drrgen.geometry import PRESETS, Detector, Views

BOX = "#e67e22"
SIZE = 512
LOOKS = [(0.0, "PA"), (90.0, "left lateral")]
# Around the box, in pixels: enough to see what the nodule stands out from.
MARGIN = 16


def draw(whole: plt.Axes, zoomed: plt.Axes, image: np.ndarray, box: np.ndarray, title: str) -> None:
    """The view with its box, and larger, with more contrast and without the box, what is in and around it."""
    whole.imshow(image, cmap="gray")
    whole.set_title(title)
    first, last = box[:2], box[2:]
    whole.add_patch(Rectangle(first, *(last - first), fill=False, ec=BOX, lw=1.2))
    centre, half = (first + last) / 2, (last - first).max() / 2 + MARGIN
    (left, top), (right, bottom) = (centre - half).round().astype(int), (centre + half).round().astype(int)
    around = image[top : bottom + 1, left : right + 1]
    darkest, brightest = np.percentile(around, [2, 90])
    zoomed.imshow(around, cmap="gray", vmin=darkest, vmax=brightest, extent=(left, right + 1, bottom + 1, top))
    zoomed.set_title("there, without the box", pad=10)
    # where the box is, on the frame
    zoomed.set_xticks([first[0] + 0.5, last[0] + 0.5])
    zoomed.set_yticks([first[1] + 0.5, last[1] + 0.5])
    zoomed.tick_params(labelbottom=False, labelleft=False, color=BOX, width=2, length=6, top=True, right=True)


def main(ct_dir: Path, out: Path) -> None:
    (series,) = dicom.find_series(ct_dir)
    volume = dicom.read(series)
    found = lidc.nodules(series.origin.series_uid, series.slices)
    assert found is not None
    setup = PRESETS["chest"]
    azimuth_deg = np.array([azimuth for azimuth, _ in LOOKS])
    views = Views(azimuth_deg, np.zeros(len(LOOKS)), volume.centre_mm, setup.sdd_mm, setup.sod_mm)
    detector = Detector(SIZE, setup.detector_mm / SIZE)
    mu = mu_per_mm(body.remove_table(volume))
    images = projectors.get("cpu")(mu, volume.voxel_from_world)(views, detector)
    boxes = nodules.boxes(found, views.projection(detector))[:, 0]
    figure, all_axes = plt.subplots(1, 2 * len(LOOKS), figsize=(13, 4.4), width_ratios=[1, 0.6] * len(LOOKS))
    for number, (image, box, (azimuth, name)) in enumerate(zip(images, boxes, LOOKS, strict=True)):
        whole, zoomed = all_axes[2 * number : 2 * number + 2]
        whole.axis("off")
        draw(whole, zoomed, image, box, f"{name}, θ = {azimuth:.0f}°")
    figure.tight_layout()
    figure.savefig(out / "nodule.png", dpi=100)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
