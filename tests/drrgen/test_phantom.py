"""Phantoms against hand formulas and brute force: chords, painting, voxels; and patients against their promises."""

from dataclasses import replace

import numpy as np
import pytest

from drrgen.anatomy import thorax
from drrgen.attenuation import mu_per_mm
from drrgen.geometry import Detector, Views, project
from drrgen.phantom import Ellipsoid, Phantom, beads, ellipsoid, line_integrals, voxelise

ISOCENTRE_MM = np.array([10.0, -20.0, 30.0])
CENTRAL_RAY = Detector(shape=1, pixel_mm=1.0)
# Rounding of coordinates of some 2000 mm is 4e-13 mm; times the slope of a chord's length at a grazing ray.
ROUNDING = 1e-9


def looks(azimuth_deg, elevation_deg=0.0, isocentre_mm=ISOCENTRE_MM) -> Views:
    azimuth, elevation = np.broadcast_arrays(np.atleast_1d(azimuth_deg).astype(float), elevation_deg)
    return Views(azimuth, elevation, isocentre_mm, sdd_mm=1800.0, sod_mm=1640.0)


def everywhere(isocentre_mm=ISOCENTRE_MM) -> Views:
    rng = np.random.default_rng(0)
    return looks(rng.uniform(-180, 180, 6), rng.uniform(-90, 90, 6), isocentre_mm)


def painted(*ellipsoids: Ellipsoid) -> Phantom:
    return Phantom("TEST", ellipsoids, ISOCENTRE_MM)


def tilted(hu: int = 300) -> Ellipsoid:
    axes, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    return ellipsoid(hu, ISOCENTRE_MM, (40, 25, 60), axes)


def hu_at(phantom: Phantom, points_mm) -> np.ndarray:
    """Brute force: the last ellipsoid that holds a point decides."""
    hu = np.full(points_mm.shape[:-1], -1000)
    for one in phantom.ellipsoids:
        hu[np.linalg.norm((points_mm - one.centre_mm) @ one.ball_from_mm.T, axis=-1) <= 1] = one.hu
    return hu


def test_chords_of_a_ball_at_every_pixel() -> None:
    centre, radius, detector = ISOCENTRE_MM + [20, -15, 30], 50.0, Detector(shape=24, pixel_mm=12.0)
    views = everywhere()
    source, first, column_step, row_step = (one[:, None, None] for one in views.rays(detector, np.eye(4)))
    ray = first + np.arange(24)[:, None] * column_step + np.arange(24)[:, None, None] * row_step - source
    off_mm = np.linalg.norm(np.cross(ray, centre - source), axis=-1) / np.linalg.norm(ray, axis=-1)
    chord_mm = 2 * np.sqrt(np.maximum(radius**2 - off_mm**2, 0))

    images = line_integrals(painted(ellipsoid(400, centre, [radius] * 3)), views, detector)
    assert np.allclose(images, mu_per_mm(400) * chord_mm, atol=ROUNDING)
    assert (images[off_mm > radius] == 0).all()
    assert 0.02 < np.mean(images > 0) < 0.98


def test_chord_through_the_centre_of_a_tilted_ellipsoid() -> None:
    views, one = everywhere(), tilted()
    chord_mm = 2 / np.linalg.norm(views.axes[2] @ one.ball_from_mm.T, axis=1)
    assert np.allclose(line_integrals(painted(one), views, CENTRAL_RAY)[:, 0, 0], mu_per_mm(300) * chord_mm, rtol=1e-12)


def test_chord_beside_the_centre_of_an_ellipsoid() -> None:
    one = ellipsoid(0, ISOCENTRE_MM + [24, 7, 20], (40, 25, 60))
    chord_mm = 50 * np.sqrt(1 - (24 / 40) ** 2 - (20 / 60) ** 2)
    assert line_integrals(painted(one), looks(0), CENTRAL_RAY).item() == pytest.approx(mu_per_mm(0) * chord_mm)


@pytest.mark.parametrize(
    ("inner_first", "offset_mm", "outer_mm", "inner_mm"),
    [(False, 0, 80, 40), (True, 0, 120, 0), (False, 50, 90, 40), (True, 50, 120, 10), (False, 90, 120, 40)],
)
def test_the_last_one_painted_wins_on_a_ray(inner_first, offset_mm, outer_mm, inner_mm) -> None:
    outer = ellipsoid(0, ISOCENTRE_MM, [60] * 3)
    inner = ellipsoid(-850, ISOCENTRE_MM - [0, offset_mm, 0], [20] * 3)
    phantom = painted(inner, outer) if inner_first else painted(outer, inner)
    expected = mu_per_mm(0) * outer_mm + mu_per_mm(-850) * inner_mm
    assert line_integrals(phantom, looks(0), CENTRAL_RAY).item() == pytest.approx(expected, rel=1e-6)  # mu is float32


