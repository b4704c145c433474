"""From Hounsfield units to linear attenuation, for one beam energy: one formula, its constants named."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

# The monoenergetic beam nearest to a 120 kVp chest beam behind 20 cm of tissue; docs/rendering.md.
ENERGY_KEV = 60.0
# Water at 60 keV: 0.2059 / cm (NIST XCOM; NIST Standard Reference Database 126).
MU_WATER_PER_MM = 0.02059
# Slope of attenuation over HU above 0, relative to water's: cortical bone (ICRP, 1.85 g/cm3) attenuates 0.574 / cm at
# 60 keV, and a 120 kVp CT, whose effective energy is about 70 keV, shows it at 1447 HU; (0.574 / 0.2059 - 1) / 1.447.
BONE_FACTOR = 1.24


def mu_per_mm(hu: ArrayLike) -> NDArray[np.float32]:
    """Linear attenuation in 1/mm, any shape: mu_w (1 + HU/1000) up to 0 HU, mu_w (1 + k HU/1000) above, never negative.

    Negative attenuation does not exist: HU below -1000 (padding, the corners outside the scanner's circle) is air.
    """
    values = np.asarray(hu, dtype=np.float32)
    slope = np.where(values > 0, np.float32(BONE_FACTOR / 1000), np.float32(1 / 1000))
    relative = np.maximum(1 + slope * values, 0)
    return np.float32(MU_WATER_PER_MM) * relative


def hu_from_mu(mu_per_mm: ArrayLike) -> NDArray[np.float64]:
    """The inverse of `mu_per_mm` for attenuation of 0 and more: HU of -1000 and more, any shape."""
    excess = np.asarray(mu_per_mm, dtype=np.float64) / MU_WATER_PER_MM - 1
    return 1000 * np.where(excess > 0, excess / BONE_FACTOR, excess)
