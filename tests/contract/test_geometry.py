"""Both packages compute the worked rows of docs/geometry.md."""

import numpy as np
import pytest
import torch
from tests.contract import schema

import drrgen.geometry
import svdrr.pose

ISOCENTRE_MM = np.array([10.0, -20.0, 30.0])
ROWS = schema.worked_rows()
# the document prints three decimals
TOLERANCE = 6e-4


def test_there_are_rows_for_all_the_named_views() -> None:
    angles = {(row.azimuth_deg, row.elevation_deg) for row in ROWS}
    assert {(0, 0), (90, 0), (-90, 0), (180, 0)} <= angles
    assert len(angles) >= 8


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.azimuth_deg:g},{row.elevation_deg:g}")
def test_drrgen(row: schema.WorkedRow) -> None:
    setup = drrgen.geometry.PRESETS["chest"]
    angles = np.array([row.azimuth_deg]), np.array([row.elevation_deg])
    views = drrgen.geometry.Views(*angles, ISOCENTRE_MM, setup.sdd_mm, setup.sod_mm)
    detector = drrgen.geometry.Detector(512, setup.detector_mm / 512)
    assert views.source_mm[0] == pytest.approx(row.source_mm, abs=TOLERANCE)
    pixel = drrgen.geometry.project(views.projection(detector)[0], row.point_mm)
    assert pixel == pytest.approx(row.pixel, abs=TOLERANCE)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.azimuth_deg:g},{row.elevation_deg:g}")
def test_svdrr(row: schema.WorkedRow) -> None:
    """svdrr speaks of places relative to the isocentre."""
    numbers = [row.azimuth_deg, row.elevation_deg, 1800.0, 1640.0, 432.0]
    views = svdrr.pose.Views(*(torch.tensor([number], dtype=torch.float64) for number in numbers))
    source_mm = svdrr.pose.source_from_isocentre_mm(views)[0].numpy() + ISOCENTRE_MM
    assert source_mm == pytest.approx(row.source_mm, abs=TOLERANCE)
    matrix = svdrr.pose.projection(views, 512)[0].numpy()
    column, row_number, depth = matrix @ [*(np.array(row.point_mm) - ISOCENTRE_MM), 1]
    assert (column / depth, row_number / depth) == pytest.approx(row.pixel, abs=TOLERANCE)
