"""CTs in one file: NIfTI, MetaImage, NRRD; geometry to LPS, refused where they are no CT in HU.

ITK reads them, but it fills in what a header leaves out, takes one of two answers where a header gives two, hands out
whatever memory holds where data are cut short or corrupt, and can crash on a malformed MetaImage. So every header, and
the length and checksum of the data, are checked here first.
"""

import gzip
import itertools
import math
import os
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from drrgen.defects import Defect, SeriesRejected, printable
from drrgen.volume import COSINE_TOLERANCE, HU_CLAMP, MAX_SIDE, MAX_VOXELS, SPACING_MM, Origin, Volume, not_hounsfield
from drrgen.worker import Crashed, Worker

SUFFIXES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd")

# The format follows the suffix: ITK, left to itself, would look for DICOM or JPEG under any name.
_IMAGE_IO = {
    ".nii": "NiftiImageIO",
    ".nii.gz": "NiftiImageIO",
    ".mha": "MetaImageIO",
    ".mhd": "MetaImageIO",
    ".nrrd": "NrrdImageIO",
}

# deflate cannot do better than 1032 to 1, so a file that claims more voxels than this does not hold them.
MAX_PACKING = 1100
# The answers of one NIfTI header to "where?" agree within this at every corner; written digits alone give 0.03 mm.
FORM_TOLERANCE_MM = 0.5
# No real header of text is longer.
HEADER_BYTES = 64 * 1024
NIFTI_BYTES = 352

_META_MATRICES = "TransformMatrix Rotation Orientation"
_META_VECTORS = "DimSize ElementSpacing ElementSize Offset Position Origin CenterOfRotation"
_META_NUMBERS = (
    ("HeaderSize CompressedDataSize CompressionLevel ElementNumberOfChannels ElementNBits ElementMin ElementMax", 1),
    ("ElementToIntensityFunctionSlope ElementToIntensityFunctionOffset ID ParentID", 1),
    ("Color", 4),
)
# The fields that the NRRD library knows; on long lines, and in long fields, it overwrites its own memory.
_NRRD_FIELDS = set(
    "type,dimension,sizes,space,space dimension,space directions,space origin,space units,spacings,kinds,centers,"
    "centerings,labels,units,thicknesses,axis mins,axis maxs,endian,encoding,measurement frame,content,min,max,"
    "old min,old max,block size,line skip,byte skip,number,sample units".split(",")
)
_NRRD_LINE = 300
_NRRD_SPACES = (
    *("left-posterior-superior", "right-anterior-superior", "left-anterior-superior"),
    *("lps", "ras", "las"),
)

# Scalar voxels in NIfTI-1: datatype, bytes.
_NIFTI_BYTES = {2: 1, 4: 2, 8: 4, 16: 4, 64: 8, 256: 1, 512: 2, 768: 4, 1024: 8, 1280: 8}

_NOT_FINITE = "some of its voxels are no finite numbers: set them to -1000, or to what they should be"
_ZLIB_OR_GZIP = 47
_PIECE_BYTES = 64 * 1024
_UID = re.compile(r"[0-9]+(\.[0-9]+){3,}")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
# What damaged headers raise here and, as RuntimeError, in ITK.
_DAMAGE = (EOFError, MemoryError, OSError, OverflowError, RuntimeError, ValueError, struct.error, zlib.error)


@dataclass(frozen=True)
class VolumeFile:
    """A CT in one file, known by its header.

    shape: slices, rows, columns after turning to LPS; spacing_mm: along x, y, z. Both 0 where the header is refused.
    defects: why it cannot be used; nothing of this can be repaired.
    """

    path: Path
    origin: Origin
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    defects: tuple[Defect, ...]


@dataclass(frozen=True)
class _Grid:
    """Where the voxels are once turned: order[i] is the stored axis along LPS axis i, flipped[i] if it runs against."""

    stored: "_Stored"
    data_bytes: int
    order: tuple[int, ...]
    flipped: tuple[bool, ...]
    shape: tuple[int, int, int]
    world_from_voxel: NDArray[np.float64]


