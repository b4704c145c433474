"""The table goes, the patient stays."""

from pathlib import Path

import numpy as np
import pytest
from tests.drrgen.volumes import volume

from drrgen import anatomy, body, dicom, phantom
from drrgen.defects import SeriesRejected

SHAPE, SPACING_MM = (68, 200, 200), (2.0, 2.0, 5.0)


@pytest.mark.parametrize("seed", range(3))
def test_a_phantom_on_a_table_becomes_the_phantom(seed: int) -> None:
    """The truth is the same patient without a table: nothing of the body may go, and nothing of the table stay.

    The outermost slices, which the phantom's flat ends fill by a fraction, are no anatomy and left out.
    """
    alone = phantom.voxelise(anatomy.thorax(seed), SHAPE, SPACING_MM).hu
    on_table = phantom.voxelise(anatomy.thorax(seed, table=True), SHAPE, SPACING_MM)
    assert (on_table.hu != alone).sum() > 1000
    cleaned = body.remove_table(on_table)
    between = slice(5, -5)
    inside = alone[between] > -300
    # where skin and table meet, a voxel may hold some of both
    assert (cleaned[between][inside] == alone[between][inside]).mean() > 0.9995
    assert (cleaned.astype(int) - alone > 100).sum() < 1e-3 * inside.sum()


def test_lungs_stay() -> None:
    patient = phantom.voxelise(anatomy.thorax(0), SHAPE, SPACING_MM)
    lungs = (patient.hu > -950) & (patient.hu < -700)
    assert body.body_mask(patient)[lungs].mean() > 0.98


def test_air_alone_is_refused() -> None:
    empty = volume()
    with pytest.raises(SeriesRejected, match="keep-table"):
        body.body_mask(empty.with_hu(np.full_like(empty.hu, -1000)))


def test_the_table_of_another_scanner_goes(real_data: Path) -> None:
    """Lung-Dx A0001 lies on a deep metal trough with a rail below it, and wears a lead: air remains behind the back."""
    patient = dicom.read(dicom.find_series(real_data / "lung-dx-a0001")[0])
    mask = body.body_mask(patient)
    assert ((patient.hu > -300) & ~mask)[:, 470:].any()
    assert not mask[:, 470:].any()
    assert 15 < mask.sum() * np.prod(patient.spacing_mm) * 1e-6 < 35


def test_real_table_goes_and_real_patient_stays(real_data: Path) -> None:
    """Behind the back of LIDC-IDRI-0001 the table lies 12 mm and more below the skin, over the whole length."""
    patient = dicom.read(dicom.find_series(real_data / "lidc-idri-0001")[0])
    mask = body.body_mask(patient)
    tissue_behind = (patient.hu > -300) & ~mask
    rows = np.flatnonzero(tissue_behind.any(axis=(0, 2)))
    assert rows.max() > 400  # the table is there
    assert not mask[:, 460:].any()  # and gone
    trunk_volume_l = mask.sum() * np.prod(patient.spacing_mm) * 1e-6
    assert 15 < trunk_volume_l < 35
