"""Makes the tables of `drrgen.attenuation` and `drrgen.beam`: `python docs/figures/physics_tables.py FOLDER`.

FOLDER is packages/drrgen/src/drrgen/data. It needs `pip install xraylib==4.3.0 spekpy==2.5.4`, and drrgen does not:
what this writes is in the package.

attenuation.csv: total mass attenuation with coherent scattering, from xraylib (Schoonjans et al. 2011, doi
10.1016/j.sab.2011.09.011), whose cross sections are NIST XCOM's; four digits, as NIST prints them. Compositions are
NIST's: of SRD 126, table 2, for the ICRU-44 tissues, and of ESTAR for water (material 276) and for cortical bone (ICRP,
material 119).

spectra.csv: the fluence of SpekPy (Poludniowski et al. 2021, doi 10.1002/mp.14945), default model, times what a
photon leaves in the detector; bins of 1 keV, relative, adding up to 1.
"""

import sys
from pathlib import Path

import numpy as np
import spekpy
import xraylib

# NIST SRD 126, table 2: shares by weight.
ICRU44 = {
    "soft_tissue_icru44": {"H": 0.102, "C": 0.143, "N": 0.034, "O": 0.708, "Na": 0.002, "P": 0.003, "S": 0.003}
    | {"Cl": 0.002, "K": 0.003},
    "cortical_bone_icru44": {"H": 0.034, "C": 0.155, "N": 0.042, "O": 0.435, "Na": 0.001, "Mg": 0.002, "P": 0.103}
    | {"S": 0.003, "Ca": 0.225},
}
ESTAR = {"water": "Water, Liquid", "cortical_bone_icrp": "Bone, Cortical (ICRP)"}
ENERGY_KEV = np.arange(10, 151)

# kVp, then mm of each filter; all with a tungsten anode of 12 degrees.
TUBES = {
    "chest120": (120, [("Al", 3.5), ("Cu", 0.1)]),
    "portable90": (90, [("Al", 3.0)]),
    "carm80": (80, [("Al", 3.0), ("Cu", 0.1)]),
}
ANODE_DEG = 12
# 0.6 mm of caesium iodide, 4.51 g/cm3, packed to 75 %.
CSI_G_PER_CM2 = 0.06 * 4.51 * 0.75


def attenuation(path: Path) -> None:
    columns = {name: [xraylib.CS_Total_CP(nist, float(kev)) for kev in ENERGY_KEV] for name, nist in ESTAR.items()}
    for name, shares in ICRU44.items():
        assert abs(sum(shares.values()) - 1) < 1e-9
        elements = [(xraylib.SymbolToAtomicNumber(symbol), share) for symbol, share in shares.items()]
        columns[name] = [sum(share * xraylib.CS_Total(z, float(kev)) for z, share in elements) for kev in ENERGY_KEV]
    rows = ["# cm2/g, NIST XCOM by xraylib 4.3.0; made by docs/figures/physics_tables.py"]
    rows.append(",".join(["energy_kev", *columns]))
    for kev, values in zip(ENERGY_KEV, zip(*columns.values(), strict=True), strict=True):
        rows.append(",".join([str(kev), *(f"{value:.4g}" for value in values)]))
    path.write_text("\n".join(rows) + "\n")


def response(energy_kev: np.ndarray, coefficient=xraylib.CS_Total_CP) -> np.ndarray:
    """What a photon leaves in the detector: its energy, if it interacts at all."""
    per_g = np.array([coefficient("CsI", float(kev)) for kev in energy_kev])
    return energy_kev * (1 - np.exp(-per_g * CSI_G_PER_CM2))


def fluence(name: str, bin_kev: float) -> tuple[np.ndarray, np.ndarray]:
    """(energies, photons) behind the filters, from 10 keV on."""
    kvp, filters = TUBES[name]
    tube = spekpy.Spek(kvp=kvp, th=ANODE_DEG, dk=bin_kev)
    tube.multi_filter(filters)
    kev, photons = tube.get_spectrum()
    return kev[kev >= ENERGY_KEV[0]], photons[kev >= ENERGY_KEV[0]]


def choices() -> None:
    """What other bins, and a detector that loses what it scatters or fluoresces, would change: p of 20 cm of water."""

    def p(bin_kev: float, coefficient=xraylib.CS_Total_CP) -> float:
        kev, photons = fluence("chest120", bin_kev)
        per_cm = np.array([xraylib.CS_Total_CP(ESTAR["water"], float(one)) for one in kev])
        seen = photons * response(kev, coefficient)
        return float(-np.log(seen @ np.exp(-20 * per_cm) / seen.sum()))

    print(f"chest120, 20 cm of water: p = {p(1):.4f}; bins of 0.5 keV {p(0.5):.4f}, of 2 keV {p(2):.4f};")
    print(f"energy absorption coefficient of CsI in the place of attenuation {p(1, xraylib.CS_Energy_CP):.4f}")


def spectra(path: Path) -> None:
    energy_kev = np.arange(10.5, max(kvp for kvp, _ in TUBES.values()))
    weights = {}
    for name in TUBES:
        kev, photons = fluence(name, 1)
        seen = photons * response(kev)
        # bins beyond the kVp are empty
        weights[name] = np.interp(energy_kev, kev, seen / seen.sum(), right=0)
    rows = ["# shares of what the detector absorbs; SpekPy 2.5.4, CsI; made by docs/figures/physics_tables.py"]
    rows.append(",".join(["energy_kev", *weights]))
    for kev, values in zip(energy_kev, zip(*weights.values(), strict=True), strict=True):
        rows.append(",".join([f"{kev:g}", *(f"{value:.7f}" for value in values)]))
    path.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    attenuation(Path(sys.argv[1]) / "attenuation.csv")
    spectra(Path(sys.argv[1]) / "spectra.csv")
    choices()