@dataclass(frozen=True)
class _Stored:
    """Where a header says its data are, from byte `start` of `path` on, and what else it says that ITK does not.

    lead: bytes of the data before the first voxel. voxel_bytes: of one voxel; None where ITK's word is good. affines:
    [4, 4], voxel to LPS. floats: their type where ITK would make zeros, which are water, of NaN.
    """

    path: Path
    start: int
    packed: bool
    lead: int = 0
    voxel_bytes: int | None = None
    affines: tuple[NDArray[np.float64], ...] = ()
    floats: np.dtype[Any] | None = None

    @property
    def most_bytes(self) -> int:
        return (self.path.stat().st_size - self.start) * (MAX_PACKING if self.packed else 1)


def is_volume_file(path: Path) -> bool:
    """By its suffix, in any case."""
    return path.name.lower().endswith(SUFFIXES)


def examine(path: Path, root: Path, worker: Worker | None = None) -> VolumeFile:
    """What the header says, and what is wrong with it; `root` is the folder that names are relative to.

    worker: reads it in another process.
    """
    origin = _origin(path, root)
    try:
        grid: _Grid = _grid(path) if worker is None else next(worker.run(_grids, path))
    except Crashed as error:
        return VolumeFile(path, origin, (0, 0, 0), (0.0, 0.0, 0.0), (Defect("unreadable-file", str(error)),))
    except SeriesRejected as rejected:
        return VolumeFile(path, origin, (0, 0, 0), (0.0, 0.0, 0.0), rejected.defects)
    x_mm, y_mm, z_mm = (float(step) for step in np.linalg.norm(grid.world_from_voxel[:3, :3], axis=0))
    return VolumeFile(path, origin, grid.shape, (x_mm, y_mm, z_mm), ())


def read(file: VolumeFile, worker: Worker | None = None) -> Volume:
    """The volume, turned (never resampled) so that columns run to the left, rows to posterior, slices to superior.

    Raises SeriesRejected. worker: reads in another process, which has ITK's voxels and the result in memory: 0.8 GB for
    512 x 512 x 764 of int16; of float32 in NIfTI, which ITK copies, 1.6 GB.
    """
    if file.defects:
        raise SeriesRejected(*file.defects)
    grid = _grid(file.path)
    if worker is None:
        return Volume(_voxels(file.path), grid.world_from_voxel, file.origin)
    hu = np.empty(grid.shape, np.int16)
    try:
        for image, read_there in zip(hu, worker.run(_slices, file.path), strict=True):
            image[:] = read_there
    except Crashed as error:
        _reject("undecodable-file", str(error))
    return Volume(hu, grid.world_from_voxel, file.origin)


def _grids(path: Path) -> Iterator[_Grid]:
    yield _grid(path)


def _slices(path: Path) -> Iterator[NDArray[np.int16]]:
    yield from _voxels(path)


def _voxels(path: Path) -> NDArray[np.int16]:
    """HU, [slice, row, column], turned."""
    import SimpleITK

    grid = _grid(path)  # again: the file may be another one by now
    image = _image(path, grid)  # owns the voxels: the arrays below are only views of them
    stored = SimpleITK.GetArrayViewFromImage(image).reshape(image.GetSize()[2::-1])
    turned = stored.transpose([2 - axis for axis in reversed(grid.order)])
    turned = turned[tuple(slice(None, None, -1 if flip else 1) for flip in reversed(grid.flipped))]
    if turned.shape != grid.shape:
        _reject("undecodable-file", f"{_by(turned.shape)} voxels instead of {_by(grid.shape)}")
    return _hounsfield(turned)


def _reject(code: str, message: str) -> NoReturn:
    raise SeriesRejected(Defect(code, message))


def _suffix(path: Path) -> str:
    return max((end for end in SUFFIXES if path.name.lower().endswith(end)), key=len)


def _origin(path: Path, root: Path) -> Origin:
    """A file is a patient of its own: nothing inside it says reliably whose it is. Names of UIDs are kept as such."""
    name = printable(path.relative_to(root).as_posix())
    without_suffix = name[: -len(_suffix(path))]
    stem = without_suffix.rpartition("/")[2]
    is_uid = len(stem) <= 64 and _UID.fullmatch(stem)
    # the end of a long path is what tells files apart
    return Origin(without_suffix[-64:] or "unknown", "", stem if is_uid else f"file:{name}")


