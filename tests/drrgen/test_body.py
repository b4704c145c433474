"""Table, mattress, blanket and rails go; the patient stays, arms, lungs and all."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from tests.drrgen.volumes import volume

from drrgen import anatomy, body, dicom, phantom
from drrgen.defects import SeriesRejected
from drrgen.volume import Volume

SHAPE, SPACING_MM = (68, 200, 200), (2.0, 2.0, 5.0)
# The outermost slices, which the phantom's flat ends fill by a fraction, are no anatomy and left out.
BETWEEN = slice(5, -5)


@cache
def naked(seed: int) -> Volume:
    return phantom.voxelise(anatomy.thorax(seed), SHAPE, SPACING_MM)


@cache
def bedded(seed: int) -> Volume:
    return phantom.voxelise(anatomy.thorax(seed, table=True), SHAPE, SPACING_MM)


def inside_skin(patient: Volume) -> np.ndarray:
    return np.stack([ndimage.binary_fill_holes(image) for image in patient.hu > -300])


def distance_mm(mask: np.ndarray) -> np.ndarray:
    """In plane, from the mask to every voxel; 999 in slices without any."""
    return np.stack(
        [ndimage.distance_transform_edt(~image) * SPACING_MM[0] if image.any() else image + 999.0 for image in mask]
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_phantom_on_a_table_becomes_the_phantom(seed: int) -> None:
    """The truth is the same patient without a table: nothing of the body may go, and nothing of the table stay."""
    alone = naked(seed).hu
    on_table = bedded(seed)
    assert (on_table.hu != alone).sum() > 1000
    cleaned = body.remove_table(on_table)
    inside = alone[BETWEEN] > -300
    # where skin and table meet, a voxel may hold some of both
    assert (cleaned[BETWEEN][inside] == alone[BETWEEN][inside]).mean() > 0.9995
    assert (cleaned.astype(int) - alone > 100).sum() < 1e-3 * inside.sum()


@pytest.mark.parametrize("seed", range(2))
def test_a_blanket_goes(seed: int) -> None:
    """3 mm of cloth at -100 HU, in folds 5 to 30 mm off the skin, all over the front."""
    alone = naked(seed)
    skin = inside_skin(alone)
    columns_mm = np.arange(SHAPE[2]) * SPACING_MM[0]
    off_skin_mm = distance_mm(skin) - (17.5 + 12.5 * np.sin(2 * np.pi * columns_mm / 120))
    blanket = (np.abs(off_skin_mm) <= 1.5) & ~skin
    blanket[:, SHAPE[1] // 2 :] = False
    assert blanket.sum() > 10_000
    mask = body.body_mask(alone.with_hu(np.where(blanket, np.int16(-100), alone.hu)))
    # the skin is grown by 3 mm: voxels of folds 3.5 mm away may just be reached where the mask is a voxel too large
    assert mask[BETWEEN][blanket[BETWEEN]].mean() < 1e-3
    # fat of the outermost voxels that is thinner than a shell may go
    assert mask[BETWEEN][skin[BETWEEN]].mean() > 0.9995


@pytest.mark.parametrize("seed", range(2))
def test_a_mattress_goes(seed: int) -> None:
    """30 mm of foam, -950 to -700 HU, that touches the back, in a cover of 2 mm, on a plate as dense as bone."""
    alone = naked(seed)
    skin = inside_skin(alone)
    off_skin_mm = distance_mm(skin)
    below = ~skin & (np.arange(SHAPE[1]) > SHAPE[1] // 2)[:, None]
    foam, cover = below & (off_skin_mm <= 30), below & (off_skin_mm > 30) & (off_skin_mm <= 32)
    plate = below & (off_skin_mm > 32) & (off_skin_mm <= 36)
    noise = np.random.default_rng(seed).integers(-950, -700, SHAPE).astype(np.int16)
    on_foam = np.select([plate, cover, foam], [np.int16(800), np.int16(-100), noise], alone.hu)
    mask = body.body_mask(alone.with_hu(on_foam))
    # the skin is grown by 3 mm, 1.5 voxels; one voxel more is the mask's own grid
    assert not mask[BETWEEN][(below & (off_skin_mm > 5))[BETWEEN]].any()
    assert mask[BETWEEN][skin[BETWEEN]].mean() > 0.9995


@pytest.mark.parametrize("radius_mm", [22.0, 38.0])
def test_arms_stay_and_a_rail_goes(radius_mm: float) -> None:
    """Both lie apart from the trunk; an arm is a thick round thing, a wrist 44 mm, and a rail is a flat one, 16 mm."""
    patient = anatomy.thorax(1)
    middle = patient.isocentre_mm
    arms = [phantom.ellipsoid(50, middle + [side * 250, 30, 0], (radius_mm, radius_mm, 2000)) for side in (-1, 1)]
    bones = [phantom.ellipsoid(800, arm.centre_mm, (10, 10, 2000)) for arm in arms]
    rail = phantom.ellipsoid(100, middle + [0, 190, 0], (150, 8, 2000))
    shape, spacing_mm = (68, 200, 200), (3.0, 3.0, 5.0)

    def voxels(*parts: phantom.Ellipsoid) -> Volume:
        return phantom.voxelise(replace(patient, ellipsoids=parts), shape, spacing_mm, supersample=1)

    mask = body.body_mask(voxels(*arms, *bones, rail, *patient.ellipsoids))
    caps = patient.ellipsoids[-2:]  # the air above and below the patient
    assert mask[BETWEEN][voxels(*arms, *caps).hu[BETWEEN] > -300].mean() > 0.9995
    assert not mask[voxels(rail, *caps).hu > -300].any()


@pytest.mark.parametrize("axis", range(3))
def test_patients_lie_as_they_like(axis: int) -> None:
    """Slices may go up or down, the patient lie on back or belly: the flipped volume has the flipped mask, exactly."""
    on_table = bedded(2)
    world_from_voxel = on_table.world_from_voxel.copy()
    world_from_voxel[:3, 2 - axis] *= -1
    flipped = replace(on_table, hu=np.flip(on_table.hu, axis), world_from_voxel=world_from_voxel)
    mask = body.body_mask(on_table)
    assert not np.array_equal(mask, np.flip(mask, axis))
    assert np.array_equal(body.body_mask(flipped), np.flip(mask, axis))


def test_thin_slices_have_the_mask_of_thick_ones() -> None:
    """0.625 mm: two of three slices lie between those that are looked at. Each thick slice becomes eight thin ones."""
    on_table = bedded(2)
    finer = np.diag([1, 1, 1 / 8, 1])
    thin = replace(on_table, hu=on_table.hu.repeat(8, axis=0), world_from_voxel=on_table.world_from_voxel @ finer)
    thick_mask = body.body_mask(on_table).repeat(8, axis=0)
    thin_mask = body.body_mask(thin)
    # between two that were looked at, a slice has the skin of both: nothing goes, and near shoulders a little stays
    assert thin_mask[thick_mask].all()
    assert (thin_mask & ~thick_mask).sum() < 0.02 * thick_mask.sum()


def test_outside_is_air_and_inside_is_untouched() -> None:
    on_table = bedded(0)
    noisy = on_table.with_hu(on_table.hu + np.random.default_rng(0).normal(0, 20, SHAPE).astype(np.int16))
    mask, cleaned = body.body_mask(noisy), body.remove_table(noisy)
    assert cleaned.dtype == np.int16
    assert (noisy.hu[~mask] != -1000).any()
    assert (cleaned[~mask] == -1000).all()
    assert np.array_equal(cleaned[mask], noisy.hu[mask])


def lungs_of(patient: Volume) -> np.ndarray:
    """Without the airways."""
    return (patient.hu > -950) & (patient.hu < -700)


def test_lungs_stay() -> None:
    patient = naked(0)
    # partial voxels of the skin have the HU of lungs, too
    assert body.body_mask(patient)[lungs_of(patient)].mean() > 0.98


def test_lungs_stay_behind_a_thin_wall() -> None:
    """A furrow, 12 mm wide and over the whole height, leaves 4 mm of wall, no more than a shell."""
    patient = naked(0)
    lungs = ndimage.binary_opening(lungs_of(patient), np.ones((1, 5, 5)))
    furrow = inside_skin(patient) & (distance_mm(lungs) > 4)
    furrow &= (np.abs(np.arange(SHAPE[1]) - SHAPE[1] // 2) <= 3)[:, None]
    furrow &= (np.abs(np.arange(SHAPE[2]) - SHAPE[2] // 2) * SPACING_MM[0] > 100) & lungs.any(
        axis=(1, 2), keepdims=True
    )
    assert furrow.sum() > 1000
    mask = body.body_mask(patient.with_hu(np.where(furrow, np.int16(-1000), patient.hu)))
    # the tips in the first and last slices are narrower than the leak
    assert mask[lungs].mean() > 0.998


def test_lungs_stay_in_a_circle_that_cuts_them() -> None:
    """The field of view is 248 mm; beyond its circle are no data, and no wall."""
    patient = naked(0)
    lungs = ndimage.binary_opening(lungs_of(patient), np.ones((1, 5, 5)))
    middle = slice(100 - 62, 100 + 62)
    y, x = np.ogrid[-61.5:62, -61.5:62]
    circle = np.hypot(y, x) <= 62
    cut = replace(patient, hu=np.where(circle, patient.hu[:, middle, middle], np.int16(-1000)))
    lungs = lungs[:, middle, middle] & circle
    cut_open = (lungs & (np.hypot(y, x) > 61)).any(axis=(1, 2))
    assert cut_open.sum() > 10
    # what is cut off from the rest by the circle, or wide open, may go: slivers
    assert body.body_mask(cut)[lungs].mean() > 0.97


def test_air_alone_is_refused() -> None:
    empty = volume()
    with pytest.raises(SeriesRejected, match="keep-table"):
        body.body_mask(empty.with_hu(np.full_like(empty.hu, -1000)))


@pytest.mark.parametrize(("name", "table_row"), [("lidc-idri-0001", 452), ("lung-dx-a0001", 470)])
def test_a_real_table_goes_and_the_real_patient_stays(real_data: Path, name: str, table_row: int) -> None:
    """LIDC-IDRI-0001 lies on a mattress on a curved plate; Lung-Dx A0001 on a deep metal trough with a rail below it.

    table_row: seen by eye, a row that both tables reach and neither patient does.
    """
    patient = dicom.read(dicom.find_series(real_data / name)[0])
    mask = body.body_mask(patient)
    tissue = patient.hu > -300
    assert (tissue & ~mask)[:, table_row:].any()  # the table is there
    assert not mask[:, table_row:].any()  # and gone

    # the trunk of an adult, arms up, from the neck to the kidneys: half of 50 to 80 kg, lungs included
    assert 15 < mask.sum() * np.prod(patient.spacing_mm) * 1e-6 < 35
    assert ndimage.label(mask)[1] == 1

    # the body again, by another way: the largest part of what is tissue-like on squares of 10 mm
    coarse = np.s_[:, ::2, ::2]
    size = round(10 / (2 * patient.spacing_mm[0]))
    labels, _ = ndimage.label(ndimage.binary_opening(tissue[coarse], np.ones((1, size, size))))
    thick = labels == np.bincount(labels.ravel())[1:].argmax() + 1
    assert mask[coarse][thick].mean() > 0.9995
    # behind it there is skin only, and what touches it; one column in a hundred, at the sides, holds no square
    back, last = last_row(thick), last_row((tissue & mask)[coarse])
    behind_mm = (last - back)[(back >= 0) & (last >= 0)] * 2 * patient.spacing_mm[1]
    assert np.percentile(behind_mm, 99) < 10


def last_row(mask: np.ndarray) -> np.ndarray:
    """[slice, column], -1 where there is none."""
    rows = mask.shape[1]
    return np.where(mask.any(axis=1), rows - 1 - mask[:, ::-1].argmax(axis=1), -1)


@pytest.mark.parametrize("axes", [(1, 0, 2), (2, 0, 1), (2, 1, 0)])
def test_the_same_patient_stored_as_coronal_or_sagittal_slices(axes: tuple[int, int, int]) -> None:
    """The mask is found on axial slices, whichever axis of the array they lie along."""
    axial = phantom.voxelise(anatomy.thorax(0, table=True), SHAPE, SPACING_MM)
    turn = np.eye(4)[[2 - axis for axis in reversed(axes)] + [3]].T
    stored = Volume(axial.hu.transpose(axes), axial.world_from_voxel @ turn, axial.origin)
    assert np.allclose(stored.centre_mm, axial.centre_mm)
    assert np.array_equal(body.body_mask(stored), body.body_mask(axial).transpose(axes))
