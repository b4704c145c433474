"""Truncated rays against geometry: a phantom cut short misses tissue on just those rays."""

from dataclasses import replace

import numpy as np
import pytest

from drrgen import anatomy, phantom, projectors, truncation
from drrgen.attenuation import mu_per_mm
from drrgen.geometry import PRESETS, Detector, Views

DETECTOR = Detector(64, 432 / 64)
ANGLES_DEG = np.array([[0.0, 0], [90, 0], [30, 30], [0, 60], [-120, -45], [0, 90], [45, -90]])


def views(isocentre_mm) -> Views:
    return Views(*ANGLES_DEG.T, np.asarray(isocentre_mm), PRESETS["chest"].sdd_mm, PRESETS["chest"].sod_mm)


def ball(centre_mm, radius_mm: float) -> phantom.Phantom:
    return phantom.Phantom("ball", [phantom.ellipsoid(0, centre_mm, [radius_mm] * 3)], np.zeros(3))


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 0, 2), (2, 0, 1)])
def test_a_ball_that_the_volume_cuts(axes: tuple[int, int, int]) -> None:
    """A ball of 100 mm around the isocentre in a volume of 120 mm: the two caps are discs of radius 80 mm.

    A ray is truncated if it crosses z = +-60 mm within such a disc: a closed form. Whichever way the volume is stored.
    """
    looks = views(np.zeros(3))
    volume = phantom.voxelise(ball([0, 0, 0], 100.0), (61, 110, 110), (2.0, 2.0, 2.0))
    body = (volume.hu > -500).transpose(axes)
    turn = np.eye(4)[[2 - axis for axis in reversed(axes)] + [3]]
    marks = truncation.truncated(body, turn @ volume.voxel_from_world, looks, DETECTOR)

    source, first, column_step, row_step = (part[:, None, None] for part in looks.rays(DETECTOR, np.eye(4)))
    index = np.arange(DETECTOR.shape)
    along = first + index[:, None] * column_step + index[:, None, None] * row_step - source
    expected, near_edge = np.zeros(marks.shape, bool), np.zeros(marks.shape, bool)
    for z_mm in (-60.0, 60.0):
        with np.errstate(divide="ignore", invalid="ignore"):
            t = (z_mm - source[..., 2]) / along[..., 2]
            point = source + t[..., None] * along
        radius_mm = np.where(t > 0, np.hypot(point[..., 0], point[..., 1]), np.inf)
        expected |= radius_mm < 80
        near_edge |= np.abs(radius_mm - 80) < 2.0  # a voxel
    assert (marks.astype(bool) == expected)[~near_edge].all()
    assert 0.02 < expected[1:].mean() < 0.5
    assert near_edge.mean() < 0.05


def test_the_missing_tissue_is_on_the_marked_rays() -> None:
    """A chest scanned over 200 of its 340 mm: line integrals in closed form, of all of it and of what was scanned."""
    thorax = anatomy.thorax(0)
    looks = views(thorax.isocentre_mm)
    scanned = phantom.voxelise(thorax, (40, 50, 50), (8.0, 8.0, 5.0))
    whole = phantom.voxelise(thorax, (72, 50, 50), (8.0, 8.0, 5.0))
    cast = [
        projectors.get("siddon")(mu_per_mm(one.hu), one.voxel_from_world)(looks, DETECTOR) for one in (scanned, whole)
    ]
    missing = cast[1] - cast[0]
    marks = truncation.truncated(scanned.hu > -900, scanned.voxel_from_world, looks, DETECTOR).astype(bool)
    # rays that meet nothing of what was scanned leave no body: they are plain air in the image
    meets = cast[0] > 0.1
    # both ways but for grazing rays, and for those that leave through the skin and come back into a shoulder beyond
    assert (meets & ~marks & (missing > 0.05)).mean() < 0.01
    assert (marks & (missing < 0.01)).mean() < 0.01
    assert marks[0].any()
    assert not marks.all()


def test_no_body_no_marks_and_rays_that_miss() -> None:
    volume = phantom.voxelise(ball([0, 0, 0], 20.0), (20, 20, 20), (5.0, 5.0, 5.0))
    looks = views(np.zeros(3))
    inside = volume.hu > -500
    assert not inside[[0, -1]].any()
    assert not truncation.truncated(inside, volume.voxel_from_world, looks, DETECTOR).any()
    everywhere = np.ones_like(inside)
    far = replace(looks, isocentre_mm=np.array([0, 0, 5000.0]))
    assert not truncation.truncated(everywhere, volume.voxel_from_world, far[:2], DETECTOR).any()


def test_lower_levels_mark_what_any_of_four_marks() -> None:
    marks = np.zeros((2, 4, 4), np.uint8)
    marks[1, 3, 0] = 1
    assert np.array_equal(truncation.halved(marks)[1], [[0, 0], [1, 0]])
    assert not truncation.halved(marks)[0].any()