@np.errstate(all="ignore")  # nonsense numbers become NaN, and NaN is refused
def _grid(path: Path) -> _Grid:
    """Everything that can be known before voxels are read; raises SeriesRejected."""
    check = {"NiftiImageIO": _check_nifti, "MetaImageIO": _check_meta, "NrrdImageIO": _check_nrrd}
    try:
        stored = check[_IMAGE_IO[_suffix(path)]](path)
        with _quiet():
            reader = _reader(path)
            reader.ReadImageInformation()
            size, spacing = reader.GetSize(), np.array(reader.GetSpacing()[:3])
            voxel_bytes = stored.voxel_bytes or _voxel_bytes(reader)
            direction = np.array(reader.GetDirection()).reshape(len(size), len(size))[:3, :3]
            position = np.array(reader.GetOrigin()[:3])
    except _DAMAGE as error:
        reason = _reason(error)
        _reject("bad-orientation" if "orthonormal" in reason else "unreadable-file", reason)
    if voxel_bytes < 2:
        _reject("not-hounsfield", "8 bits hold no CT in HU: a label map?")
    data_bytes = stored.lead + math.prod(size) * voxel_bytes
    _check_size(size, spacing)
    if data_bytes > stored.most_bytes:
        _reject("truncated-file", f"it is too short for the {_by(size)} voxels that its header claims: get it again")
    if not np.abs(direction.T @ direction - np.eye(3)).max() <= COSINE_TOLERANCE or not np.isfinite(position).all():
        _reject(
            "bad-orientation", "its axes are not three orthogonal unit vectors: resample it to a grid without shear"
        )
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = direction * spacing, position
    _check_agreement(affine, stored.affines, size)
    order = max(itertools.permutations(range(3)), key=lambda axes: np.abs(direction[range(3), axes]).sum())
    flipped = tuple(bool(direction[axis, stored] < 0) for axis, stored in enumerate(order))
    columns, rows, slices = (size[axis] for axis in order)
    world_from_voxel = affine @ _stored_from_voxel(order, flipped, size)
    return _Grid(stored, data_bytes, order, flipped, (slices, rows, columns), world_from_voxel)


def _check_size(size: tuple[int, ...], spacing: NDArray[np.float64]) -> None:
    if len(size) < 3 or any(side != 1 for side in size[3:]):
        _reject("not-a-volume", f"{_by(size)} voxels are not one volume of three dimensions")
    if max(size) > MAX_SIDE or math.prod(size) > MAX_VOXELS:
        _reject("absurd-size", f"{_by(size)} voxels")
    if not (SPACING_MM[0] <= spacing.min() and spacing.max() <= SPACING_MM[1]):
        _reject("absurd-size", f"steps of {spacing.min():g} to {spacing.max():g} mm between voxels")
    if min(size[:3]) < 2:
        _reject("too-few-slices", f"{_by(size)} voxels are no volume")


def _by(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))


def _check_agreement(
    affine: NDArray[np.float64], others: tuple[NDArray[np.float64], ...], size: tuple[int, ...]
) -> None:
    corners = np.array([(*corner, 1) for corner in itertools.product(*((0, side - 1) for side in size[:3]))]).T
    for other in others:
        if not np.abs((affine - other) @ corners).max() <= FORM_TOLERANCE_MM:
            _reject("bad-orientation", "its sform, qform and pixdim disagree where the voxels are: make them agree")


def _stored_from_voxel(order: tuple[int, ...], flipped: tuple[bool, ...], size: tuple[int, ...]) -> NDArray[np.float64]:
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1
    for axis, (stored, flip) in enumerate(zip(order, flipped, strict=True)):
        matrix[stored, axis] = -1 if flip else 1
        matrix[stored, 3] = size[stored] - 1 if flip else 0
    return matrix


def _reader(path: Path) -> Any:
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO(_IMAGE_IO[_suffix(path)])
    reader.SetFileName(str(path))
    return reader


def _voxel_bytes(reader: Any) -> int:
    """Of one voxel as ITK hands it out; refuses vectors, colours and complex numbers."""
    import SimpleITK

    kind = SimpleITK.GetPixelIDValueAsString(reader.GetPixelID())
    scalar = re.fullmatch(r"([0-9]+)-bit (signed integer|unsigned integer|float)", kind)
    if scalar is None or reader.GetNumberOfComponents() != 1:
        _reject("not-a-volume", f"its voxels are not single numbers but {kind}")
    return int(scalar[1]) // 8


