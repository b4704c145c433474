"""How fast a folder with as many series as LIDC-IDRI is indexed: cold, cached, after one more series; and scanned.

    python tests/benchmarks/indexing.py [--ct-dir ONE_SERIES] [--series 1018]

The folder is made of one series' headers under other UIDs, in sparse files of the true size: headers are all that is
read, so that nothing is gained by the missing pixels. "cold" is without drrgen's cache; the system's is warm.
"""

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

import pydicom

from drrgen import anatomy, catalog, dicom, phantom


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ct-dir", type=Path)
    parser.add_argument("--series", type=int, default=1018)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = str(Path(scratch, "cache"))
        template = options.ct_dir or Path(scratch, "template")
        if options.ct_dir is None:
            dicom.write_series(template, phantom.voxelise(anatomy.thorax(0), (133, 512, 512), (0.7, 0.7, 2.5)), "chest")
        root = Path(scratch, "LIDC-IDRI")
        num_slices = len(list(template.glob("*.dcm")))
        make(template, root, range(options.series), num_slices)
        files = options.series * num_slices
        print(f"{options.series} series, {files} files, {os.cpu_count()} cores")
        report("cold", root, files, options.series)
        report("cached", root, files, options.series)
        make(template, root, range(options.series, options.series + 1), num_slices)
        report("one series more", root, files + num_slices, options.series + 1)
        start = time.perf_counter()
        catalog.scan(root)
        print(f"scan, cached: {time.perf_counter() - start:.2f} s")
        (cache,) = Path(os.environ["XDG_CACHE_HOME"], "drrgen").iterdir()
        memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        print(f"cache: {cache.stat().st_size / 1e6:.0f} MB, memory: {memory_mb:.0f} MB")


def report(name: str, root: Path, files: int, series: int) -> None:
    start = time.perf_counter()
    found = dicom.find_series(root)
    seconds = time.perf_counter() - start
    assert (len(found), sum(len(one.slices) for one in found)) == (series, files)
    print(f"{name}: {seconds:.2f} s, {series / seconds:.0f} series/s, {files / seconds:.0f} files/s")


def make(template: Path, root: Path, numbers: range, num_slices: int) -> None:
    """Copies of a series, patient `number` each. UIDs and positions keep their length, so that bytes are replaced."""
    paths = sorted(path for path in template.iterdir() if path.suffix == ".dcm")
    first = pydicom.dcmread(paths[0], stop_before_pixels=True)
    series_uid, patient = first.SeriesInstanceUID, str(first.PatientID)
    headers = []
    for path in paths:
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
        data = path.read_bytes()
        headers.append((data[: data.index(b"\xe0\x7f\x10\x00") + 12], dataset.SOPInstanceUID, len(data)))
    for number in numbers:
        folder = root / f"LIDC-IDRI-{number:04d}" / "01-01-2000-NA-NA-30178" / "3000566.000000-NA-03192"
        folder.mkdir(parents=True)
        for k in range(num_slices):
            header, sop_uid, size = headers[k % len(headers)]
            data = header.replace(series_uid.encode(), tail(series_uid, number).encode())
            data = data.replace(sop_uid.encode(), tail(sop_uid, 1000 * number + k).encode())
            data = data.replace(patient.encode(), tail(patient, number).encode())
            path = folder / f"1-{k + 1:03d}.dcm"
            path.write_bytes(data)
            os.truncate(path, size)


def tail(text: str, number: int) -> str:
    """The text with its end replaced by a number."""
    digits = f"{number:08d}"[-min(8, len(text) - 6) :]
    return text[: -len(digits)] + digits


if __name__ == "__main__":
    main()
