"""Grids of directions: counts, order, cuts, and what is refused."""

import numpy as np
import pytest

from drrgen.errors import InputError
from drrgen.geometry import view_axes
from drrgen.grid import directions


def test_5deg_is_the_sphere_of_the_documentation() -> None:
    azimuth_deg, elevation_deg = directions("5deg")
    assert len(azimuth_deg) == 72 * 35 + 2
    assert (np.abs(elevation_deg) == 90).sum() == 2
    assert (azimuth_deg.min(), azimuth_deg.max()) == (-180, 175)
    assert (np.diff(elevation_deg) >= 0).all()
    assert len(np.unique(np.round(view_axes(azimuth_deg, elevation_deg)[2], 9), axis=0)) == len(azimuth_deg)


def test_order_is_elevation_outer_azimuth_inner() -> None:
    azimuth_deg, elevation_deg = directions("30deg", "-30:30", "0:30")
    assert azimuth_deg.tolist() == [-30, 0, 30, -30, 0, 30]
    assert elevation_deg.tolist() == [0, 0, 0, 30, 30, 30]


@pytest.mark.parametrize("behind", ["90:270", "-270:-90"])
def test_azimuths_count_modulo_a_full_turn(behind: str) -> None:
    assert directions("45deg", behind, "0:0")[0].tolist() == [-180, -135, -90, 90, 135]
    assert directions("45deg", "-400:-300", "0:0")[0].tolist() == [-0.0, 45]


def test_ends_of_a_range_are_included_whatever_the_step() -> None:
    azimuth_deg, _ = directions("0.3deg", "-90:90", "-0.3:0.3")
    assert (azimuth_deg.min(), azimuth_deg.max()) == pytest.approx((-90, 90))
    assert len(azimuth_deg) == 601 * 3


def test_poles_belong_to_every_azimuth_range() -> None:
    assert directions("30deg", "30:60")[1].tolist().count(90) == 1


def test_fibonacci_starts_at_pa_and_covers_equal_areas() -> None:
    azimuth_deg, elevation_deg = directions("fibonacci:3000")
    assert (azimuth_deg[0], elevation_deg[0]) == (0, 0)
    to_detector = view_axes(azimuth_deg, elevation_deg)[2]
    # every cap of half-angle 30 deg holds (1 - cos 30) / 2 of the sphere; a lattice misses by about its rim, ~ sqrt(N)
    for axis in np.eye(3):
        share = (to_detector @ axis > np.cos(np.deg2rad(30))).mean()
        assert share == pytest.approx((1 - np.cos(np.deg2rad(30))) / 2, abs=1 / np.sqrt(3000) / 2)
    # the first half is the PA hemisphere
    assert (to_detector[:1500, 1] < 0).all()


@pytest.mark.parametrize(
    "text", ["", "5", "deg", "0deg", "7deg", "-5deg", "0.0001deg", "fibonacci", "fibonacci:1", "1e9deg"]
)
def test_nonsense_is_refused_with_the_cure(text: str) -> None:
    with pytest.raises(InputError, match=r"5deg.*fibonacci:3000"):
        directions(text)


@pytest.mark.parametrize("text", ["", "90", "90:-90", "a:b", "1:2:3"])
def test_nonsense_ranges_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="low:high"):
        directions("5deg", text)


def test_an_empty_cut_is_refused() -> None:
    with pytest.raises(InputError, match="widen"):
        directions("30deg", "1:2", "1:2")
