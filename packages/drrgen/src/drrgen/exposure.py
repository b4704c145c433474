"""A volume exposed to a beam: what a projector casts, and how casts become line integrals."""

import numpy as np
from numpy.typing import NDArray

from drrgen import attenuation
from drrgen.beam import Beam, LineIntegrals
from drrgen.geometry import Detector, Float, Views
from drrgen.projectors import Project, Projector


def prepare(
    projector: Projector, hu: NDArray[np.int16], voxel_from_world: Float, beam: Beam, materials: bool = False
) -> Project:
    """The volume, [slice, row, column], made ready to be cast in this beam.

    Result: line integrals [view, row, column]; with materials [view, 3, row, column]: the whole and its two summands,
    soft and bone. The soft image is what the beam would show if nothing attenuated more than water, HU above 0 being 0;
    the bone image is the rest. One energy without materials is one cast; all else casts two volumes, and holds both.
    """
    if not beam.is_spectrum and not materials:
        return projector(attenuation.mu_per_mm(hu, float(beam.energy_kev[0])), voxel_from_world)
    cast_water = projector(attenuation.water_part(hu), voxel_from_world)
    cast_dense = projector(attenuation.dense_part(hu), voxel_from_world)
    look_up = LineIntegrals(beam)

    def project(views: Views, detector: Detector) -> NDArray[np.float32]:
        water_mm, dense_mm = cast_water(views, detector), cast_dense(views, detector)
        for part_mm in (water_mm, dense_mm):
            # nothing is negative, but `cpu` adds changes that cancel in float32, and may end a little below 0
            np.maximum(part_mm, 0, out=part_mm)
        whole = look_up(water_mm, dense_mm)
        if not materials:
            return whole
        soft = look_up(water_mm, np.zeros_like(dense_mm))
        return np.stack([whole, soft, whole - soft], axis=1)

    return project
