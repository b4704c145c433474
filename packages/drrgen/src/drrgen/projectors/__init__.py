"""The projectors by name. All have one signature; each is imported only when it is asked for.

A projector is given a volume once, and casts any number of batches of views of it: what it makes of the volume (other
orders of its voxels, a copy on a GPU) is made once.

    project = projectors.get(name)(mu, voxel_from_world)
    line_integrals = project(views, detector)

mu: [slice, row, column], attenuation in 1/mm, 0 outside. voxel_from_world: [4, 4], LPS mm to voxel (column, row,
slice). views: V cone-beam views. Result: float32 [view, row, column], dimensionless; rays begin at the source and run
on behind the detector, through the whole volume.
"""

import importlib
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from drrgen.errors import InputError
from drrgen.geometry import Detector, Views

NAMES = ("cpu", "siddon")


class Project(Protocol):
    """Casts views of one volume."""

    def __call__(self, views: Views, detector: Detector) -> NDArray[np.float32]: ...


class Projector(Protocol):
    """Makes a volume ready to be cast."""

    def __call__(self, mu: NDArray[np.float32], voxel_from_world: NDArray[np.float64]) -> Project: ...


def resolve(name: str) -> str:
    """`auto` becomes the fastest projector of this machine; another name stays, if there is such a projector."""
    if name == "auto":
        return "cpu"
    if name not in NAMES:
        raise InputError(f"--projector {name!r} does not exist: choose one of auto, {', '.join(NAMES)}")
    return name


def get(name: str) -> Projector:
    """The projector of a name that `resolve` returned."""
    return importlib.import_module(f"drrgen.projectors.{name}").prepare
