"""How near a view is to the truth: PSNR and SSIM of line integrals, on one fixed range for every image.

counts: [..., N, N], true for the pixels that are judged, all of them by default; an image without any has nan.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import gaussian_filter, minimum_filter

DATA_RANGE = 8.0
"""The range of line integrals that both metrics refer to: that of the autoencoder's scale, not the image's own."""

SSIM_SIGMA = 1.5
SSIM_TRUNCATE = 3.5
"""An 11 x 11 Gaussian window, as Wang et al. 2004."""


def psnr(view: ArrayLike, truth: ArrayLike, counts: ArrayLike = True) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio in dB of line integrals [..., N, N]: [...]. Infinite where both are the same."""
    error = np.asarray(view, dtype=np.float64) - np.asarray(truth, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return 10 * np.log10(DATA_RANGE**2 / _mean(error**2, counts))


def ssim(view: ArrayLike, truth: ArrayLike, counts: ArrayLike = True) -> NDArray[np.float64]:
    """Mean structural similarity of line integrals [..., N, N]: [...] (Wang et al. 2004, eq. 13, K = 0.01 and 0.03).

    The mean is over the pixels whose whole window lies in the image, and counts.
    """
    x, y = np.asarray(view, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    mean_x, mean_y = _window(x), _window(y)
    variance_x, variance_y = _window(x * x) - mean_x**2, _window(y * y) - mean_y**2
    covariance = _window(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity /= (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    edge = int(SSIM_TRUNCATE * SSIM_SIGMA + 0.5)
    whole = minimum_filter(np.broadcast_to(counts, x.shape), 2 * edge + 1, axes=(-2, -1))
    inside = slice(edge, -edge)
    return _mean(similarity[..., inside, inside], whole[..., inside, inside])


def _mean(values: NDArray[np.float64], counts: ArrayLike) -> NDArray[np.float64]:
    """Over the pixels [..., N, N] that count: [...]."""
    counted = np.broadcast_to(counts, values.shape)
    with np.errstate(invalid="ignore"):
        return np.sum(values, axis=(-2, -1), where=counted) / np.sum(counted, axis=(-2, -1))


def _window(image: NDArray[np.float64]) -> NDArray[np.float64]:
    return gaussian_filter(image, SSIM_SIGMA, truncate=SSIM_TRUNCATE, axes=(-2, -1))
