"""A volume in a beam: plates of known thickness, and the laws of the soft and the bone image."""

import numpy as np
import pytest

from drrgen import anatomy, beam, exposure, phantom, projectors
from drrgen.geometry import Detector, Views

ABOVE = Views(np.array([0.0]), np.array([90.0]), np.zeros(3), 1e6, 9e5)
# one pixel in the middle: its ray is perpendicular to the plates
CENTRE = Detector(1, 1.0)
BEAMS = [beam.mono(60), beam.mono(81.5), beam.spectrum("chest120"), beam.spectrum("carm80")]


def by_name(one: beam.Beam) -> str:
    return one.name


def plates(water_mm: int, bone_mm: int, bone_hu: int):
    """(hu, voxel_from_world): slices of 1 mm, air around them, bone on water."""
    column = np.full(water_mm + bone_mm + 20, -1000, np.int16)
    column[10 : 10 + water_mm] = 0
    column[10 + water_mm : 10 + water_mm + bone_mm] = bone_hu
    hu = np.broadcast_to(column[:, None, None], (len(column), 9, 9)).copy()
    voxel_from_world = np.eye(4)
    voxel_from_world[:3, 3] = 4, 4, len(column) / 2
    return hu, voxel_from_world


@pytest.mark.parametrize("name", projectors.NAMES)
@pytest.mark.parametrize("of", BEAMS, ids=by_name)
def test_plates_of_water_and_bone(name: str, of: beam.Beam) -> None:
    """150 mm of water and 12 mm of 1200 HU. `cpu` rounds voxels to 1/16382 of the largest attenuation, 0.052 / mm: up
    to 1.6e-6 / mm along 162 mm, which is 2.6e-4. The table's 1e-5 are small beside it."""
    cast = exposure.prepare(projectors.get(name), *plates(150, 12, 1200), of)
    expected = -np.log(of.weight @ np.exp(-of.water_per_mm * (162 + of.bone_factor * 12 * 1.2)))
    assert cast(ABOVE, CENTRE)[0, 0, 0] == pytest.approx(expected, abs=2.7e-4)


@pytest.mark.parametrize("of", BEAMS, ids=by_name)
def test_the_soft_image_is_that_of_a_patient_without_bone(of: beam.Beam) -> None:
    """The same volume with HU above 0 set to 0, in the same beam; bone is what is missing to the whole."""
    chest = phantom.voxelise(anatomy.thorax(1), (24, 32, 32), (12.0, 12.0, 14.0))
    views = Views(np.array([0.0, 70.0]), np.array([0.0, 20.0]), chest.centre_mm, 1800.0, 1640.0)
    detector = Detector(32, 432 / 32)
    cast, frame = projectors.get("siddon"), chest.voxel_from_world
    whole, soft, bone = np.moveaxis(exposure.prepare(cast, chest.hu, frame, of, materials=True)(views, detector), 1, 0)
    # the table's 1e-5 twice: one energy is cast without it
    without = exposure.prepare(cast, np.minimum(chest.hu, 0), frame, of)(views, detector)
    assert np.abs(soft - without).max() < 2e-5
    assert np.abs(whole - exposure.prepare(cast, chest.hu, frame, of)(views, detector)).max() < 2e-5
    assert np.abs(whole - soft - bone).max() < 2e-6
    assert bone.min() >= 0
    assert bone.max() > 0.5


def test_what_holds_no_bone_has_an_empty_bone_image() -> None:
    stack = exposure.prepare(projectors.get("cpu"), *plates(100, 0, 0), beam.spectrum("chest120"), materials=True)
    whole, soft, bone = stack(ABOVE, CENTRE)[0, :, 0, 0]
    assert bone == 0
    assert whole == soft > 2


def test_no_image_is_negative() -> None:
    """What is stored below 0 becomes 0, and then soft and bone no longer add up to the whole: a shard is refused.

    Sums of `cpu` cancel in float32, down to -6e-5 beside this cube of noise; to -5e-4, two steps, beside 200 voxels.
    """
    hu = np.full((60, 60, 60), -1000, np.int16)
    hu[6:-6, 6:-6, 6:-6] = np.random.default_rng(0).integers(-100, 3000, (48, 48, 48))
    views = Views(np.array([-70.0, 10, 40]), np.array([66.0, 30, 5]), np.full(3, 29.5), 1800.0, 1640.0)
    cast = exposure.prepare(projectors.get("cpu"), hu, np.eye(4), beam.spectrum("chest120"), materials=True)
    # the shares of the spectrum's lines add up to 1 within 1e-15
    assert cast(views, Detector(256, 0.5)).min() >= -1e-12