def test_air_painted_last_removes() -> None:
    phantom = painted(ellipsoid(0, ISOCENTRE_MM, [60] * 3), ellipsoid(-1000, ISOCENTRE_MM, [70] * 3))
    assert (line_integrals(phantom, everywhere(), Detector(shape=8, pixel_mm=20.0)) == 0).all()


def test_the_ray_starts_at_the_source_and_does_not_end_at_the_detector() -> None:
    """A patient wider than the gap between isocentre and detector is not cut off: docs/geometry.md."""
    on_the_detector = ellipsoid(0, ISOCENTRE_MM - [0, 160, 0], [30] * 3)
    assert line_integrals(painted(on_the_detector), looks(0), CENTRAL_RAY).item() == pytest.approx(mu_per_mm(0) * 60)
    around_the_source = ellipsoid(0, ISOCENTRE_MM + [0, 1640, 0], [30] * 3)
    assert line_integrals(painted(around_the_source), looks(0), CENTRAL_RAY).item() == pytest.approx(mu_per_mm(0) * 30)


def test_a_patient_on_a_ray_is_what_brute_force_finds_there() -> None:
    phantom = thorax(0)
    views, detector = everywhere(phantom.isocentre_mm), Detector(shape=2, pixel_mm=80.0)
    source, first, column_step, _ = views.rays(detector, np.eye(4))
    ray = first + column_step - source
    # 0.1 mm steps over 600 mm: some 50 borders per ray, each off by up to a step, at random, times at most 0.04 / mm
    along_mm = 1640 - 300 + np.arange(6000) / 10
    points = source[:, None] + along_mm[:, None] * (ray / np.linalg.norm(ray, axis=1)[:, None])[:, None]
    summed = mu_per_mm(hu_at(phantom, points)).sum(axis=1, dtype=float) / 10
    assert np.allclose(line_integrals(phantom, views, detector)[:, 0, 1], summed, atol=0.02)
    assert summed.max() > 1


def test_turning_the_patient_is_turning_the_view() -> None:
    phantom, turn = thorax(1), np.deg2rad(35)
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    centre = phantom.isocentre_mm
    turned = [
        Ellipsoid(one.hu, centre + rotation @ (one.centre_mm - centre), one.ball_from_mm @ rotation.T)
        for one in phantom.ellipsoids
    ]
    detector = Detector(shape=32, pixel_mm=13.5)
    still = line_integrals(phantom, looks([0, 60], 20, centre), detector)
    moved = line_integrals(replace(phantom, ellipsoids=turned), looks([35, 95], 20, centre), detector)
    assert np.allclose(still, moved, atol=1e-7)  # of two thousand grazing rays some are very grazing


def test_every_bead_casts_its_shadow_where_the_projection_matrix_says() -> None:
    views, detector = everywhere(), Detector(shape=216, pixel_mm=2.0)
    columns, rows = np.arange(216), np.arange(216)[:, None]
    for bead in beads().ellipsoids:
        images = line_integrals(painted(bead), views, detector)
        mass = images.sum(axis=(1, 2))
        centroid = np.stack([(images * columns).sum(axis=(1, 2)), (images * rows).sum(axis=(1, 2))], -1) / mass[:, None]
        # the centroid of a ball's perspective shadow is not quite its centre's, and a shadow is only some pixels wide
        assert np.allclose(centroid, project(views.projection(detector), bead.centre_mm), atol=0.1)


def test_beads_tell_all_directions_apart() -> None:
    left, anterior, superior = (one.centre_mm - beads().isocentre_mm for one in beads().ellipsoids)
    assert left[0] > 0 > anterior[1]
    assert superior[2] > 0
    lengths = np.linalg.norm([left, anterior, superior], axis=1)
    assert len(set(lengths)) == 3
    assert (np.abs([left[0], anterior[1], superior[2]]) == lengths).all()


def test_voxels_of_one_sample_are_the_hu_at_their_centres() -> None:
    phantom = thorax(2, table=True)
    volume = voxelise(phantom, (21, 30, 34), (12.0, 13.0, 16.0), supersample=1)
    voxels = np.stack(np.meshgrid(np.arange(34), np.arange(30), np.arange(21), np.ones(1), indexing="ij"), -1)
    centres_mm = (voxels[:, :, :, 0] @ volume.world_from_voxel.T)[..., :3].transpose(2, 1, 0, 3)
    assert np.allclose(volume.centre_mm, phantom.isocentre_mm)
    assert np.array_equal(volume.hu, hu_at(phantom, centres_mm))


