"""The settings that decide what is in a shard: one frozen value, checked once, kept in every shard as JSON."""

import json
from dataclasses import asdict, dataclass
from itertools import pairwise

from drrgen import grid, projectors
from drrgen.errors import InputError
from drrgen.geometry import PRESETS, Detector, Setup

MIN_LEVEL = 64
MAX_SIZE = 4096


@dataclass(frozen=True)
class RenderConfig:
    """All that a shard depends on beside the CT. `levels`, from the largest on; None for every halving down to 64.

    dataset, licence, attribution: of CTs that do not say themselves where they come from.
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

    def __post_init__(self) -> None:
        if not 1 <= self.size <= MAX_SIZE:
            raise InputError(f"--size {self.size}: choose 1 to {MAX_SIZE} pixels")
        if self.geometry not in PRESETS:
            raise InputError(f"--geometry {self.geometry!r} does not exist: choose one of {', '.join(PRESETS)}")
        object.__setattr__(self, "projector", projectors.resolve(self.projector))
        levels = _halvings(self.size) if self.levels is None else tuple(sorted(self.levels, reverse=True))
        if levels[:1] != (self.size,) or any(a != 2 * b for a, b in pairwise(levels)):
            raise InputError(
                f"--levels {','.join(map(str, levels))}: name the size {self.size} and its halves down to the smallest"
                f" level wanted, e.g. {','.join(map(str, _halvings(self.size)))}"
            )
        object.__setattr__(self, "levels", levels)
        grid.directions(self.grid, self.azimuth, self.elevation)

    @property
    def setup(self) -> Setup:
        return PRESETS[self.geometry]

    @property
    def detectors(self) -> list[Detector]:
        """One detector per level, the largest first."""
        return [Detector(size, self.setup.detector_mm / size) for size in self.levels or ()]

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"setup": asdict(self.setup)}, sort_keys=True)


def _halvings(size: int) -> tuple[int, ...]:
    levels = [size]
    while levels[-1] % 2 == 0 and levels[-1] // 2 >= MIN_LEVEL:
        levels.append(levels[-1] // 2)
    return tuple(levels)
