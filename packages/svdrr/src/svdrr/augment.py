"""A rendered view made to look like a film that was read: other place, noise, curve. For sources only, never targets.

A film's grey values become line integrals by their histogram (radiograph.from_film). What that leaves is a monotone
error of the curve, the noise of the detector, and a place and size that are a little off. The rays that the model is
told stay those of the rendered view, so they are slightly wrong on purpose: so are those of a film, whose distances
and centring nobody wrote down. The bounds are small, so that the pose still says more than the error.
"""

import numpy as np
from numpy.typing import NDArray

ZOOM, SHIFT = 0.04, 0.03
"""The body is larger or smaller, and beside its place, by this share of the image's side at most."""

PHOTONS = (3e4, 1e5, 1e6)
"""In air, per pixel: an exposure that is low, one that is usual, one that is high.

Few for pixels as large as these, because the noise stands for film grain and for 8-bit files too.
"""

READOUT = 2.0
"""The detector's own noise, in photons."""

FLOOR, CEILING = 0.05, (0.85, 1.2)
"""The window's lower end at most, and the range of its upper end, in shares of the peak."""

GAMMA = 1.25
"""The largest exponent of the film's curve; the smallest is its inverse."""


def augmented(line_integrals: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """The view [N, N] in another place, exposed and windowed anew; everything drawn from `rng`."""
    side = len(line_integrals)
    zoom, down, right = 1 + rng.uniform(-ZOOM, ZOOM), *(side * rng.uniform(-SHIFT, SHIFT, 2))
    image = moved(line_integrals, zoom, down, right)
    image = exposed(image, rng.choice(PHOTONS), rng)
    return developed(image, rng.uniform(0, FLOOR), rng.uniform(*CEILING), GAMMA ** rng.uniform(-1, 1))


def moved(image: NDArray[np.float32], zoom: float, down: float, right: float) -> NDArray[np.float32]:
    """[N, N] enlarged about its centre, then shifted by these pixels; linear between pixels, the edges go on."""
    for axis, shift in ((0, down), (1, right)):
        last = image.shape[axis] - 1
        place = ((np.arange(last + 1) - shift - last / 2) / zoom + last / 2).clip(0, last)
        before = np.minimum(place.astype(int), last - 1)
        weight = np.expand_dims((place - before).astype(np.float32), 1 - axis)
        image = np.take(image, before, axis) * (1 - weight) + np.take(image, before + 1, axis) * weight
    return image


def exposed(line_integrals: NDArray[np.float32], photons: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """What a detector with READOUT noise makes of them, at this many photons per pixel in air; never below 0.

    Photons are counted with a Gaussian of Poisson's variance, which costs a tenth of Poisson's own draws. A pixel with
    less than one photon counts as one, as where a real detector is starved.
    """
    in_air = np.float32(photons)
    expected = in_air * np.exp(-line_integrals)
    noise = rng.standard_normal(line_integrals.shape, dtype=np.float32) * np.sqrt(expected + np.float32(READOUT**2))
    return np.log(in_air / (expected + noise).clip(1, in_air))


def developed(line_integrals: NDArray[np.float32], floor: float, ceiling: float, gamma: float) -> NDArray[np.float32]:
    """Through a window from `floor` to `ceiling`, in shares of the peak, and a curve: monotone, from 0 to the peak."""
    peak = line_integrals.max()
    if peak == 0:
        return line_integrals
    grey = ((line_integrals / peak - np.float32(floor)) / np.float32(ceiling - floor)).clip(0, 1)
    return peak * grey ** np.float32(gamma)
