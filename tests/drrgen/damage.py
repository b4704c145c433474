"""Ways in which a CT series on disk goes wrong: each takes a folder that `drrgen.dicom.write_series` made.

Its files are `1-001.dcm` ..., the topmost slice first. One that goes wrong is the fifth, or the text says which.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLosslessSV1, RLELossless, generate_uid

Damage = Callable[[Path], None]


def fifth(folder: Path) -> Path:
    return sorted(folder.iterdir())[4]


def edit(path: Path, change: Callable[[pydicom.Dataset], None]) -> None:
    dataset = pydicom.dcmread(path)
    change(dataset)
    dataset.save_as(path)


def edit_all(paths: Iterable[Path], change: Callable[[pydicom.Dataset], None]) -> None:
    for path in list(paths):
        edit(path, change)


def set_tag(name: str, value: object, every: bool = False) -> Damage:
    def damage(folder: Path) -> None:
        edit_all(folder.iterdir() if every else [fifth(folder)], lambda dataset: setattr(dataset, name, value))

    return damage


def delete_tag(name: str) -> Damage:
    return lambda folder: edit(fifth(folder), lambda dataset: delattr(dataset, name))


def move(path: Path, by_mm: Iterable[float]) -> None:
    def change(dataset: pydicom.Dataset) -> None:
        position = np.array(dataset.ImagePositionPatient, float) + list(by_mm)
        dataset.ImagePositionPatient = [f"{value:.8g}" for value in position]

    edit(path, change)


def remove(folder: Path) -> None:
    fifth(folder).unlink()


def remove_two_neighbours(folder: Path) -> None:
    for path in sorted(folder.iterdir())[4:6]:
        path.unlink()


def duplicate(folder: Path) -> None:
    """A byte copy under another name."""
    shutil.copy(fifth(folder), folder / "copy.dcm")


def duplicate_anew(folder: Path) -> None:
    """The same slice once more, as an instance of its own."""
    duplicate(folder)
    edit(folder / "copy.dcm", lambda dataset: setattr(dataset, "SOPInstanceUID", generate_uid()))


def duplicate_unequal(folder: Path) -> None:
    def change(dataset: pydicom.Dataset) -> None:
        dataset.SOPInstanceUID = generate_uid()
        dataset.PixelData = bytes([dataset.PixelData[0] ^ 1]) + dataset.PixelData[1:]

    duplicate(folder)
    edit(folder / "copy.dcm", change)


def truncate(folder: Path) -> None:
    """As an interrupted download leaves it: a tenth of the pixels."""
    path = fifth(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 10 + 1200])


def truncate_by_a_byte(folder: Path) -> None:
    path = fifth(folder)
    path.write_bytes(path.read_bytes()[:-1])


def cut_header(folder: Path) -> None:
    """The end slice, so that no gap betrays it."""
    path = min(folder.iterdir())
    path.write_bytes(path.read_bytes()[:300])


def empty_file(folder: Path) -> None:
    fifth(folder).write_bytes(b"")


def zeros(folder: Path) -> None:
    """The last slice, as a download leaves it that claims its place on the disk first."""
    path = max(folder.iterdir())
    path.write_bytes(b"\0" * path.stat().st_size)


def without_preamble(folder: Path) -> None:
    path = fifth(folder)
    path.rename(folder / "IM5")
    data = (folder / "IM5").read_bytes()
    (folder / "IM5").write_bytes(data[data.index(b"\x08\x00\x08\x00CS") :])


def too_few_bytes(folder: Path) -> None:
    """A whole file whose pixels are fewer than its rows and columns say."""
    edit(fifth(folder), lambda dataset: setattr(dataset, "PixelData", dataset.PixelData[:-100]))


def scout(folder: Path) -> None:
    """One more image, coronal, under the same SeriesInstanceUID."""

    def change(dataset: pydicom.Dataset) -> None:
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
        dataset.SOPInstanceUID = generate_uid()

    shutil.copy(min(folder.iterdir()), folder / "scout.dcm")
    edit(folder / "scout.dcm", change)


def second_reconstruction(folder: Path) -> None:
    """As many slices again, with other pixels, under the same SeriesInstanceUID."""

    def change(dataset: pydicom.Dataset) -> None:
        dataset.PixelSpacing = [2, 2]
        dataset.SOPInstanceUID = generate_uid()

    for path in sorted(folder.iterdir()):
        shutil.copy(path, folder / f"again-{path.name}")
        edit(folder / f"again-{path.name}", change)


def tilt(folder: Path) -> None:
    """The orientation says 15 degrees, the positions go straight up."""
    cosine, sine = np.cos(np.deg2rad(15)), np.sin(np.deg2rad(15))
    set_tag("ImageOrientationPatient", [1, 0, 0, 0, round(cosine, 8), round(-sine, 8)], every=True)(folder)


def wander(folder: Path) -> None:
    """Every second slice lies 5 mm beside the others."""
    for path in sorted(folder.iterdir())[::2]:
        move(path, [5, 0, 0])


def shift_one(folder: Path) -> None:
    move(fifth(folder), [0, 0, 0.5])


def outlier_end(folder: Path) -> None:
    """The last slice lies 38 mm farther away, as in LIDC-IDRI-0514."""
    move(max(folder.iterdir()), [0, 0, -38])


def far_apart(folder: Path) -> None:
    for number, path in enumerate(sorted(folder.iterdir())):
        move(path, [0, 0, -30 * number])


def other_rows(folder: Path) -> None:
    def change(dataset: pydicom.Dataset) -> None:
        dataset.Rows -= 1
        dataset.PixelData = dataset.PixelData[: 2 * dataset.Rows * dataset.Columns]

    edit(fifth(folder), change)


def keep(count: int) -> Damage:
    def damage(folder: Path) -> None:
        for path in sorted(folder.iterdir())[count:]:
            path.unlink()

    return damage


def signed_as_unsigned(folder: Path) -> None:
    """HU as they are, below 0 too, under a PixelRepresentation that knows no sign."""

    def change(dataset: pydicom.Dataset) -> None:
        dataset.PixelData = (dataset.pixel_array.astype(np.int64) - 1000).astype("<i2").tobytes()
        dataset.RescaleIntercept = "0"

    edit_all(folder.iterdir(), change)


def hang(_: object) -> Iterator[None]:
    """For a worker: takes as long as it likes."""
    time.sleep(600)
    yield None


def raw_slope(folder: Path) -> None:
    """Not a number, in letters that pydicom itself would not write."""
    path = fifth(folder)
    edit(path, lambda dataset: setattr(dataset, "RescaleSlope", "1.375"))
    path.write_bytes(path.read_bytes().replace(b"1.375", b"nan  "))


def eight_bit(folder: Path) -> None:
    def change(dataset: pydicom.Dataset) -> None:
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
        dataset.PixelData = dataset.PixelData[::2]

    edit(fifth(folder), change)


def deflated(folder: Path) -> None:
    path = fifth(folder)
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    dataset.save_as(path)


def enhanced(folder: Path) -> None:
    set_tag("SOPClassUID", "1.2.840.10008.5.1.4.1.1.2.1", every=True)(folder)


def compressed(compressor: str) -> Damage:
    """All slices by lossless JPEG or JPEG 2000 ("JPEG", "JPEG2000"): SimpleITK's code streams in the files' headers."""

    expected = {"JPEG": JPEGLosslessSV1, "JPEG2000": JPEG2000Lossless}[compressor]

    def damage(folder: Path) -> None:
        writer = SimpleITK.ImageFileWriter()
        writer.UseCompressionOn()
        writer.SetCompressor(compressor)
        encoded_path = folder.parent / "encoded.dcm"
        writer.SetFileName(str(encoded_path))
        for path in folder.iterdir():
            writer.Execute(SimpleITK.Cast(SimpleITK.ReadImage(str(path)), SimpleITK.sitkInt16))
            encoded = pydicom.dcmread(encoded_path)
            assert encoded.file_meta.TransferSyntaxUID == expected

            def swap_pixels(dataset: pydicom.Dataset, encoded: pydicom.Dataset = encoded) -> None:
                dataset.PixelData, dataset.PixelRepresentation = encoded.PixelData, 1
                dataset["PixelData"].is_undefined_length = True
                dataset.RescaleIntercept = encoded.RescaleIntercept
                dataset.file_meta.TransferSyntaxUID = encoded.file_meta.TransferSyntaxUID

            edit(path, swap_pixels)
        encoded_path.unlink()

    return damage


def run_length(folder: Path) -> None:
    """All slices by DICOM's run-length coding, which pydicom itself reads and writes."""
    edit_all(folder.iterdir(), lambda dataset: dataset.compress(RLELossless, generate_instance_uid=False))


