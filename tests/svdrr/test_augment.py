"""Each part of the augmentation does what its name says, within its bounds, and all of it follows its seed."""

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.svdrr.shards_for_tests import cast, random_body

from svdrr.augment import CEILING, FLOOR, GAMMA, SHIFT, ZOOM, augmented, developed, exposed, moved


@pytest.fixture
def view() -> NDArray[np.float32]:
    """A lateral view, where line integrals are largest."""
    return cast(random_body(np.random.default_rng(0)), 90, 0, 64).astype(np.float32)


def test_follows_its_seed(view: NDArray[np.float32]) -> None:
    first, same, other = (augmented(view, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, same)
    assert np.abs(first - other).max() > 0.1
    assert first.dtype == np.float32


def test_stays_between_0_and_the_peak_and_air_stays_air(view: NDArray[np.float32]) -> None:
    """100 draws. Noise lifts the peak by less than a tenth.

    In air, four columns that the body never reaches, noise has a deviation of 1 / sqrt(3e4) = 0.006 at most. Where the
    window's lower end is near 0, a gamma of 1/1.25 makes of four deviations, 0.023 of a peak of 8, 0.07.
    """
    still = np.zeros_like(view, dtype=bool)
    still[:, :4] = still[:, -4:] = True
    assert view[still].max() == 0
    for seed in range(100):
        image = augmented(view, np.random.default_rng(seed))
        assert image.min() >= 0
        assert image.max() < 1.1 * view.max()
        assert image[still].max() < 0.1


def test_moving_is_exact_on_a_ramp() -> None:
    """Linear interpolation of a ramp: shifted 2 down and 1.5 left, enlarged by 1.25 about the centre; 1e-4: float32."""
    rows, columns = np.mgrid[:32, :32].astype(np.float32)
    image = 3 * rows + columns
    assert np.array_equal(moved(image, 1, 0, 0), image)
    inside = slice(4, -4)
    shifted = moved(image, 1, 2, -1.5)
    assert np.abs(shifted - (3 * (rows - 2) + columns + 1.5))[inside, inside].max() < 1e-4
    enlarged = moved(image, 1.25, 0, 0)
    centred = 15.5 + (rows - 15.5) / 1.25, 15.5 + (columns - 15.5) / 1.25
    assert np.abs(enlarged - (3 * centred[0] + centred[1]))[inside, inside].max() < 1e-4
    assert np.array_equal(moved(image, 1, 2, 0)[:2], image[[0, 0]])


def test_noise_is_that_of_counted_photons() -> None:
    """100,000 pixels each: the mean within 4 standard errors and the logarithm's own bias of 1 / (2 counts).

    The deviation is within 3 % of 1 / sqrt(counts), which grows with the line integral; below 100 counts the logarithm
    is no longer straight enough for that.
    """
    rng, deviations = np.random.default_rng(0), []
    for integral in (1.0, 3.0, 5.0):
        counts = 3e4 * np.exp(-integral)
        image = exposed(np.full((400, 250), integral, np.float32), 3e4, rng)
        deviations.append(image.std())
        expected = np.sqrt(counts + 4) / counts
        assert image.std() == pytest.approx(expected, rel=0.03)
        assert abs(image.mean() - integral) < 4 * expected / np.sqrt(image.size) + 1 / counts
    assert deviations == sorted(deviations)


def test_a_starved_detector_and_air_are_bounded() -> None:
    rng = np.random.default_rng(0)
    assert exposed(np.full((64, 64), 16.0, np.float32), 3e4, rng).max() <= np.log(3e4) + 1e-5
    air = exposed(np.zeros((64, 64), np.float32), 3e4, rng)
    assert air.min() >= 0
    assert air.max() < 6 / np.sqrt(3e4)


def test_the_curve_keeps_order_and_ends() -> None:
    image = np.linspace(0, 6, 256, dtype=np.float32).reshape(16, 16)
    for floor in (0, FLOOR):
        for ceiling in (*CEILING, 1.0):
            for gamma in (1 / GAMMA, 1.0, GAMMA):
                changed = developed(image, floor, ceiling, gamma)
                assert (np.diff(changed.ravel()) >= 0).all()
                assert changed[0, 0] == 0
                assert changed.max() == pytest.approx(6, rel=1e-6) if ceiling <= 1 else changed.max() < 6
    assert np.allclose(developed(image, 0, 1, 1), image, atol=1e-6)
    assert developed(image, 0, 1, 2)[8, 0] == pytest.approx(6 * (128 / 255) ** 2, rel=1e-5)
    assert np.array_equal(developed(np.zeros((4, 4), np.float32), 0.05, 1, 2), np.zeros((4, 4)))


def test_the_place_changes_by_few_percent_only() -> None:
    """The centre of mass of a bright square moves by at most the shift and what the zoom adds to its place."""
    image = np.zeros((100, 100), np.float32)
    image[40:50, 40:50] = 4
    for seed in range(50):
        changed = augmented(image, np.random.default_rng(seed))
        rows, columns = (changed > 2).nonzero()
        most = 100 * SHIFT + 10 * ZOOM + 1  # of 100 pixels; the square is 5 from the centre
        assert abs(rows.mean() - 44.5) < most
        assert abs(columns.mean() - 44.5) < most