def _image(path: Path, grid: _Grid) -> Any:
    try:
        if grid.stored.packed:
            _check_packed(grid.stored, grid.data_bytes)
        if grid.stored.floats is not None:
            _check_finite(grid.stored, grid.stored.floats, grid.data_bytes)
        with _quiet():
            return _reader(path).Execute()
    except _DAMAGE as error:
        _reject("undecodable-file", _reason(error))


def _check_packed(stored: _Stored, data_bytes: int) -> None:
    """Unpack once for the length and the checksum, which ITK looks at in no format: it would hand out garbage."""
    count, unpack, piece = 0, zlib.decompressobj(_ZLIB_OR_GZIP), b""
    with stored.path.open("rb") as file:
        file.seek(stored.start)
        while not (unpack.eof and count >= data_bytes):
            if unpack.eof:  # several streams in a row, as bgzip writes them
                piece, unpack = unpack.unused_data, zlib.decompressobj(_ZLIB_OR_GZIP)
            piece = piece or file.read(_PIECE_BYTES)
            if not piece:
                raise EOFError(f"compressed data end after {count} of {data_bytes} bytes: get it again")
            count += len(unpack.decompress(piece))
            piece = b""
            if count > data_bytes + HEADER_BYTES:
                raise EOFError(f"compressed data go on after the {data_bytes} bytes that the header claims")


def _check_finite(stored: _Stored, floats: np.dtype[Any], data_bytes: int) -> None:
    with gzip.open(stored.path) if stored.packed else stored.path.open("rb") as file:
        file.seek(stored.start + stored.lead)
        for start in range(stored.lead, data_bytes, _PIECE_BYTES):
            piece = file.read(min(_PIECE_BYTES, data_bytes - start))
            if not np.isfinite(np.frombuffer(piece, floats)).all():
                _reject("not-hounsfield", _NOT_FINITE)


@contextmanager
def _quiet() -> Iterator[None]:
    """ITK's libraries write their complaints straight to file descriptor 2; the one line that matters is ours."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def _reason(error: BaseException) -> str:
    """One line of ITK's many: what follows its own file names and addresses."""
    text = " ".join(str(error).split("ERROR:", 1)[-1].split())
    return printable(re.sub(r"\w+\(0x[0-9a-f]+\): ", "", text))[:200] or type(error).__name__


@np.errstate(all="ignore")
def _hounsfield(stored: NDArray[Any]) -> NDArray[np.int16]:
    """Rounded and clamped to HU_CLAMP, slice by slice to save memory; refuses what is no CT in HU."""
    if stored.dtype.kind == "f" and not all(np.isfinite(image).all() for image in stored):
        _reject("not-hounsfield", _NOT_FINITE)
    if reason := not_hounsfield(stored):
        _reject("not-hounsfield", reason)
    hu = np.empty(stored.shape, np.int16)
    for image, one in zip(hu, stored, strict=True):
        image[:] = np.rint(np.clip(one, *HU_CLAMP))
    return hu


