"""HU to attenuation: known values, and the inverse."""

import numpy as np
import pytest

from drrgen.attenuation import MU_WATER_PER_MM, hu_from_mu, mu_per_mm


@pytest.mark.parametrize(
    ("hu", "relative_to_water"),
    [(-1000, 0.0), (-3024, 0.0), (-500, 0.5), (0, 1.0), (1000, 2.24), (1447, 1 + 1.24 * 1.447)],
)
def test_known_values(hu: int, relative_to_water: float) -> None:
    # float32 has 24 bits
    assert mu_per_mm(hu) == pytest.approx(MU_WATER_PER_MM * relative_to_water, rel=1e-6)


def test_cortical_bone_at_60_kev_is_that_of_the_table() -> None:
    """ICRP cortical bone: 0.574 / cm. The factor 1.24 is rounded to three digits."""
    assert mu_per_mm(1447) * 10 == pytest.approx(0.574, rel=5e-3)


def test_inverse() -> None:
    hu = np.arange(-1000, 3072)
    assert np.allclose(hu_from_mu(mu_per_mm(hu)), hu, atol=1e-3)
