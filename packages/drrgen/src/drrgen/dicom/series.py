"""What an index finds: slices with their geometry, files that cannot be used, and the series that both make."""

from dataclasses import dataclass
from pathlib import Path

from drrgen.defects import Defect
from drrgen.volume import Origin


@dataclass(frozen=True, slots=True)
class Slice:
    """One file's geometry: position [3] and orientation [6] in LPS, spacing (between rows, between columns) in mm."""

    path: Path
    sop_uid: str
    position_mm: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing_mm: tuple[float, ...]
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Unusable:
    """A file that is no usable slice, and why."""

    path: Path
    defect: Defect


@dataclass(frozen=True)
class Series:
    """The CT files that share a SeriesInstanceUID, in no order.

    origins: more than one where its files disagree whose they are. unusable: its own files, and unreadable ones that
    lie in its folder alone, so probably are slices of it.
    """

    origins: tuple[Origin, ...]
    slices: tuple[Slice, ...]
    unusable: tuple[Unusable, ...] = ()

    @property
    def origin(self) -> Origin:
        return self.origins[0]

    @property
    def num_files(self) -> int:
        return len(self.slices) + len(self.unusable)

    @property
    def folder(self) -> Path:
        """Of its first file, by name."""
        return min([one.path for one in self.slices] + [one.path for one in self.unusable]).parent
