"""Spectra and the line integrals that they give: laws, known answers, and the table against the sum."""

import math
import re

import numpy as np
import pytest
from tests.contract import schema

from drrgen import attenuation, beam
from drrgen.errors import InputError

KVP = {"chest120": 120, "portable90": 90, "carm80": 80}


def direct(of: beam.Beam, water_mm: float, dense_mm: float) -> float:
    """The sum over the lines, one after the other."""
    mu_water, factor = attenuation.water_per_mm(of.energy_kev), attenuation.bone_factor(of.energy_kev)
    intensity = 0.0
    for weight, mu_w, k in zip(of.weight, mu_water, factor, strict=True):
        intensity += weight * math.exp(-mu_w * (water_mm + k * dense_mm))
    return -math.log(intensity)


@pytest.fixture(scope="module", params=beam.NAMES)
def spectrum(request: pytest.FixtureRequest) -> beam.Beam:
    return beam.spectrum(request.param)


@pytest.fixture(scope="module")
def look_up(spectrum: beam.Beam) -> beam.LineIntegrals:
    return beam.LineIntegrals(spectrum)


def test_every_spectrum_is_one(spectrum: beam.Beam) -> None:
    assert spectrum.kvp == KVP[spectrum.name]
    assert str(KVP[spectrum.name]) in spectrum.description
    assert spectrum.weight.sum() == pytest.approx(1, abs=1e-12)
    assert (spectrum.weight > 0).all()
    # filtered, and up to the tube's voltage in bins of 1 keV without a gap
    assert (np.diff(spectrum.energy_kev) == 1).all()
    assert spectrum.energy_kev[0] > 10
    assert spectrum.energy_kev[-1] == KVP[spectrum.name] - 0.5


def test_tungstens_lines_stand_where_they_belong() -> None:
    """K alpha at 57.98 and 59.32 keV, K beta at 67.2: the tallest bins of a 120 kVp spectrum."""
    chest = beam.spectrum("chest120")
    tallest = chest.energy_kev[np.argsort(chest.weight)[::-1][:3]]
    assert set(tallest) == {57.5, 59.5, 67.5}
    # a tube of 80 kVp still has them; their K edge is at 69.5 keV
    carm = beam.spectrum("carm80")
    assert carm.weight[carm.energy_kev == 59.5] > 1.5 * carm.weight[carm.energy_kev == 61.5]


def test_the_chest_beam_is_that_of_the_design() -> None:
    """The study that chose 60 keV: mean 60.9 keV; like 53 keV without a patient, and 59 behind 20 cm of water."""
    chest = beam.spectrum("chest120")
    assert chest.mean_kev == pytest.approx(60.9, abs=0.05)
    assert chest.equivalent_kev == pytest.approx(59, abs=0.5)
    thin = beam.line_integrals(chest, 0.01, 0.0) / 0.01
    assert thin == pytest.approx(attenuation.water_per_mm(53), rel=0.01)


# cm of water, of cortical bone: percent by which 60 keV is off, as the same study printed them
@pytest.mark.parametrize(
    ("water_cm", "bone_cm", "percent"),
    [(5, 0, -4.2), (10, 0, -2.7), (20, 0, -0.5), (20, 1, 0.6), (20, 2, 2.1), (30, 2, 3.7)],
)
def test_error_of_60_kev(water_cm: float, bone_cm: float, percent: float) -> None:
    """1 mm of cortical bone is 1 mm of `water_part`, and 1.4446 mm of `dense_part`: it shows at 1445 HU.

    Two decimals of k are 0.4 % of bone, whose share is 0.2 of all at most; the study rounded to one decimal.
    """
    water_mm = 10 * (water_cm + bone_cm)
    dense_mm = 10 * bone_cm * 1.4446
    exact = direct(beam.spectrum("chest120"), water_mm, dense_mm)
    mono = direct(beam.mono(60), water_mm, dense_mm)
    assert 100 * (mono / exact - 1) == pytest.approx(percent, abs=0.15)


def test_the_documents_tables() -> None:
    """docs/rendering.md, to the digits that it prints, by the sum over the lines."""
    tables = schema.tables("rendering.md")
    header, rows = next((header, rows) for header, rows in tables.items() if header[0] == "water + cortical bone, cm")
    assert len(rows) == 7
    for path, p, *percents in rows:
        water_cm, bone_cm = map(float, path.split(" + "))
        through = 10 * (water_cm + bone_cm), 10 * bone_cm * 1.4446
        assert direct(beam.spectrum("chest120"), *through) == pytest.approx(float(p), abs=6e-4)
        for what, percent in zip(header[2:], percents, strict=True):
            energy_kev, name = re.fullmatch(r"([\d.]+) keV for `(\w+)`", what).groups()
            ratio = direct(beam.mono(float(energy_kev)), *through) / direct(beam.spectrum(name), *through)
            assert 100 * (ratio - 1) == pytest.approx(float(percent.split(" ")[0]), abs=0.06)
    header, rows = next((header, rows) for header, rows in tables.items() if header[0] == "spectrum")
    assert [row[0].strip("`") for row in rows] == list(beam.NAMES)
    for name, tube, mean, equivalent in rows:
        one = beam.spectrum(name.strip("`"))
        assert tube in f"{one.description}".replace(", tungsten anode of 12 degrees", "")
        assert one.mean_kev == pytest.approx(float(mean), abs=0.06)
        assert one.equivalent_kev == pytest.approx(float(equivalent.split(", ")[1]), abs=0.11)


