"""The projectors by name. All have one signature; each is imported only when it is asked for.

A projector is given a volume once, and casts any number of batches of views of it: what it makes of the volume (other
orders of its voxels, a copy on a GPU) is made once.

    project = projectors.get(name)(mu, voxel_from_world)
    line_integrals = project(views, detector)

mu: [slice, row, column], attenuation in 1/mm, 0 outside. voxel_from_world: [4, 4], LPS mm to voxel (column, row,
slice). views: V cone-beam views. Result: float32 [view, row, column], dimensionless; rays begin at the source and run
on behind the detector, through the whole volume.
"""

import ctypes
import importlib
import importlib.util
import math
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from drrgen.errors import InputError
from drrgen.geometry import Detector, Views

NAMES = ("cpu", "cuda", "siddon")


class Project(Protocol):
    """Casts views of one volume."""

    def __call__(self, views: Views, detector: Detector) -> NDArray[np.float32]: ...


@runtime_checkable
class StoringProject(Project, Protocol):
    """A `Project` that also makes of line integrals what is stored, where they are: only that need be copied."""

    def stored(
        self, views: Views, detector: Detector, levels: list[int], steps_per_unit: float
    ) -> dict[int, NDArray[np.uint16]]:
        """{size: images [view, size, size]}: `drrgen.render.quantised`, then `drrgen.shards.halved`, to the bit.

        levels: sizes from the detector's shape down, each half of the one before. steps_per_unit: stored steps to a
        line integral of 1.
        """
        ...


class Projector(Protocol):
    """Makes a volume ready to be cast."""

    def __call__(self, mu: NDArray[np.float32], voxel_from_world: NDArray[np.float64]) -> Project: ...


def resolve(name: str) -> str:
    """`auto` becomes the fastest projector of this machine; another name stays, if that projector can run here."""
    if name == "auto":
        return "cuda" if _has_gpu() else "cpu"
    if name not in NAMES:
        raise InputError(f"--projector {name!r} does not exist: choose one of auto, {', '.join(NAMES)}")
    if name == "cuda":
        importlib.import_module("drrgen.projectors.cuda").require_device()
    return name


def _has_gpu() -> bool:
    """Whether `cuda` runs here. To import torch takes seconds, so NVIDIA's driver is looked for first."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "triton")):
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return bool(importlib.import_module("drrgen.projectors.cuda").has_device())


def get(name: str) -> Projector:
    """The projector of a name that `resolve` returned."""
    return importlib.import_module(f"drrgen.projectors.{name}").prepare


def extremes(mu: NDArray[np.float32]) -> tuple[float, float]:
    """The lowest and the highest attenuation of a volume. Raises InputError where it is not finite everywhere."""
    low, high = float(mu.min()), float(mu.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError("attenuation is not finite everywhere: replace NaN and infinity in the volume")
    return low, high