def test_voxels_weigh_what_the_ellipsoid_weighs() -> None:
    expected = mu_per_mm(300) * 4 / 3 * np.pi * 40 * 25 * 60
    errors = []
    for spacing_mm in (8.0, 4.0, 2.0):
        count = int(144 / spacing_mm) + 1
        volume = voxelise(painted(tilted()), (count,) * 3, (spacing_mm,) * 3)
        errors.append(abs(mu_per_mm(volume.hu).sum(dtype=float) * spacing_mm**3 / expected - 1))
    # the count of lattice points in a smooth body errs by about the 3/2 power of their distance
    assert (np.array(errors) < [1e-2, 3e-3, 1e-3]).all()


def test_partial_volume_averages_attenuation_not_hu() -> None:
    bone = ellipsoid(1000, ISOCENTRE_MM - [500, 0, 0], [500] * 3)
    volume = voxelise(painted(bone), (1, 1, 1), (1.0, 1.0, 1.0))
    # half bone of 2.24 times water's attenuation, half air: 1.12 times, and 120 / 1.24 is HU 97, not the mean of 0
    assert volume.hu.item() == 97


def test_the_same_phantom_is_the_same_series() -> None:
    first, second = (voxelise(beads(), (6, 8, 8), (25.0, 25.0, 30.0)) for _ in range(2))
    other = voxelise(beads(), (6, 8, 8), (25.0, 25.0, 31.0))
    assert first.origin == second.origin
    assert first.origin.series_uid != other.origin.series_uid
    assert first.origin.study_uid == other.origin.study_uid
    assert len(first.origin.series_uid) <= 64


def test_a_seed_is_a_patient() -> None:
    for mine, again, other in zip(thorax(3).arrays, thorax(3).arrays, thorax(4).arrays, strict=True):
        assert np.array_equal(mine, again)
        assert not np.array_equal(mine, other[: len(mine)])


def test_patients_look_different() -> None:
    detector = Detector(shape=32, pixel_mm=13.5)
    images = [line_integrals(thorax(s), looks([0, 60], 0, thorax(s).isocentre_mm), detector) for s in (3, 4, 5)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(images[one] - images[other]).mean() > 0.1  # of a mean of 2


def test_the_table_leaves_the_patient_alone() -> None:
    patient, on_table = thorax(5), thorax(5, table=True)
    num_parts = len(on_table.ellipsoids) - len(patient.ellipsoids)
    assert num_parts > 0
    for mine, theirs in zip(patient.arrays, on_table.arrays, strict=True):
        assert np.array_equal(mine, theirs[num_parts:])


@pytest.mark.parametrize("seed", range(4))
def test_a_patient_fits_the_field_and_has_the_hu_of_one(seed: int) -> None:
    hu = voxelise(thorax(seed), (57, 66, 66), (6.0, 6.0, 6.0)).hu
    for axis in range(3):
        assert (hu.take([0, -1], axis) == -1000).all()
    assert -1000 == hu.min() < 500 < hu.max() < 1200
    litres = 6.0**3 / 1e6
    assert 2.5 < np.sum((hu > -900) & (hu < -700)) * litres < 6.5  # lungs
    assert 10 < np.sum(hu > -200) * litres < 25  # the rest: a trunk of 320 x 240 x 320 mm is 19, less the lungs


@pytest.mark.parametrize("seed", range(4))
def test_heart_is_left_and_liver_is_right(seed: int) -> None:
    phantom = thorax(seed)
    # above the domes the right half holds more lung, the left half more heart
    x, y, z = np.meshgrid(np.arange(4, 100, 4), np.arange(-80, 0, 4), np.arange(-44, 0, 4), indexing="ij")
    left, right = (hu_at(phantom, phantom.isocentre_mm + np.stack([side * x, y, z], -1)) for side in (1, -1))
    assert np.sum(left > -200) > 1.2 * np.sum(right > -200)
    # the lung reaches lower at the left, where the dome is lower
    heights = np.arange(-110, 0)
    left_dome, right_dome = (
        heights[
            hu_at(phantom, phantom.isocentre_mm + np.array([side * 72, -5, 0]) + heights[:, None] * [0, 0, 1]) < -700
        ]
        for side in (1, -1)
    )
    assert left_dome[left_dome > -75].min() < right_dome.min()


def test_nodules_are_round_and_within_the_lungs() -> None:
    directions = np.random.default_rng(0).normal(size=(200, 3))
    directions /= np.linalg.norm(directions, axis=1)[:, None]
    counts = []
    for seed in range(12):
        phantom = thorax(seed)
        counts.append(len(phantom.nodules))
        for nodule in phantom.nodules:
            radius = nodule.diameter_mm / 2
            assert 3 <= radius <= 12
            just_inside, just_outside = (
                hu_at(phantom, nodule.centre_mm + factor * radius * directions) for factor in (0.99, 1.01)
            )
            assert np.ptp(just_inside) == 0
            assert just_inside[0] > -50
            # all around is lung, but for a vessel or two that run into the nodule
            assert np.mean(just_outside < -800) > 0.6
            assert just_outside.max() <= 50
    assert min(counts) == 0
    assert max(counts) >= 3