def test_one_line_is_the_formula() -> None:
    """A spectrum of one line attenuates as the mono-energetic formula; float32, and 24 bits of a table's nodes."""
    water_mm, dense_mm = np.float32([0, 10, 333.3, 800]), np.float32([0, 7, 50.05, 0])
    expected = 0.02059 * (water_mm + 1.24 * dense_mm)
    assert beam.LineIntegrals(beam.mono(60))(water_mm, dense_mm) == pytest.approx(expected, rel=1e-6, abs=4e-6)


def test_the_package_sums_as_the_twin_does(spectrum: beam.Beam) -> None:
    for water_mm, dense_mm in ((0.0, 0.0), (3.0, 0.5), (200.0, 30.0), (600.0, 150.0)):
        assert beam.line_integrals(spectrum, water_mm, dense_mm) == pytest.approx(
            direct(spectrum, water_mm, dense_mm), rel=1e-12, abs=1e-12
        )


def test_the_table_is_within_1e_5_of_the_sum(spectrum: beam.Beam, look_up: beam.LineIntegrals) -> None:
    """A 24th of a stored step. The error is largest half-way between nodes, where almost nothing attenuates."""
    rng = np.random.default_rng(0)
    water_mm = np.concatenate([rng.uniform(0, 900, 500), rng.uniform(0, 30, 500), [0.25, 0.25, 0, 0, 900, -0.2]])
    dense_mm = np.concatenate([rng.uniform(0, 200, 500), rng.uniform(0, 3, 500), [0.05, 0, 0.05, 0, 200, 0]])
    exact = [direct(spectrum, *each) for each in zip(np.float32(water_mm), np.float32(dense_mm), strict=True)]
    found = look_up(np.float32(water_mm), np.float32(dense_mm))
    assert found.dtype == np.float32
    assert np.abs(found - exact).max() < 1e-5


def test_beyond_the_table_nothing_breaks(spectrum: beam.Beam, look_up: beam.LineIntegrals) -> None:
    """More water than the table holds is beyond the stored scale. More bone than 14 cm goes on as a straight line, too
    steep by less than 2 % at half as much again."""
    assert look_up(np.float32([900, 1200, 1e6]), np.zeros(3, np.float32)).min() > 16
    found = look_up(np.float32([300]), np.float32([300])).item()
    assert direct(spectrum, 300, 300) < found < 1.02 * direct(spectrum, 300, 300)


def test_more_matter_attenuates_more_and_hardens_the_beam(spectrum: beam.Beam, look_up: beam.LineIntegrals) -> None:
    """Along both axes: p grows from 0, and the attenuation per mm falls."""
    assert look_up(np.zeros(1, np.float32), np.zeros(1, np.float32)).item() == pytest.approx(0, abs=1e-6)
    # 3 mm apart: float32 would hide what smaller steps change of the slope
    thickness_mm = np.arange(0, 198, 3, dtype=np.float32)
    for water, dense in ((1, 0), (0, 1), (1, 0.5)):
        p = look_up(np.float32(water) * thickness_mm, np.float32(dense) * thickness_mm)
        assert (np.diff(p) > 0).all()
        assert (np.diff(p[1:] / thickness_mm[1:]) < 0).all()


def test_images_keep_their_shape(look_up: beam.LineIntegrals) -> None:
    """Rows that are no contiguous memory, too."""
    water_mm = np.linspace(0, 300, 24, dtype=np.float32).reshape(2, 3, 4)
    turned = look_up(water_mm.swapaxes(0, 2), np.zeros((4, 3, 2), np.float32))
    assert np.array_equal(turned.swapaxes(0, 2), look_up(water_mm, np.zeros_like(water_mm)))


def test_equivalent_energies_attenuate_alike(spectrum: beam.Beam) -> None:
    """200 mm of water: 0.1 keV is at most 0.2 % at 50 keV."""
    equivalent = 200 * attenuation.water_per_mm(spectrum.equivalent_kev)
    assert equivalent == pytest.approx(direct(spectrum, 200, 0), rel=1e-3)
    assert beam.mono(72.5).equivalent_kev == 72.5


@pytest.mark.parametrize("energy_kev", [9.9, 150.1, 0, -60, math.nan, math.inf])
def test_energies_beyond_the_tables_are_refused(energy_kev: float) -> None:
    with pytest.raises(InputError, match="10 to 150 keV"):
        beam.mono(energy_kev)


def test_unknown_spectra_are_refused_with_the_choices() -> None:
    with pytest.raises(InputError, match="chest120, portable90, carm80"):
        beam.spectrum("chest121")


@pytest.mark.parametrize("energy_kev", [10.0, 60.0, 150.0])
def test_one_energy_is_a_straight_line_however_thick(energy_kev: float) -> None:
    """900 mm of water at 10 keV leave 10^-208 of the beam, and bone before it nothing that float64 knows."""
    water_mm, dense_mm = np.float32([0, 1, 900]), np.float32([0, 200, 200])
    expected = attenuation.water_per_mm(energy_kev) * (water_mm + attenuation.bone_factor(energy_kev) * dense_mm)
    assert np.allclose(beam.LineIntegrals(beam.mono(energy_kev))(water_mm, dense_mm), expected, rtol=1e-6)
