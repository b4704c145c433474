"""DICOM CT in and out: files to series by tags, series to volumes by positions; nobody else reads CT files."""

import math
import os
import shutil
import struct
import uuid
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import CTImageStorage, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, generate_uid

from drrgen.defects import Defect, SeriesRejected
from drrgen.errors import InputError
from drrgen.volume import Origin, Volume

# HU beyond these are padding, the corners outside the scanner's circle, or metal in a 12-bit scanner.
HU_CLAMP = (-1000, 3071)

# A step between slices may differ from the median step by this much: positions are written with few digits.
STEP_TOLERANCE = 0.01
STEP_TOLERANCE_MM = 0.01
# Slices may drift sideways by this much per slice, in pixels, before they count as sheared by a tilted gantry.
DRIFT_TOLERANCE_PX = 0.1
# Cosines of ImageOrientationPatient agree and are orthonormal within this.
COSINE_TOLERANCE = 1e-3

# More than any CT has: files that claim more are refused before memory is allocated.
MAX_SIDE = 4096
MAX_VOXELS = 1_000_000_000
# Between pixels, or between slices, of anything that is a CT of a person.
SPACING_MM = (0.05, 20.0)
# A gap longer than this is no missing slice but one that belongs elsewhere.
MAX_GAP_MM = 200.0

_TAGS = (
    "SOPClassUID StudyInstanceUID SeriesInstanceUID PatientID Manufacturer ConvolutionKernel KVP "
    "SliceThickness ImagePositionPatient ImageOrientationPatient PixelSpacing Rows Columns"
).split()

# What pydicom raises on damaged or hostile files. It decodes values when they are first looked at.
_DAMAGE = (
    *(AttributeError, EOFError, InvalidDicomError, KeyError, NotImplementedError, OSError, OverflowError),
    *(RuntimeError, TypeError, ValueError, struct.error),
)


@dataclass(frozen=True)
class Slice:
    """One file's geometry: position [3] and orientation [6] in LPS, spacing (between rows, between columns) in mm."""

    path: Path
    position_mm: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing_mm: tuple[float, ...]
    shape: tuple[int, int]


@dataclass(frozen=True)
class Series:
    """The CT slices that share a SeriesInstanceUID, in no order.

    incomplete: its files that lack a position, orientation, spacing or size. damaged: unreadable DICOM files in its
    own folder, so probably slices of it. origins: more than one where its files disagree whose they are.
    """

    origins: tuple[Origin, ...]
    slices: tuple[Slice, ...]
    incomplete: tuple[Path, ...] = ()
    damaged: tuple[Path, ...] = ()

    @property
    def origin(self) -> Origin:
        return self.origins[0]


def find_series(directory: Path) -> list[Series]:
    """All CT Image Storage series below a folder, in any layout and by tags alone, sorted by patient and series.

    Other files (CR and DX, XML, licences) and hidden folders are passed over. Unreadable DICOM files count to the
    series that has their folder for itself; where there is none, they are a series of an unknown patient. Raises
    InputError where there is no CT slice.
    """
    if not directory.is_dir():
        raise InputError(f"--ct-dir {directory}: there is no such folder")
    files: dict[str, list[tuple[Path, Origin, Slice | None]]] = defaultdict(list)
    damaged: dict[Path, list[Path]] = defaultdict(list)
    for path in _dicom_files(directory):
        try:
            with _silent():
                header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_TAGS))
                if header.SOPClassUID == CTImageStorage:
                    origin = _origin(header)
                    files[origin.series_uid].append((path, origin, _slice(path, header)))
        except _DAMAGE:
            damaged[path.parent].append(path)

    series_of_folder: dict[Path, set[str]] = defaultdict(set)
    for uid, group in files.items():
        for path, _, _ in group:
            series_of_folder[path.parent].add(uid)
    damaged_of_series: dict[str, list[Path]] = defaultdict(list)
    for folder, paths in damaged.items():
        owners = series_of_folder[folder]
        damaged_of_series[owners.pop() if len(owners) == 1 else ""].extend(paths)

    found = []
    for uid in files.keys() | damaged_of_series.keys():
        group = files[uid]
        # manufacturer, kernel and the like may vary within a series; whose scan it is may not
        origins = {(origin.patient_id, origin.study_uid): origin for _, origin, _ in group}
        found.append(
            Series(
                origins=tuple(origins.values()) or (Origin("unknown", "", ""),),
                slices=tuple(one for _, _, one in group if one is not None),
                incomplete=tuple(path for path, _, one in group if one is None),
                damaged=tuple(damaged_of_series[uid]),
            )
        )
    if not found:
        raise InputError(f"--ct-dir {directory}: no DICOM CT slice in there; point it at a folder of CT series")
    return sorted(found, key=lambda one: (one.origin.patient_id, one.origin.series_uid))