def _check_nifti(path: Path) -> _Stored:
    """The header's own sform and qform, in LPS: ITK takes one of them, and takes spacing from pixdim."""
    with gzip.open(path) if _suffix(path) == ".nii.gz" else path.open("rb") as file:
        header = file.read(NIFTI_BYTES)
    order = "<" if header[:4] == struct.pack("<i", 348) else ">"
    if len(header) < NIFTI_BYTES or header[:4] != struct.pack(f"{order}i", 348) or header[344:348] != b"n+1\0":
        _reject("unreadable-file", "not NIfTI-1 in one file")

    def numbers(kind: str, offset: int) -> tuple[Any, ...]:
        return struct.unpack_from(order + kind, header, offset)

    (datatype,), (qform_code, sform_code) = numbers("h", 70), numbers("2h", 252)
    offset, slope, intercept = numbers("3f", 108)
    pixdim, quaternion, rows = numbers("8f", 76), numbers("6f", 256), numbers("12f", 280)
    if not (NIFTI_BYTES <= offset <= HEADER_BYTES and offset == int(offset)):
        _reject("unreadable-file", f"vox_offset is {offset:g}")
    if datatype not in _NIFTI_BYTES:
        _reject("not-a-volume", f"its voxels are not single numbers: datatype {datatype}")
    unit_mm = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}.get(header[123] & 7)
    if unit_mm is None:
        _reject("absurd-size", f"xyzt_units {header[123]} names no unit of length")
    # without a slope NIfTI ignores the intercept; ITK adds it
    if (slope == 0 or not math.isfinite(slope)) and math.isfinite(intercept) and intercept != 0:
        _reject("not-hounsfield", f"scl_inter is {intercept:g}, but scl_slope is {slope:g}: set it to 1")
    affines = []
    if sform_code > 0:
        affines.append(np.reshape(rows, (3, 4)))
    if qform_code > 0:
        affines.append(_qform(pixdim, quaternion))
    if not affines:
        _reject("bad-orientation", "sform_code and qform_code are 0: nothing says how the patient lies in it")
    if not np.isfinite(affines).all():
        _reject("bad-orientation", "its sform or qform has values that are no finite numbers")
    lps_from_ras = np.diag([-unit_mm, -unit_mm, unit_mm])
    whole = tuple(np.vstack([lps_from_ras @ affine, [0, 0, 0, 1]]) for affine in affines)
    packed = _suffix(path) == ".nii.gz"
    start, lead = (0, int(offset)) if packed else (int(offset), 0)
    floats = {16: np.dtype(f"{order}f4"), 64: np.dtype(f"{order}f8")}.get(datatype)
    return _Stored(path, start, packed, lead, _NIFTI_BYTES[datatype], whole, floats)


def _qform(pixdim: tuple[float, ...], quaternion: tuple[float, ...]) -> NDArray[np.float64]:
    """[3, 4], voxel to RAS, from the unit quaternion (a, b, c, d) whose a is not stored; nifti1.h, method 2."""
    b, c, d = quaternion[:3]
    rest = 1 - (b * b + c * c + d * d)
    a = math.sqrt(max(rest, 0))
    if rest < 0:
        b, c, d = np.array([b, c, d]) / math.sqrt(1 - rest)
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    steps = np.array(pixdim[1:4]) * [1, 1, -1 if pixdim[0] < 0 else 1]
    return np.column_stack([rotation * steps, quaternion[3:]])


def _check_meta(path: Path) -> _Stored:
    """MetaIO trusts NDims, counts and sizes, and ignores units, slope and offset: all of them are looked at here."""
    fields, length = _meta_fields(path)
    dimensions = fields.get("NDims", "")
    if dimensions not in ("3", "4"):
        _reject("not-a-volume", f"NDims is {dimensions[:20] or 'missing'}, not 3")
    _check_counts(fields, int(dimensions))
    orientations = fields.keys() & set(_META_MATRICES.split())
    if len(orientations) != 1:
        _reject("bad-orientation", "not one TransformMatrix: nothing certain says how the patient lies in it")
    if "ElementSpacing" not in fields:
        _reject("absurd-size", "ElementSpacing is missing: nothing says how far apart its voxels are")
    if fields.get("DistanceUnits", "mm") not in ("mm", "?"):
        _reject("absurd-size", f"DistanceUnits is {fields['DistanceUnits'][:20]!r}, not mm")
    slope, offset = (fields.get(f"ElementToIntensityFunction{name}") for name in ("Slope", "Offset"))
    if float(slope or 1) != 1 or float(offset or 0) != 0:
        _reject("not-hounsfield", "ElementToIntensityFunction is not 1 and 0, and ITK ignores it: store HU")
    if fields.get("BinaryData", "").lower() not in ("true", "1") or float(fields.get("HeaderSize", 0)) != 0:
        _reject("unreadable-file", "voxels written as text, or data with a HeaderSize of its own, are not accepted")

    name = fields["ElementDataFile"]
    packed = fields.get("CompressedData", "False").lower() in ("true", "1")
    if name in ("LOCAL", "Local", "local"):
        stored = _Stored(path, length, packed)
    else:
        stored = _Stored(_data_file(path, name), 0, packed)
    if float(fields.get("CompressedDataSize", 0)) > stored.path.stat().st_size - stored.start:
        _reject("truncated-file", "CompressedDataSize is more than there is: get it again")
    return stored


