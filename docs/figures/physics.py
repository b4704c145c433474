"""Prints the tables of docs/rendering.md's "Attenuation", and draws its picture where there is a CT.

`python docs/figures/physics.py [CT_DIR docs/img]`
"""

import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from drrgen import attenuation, beam, body, dicom, exposure, projectors
from drrgen.geometry import PRESETS, Detector, Views

ICRP, ICRU44, TISSUE = "cortical_bone_icrp", "cortical_bone_icru44", "soft_tissue_icru44"
ENERGIES_KEV = (40, 50, 60, 70, 80, 100, 120)
# cm of water, cm of cortical bone
PATHS_CM = ((5, 0), (10, 0), (20, 0), (30, 0), (20, 1), (20, 2), (30, 2))
SHAPE = 512
VIEWS_DEG = {"PA": (0.0, 0.0), "left lateral": (90.0, 0.0)}
TIMED_VIEWS = 16
# A difference beyond this is drawn in full colour.
RANGE = 0.4


def by_energy() -> None:
    print("| keV | μw, 1/cm | k | k of ICRU-44 bone | cortical bone, 1/cm | soft tissue: formula / tissue |")
    print("|---|---|---|---|---|---|")

    def excess(material: str, energy_kev: float) -> float:
        one, water = (attenuation.material_per_mm(each, energy_kev) for each in (material, "water"))
        return float(one / water - 1)

    ct = attenuation.CT_ENERGY_KEV
    for energy_kev in ENERGIES_KEV:
        k, other = attenuation.bone_factor(energy_kev), excess(ICRU44, energy_kev) / excess(ICRU44, ct)
        water, bone = (10 * attenuation.material_per_mm(one, energy_kev) for one in ("water", ICRP))
        tissue = attenuation.mu_per_mm(1000 * excess(TISSUE, ct), energy_kev)
        off = 100 * (float(tissue / attenuation.material_per_mm(TISSUE, energy_kev)) - 1)
        print(f"| {energy_kev} | {water:.4f} | {k:.2f} | {other:.2f} | {bone:.3f} | {off:+.1f} % |")
    print(f"\nHU at {ct:g} keV:", {name: round(1000 * excess(name, ct)) for name in attenuation.DENSITY})


def by_spectrum() -> None:
    print("\n| spectrum | mean, keV | equivalent behind 10, 20, 30 cm of water, keV |")
    print("|---|---|---|")
    energies = np.linspace(150, 10, 14001)
    for name in beam.NAMES:
        one = beam.spectrum(name)
        mu = [beam.line_integrals(one, 10.0 * cm, 0.0) / (10 * cm) for cm in (10, 20, 30)]
        behind = np.interp(mu, attenuation.material_per_mm("water", energies), energies)
        print(f"| `{name}` | {one.mean_kev:.1f} | {', '.join(f'{kev:.1f}' for kev in behind)} |")


def errors() -> None:
    """Of one energy against the spectra: 60 keV, and the spectrum's own equivalent."""
    names = [f"{kev:g} keV for `{one.name}`" for one in map(beam.spectrum, beam.NAMES) for kev in _energies(one)]
    print(f"\n| water + cortical bone, cm | p of `chest120` | {' | '.join(names)} |\n|{'---|' * (len(names) + 2)}")
    ct = attenuation.CT_ENERGY_KEV
    water, bone = (float(attenuation.material_per_mm(one, ct)) for one in ("water", ICRP))
    for water_cm, bone_cm in PATHS_CM:
        # a mm of bone is one of water_part, and HU / 1000 of dense_part
        path = 10.0 * (water_cm + bone_cm), 10.0 * bone_cm * (bone / water - 1)
        cells = [f"{beam.line_integrals(beam.spectrum('chest120'), *path):.3f}"]
        for one in map(beam.spectrum, beam.NAMES):
            exact = beam.line_integrals(one, *path)
            cells += [
                f"{100 * (beam.line_integrals(beam.mono(kev), *path) / exact - 1):+.1f} %" for kev in _energies(one)
            ]
        print(f"| {water_cm} + {bone_cm} | {' | '.join(cells)} |")


def _energies(spectrum: beam.Beam) -> list[float]:
    return [60.0] if spectrum.name == "chest120" else [60.0, spectrum.equivalent_kev]


def on_a_ct(ct: Path, path: Path) -> None:
    volume = dicom.read(dicom.find_series(ct)[0])
    hu, setup = body.remove_table(volume), PRESETS["chest"]
    detector = Detector(SHAPE, setup.detector_mm / SHAPE)
    angles = np.array(list(VIEWS_DEG.values())).T
    views = Views(*angles, volume.centre_mm, setup.sdd_mm, setup.sod_mm)
    many = Views(np.arange(TIMED_VIEWS) * 5.0, np.zeros(TIMED_VIEWS), volume.centre_mm, setup.sdd_mm, setup.sod_mm)

    def prepare(one: beam.Beam, materials: bool):
        return exposure.prepare(projectors.get("cpu"), hu, volume.voxel_from_world, one, materials)

    casts = {
        "60 keV": prepare(beam.mono(60), False),
        "chest120": prepare(beam.spectrum("chest120"), False),
        "chest120 with materials": prepare(beam.spectrum("chest120"), True),
    }
    print()
    for name, cast in casts.items():
        cast(many, detector)
        began = time.perf_counter()
        cast(many, detector)
        print(f"{name}: {1000 * (time.perf_counter() - began) / TIMED_VIEWS:.1f} ms per view of {SHAPE} pixels")
    mono = casts["60 keV"](views, detector)
    stack = casts["chest120 with materials"](views, detector)
    print("\n| view | p up to | 60 keV less `chest120`: mean | rms | lowest | highest | bone's share of p |")
    print("|---|---|---|---|---|---|---|")
    for name, one, (whole, _, bone) in zip(VIEWS_DEG, mono, stack, strict=True):
        patient = whole > 0.05
        off = (one - whole)[patient]
        print(
            f"| {name} | {whole.max():.2f} | {off.mean():+.3f} | {np.sqrt((off**2).mean()):.3f} | {off.min():+.3f} "
            f"| {off.max():+.3f} | {100 * bone[patient].sum() / whole[patient].sum():.0f} % |"
        )
    _draw(mono[0], *stack[0], path)


def _draw(mono, whole, soft, bone, path: Path) -> None:
    figure, panels = plt.subplots(1, 4, figsize=(13, 3.7), layout="constrained")
    for axes, image, name in (
        (panels[0], whole, "chest120"),
        (panels[2], soft, "its soft image"),
        (panels[3], bone, "its bone image"),
    ):
        axes.imshow(image, cmap="gray", vmin=0, vmax=np.percentile(image, 99.8))
        axes.set_title(name, fontsize=10)
    shown = panels[1].imshow(mono - whole, cmap="RdBu_r", vmin=-RANGE, vmax=RANGE)
    panels[1].set_title("60 keV less chest120", fontsize=10)
    figure.colorbar(shown, ax=panels[1], shrink=0.8)
    for axes in panels:
        axes.axis("off")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    by_energy()
    by_spectrum()
    errors()
    if len(sys.argv) > 1:
        on_a_ct(Path(sys.argv[1]), Path(sys.argv[2]) / "physics.png")
