"""A volume to DICOM files: one CT image per slice, for phantoms and tests."""

import shutil
import uuid
from pathlib import Path

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from drrgen.volume import HU_CLAMP, Volume


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