def _silent() -> warnings.catch_warnings:
    """pydicom warns of every value that breaks DICOM's rules; what matters here is checked, and refused in one line."""
    return warnings.catch_warnings(action="ignore")


def _dicom_files(directory: Path) -> Iterator[Path]:
    """Regular files with DICOM's mark at byte 128; links are not followed."""
    for folder, folders, names in os.walk(directory, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if path.is_symlink() or not path.is_file():
                continue
            with path.open("rb") as file:
                if file.read(132)[128:] == b"DICM":
                    yield path


def _origin(header: pydicom.Dataset) -> Origin:
    return Origin(
        patient_id=_text(header.get("PatientID")) or "unknown",
        study_uid=_text(header.get("StudyInstanceUID")) or "",
        series_uid=_text(header.get("SeriesInstanceUID")) or "",
        manufacturer=_text(header.get("Manufacturer")),
        kernel=_text(header.get("ConvolutionKernel")),
        kvp=_number(header.get("KVP")),
        slice_thickness_mm=_number(header.get("SliceThickness")),
    )


def _slice(path: Path, header: pydicom.Dataset) -> Slice | None:
    try:
        return Slice(
            path=path,
            position_mm=_vector(header.ImagePositionPatient, 3),
            orientation=_vector(header.ImageOrientationPatient, 6),
            spacing_mm=_vector(header.PixelSpacing, 2),
            shape=(int(header.Rows), int(header.Columns)),
        )
    except (AttributeError, OverflowError, TypeError, ValueError):
        return None


def _vector(values: object, length: int) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in values)  # type: ignore[attr-defined]
    if len(numbers) != length or not np.isfinite(numbers).all():
        raise ValueError(f"{length} finite numbers expected")
    return numbers


def _text(value: object) -> str | None:
    """A tag's text as far as it can be printed on one line; DICOM allows such texts (LO, UI) 64 characters."""
    return "".join(letter for letter in str(value or "") if letter.isprintable())[:64] or None


