"""The geometry that the model is told; docs/geometry.md's worked rows are checked in tests/contract."""

import pytest
import torch

from svdrr.pose import (
    BODY_MM,
    POSE_FEATURES,
    Views,
    pose_features,
    projection,
    ray_map,
    relative_pose,
    source_from_isocentre_mm,
)

SIZE = 16
EXACT = 1e-9
"""Float64 throughout: a few roundings of numbers of the order of 1000 mm."""


@pytest.fixture
def views() -> Views:
    """Fifty random views, each of its own geometry."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(5, 50, generator=generator, dtype=torch.float64)
    azimuth, elevation = 360 * uniform[0] - 180, 180 * uniform[1] - 90
    return Views(azimuth, elevation, 1000 + 800 * uniform[2], 850 + 100 * uniform[3], 300 + 200 * uniform[4])


def test_a_ray_goes_from_the_source_to_the_pixel_that_a_point_projects_to(views: Views) -> None:
    point_mm = torch.tensor([40.0, -25.0, 60.0], dtype=torch.float64)
    source_mm = source_from_isocentre_mm(views)
    direction = torch.nn.functional.normalize(point_mm - source_mm, dim=1)
    moment = torch.linalg.cross(source_mm, direction) / BODY_MM

    homogeneous = projection(views, SIZE) @ torch.cat([point_mm, torch.ones(1, dtype=torch.float64)])
    column_row = homogeneous[:, :2] / homogeneous[:, 2:]
    rays = ray_map(views, SIZE)
    for index in range(len(views)):  # where the map's rays cross the detector, they are linear in (column, row)
        view = Views(*(getattr(views, name)[index : index + 1] for name in vars(views)))
        column, row = column_row[index]
        expected = torch.cat([direction[index], moment[index]])
        found = _ray_at(view, column.item(), row.item())
        assert torch.allclose(found, expected, atol=EXACT)
    assert rays.shape == (50, 6, SIZE, SIZE)


def _ray_at(view: Views, column: float, row: float) -> torch.Tensor:
    """The ray of the (fractional) pixel, from the map's four corners: SDD-normalised directions are affine in it."""
    rays = ray_map(view, SIZE)[0, :3].permute(1, 2, 0)
    n = -source_from_isocentre_mm(view)[0] / view.sod_mm
    on_plane = rays / (rays @ n)[..., None]
    origin, right, below = on_plane[0, 0], on_plane[0, 1] - on_plane[0, 0], on_plane[1, 0] - on_plane[0, 0]
    direction = torch.nn.functional.normalize(origin + column * right + row * below, dim=0)
    return torch.cat([direction, torch.linalg.cross(source_from_isocentre_mm(view)[0], direction) / BODY_MM])


def test_every_ray_is_a_pluecker_line_through_the_source(views: Views) -> None:
    direction, moment = ray_map(views, SIZE).split(3, dim=1)
    source = source_from_isocentre_mm(views)[:, :, None, None].expand_as(direction)
    assert torch.allclose(direction.norm(dim=1), torch.ones(1, dtype=torch.float64), atol=EXACT)
    assert (direction * moment).sum(dim=1).abs().max() < EXACT
    assert torch.allclose(torch.linalg.cross(source, direction, dim=1), BODY_MM * moment, atol=1e-6 * BODY_MM)


def test_a_coarser_map_is_that_of_larger_pixels(views: Views) -> None:
    """A cell's ray goes through the middle of the 2 x 2 finer cells that it covers."""
    fine, coarse = ray_map(views, 2 * SIZE)[:, :3], ray_map(views, SIZE)[:, :3]
    n = -(source_from_isocentre_mm(views) / views.sod_mm[:, None])[:, :, None, None]
    fine, coarse = (rays / (rays * n).sum(dim=1, keepdim=True) for rays in (fine, coarse))
    assert torch.allclose(torch.nn.functional.avg_pool2d(fine, 2), coarse, atol=EXACT)


def test_features_know_a_full_turn_and_tell_all_else_apart() -> None:
    def features(source: tuple[float, float], target: tuple[float, float], sdd_mm: float = 1800.0) -> torch.Tensor:
        def views(angles: tuple[float, float]) -> Views:
            return Views(*(torch.tensor([x], dtype=torch.float64) for x in (*angles, sdd_mm, 1640.0, 432.0)))

        return pose_features(views(source), views(target), 128)

    reference = features((0, 0), (30, 10))
    assert reference.shape == (1, POSE_FEATURES)
    assert torch.allclose(reference, features((0, 0), (390, 10)), atol=EXACT)
    for other in (features((30, 10), (0, 0)), features((0, 0), (-30, 10)), features((0, 0), (30, 10), sdd_mm=1100.0)):
        assert (reference - other).abs().max() > 0.1


def test_the_relative_pose_is_source_minus_target() -> None:
    """From PA to a view 90 degrees to the left and 30 up: the polar angle falls by 30, so source minus target rises."""

    def views(azimuth_deg: float, elevation_deg: float) -> Views:
        return Views(*(torch.tensor([x], dtype=torch.float64) for x in (azimuth_deg, elevation_deg, 1800, 1640, 432)))

    expected = torch.tensor([[torch.pi / 6, -1, 0, 0]], dtype=torch.float64)
    assert torch.allclose(relative_pose(views(0, 0), views(90, 30)), expected, atol=EXACT)
    assert torch.allclose(relative_pose(views(200, 10), views(-70, 40)), expected, atol=EXACT)
