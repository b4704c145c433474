"""PSNR and SSIM at values that can be computed by hand."""

import numpy as np
import pytest

from svdrr.metrics import DATA_RANGE, psnr, ssim


def test_psnr_of_a_constant_error() -> None:
    """An error of a tenth of the range everywhere is 20 dB, whatever the image."""
    truth = np.random.default_rng(0).uniform(0, 8, (3, 16, 16))
    assert psnr(truth + DATA_RANGE / 10, truth) == pytest.approx([20, 20, 20])
    assert psnr(truth, truth).tolist() == [np.inf] * 3


def test_ssim_of_constant_images_is_the_luminance_term() -> None:
    """Without variance only (2ab + c1) / (a^2 + b^2 + c1) is left; 1e-6: a variance is a difference of squares."""
    c1 = (0.01 * DATA_RANGE) ** 2
    expected = (2 * 2 * 4 + c1) / (2**2 + 4**2 + c1)
    assert ssim(np.full((32, 32), 2.0), np.full((32, 32), 4.0)) == pytest.approx(expected, abs=1e-6)


def test_ssim_is_1_for_the_same_and_low_for_noise() -> None:
    x, y = np.random.default_rng(0).uniform(0, 8, (2, 2, 32, 32))
    assert ssim(x, x) == pytest.approx([1, 1])
    assert np.all(ssim(x, y) < 0.2)
    assert ssim(x, y) == pytest.approx(ssim(y, x))


def test_pixels_that_do_not_count_change_nothing() -> None:
    """Where both are the same but in a corner that is left out; SSIM leaves out every window that reaches into it."""
    x = np.random.default_rng(0).uniform(0, 8, (2, 32, 32))
    y, counts = x.copy(), np.ones((2, 32, 32), bool)
    y[0, :10, :10] += 3
    counts[0, :10, :10] = False
    assert psnr(y, x, counts).tolist() == [np.inf, np.inf]
    assert ssim(y, x, counts) == pytest.approx([1, 1])
    assert ssim(y, x)[0] < 0.99
    y[0, 20, 20] += 8
    assert psnr(y, x, counts)[0] == pytest.approx(10 * np.log10(1024 - 100))
    counts[0] = False
    assert np.isnan([psnr(y, x, counts)[0], ssim(y, x, counts)[0]]).all()
    assert psnr(y, x, counts)[1] == np.inf


def test_ssim_is_that_of_the_definition() -> None:
    """One window written out: 11 x 11 Gaussian weights of sigma 1.5 around the only pixel that counts."""
    x, y = np.random.default_rng(1).uniform(0, 8, (2, 11, 11))
    line = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    weight = np.outer(line, line) / line.sum() ** 2
    mean_x, mean_y = (weight * x).sum(), (weight * y).sum()
    var_x, var_y = (weight * (x - mean_x) ** 2).sum(), (weight * (y - mean_y) ** 2).sum()
    covariance = (weight * (x - mean_x) * (y - mean_y)).sum()
    c1, c2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2
    expected = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    expected /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    assert ssim(x, y) == pytest.approx(expected)
