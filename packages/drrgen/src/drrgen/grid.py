"""Which directions to look from: `5deg` and `fibonacci:3000` become arrays of azimuth and elevation."""

import re

import numpy as np
from numpy.typing import NDArray

from drrgen.errors import InputError

Angles = tuple[NDArray[np.float64], NDArray[np.float64]]
MAX_VIEWS = 1_000_000
_ROUNDING_DEG = 1e-9
_CURE = "use e.g. 5deg (a step that divides 90) or fibonacci:3000"


def directions(grid: str, azimuth: str = "-180:180", elevation: str = "-90:90") -> Angles:
    """(azimuth_deg, elevation_deg), each [V], of a grid such as `5deg`, cut to two ranges `low:high`, ends included.

    Azimuths count modulo a full turn: `90:270` and `-270:-90` are the half behind the patient. The poles belong to
    every azimuth range. Raises InputError where the text is no grid or no range, or no view is left.
    """
    azimuth_deg, elevation_deg = _parse(grid)
    (low_a, high_a), (low_e, high_e) = _range("--azimuth", azimuth), _range("--elevation", elevation)
    # angles are multiples of a step in binary fractions: 0.3 deg times 300 misses 90 by 1e-14
    inside = (azimuth_deg - low_a + _ROUNDING_DEG) % 360 <= high_a - low_a + 2 * _ROUNDING_DEG
    inside |= np.abs(elevation_deg) == 90
    inside &= (elevation_deg >= low_e - _ROUNDING_DEG) & (elevation_deg <= high_e + _ROUNDING_DEG)
    if not inside.any():
        raise InputError(
            f"--grid {grid} has no view with azimuth {azimuth} and elevation {elevation}: widen the ranges"
        )
    return azimuth_deg[inside], elevation_deg[inside]


def _parse(grid: str) -> Angles:
    if match := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)deg", grid):
        return _latitudes(grid, float(match[1]))
    if match := re.fullmatch(r"fibonacci:([0-9]{1,7})", grid):
        num_views = int(match[1])
        if 2 <= num_views <= MAX_VIEWS:
            return _fibonacci(num_views)
    raise InputError(f"--grid {grid!r} is no grid: {_CURE}")


def _latitudes(grid: str, step_deg: float) -> Angles:
    """Every `step_deg` in both angles, the poles once; elevation outer, azimuth inner."""
    rings = round(90 / step_deg) if step_deg > 0 else 0
    if rings == 0 or not np.isclose(rings * step_deg, 90) or 8 * rings**2 > MAX_VIEWS:
        raise InputError(f"--grid {grid!r}: the step must divide 90 and give at most {MAX_VIEWS} views; {_CURE}")
    azimuth_deg = np.arange(-2 * rings, 2 * rings) * step_deg
    elevation_deg = np.arange(-rings + 1, rings) * step_deg
    inner, outer = np.tile(azimuth_deg, len(elevation_deg)), np.repeat(elevation_deg, len(azimuth_deg))
    return np.concatenate([[0.0], inner, [0.0]]), np.concatenate([[-90.0], outer, [90.0]])


def _fibonacci(num_views: int) -> Angles:
    """A Fibonacci lattice: a spiral of equal steps in area and in the golden angle, from PA, the first view, to AP.

    The spiral winds around the PA axis, so the first half of the views is the PA hemisphere. (Gonzalez 2010,
    doi 10.1007/s11004-009-9257-x, with the two end points on the axis itself.)
    """
    k = np.arange(num_views)
    along_pa = 1 - 2 * k / (num_views - 1)
    across = np.sqrt(np.maximum(1 - along_pa**2, 0))
    turn = k * np.pi * (3 - np.sqrt(5))
    to_left, to_head = across * np.cos(turn), across * np.sin(turn)
    return np.rad2deg(np.arctan2(to_left, along_pa)), np.rad2deg(np.arcsin(to_head))


def _range(option: str, text: str) -> tuple[float, float]:
    number = r"([+-]?[0-9]+(?:\.[0-9]+)?)"
    match = re.fullmatch(f"{number}:{number}", text)
    if match is None or float(match[1]) > float(match[2]):
        raise InputError(f"{option} {text!r} is no range: use low:high in degrees, e.g. -90:90")
    return float(match[1]), float(match[2])
