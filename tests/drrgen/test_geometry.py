"""Laws of docs/geometry.md; its worked rows are tested from both packages in tests/contract."""

import numpy as np
import pytest

from drrgen.geometry import Detector, Views, project, view_axes

DETECTOR = Detector(shape=64, pixel_mm=6.75)


@pytest.fixture
def views() -> Views:
    rng = np.random.default_rng(0)
    return Views(rng.uniform(-180, 180, 20), rng.uniform(-90, 90, 20), np.array([10.0, -20.0, 30.0]), 1800.0, 1640.0)


def test_axes_are_orthonormal_and_left_handed(views: Views) -> None:
    u, v, n = views.axes
    gram = np.einsum("vai,vbi->vab", np.stack([u, v, n], 1), np.stack([u, v, n], 1))
    assert np.allclose(gram, np.eye(3), atol=1e-14)
    # seen from the detector, right x down points away from the observer: towards the source
    assert np.allclose(np.cross(u, v), -n, atol=1e-14)


@pytest.mark.parametrize(
    ("azimuth_deg", "elevation_deg", "to_detector", "columns", "rows"),
    [
        (0, 0, (0, -1, 0), (1, 0, 0), (0, 0, -1)),  # PA: detector anterior, patient's left on the image's right
        (90, 0, (1, 0, 0), (0, 1, 0), (0, 0, -1)),  # left lateral: anterior on the image's left
        (-90, 0, (-1, 0, 0), (0, -1, 0), (0, 0, -1)),
        (180, 0, (0, 1, 0), (-1, 0, 0), (0, 0, -1)),  # AP from behind: patient's left on the image's left
        (0, 90, (0, 0, 1), (1, 0, 0), (0, -1, 0)),  # from the feet, detector above the head: anterior on the bottom
    ],
)
def test_named_views(azimuth_deg, elevation_deg, to_detector, columns, rows) -> None:
    u, v, n = view_axes(azimuth_deg, elevation_deg)
    assert np.allclose(np.stack([u, v, n]), [columns, rows, to_detector], atol=1e-15)


def test_projection_maps_every_pixel_to_itself(views: Views) -> None:
    columns, rows = np.meshgrid(np.arange(64), np.arange(64))
    pixels = np.stack([columns, rows], -1)
    source, first, column_step, row_step = views.rays(DETECTOR, np.eye(4))
    for index in range(len(views)):
        on_detector = first[index] + columns[..., None] * column_step[index] + rows[..., None] * row_step[index]
        halfway = (on_detector + source[index]) / 2
        for points in (on_detector, halfway):
            assert np.allclose(project(views.projection(DETECTOR)[index], points), pixels, atol=1e-9)


def test_isocentre_lies_in_the_middle_of_every_image(views: Views) -> None:
    assert np.allclose(project(views.projection(DETECTOR), views.isocentre_mm), (64 - 1) / 2)


def test_distances(views: Views) -> None:
    assert np.allclose(np.linalg.norm(views.source_mm - views.isocentre_mm, axis=1), 1640)
    assert np.allclose(np.linalg.norm(views.source_mm - views.detector_mm, axis=1), 1800)


def test_half_resolution_pixel_is_the_centre_of_its_box(views: Views) -> None:
    point = np.array([40.0, 5.0, -60.0])
    fine = project(views.projection(DETECTOR), point)
    coarse = project(views.projection(Detector(32, 13.5)), point)
    assert np.allclose(coarse, (fine + 0.5) / 2 - 0.5)
