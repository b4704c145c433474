"""The settings that decide what is in a shard: one frozen value, checked once, kept in every shard as JSON."""

import json
from dataclasses import asdict, dataclass
from itertools import pairwise

from drrgen import beam, chunks, grid, projectors
from drrgen.attenuation import ENERGY_KEV
from drrgen.beam import Beam
from drrgen.errors import InputError
from drrgen.geometry import PRESETS, Detector, Setup

MIN_LEVEL = 64
MAX_SIZE = 4096
# What the first version did before there were settings for it.
_LATER = {"energy_kev": 60.0, "spectrum": None, "materials": False, "compression": "deflate"}


@dataclass(frozen=True)
class RenderConfig:
    """All that a shard depends on beside the CT. `levels`, from the largest on; None for every halving down to 64.

    energy_kev: None for 60 keV, or where a spectrum is named. dataset, licence, attribution: of CTs that do not say
    themselves where they come from.
    """

    grid: str = "5deg"
    azimuth: str = "-180:180"
    elevation: str = "-90:90"
    size: int = 512
    levels: tuple[int, ...] | None = None
    geometry: str = "chest"
    projector: str = "auto"
    keep_table: bool = False
    dataset: str | None = None
    licence: str | None = None
    attribution: str | None = None
    energy_kev: float | None = None
    spectrum: str | None = None
    materials: bool = False
    compression: str = "deflate"

    def __post_init__(self) -> None:
        if not 1 <= self.size <= MAX_SIZE:
            raise InputError(f"--size {self.size}: choose 1 to {MAX_SIZE} pixels")
        if self.geometry not in PRESETS:
            raise InputError(f"--geometry {self.geometry!r} does not exist: choose one of {', '.join(PRESETS)}")
        if self.compression not in chunks.FILTERS:
            known = ", ".join(chunks.FILTERS)
            raise InputError(f"--compression {self.compression!r} does not exist: choose one of {known}")
        chunks.require(self.compression)
        object.__setattr__(self, "projector", projectors.resolve(self.projector))
        levels = _halvings(self.size) if self.levels is None else tuple(sorted(self.levels, reverse=True))
        if levels[:1] != (self.size,) or any(a != 2 * b for a, b in pairwise(levels)):
            raise InputError(
                f"--levels {','.join(map(str, levels))}: name the size {self.size} and its halves down to the smallest"
                f" level wanted, e.g. {','.join(map(str, _halvings(self.size)))}"
            )
        object.__setattr__(self, "levels", levels)
        if self.spectrum is None:
            object.__setattr__(self, "energy_kev", float(ENERGY_KEV if self.energy_kev is None else self.energy_kev))
        elif self.energy_kev is not None:
            raise InputError(f"--energy {self.energy_kev:g} and --spectrum {self.spectrum}: choose one of them")
        _ = self.beam  # raises where there is none
        grid.directions(self.grid, self.azimuth, self.elevation)

    @property
    def setup(self) -> Setup:
        return PRESETS[self.geometry]

    @property
    def detectors(self) -> list[Detector]:
        """One detector per level, the largest first."""
        return [Detector(size, self.setup.detector_mm / size) for size in self.levels or ()]

    @property
    def beam(self) -> Beam:
        return beam.mono(self.energy_kev) if self.energy_kev is not None else beam.spectrum(str(self.spectrum))

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"setup": asdict(self.setup)}, sort_keys=True)

    def made(self, config_json: str, of_other_cts: bool = False) -> bool:
        """Whether a shard's settings are these; a setting that did not exist when it was made had its default.

        of_other_cts: whether it may be said to come from somewhere else.
        """
        ours = json.loads(self.to_json())
        its_own = {name: ours[name] for name in ("dataset", "licence", "attribution") if of_other_cts}
        try:
            return bool(_LATER | json.loads(config_json) | its_own == ours)
        except (TypeError, ValueError):
            return False


def _halvings(size: int) -> tuple[int, ...]:
    levels = [size]
    while levels[-1] % 2 == 0 and levels[-1] // 2 >= MIN_LEVEL:
        levels.append(levels[-1] // 2)
    return tuple(levels)