def _number(value: object) -> float | None:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (OverflowError, TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def read(series: Series) -> Volume:
    """The volume of a series: slices sorted by position along their normal, spacing from positions only.

    Raises SeriesRejected where the slices are not one complete, regular, undistorted grid, or a file is damaged.
    """
    ordered, world_from_voxel = _grid(series)
    rows, columns = ordered[0].shape
    hu = np.empty((len(ordered), rows, columns), np.int16)
    for image, one in zip(hu, ordered, strict=True):
        image[:] = _hounsfield(one)
    return Volume(hu, world_from_voxel, series.origin)


def _grid(series: Series) -> tuple[list[Slice], NDArray[np.float64]]:
    """The slices by position, and world_from_voxel [4, 4]: DICOM PS3.3 C.7.6.2.1-1 with the positions' own step."""
    slices = series.slices
    if series.damaged:
        raise SeriesRejected(
            Defect("unreadable-file", f"{series.damaged[0]} is DICOM, but cannot be read: get it again")
        )
    if not series.origin.series_uid:
        raise SeriesRejected(Defect("missing-tags", f"{len(slices)} CT slices have no SeriesInstanceUID"))
    if series.incomplete:
        raise SeriesRejected(
            Defect("missing-tags", f"{series.incomplete[0]} lacks position, orientation, spacing or size")
        )
    if len(series.origins) > 1:
        raise SeriesRejected(
            Defect("mixed-patient", "files of different patients or studies share one SeriesInstanceUID")
        )
    if len(slices) < 2:
        raise SeriesRejected(Defect("too-few-slices", f"{len(slices)} slice is no volume"))
    if any(one.shape != slices[0].shape for one in slices):
        raise SeriesRejected(Defect("mixed-shape", "slices of different rows or columns share one SeriesInstanceUID"))
    if not all(0 < side <= MAX_SIDE for side in slices[0].shape) or len(slices) * np.prod(slices[0].shape) > MAX_VOXELS:
        raise SeriesRejected(Defect("absurd-size", f"{len(slices)} slices of {slices[0].shape} pixels"))
    orientations = np.array([one.orientation for one in slices])
    if np.ptp(orientations, axis=0).max() > COSINE_TOLERANCE:
        raise SeriesRejected(Defect("mixed-orientation", "slices of different orientation share one SeriesInstanceUID"))
    spacings = np.array([one.spacing_mm for one in slices])
    if not (SPACING_MM[0] <= spacings.min() and spacings.max() <= SPACING_MM[1]):
        raise SeriesRejected(Defect("absurd-size", f"PixelSpacing of {spacings.min():g} to {spacings.max():g} mm"))
    if np.ptp(spacings, axis=0).max() > STEP_TOLERANCE * spacings.min():
        raise SeriesRejected(Defect("mixed-spacing", "slices of different PixelSpacing share one SeriesInstanceUID"))

    along_row, along_column = orientations[0, :3], orientations[0, 3:]
    lengths = np.array([along_row @ along_row, along_column @ along_column, 1 + along_row @ along_column])
    if np.abs(lengths - 1).max() > COSINE_TOLERANCE:
        raise SeriesRejected(Defect("bad-orientation", "ImageOrientationPatient is not two orthogonal unit vectors"))
    normal = np.cross(along_row, along_column)
    positions = np.array([one.position_mm for one in slices])
    order = np.argsort(positions @ normal, kind="stable")
    positions = positions[order]
    steps = np.diff(positions @ normal)
    step = float(np.median(steps))
    _check_steps(steps, step)
    between_rows, between_columns = spacings[0]
    drift = np.diff(positions, axis=0) - np.outer(steps, normal)
    if np.linalg.norm(drift, axis=1).max() > DRIFT_TOLERANCE_PX * spacings.min():
        raise SeriesRejected(Defect("gantry-tilt", "slices are shifted sideways: the gantry was tilted"))

    world_from_voxel = np.eye(4)
    world_from_voxel[:3, 0] = along_row * between_columns
    world_from_voxel[:3, 1] = along_column * between_rows
    world_from_voxel[:3, 2] = (positions[-1] - positions[0]) / (len(slices) - 1)
    world_from_voxel[:3, 3] = positions[0]
    return [slices[i] for i in order], world_from_voxel


def _check_steps(steps: NDArray[np.float64], step: float) -> None:
    tolerance = max(STEP_TOLERANCE * step, STEP_TOLERANCE_MM)
    if steps.min() < STEP_TOLERANCE_MM:
        raise SeriesRejected(
            Defect("duplicate-position", f"{int((steps < STEP_TOLERANCE_MM).sum())} slices lie on another one")
        )
    if (np.abs(steps - step) <= tolerance).all():
        if step > SPACING_MM[1]:
            raise SeriesRejected(Defect("absurd-size", f"steps of {step:g} mm between slices"))
        return
    whole = np.rint(steps / step)
    regular = np.abs(steps - whole * step) <= np.maximum(whole, 1) * tolerance
    if regular.all() and whole.min() >= 1 and steps.max() <= MAX_GAP_MM:
        raise SeriesRejected(
            Defect("missing-slices", f"{int((whole - 1).sum())} slices are missing between the others")
        )
    raise SeriesRejected(
        Defect("non-uniform-spacing", f"steps of {steps.min():.3f} to {steps.max():.3f} mm between slices")
    )


def _hounsfield(one: Slice) -> NDArray[np.int16]:
    """One slice in HU, [row, column], clamped to HU_CLAMP."""
    try:
        with _silent():
            return _decoded(one)
    except _DAMAGE as error:
        reason = " ".join(str(error).split())
        raise SeriesRejected(Defect("undecodable-file", f"{one.path}: {reason}")) from error


def _decoded(one: Slice) -> NDArray[np.int16]:
    dataset = pydicom.dcmread(one.path)
    syntax = dataset.file_meta.TransferSyntaxUID
    slope, intercept = _number(dataset.get("RescaleSlope")), _number(dataset.get("RescaleIntercept"))
    if syntax == DeflatedExplicitVRLittleEndian:
        raise ValueError("the deflated transfer syntax is not accepted")
    if dataset.BitsAllocated != 16 or dataset.SamplesPerPixel != 1 or dataset.get("NumberOfFrames", 1) != 1:
        raise ValueError("not one frame of one 16-bit sample per pixel")
    # both are required of a CT (PS3.3 C.8.2.1); guessing them would shift every value
    if slope is None or intercept is None or slope <= 0:
        raise ValueError("RescaleSlope and RescaleIntercept are not two finite numbers, the slope above 0")
    hu = _decompressed(one.path) if syntax.is_compressed else dataset.pixel_array * slope + intercept
    if hu.shape != one.shape:
        raise ValueError(f"{hu.shape} pixels instead of {one.shape}")
    return np.rint(np.clip(hu, *HU_CLAMP)).astype(np.int16)


def _decompressed(path: Path) -> NDArray[np.float64]:
    """JPEG, JPEG-LS and JPEG 2000 through SimpleITK's GDCM, which applies slope and intercept itself."""
    import SimpleITK

    (image,) = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
    return image.astype(np.float64)


def write_series(directory: Path, volume: Volume, series_description: str) -> None:
    """Write a volume as uncompressed CT Image Storage files `1-001.dcm` ..., the topmost slice first.

    The directory appears when it is whole, and replaces one of its name. UIDs of the instances follow from the series
    UID, so the same volume gives the same bytes. HU are clamped to HU_CLAMP, as in reading.
    """
    partial = directory.with_name(f".{directory.name}.tmp-{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    try:
        _write_slices(partial, volume, series_description)
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_slices(directory: Path, volume: Volume, series_description: str) -> None:
    num_slices, rows, columns = volume.hu.shape
    affine, spacing, origin = volume.world_from_voxel, volume.spacing_mm, volume.origin
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
    file = FileDataset(str(directory), {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.StudyInstanceUID, file.SeriesInstanceUID = (
        CTImageStorage,
        origin.study_uid,
        origin.series_uid,
    )
    file.FrameOfReferenceUID = generate_uid(entropy_srcs=[origin.study_uid, "frame"])
    file.PatientID = file.PatientName = origin.patient_id
    file.PatientPosition, file.Modality, file.SeriesDescription = "HFS", "CT", series_description
    file.ImageType = ["DERIVED", "PRIMARY", "AXIAL"]
    file.StudyDate, file.StudyTime, file.AccessionNumber, file.StudyID = "20000101", "000000", "", "1"
    file.ReferringPhysicianName = file.PatientBirthDate = file.PatientSex = ""
    file.Manufacturer, file.ConvolutionKernel = origin.manufacturer or "", origin.kernel or ""
    file.KVP = f"{origin.kvp:g}" if origin.kvp else ""
    file.SeriesNumber, file.AcquisitionNumber = 1, 1
    file.SliceThickness = f"{origin.slice_thickness_mm or spacing[2]:.6g}"
    file.ImageOrientationPatient = [f"{value:.8g}" for value in (affine[:3, :2] / spacing[:2]).T.ravel()]
    file.PixelSpacing = [f"{spacing[1]:.8g}", f"{spacing[0]:.8g}"]
    file.Rows, file.Columns, file.SamplesPerPixel = rows, columns, 1
    file.PhotometricInterpretation = "MONOCHROME2"
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 16, 15, 0
    file.RescaleIntercept, file.RescaleSlope, file.RescaleType = HU_CLAMP[0], 1, "HU"
    for number in range(1, num_slices + 1):
        k = num_slices - number
        uid = generate_uid(entropy_srcs=[origin.series_uid, str(number)])
        meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = uid
        file.InstanceNumber = number
        file.ImagePositionPatient = [f"{value:.8g}" for value in affine[:3, 2] * k + affine[:3, 3]]
        file.PixelData = (np.clip(volume.hu[k], *HU_CLAMP).astype(np.int32) - HU_CLAMP[0]).astype("<u2").tobytes()
        file.save_as(directory / f"1-{number:03d}.dcm", enforce_file_format=True)
