"""The projector for CPUs: Joseph's method slab by slab, several views to one pass over the volume, on all threads.

Joseph 1982 (doi 10.1109/TMI.1982.4307572) samples a ray where it crosses the slices of the axis along which it crosses
most, bilinearly within each. Rays that share this axis are summed together, slice by slice, on the grid of a plane
parallel to the slices, as in Lacroute & Levoy's shear-warp (1994, doi 10.1145/192161.192283), and the plane is
resampled once to the detector. New here: the rows are never sampled but summed as changes of slope, which makes a
fine grid cheap (`drrgen.projectors.slab`); each ray keeps its own axis, so a view may have several planes; and the grid
is chosen such that a pixel is nearer to the mean over its area than its central ray is.
"""

import numba
import numpy as np
from numpy.typing import NDArray

from drrgen.geometry import Detector, Float, Views
from drrgen.projectors import Project, extremes, slab
from drrgen.projectors.plan import AXES, PASS, plan

# The largest 16-bit step of attenuation above 0: second differences reach twice as far both ways, and must fit.
_LEVELS = 16382
# Points of the planes of one batch of views, per thread: 16 MiB, for several views that share what is read of a volume.
_BATCH_POINTS = 1 << 22


def prepare(mu: NDArray[np.float32], voxel_from_world: Float) -> Project:
    """Signature, shapes and units: `drrgen.projectors`; mu of any sign, but finite, or it raises InputError.

    Voxels are rounded to 16382 steps between 0 and the extremes, an error of at most 0.003 % of these per voxel.
    Outside the volume attenuation is 0, reached linearly one voxel beyond the outermost centres. A source inside the
    volume sees the slices before it, whole, and not one that it lies in exactly. Results do not depend on the number of
    threads or on how views are batched, to the bit. Memory: 2 bytes per voxel, 3 more for each axis that is the main
    one of a ray, and at most about 45 MB per thread.
    """
    return _Slabs(mu, voxel_from_world).project


class _Slabs:
    """A volume in 16 bits, laid out along each axis when a view first needs it."""

    def __init__(self, mu: NDArray[np.float32], voxel_from_world: Float) -> None:
        low, high = extremes(mu)
        self._step = (max(high, 0.0) - min(low, 0.0)) / _LEVELS or 1.0
        self._voxels = np.rint(mu / np.float32(self._step)).astype(np.int16)
        self._voxel_from_world = voxel_from_world
        self._laid_out: dict[int, tuple[NDArray[np.int16], ...]] = {}
        self._planes = np.empty(0, np.float32)

    def project(self, views: Views, detector: Detector) -> NDArray[np.float32]:
        line_integrals = np.empty((len(views), detector.shape, detector.shape), np.float32)
        rays = views.rays(detector, self._voxel_from_world)
        passes, num_passes = np.zeros((len(views), 6), PASS), np.zeros(len(views), np.int64)
        plan(*rays, np.array(self._voxels.shape[::-1]), detector.shape, passes, num_passes)
        points = (passes["rows"] * passes["columns"]).sum(axis=1)
        limit = numba.get_num_threads() * _BATCH_POINTS
        start = 0
        while start < len(views):
            stop = start + max(1, int(np.searchsorted(points[start:].cumsum(), limit, side="right")))
            batch = np.concatenate([passes[view, : num_passes[view]] for view in range(start, stop)])
            first_pass = np.concatenate([[0], num_passes[start:stop].cumsum()])
            self._cast(batch, first_pass, views, detector, line_integrals[start:stop])
            start = stop
        return line_integrals

    def _cast(
        self,
        passes: NDArray[np.void],
        first_pass: NDArray[np.int64],
        views: Views,
        detector: Detector,
        out: NDArray[np.float32],
    ) -> None:
        sizes = passes["rows"] * passes["columns"]
        passes["offset"] = np.cumsum(sizes) - sizes
        if sizes.sum() > len(self._planes):
            self._planes = np.empty(int(sizes.sum()), np.float32)
        for axis in range(3):
            across = passes[passes["face"] % 3 == axis]
            if len(across):
                slab.sum_slices(*self._across(axis), across, self._planes, numba.get_num_threads())
        slab.resample(passes, first_pass, self._planes, views.sdd_mm, detector.pixel_mm, self._step, out)

    def _across(self, axis: int) -> tuple[NDArray[np.int16], ...]:
        """What `slab.lay_out` makes of the volume, with its slices across `axis`."""
        if axis not in self._laid_out:
            voxels = self._voxels.transpose([2 - one for one in (axis, *AXES[axis])])
            slices, rows, columns = voxels.shape
            strips = -(-(columns + 2 * slab.PAD) // slab.STRIP)
            cells = strips * slab.STRIP // slab.CELL
            changes = np.zeros((slices, strips, rows + 2, slab.STRIP + slab.OVERLAP), np.int16)
            first, last = np.zeros((slices, cells), np.int16), np.full((slices, cells), -1, np.int16)
            slab.lay_out(voxels, changes, first, last)
            self._laid_out[axis] = changes, first, last
        return self._laid_out[axis]
