"""Which series lie in a folder: any layout, headers only, and the second time without opening a file."""

import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from tests.drrgen import damage
from tests.drrgen.volumes import volume

from drrgen import dicom
from drrgen.defects import SeriesRejected
from drrgen.dicom import cache, headers, index
from drrgen.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dicom.write_series(tmp_path / "ct" / "series", volume(), "test")
    return tmp_path / "ct" / "series"


def number_of_slices(directory: Path) -> list[int]:
    return [len(one.slices) for one in dicom.find_series(directory)]


@pytest.mark.parametrize(
    "layout",
    [
        "LIDC-IDRI/LIDC-IDRI-0001/{study}/{series}/{number:06d}.dcm",  # old TCIA
        "LIDC-IDRI/LIDC-IDRI-0001/01-01-2000-30178/3000566-03192/{number:06d}.dcm",  # 2018
        "manifest-1/LIDC-IDRI/LIDC-IDRI-0001/01-01-2000-NA-NA-30178/3000566.000000-NA-03192/1-{number:03d}.dcm",
        "{number:08x}-1111-4222-8333-444444444444.dcm",  # IDC, flat
        "IMG{number:04d}",  # a hospital's disc
        "{number:03d}/slice.DCM",  # a folder each
    ],
)
def test_any_layout_is_found(folder: Path, tmp_path: Path, layout: str) -> None:
    for number, path in enumerate(sorted(folder.iterdir())):
        target = tmp_path / "other" / layout.format(number=number, study="1.2.3", series="1.2.3.4")
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    assert number_of_slices(tmp_path / "other") == [12]


def test_two_series_in_one_folder(folder: Path) -> None:
    dicom.write_series(folder.parent / "other", volume(series_uid="1.2.3.5"), "test")
    for path in (folder.parent / "other").iterdir():
        path.rename(folder / f"other-{path.name}")
    assert number_of_slices(folder) == [12, 12]


def test_a_series_in_two_folders_is_one(folder: Path) -> None:
    (folder / "rest").mkdir()
    for path in sorted(folder.glob("*.dcm"))[6:]:
        path.rename(folder / "rest" / path.name)
    assert number_of_slices(folder) == [12]


def test_two_folders_with_the_same_slices_are_two_copies(folder: Path) -> None:
    """A partial download beside the whole one: neither spoils the other."""
    shutil.copytree(folder, folder.parent / "partial")
    for path in sorted((folder.parent / "partial").iterdir())[8:]:
        path.unlink()
    found = dicom.find_series(folder.parent)
    assert [(one.folder.name, len(one.slices)) for one in found] == [("partial", 8), ("series", 12)]


def test_folders_that_share_some_slices_are_one_series(folder: Path) -> None:
    """A download that was begun twice: together they are whole, and what is in both is there twice."""
    (folder / "rest").mkdir()
    for path in sorted(folder.glob("*.dcm"))[7:]:
        path.rename(folder / "rest" / path.name)
    for path in sorted(folder.glob("*.dcm"))[5:]:
        shutil.copy(path, folder / "rest" / path.name)
    (series,) = dicom.find_series(folder)
    with pytest.raises(SeriesRejected, match="duplicate-slice: 2 slices are exact copies"):
        dicom.read(series)
    assert dicom.read(series, "repair").hu.shape[0] == 12


@pytest.mark.parametrize("uid", ["", "1.2.3"])
def test_slices_without_a_uid_of_their_own_are_no_copies(folder: Path, uid: str) -> None:
    damage.set_tag("SOPInstanceUID", uid, every=True)(folder)
    (folder / "rest").mkdir()
    for path in sorted(folder.glob("*.dcm"))[6:]:
        path.rename(folder / "rest" / path.name)
    assert number_of_slices(folder) == [12]


def test_folders_in_folders_in_folders(folder: Path, tmp_path: Path) -> None:
    """More than Python's recursion allows; made and removed from within, as the path is longer than a system call
    takes, and what removes temporary folders after the tests recurses."""
    depth = 1200
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(depth):
            os.mkdir("d")
            os.chdir("d")
        os.chdir(here)
        assert number_of_slices(tmp_path) == [12]
    finally:
        os.chdir(tmp_path)
        for _ in range(depth):
            os.chdir("d")
        for _ in range(depth):
            os.chdir("..")
            os.rmdir("d")
        os.chdir(here)


def test_a_damaged_file_among_many_series_does_not_reject_them_all(folder: Path) -> None:
    """Flat downloads hold many series in one folder: whose slice a damaged file was cannot be told."""
    dicom.write_series(folder.parent / "other", volume(series_uid="1.2.3.5"), "test")
    for path in (folder.parent / "other").iterdir():
        path.rename(folder / f"other-{path.name}")
    (folder / "damaged.dcm").write_bytes((folder / "1-001.dcm").read_bytes()[:300])
    unknown, one, two = sorted(dicom.find_series(folder), key=lambda series: series.origin.series_uid)
    assert dicom.read(one).hu.shape == dicom.read(two).hu.shape
    with pytest.raises(SeriesRejected, match=r"unreadable-file.*damaged\.dcm"):
        dicom.read(unknown)


def test_hidden_folders_are_passed_over(folder: Path) -> None:
    """An interrupted writer leaves one."""
    folder.rename(folder.parent / ".series.tmp-1")
    assert dicom.find_series(folder.parent) == []


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        dicom.find_series(tmp_path / "nowhere")


