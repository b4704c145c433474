"""From Hounsfield units to linear attenuation at one energy: NIST's coefficients, and one formula."""

from collections.abc import Callable
from functools import cache, partial
from importlib import resources

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float = NDArray[np.float64]

# The monoenergetic beam nearest to a 120 kVp chest beam behind 20 cm of tissue; docs/rendering.md.
ENERGY_KEV = 60.0
# What the tables hold.
ENERGY_RANGE_KEV = (10.0, 150.0)
# Effective energy of a CT's beam at 120 kVp. An assumption: it turns HU into an amount of bone.
CT_ENERGY_KEV = 70.0
# g/cm3: by definition; ICRU 44; ICRP 23; ICRU 44 (NIST SRD 126, table 2, and ESTAR).
DENSITY = {"water": 1.0, "soft_tissue_icru44": 1.06, "cortical_bone_icrp": 1.85, "cortical_bone_icru44": 1.92}
# The bone that HU above 0 stand for.
_BONE = "cortical_bone_icrp"


def material_per_mm(material: str, energy_kev: ArrayLike) -> Float:
    """Linear attenuation in 1/mm of one of DENSITY's materials, any shape, from 10 to 150 keV.

    Total attenuation with coherent scattering, NIST XCOM, on a grid of 1 keV; in between log-log.
    """
    table = _table()
    logarithm = np.interp(np.log(energy_kev), np.log(table["energy_kev"]), np.log(table[material]))
    return np.exp(logarithm) * DENSITY[material] / 10


def water_per_mm(energy_kev: ArrayLike) -> Float:
    """Linear attenuation of water in 1/mm, to its four digits: 0.02059 at 60 keV."""
    return np.round(material_per_mm("water", energy_kev), 7)


def bone_factor(energy_kev: ArrayLike) -> Float:
    """k: the slope of attenuation over HU above 0, relative to water's, to two decimals: 1.24 at 60 keV.

    The formula then gives cortical bone its attenuation at this energy, if the CT shows it as at CT_ENERGY_KEV. 5 keV
    more or less there change k by 9 %, so that further decimals would say nothing.
    """
    return np.round(_excess(energy_kev) / _excess(CT_ENERGY_KEV), 2)


def _excess(energy_kev: ArrayLike) -> Float:
    """Attenuation of cortical bone beyond water's, relative to it: HU / 1000 in a CT of that energy."""
    return material_per_mm(_BONE, energy_kev) / material_per_mm("water", energy_kev) - 1


def mu_per_mm(hu: ArrayLike, energy_kev: float = ENERGY_KEV) -> NDArray[np.float32]:
    """Linear attenuation in 1/mm, any shape: mu_w (1 + HU/1000) up to 0 HU, mu_w (1 + k HU/1000) above, never negative.

    Negative attenuation does not exist: HU below -1000 (padding, the corners outside the scanner's circle) is air.
    """
    return _each_once(partial(_formula, energy_kev=energy_kev), hu)


def _formula(hu: NDArray[np.float32], energy_kev: float) -> NDArray[np.float32]:
    slope = np.where(hu > 0, np.float32(bone_factor(energy_kev) / 1000), np.float32(1 / 1000))
    return np.float32(water_per_mm(energy_kev)) * np.maximum(1 + slope * hu, 0)


def _each_once(function: Callable[[NDArray[np.float32]], NDArray[np.float32]], hu: ArrayLike) -> NDArray[np.float32]:
    """A function of HU, any shape. A CT has millions of voxels and 65536 values at most: each is worked out once."""
    values = np.asarray(hu)
    if values.dtype == np.int16 and values.size > 2**16:
        table = function(np.arange(2**16, dtype=np.uint16).view(np.int16).astype(np.float32))
        return table[values.view(np.uint16)]
    return function(values.astype(np.float32))


def water_part(hu: ArrayLike) -> NDArray[np.float32]:
    """w = 1 + HU/1000 between 0 and 1, any shape: the share of a voxel that attenuates as water does, at any energy."""
    return _each_once(lambda values: np.clip(1 + values / 1000, 0, 1), hu)


def dense_part(hu: ArrayLike) -> NDArray[np.float32]:
    """d = HU/1000 above 0, else 0, any shape. At every energy, mu_per_mm is mu_w (w + k d)."""
    return _each_once(lambda values: np.maximum(values / 1000, 0), hu)


def hu_from_mu(mu_per_mm: ArrayLike) -> Float:
    """The inverse of `mu_per_mm` at 60 keV for attenuation of 0 and more: HU of -1000 and more, any shape."""
    excess = np.asarray(mu_per_mm, dtype=np.float64) / water_per_mm(ENERGY_KEV) - 1
    return 1000 * np.where(excess > 0, excess / bone_factor(ENERGY_KEV), excess)


@cache
def _table() -> NDArray[np.void]:
    with resources.files("drrgen").joinpath("data/attenuation.csv").open() as lines:
        return np.genfromtxt(lines, delimiter=",", names=True, comments="#", skip_header=1)