def _check_counts(fields: dict[str, str], dimensions: int) -> None:
    """MetaIO takes as many numbers as it expects, from the following lines if need be."""
    for names, count in (*_META_NUMBERS, (_META_VECTORS, dimensions), (_META_MATRICES, dimensions**2)):
        for name in fields.keys() & set(names.split()):
            numbers = fields[name].split()
            if len(numbers) != count or not all(map(_NUMBER.fullmatch, numbers)):
                _reject("unreadable-file", f"{name} is not {count} numbers")
    if any(float(size) < 0 for name in ("DimSize", "CompressedDataSize") for size in fields.get(name, "0").split()):
        _reject("unreadable-file", "DimSize or CompressedDataSize below 0")


def _meta_fields(path: Path) -> tuple[dict[str, str], int]:
    """The lines `Name = value`, ElementDataFile the last of them, and how many bytes they take."""
    fields: dict[str, str] = {}
    for line, length in _lines(path):
        name, *values = (part.strip() for part in re.split("[=:]", line, maxsplit=1))
        if not values or name in fields:
            _reject("unreadable-file", f"its header's line {line[:40]!r} is no `Name = value`, or says it twice")
        fields[name] = values[0]
        if name == "ElementDataFile":
            return fields, length
    _reject("unreadable-file", f"no ElementDataFile in its first {HEADER_BYTES} bytes")


def _data_file(path: Path, name: str) -> Path:
    """Only ever a file beside its header: a header must not lead to other places."""
    data = path.with_name(name) if name and not re.search(r"[/\\%]|\.\.|^LIST|^\.$", name) else None
    if data is None or data.is_symlink() or not data.is_file():
        _reject("external-data", f"ElementDataFile is {name[:80]!r}, which is not one file beside it")
    return data


def _check_nrrd(path: Path) -> _Stored:
    """ITK takes any space for LPS where it knows no better, and any unit for mm."""
    fields: dict[str, str] = {}
    lines = _lines(path)
    if not next(lines, ("", 0))[0].startswith("NRRD000"):
        _reject("unreadable-file", "not NRRD")
    length = 0
    for line, length in lines:  # noqa: B007
        if not line:
            break
        name, separator, value = line.partition(":")
        if line.startswith("#") or value.startswith("="):
            continue
        key = " ".join(name.lower().split())
        if not separator or key in fields or len(line) > _NRRD_LINE:
            _reject(
                "unreadable-file", f"its header's line {line[:40]!r} is no `name: value`, too long, or says it twice"
            )
        if key.replace(" ", "") == "datafile":
            _reject("external-data", "its voxels are in another file: store them in one")
        if key not in _NRRD_FIELDS:
            _reject("unreadable-file", f"its header has a field {name[:40]!r}, which is none of NRRD's")
        fields[key] = value.strip()
    else:
        _reject("unreadable-file", f"its header does not end in its first {HEADER_BYTES} bytes")

    if fields.get("space", "").lower() not in _NRRD_SPACES:
        _reject(
            "bad-orientation", f"space is {fields.get('space', 'missing')[:40]!r}: how the patient lies is not known"
        )
    if not re.fullmatch(r"(\s*\([^()]*\)){3}", fields.get("space directions", "")):
        _reject("bad-orientation", "space directions is not three vectors")
    if set(re.findall(r'"([^"]*)"', fields.get("space units", ""))) - {"mm"}:
        _reject("absurd-size", f"space units is {fields['space units'][:40]}, not mm")
    encoding = fields.get("encoding", "").lower()
    if encoding not in ("raw", "gzip", "gz") or {fields.get(f"{name} skip", "0") for name in ("line", "byte")} != {"0"}:
        _reject("unreadable-file", f"encoding {encoding[:20]!r}, or a skip: store it raw or gzip, without a skip")
    return _Stored(path, length, encoding != "raw")


def _lines(path: Path) -> Iterator[tuple[str, int]]:
    """A header's lines, and how many bytes end with each; no other characters may end a line in another's eyes."""
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
    start = 0
    while (end := header.find(b"\n", start)) >= 0:
        line = header[start:end].removesuffix(b"\r")
        if re.search(rb"[\x00-\x08\x0a-\x1f\x7f]", line):
            _reject("unreadable-file", f"its header has a line of no text: {line[:20]!r}")
        start = end + 1
        yield line.decode("utf-8", "replace"), start