def test_symbolic_links_are_not_followed_but_counted(folder: Path, tmp_path: Path, caplog) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "link").symlink_to(folder)
    (elsewhere / "link.dcm").symlink_to(folder / "1-001.dcm")
    assert dicom.find_series(elsewhere) == []
    assert "2 symbolic links are not followed" in caplog.text


def test_named_pipes_do_not_block(folder: Path) -> None:
    os.mkfifo(folder / "pipe.dcm")
    assert number_of_slices(folder) == [12]


def test_a_directory_file_is_passed_over(folder: Path) -> None:
    """DICOMDIR is a DICOM file without images; it is never opened as a guide to others."""
    directory = folder / "DICOMDIR"
    shutil.copy(folder / "1-001.dcm", directory)
    data = directory.read_bytes()
    ct, media_directory = b"1.2.840.10008.5.1.4.1.1.2\0", b"1.2.840.10008.1.3.10\0\0\0\0\0\0"
    directory.write_bytes(data.replace(ct, media_directory))
    assert number_of_slices(folder) == [12]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose headers are read from here on."""
    paths = []

    def read_header(path: Path):
        paths.append(path)
        return headers.read_header(path)

    monkeypatch.setattr(index, "read_header", read_header)
    return paths


def test_the_second_time_no_file_is_opened(folder: Path, opened: list[Path]) -> None:
    damage.junk(folder)
    damage.remove(folder)
    first = dicom.find_series(folder)
    assert len(opened) == len([path for path in folder.iterdir() if not path.name.startswith(".")])
    opened.clear()
    assert dicom.find_series(folder) == first
    assert opened == []


def test_changed_new_and_removed_files_are_noticed(folder: Path, opened: list[Path]) -> None:
    dicom.find_series(folder)
    opened.clear()
    damage.truncate(folder)
    shutil.copy(folder / "1-002.dcm", folder / "new.dcm")
    (folder / "1-008.dcm").unlink()
    (series,) = dicom.find_series(folder)
    assert sorted(path.name for path in opened) == ["1-005.dcm", "new.dcm"]
    assert (len(series.slices), len(series.unusable)) == (11, 1)


def test_unreadable_files_are_tried_again(folder: Path, opened: list[Path]) -> None:
    """What cures them, such as a permission, may leave size and time as they are."""
    damage.cut_header(folder)
    dicom.find_series(folder)
    opened.clear()
    dicom.find_series(folder)
    assert [path.name for path in opened] == ["1-001.dcm"]


@pytest.mark.parametrize("text", ["no database", "", "SQLite format 3\0 and then nothing"])
def test_a_damaged_cache_is_made_again(folder: Path, opened: list[Path], text: str) -> None:
    dicom.find_series(folder)
    for path in cache.folder().iterdir():
        path.write_text(text)
    opened.clear()
    assert number_of_slices(folder) == [12]
    assert len(opened) == 12
    assert number_of_slices(folder) == [12]
    assert len(opened) == 12


def test_nonsense_in_the_cache_is_read_again(folder: Path, opened: list[Path]) -> None:
    dicom.find_series(folder)
    newest = max(cache.folder().iterdir(), key=lambda path: path.stat().st_mtime_ns)
    with sqlite3.connect(newest) as connection:
        connection.execute("UPDATE files SET header = '[1, 2]'")
    connection.close()
    opened.clear()
    assert number_of_slices(folder) == [12]
    assert len(opened) == 12


def test_without_a_place_for_the_cache_it_works_and_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert number_of_slices(folder) == [12]
    assert "cannot be kept" in caplog.text


def test_many_files_are_read_by_many_processes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """The same series whether by one process or several."""
    alone = dicom.find_series(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(index, "_MIN_PARALLEL", 2)
    monkeypatch.setattr(index, "_CHUNK", 5)
    together = dicom.find_series(folder)
    assert together == alone
    assert "Traceback" not in capfd.readouterr().err


READING = """
import sys
import time
from pathlib import Path

from drrgen.dicom import index

if __name__ == "__main__":
    index._MIN_PARALLEL, index._CHUNK = 2, 5
    reading = index._read({str(file.path).encode(): file for file in index.walk(Path(sys.argv[1]))})
    next(reading)
    print(flush=True)
    time.sleep(600)
"""


def test_processes_that_read_end_with_the_one_that_started_them(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "reading.py"
    script.write_text(READING)
    with subprocess.Popen([sys.executable, script, folder], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        readers = psutil.Process(process.pid).children(recursive=True)
        assert readers
        process.kill()
    assert not psutil.wait_procs(readers, timeout=60)[1]


def test_paths_of_any_bytes_are_kept(folder: Path, opened: list[Path]) -> None:
    """Old discs hold names that are no Unicode."""
    name = os.fsdecode(b"Tho\xe4rax.dcm")
    try:
        (folder / "1-001.dcm").rename(folder / name)
    except OSError:
        pytest.skip("this file system has Unicode names only")
    assert number_of_slices(folder) == number_of_slices(folder) == [12]
    assert len(opened) == 12


def test_a_header_is_read_without_its_pixels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a 16 MB slice no more than the first 16 KB are read."""
    path = folder / "1-001.dcm"

    def enlarge(dataset) -> None:
        dataset.Rows = dataset.Columns = 2896
        dataset.PixelData = np.zeros((2896, 2896), "<u2").tobytes()

    damage.edit(path, enlarge)
    asked = []
    read = headers.BoundedFile.read

    def counted(file, size=None):
        data = read(file, size)
        asked.append(len(data))
        return data

    monkeypatch.setattr(headers.BoundedFile, "read", counted)
    header = headers.read_header(path)
    assert isinstance(header.content, dicom.Slice)
    assert sum(asked) < 32 << 10
