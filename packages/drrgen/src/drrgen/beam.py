"""X-ray beams: one energy or a spectrum, and the line integral that a detector sees in it."""

import math
from dataclasses import dataclass
from functools import cached_property
from importlib import resources

import numpy as np
from numba import njit, prange
from numpy.typing import ArrayLike, NDArray

from drrgen import attenuation
from drrgen.errors import InputError

Float = NDArray[np.float64]

# name: kVp and filters of the tubes whose spectra docs/figures/physics_tables.py has made.
_TUBES = {
    "chest120": (120, "3.5 mm Al + 0.1 mm Cu"),
    "portable90": (90, "3 mm Al"),
    "carm80": (80, "3 mm Al + 0.1 mm Cu"),
}
NAMES = tuple(_TUBES)
# A spectrum's equivalent energy is that of the line that this much water attenuates as much.
EQUIVALENT_WATER_MM = 200.0

# The grid of line integrals over (water, dense) in mm: 14 MB. The steps keep the error below 1e-5, which is largest for
# the softest beam without anything before it (2e-5 for steps twice as wide). Beyond its end, a line integral of 16 of
# water alone or a hand's breadth of solid bone, the last cell goes on as a straight line.
_STEP_MM = 0.5, 0.1
_END_MM = 900.0, 200.0


@dataclass(frozen=True)
class Beam:
    """Lines of energy [K], ascending, and their shares [K] of what the detector absorbs, which add up to 1."""

    name: str
    description: str
    kvp: float | None
    energy_kev: Float
    weight: Float

    @property
    def is_spectrum(self) -> bool:
        return len(self.energy_kev) > 1

    @cached_property
    def water_per_mm(self) -> Float:
        """Attenuation of water at each energy, [K], in 1/mm."""
        return attenuation.water_per_mm(self.energy_kev)

    @cached_property
    def bone_factor(self) -> Float:
        """`attenuation.bone_factor` at each energy, [K]."""
        return attenuation.bone_factor(self.energy_kev)

    @property
    def mean_kev(self) -> float:
        """Mean energy of what the detector absorbs with nothing before it."""
        return float(self.weight @ self.energy_kev)

    @property
    def equivalent_kev(self) -> float:
        """The one energy at which 200 mm of water attenuate as much, to 0.1 keV."""
        if not self.is_spectrum:
            return float(self.energy_kev[0])
        effective = line_integrals(self, EQUIVALENT_WATER_MM, 0.0) / EQUIVALENT_WATER_MM
        low, high = attenuation.ENERGY_RANGE_KEV
        energies = np.linspace(high, low, round(10 * (high - low)) + 1)
        return round(float(np.interp(effective, attenuation.water_per_mm(energies), energies)), 1)


def mono(energy_kev: float) -> Beam:
    """A beam of one energy. Raises InputError beyond the tables."""
    low, high = attenuation.ENERGY_RANGE_KEV
    if not low <= energy_kev <= high:
        raise InputError(f"--energy {energy_kev:g}: choose {low:g} to {high:g} keV, the range of the tables")
    return Beam(f"{energy_kev:g} keV", "one energy", None, np.array([energy_kev]), np.ones(1))


def spectrum(name: str) -> Beam:
    """One of NAMES. Raises InputError for another name."""
    if name not in _TUBES:
        raise InputError(f"--spectrum {name!r} does not exist: choose one of {', '.join(NAMES)}")
    with resources.files("drrgen").joinpath("data/spectra.csv").open() as lines:
        table = np.genfromtxt(lines, delimiter=",", names=True, comments="#", skip_header=1)
    there = table[name] > 0
    kvp, filters = _TUBES[name]
    description = (
        f"{kvp} kVp, tungsten anode of 12 degrees, {filters} (SpekPy 2.5.4); "
        "detector of 0.6 mm CsI packed to 75 % that absorbs the whole energy of each photon that interacts"
    )
    return Beam(name, description, float(kvp), table["energy_kev"][there], table[name][there] / table[name].sum())


def line_integrals(beam: Beam, water_mm: ArrayLike, dense_mm: ArrayLike) -> Float:
    """p = -ln sum_i weight_i exp(-mu_i (water + k_i dense)), [water, dense] for vectors of both, else a number.

    water_mm, dense_mm: integrals along a ray of `attenuation.water_part` and `attenuation.dense_part`.
    """
    water_per_mm, dense_per_mm = beam.water_per_mm, beam.water_per_mm * beam.bone_factor
    # beyond the most penetrating line, which would underflow behind a metre of water at 10 keV
    through_water = np.exp(-np.multiply.outer(water_mm, water_per_mm - water_per_mm.min()))
    through_dense = np.exp(-np.multiply.outer(dense_mm, dense_per_mm - dense_per_mm.min()))
    least = np.add.outer(np.multiply(water_mm, water_per_mm.min()), np.multiply(dense_mm, dense_per_mm.min()))
    return least - np.log((through_water * beam.weight) @ through_dense.T)


class LineIntegrals:
    """The same as a table lookup for images: float32 of any one shape, within 1e-5 of the sum."""

    def __init__(self, beam: Beam) -> None:
        nodes = (np.arange(math.ceil(end / step) + 1) * step for end, step in zip(_END_MM, _STEP_MM, strict=True))
        self._table = line_integrals(beam, *nodes).astype(np.float32)

    def __call__(self, water_mm: NDArray[np.float32], dense_mm: NDArray[np.float32]) -> NDArray[np.float32]:
        out = np.empty(water_mm.shape, np.float32)
        per_mm = tuple(np.float32(1 / step) for step in _STEP_MM)
        _look_up(self._table, water_mm.ravel(), dense_mm.ravel(), *per_mm, out.ravel())
        return out


@njit(cache=True, nogil=True, parallel=True)
def _look_up(table, water_mm, dense_mm, water_per_mm, dense_per_mm, out):  # type: ignore[no-untyped-def]
    """Bilinear between the table's nodes; cells at the border reach on to infinity."""
    last_row, last_column = table.shape[0] - 2, table.shape[1] - 2
    for pixel in prange(len(out)):
        y, x = water_mm[pixel] * water_per_mm, dense_mm[pixel] * dense_per_mm
        row, column = min(max(int(y), 0), last_row), min(max(int(x), 0), last_column)
        y, x = y - np.float32(row), x - np.float32(column)
        upper = table[row, column] + x * (table[row, column + 1] - table[row, column])
        lower = table[row + 1, column] + x * (table[row + 1, column + 1] - table[row + 1, column])
        out[pixel] = upper + y * (lower - upper)