def shuffled_names(folder: Path) -> None:
    names = sorted(folder.iterdir())
    for number, path in enumerate(np.random.default_rng(0).permutation(names)):
        Path(path).rename(folder / f"{number:06d}")


def feet_first(folder: Path) -> None:
    """PatientPosition and file order change; LPS positions are what they were."""
    paths = sorted(folder.iterdir())
    edit_all(paths, lambda dataset: setattr(dataset, "PatientPosition", "FFS"))
    for number, path in enumerate(reversed(paths)):
        edit(path, lambda dataset, number=number: setattr(dataset, "InstanceNumber", number + 1))


def junk(folder: Path) -> None:
    """What lies about in downloads, and a radiograph and a localizer of the same study."""
    (folder / "LICENSE").write_text("CC BY")
    (folder / "069.xml").write_text("<LidcReadMessage/>")
    (folder / "._1-001.dcm").write_bytes(b"\0\5\26\7")
    for name, tag, value in (
        ("cr.dcm", "SOPClassUID", "1.2.840.10008.5.1.4.1.1.1"),
        ("localizer.dcm", "ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]),
    ):
        shutil.copy(folder / "1-001.dcm", folder / name)
        edit(folder / name, lambda dataset, tag=tag, value=value: setattr(dataset, tag, value))


def uncompressed_syntax(uid: str) -> Damage:
    """The same slices with implicit lengths or the big end first."""

    def damage(folder: Path) -> None:
        for path in folder.iterdir():
            dataset = pydicom.dcmread(path)
            implicit, little = uid == "1.2.840.10008.1.2", uid != "1.2.840.10008.1.2.2"
            dataset.file_meta.TransferSyntaxUID = uid
            if not little:
                dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
            pydicom.dcmwrite(path, dataset, implicit_vr=implicit, little_endian=little, force_encoding=True)

    assert uid != ExplicitVRLittleEndian
    return damage
