"""Tiny shards of ellipsoid bodies, whose line integrals are closed forms; by the schema, without drrgen."""

import zlib
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

SDD_MM, SOD_MM, DETECTOR_MM = 1800.0, 1640.0, 432.0
ISOCENTRE_MM = np.array([10.0, -20.0, 30.0])
ANGLES_DEG = [(azimuth, 0.0) for azimuth in range(-90, 91, 30)]


def view_axes(azimuth_deg: float, elevation_deg: float) -> tuple[NDArray, NDArray, NDArray]:
    """docs/geometry.md once more, on its own, so that the reader is not tested against itself."""
    theta, phi = np.deg2rad(azimuth_deg), np.deg2rad(elevation_deg)
    n = np.array([np.cos(phi) * np.sin(theta), -np.cos(phi) * np.cos(theta), np.sin(phi)])
    u = np.array([np.cos(theta), np.sin(theta), 0.0])
    return u, np.cross(u, n), n


def random_body(rng: np.random.Generator) -> NDArray:
    """Rows of (centre relative to the isocentre, semi-axes, attenuation per mm): a trunk, lungs, heart, spine."""
    rows = [
        [0, 0, 0, 165, 105, 250, 0.017],
        [-75, -5, 10, 60, 80, 120, -0.013],
        [75, -5, 10, 60, 80, 120, -0.013],
        [25, -35, -40, 50, 40, 60, 0.012],
        [0, 75, 0, 18, 18, 240, 0.022],
    ]
    body = np.array(rows, dtype=np.float64)
    body[:, :3] += rng.normal(0, 6, (len(body), 3))
    body[:, 3:6] *= rng.uniform(0.85, 1.15, (len(body), 3))
    return body


def cast(body: NDArray, azimuth_deg: float, elevation_deg: float, size: int) -> NDArray:
    """Line integrals [size, size] along the rays through the pixels' centres."""
    u, v, n = view_axes(azimuth_deg, elevation_deg)
    offset_mm = (np.arange(size) - (size - 1) / 2) * DETECTOR_MM / size
    ray = SDD_MM * n + offset_mm[None, :, None] * u + offset_mm[:, None, None] * v
    ray /= np.linalg.norm(ray, axis=-1, keepdims=True)
    image = np.zeros((size, size))
    for *centre, x, y, z, attenuation in body:  # in the frame where the ellipsoid is the unit ball
        start, step = (-SOD_MM * n - centre) / (x, y, z), ray / (x, y, z)
        a, b, c = (step * step).sum(-1), step @ start, start @ start - 1
        image += attenuation * 2 * np.sqrt(np.maximum(b * b - a * c, 0)) / a
    return image.clip(min=0)


def write_shard(path: Path, patient_id: str, body: NDArray, angles_deg: list, levels: tuple[int, ...]) -> Path:
    """A shard of schema 1.0 with every MUST; levels: largest first."""
    largest = levels[0]
    images = np.stack([cast(body, *angles, largest) for angles in angles_deg])
    counts = np.round(images * 4096).clip(0, 65535).astype(np.uint16)
    axes = [view_axes(*angles) for angles in angles_deg]
    source_mm = np.stack([ISOCENTRE_MM - SOD_MM * n for _, _, n in axes])
    focal, centre = SDD_MM * largest / DETECTOR_MM, (largest - 1) / 2
    rotation = np.stack([[focal * u + centre * n, focal * v + centre * n, n] for u, v, n in axes])
    projection = np.concatenate([rotation, -rotation @ source_mm[:, :, None]], axis=2)

    with h5py.File(path, "w") as file:
        file.attrs.update(
            {"schema": "drr-sphere", "schema_version": "1.0", "kind": "rendered", "created_by": "svdrr's tests"},
            config_json="{}",
            config_sha256="44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
            patient_id=patient_id,
            licence="CC0",
            attribution="nobody",
        )
        views = file.create_group("views")
        views.attrs.update(sdd_mm=SDD_MM, sod_mm=SOD_MM, isocentre_mm=ISOCENTRE_MM, levels=levels)
        views.attrs["pixel_spacing_mm"] = [DETECTOR_MM / size for size in levels]
        views["azimuth_deg"], views["elevation_deg"] = np.array(angles_deg, dtype=np.float64).T
        views["source_mm"], views["projection"] = source_mm, projection
        for size in levels:
            while counts.shape[1] > size:
                quads = counts.astype(np.uint32)
                quads = quads[:, ::2, ::2] + quads[:, 1::2, ::2] + quads[:, ::2, 1::2] + quads[:, 1::2, 1::2]
                counts = (quads + 2 >> 2).astype(np.uint16)
            stored = file.create_dataset(
                f"images/{size}", data=counts, chunks=(1, size, size), shuffle=True, compression="gzip"
            )
            stored.attrs.update(scale=1 / 4096, offset=0.0, quantity="line integral", saturated_count=0)
            stored.attrs.update(energy_kev=60.0, mu_water_per_mm=0.02059, bone_factor=1.24)
            file[f"checks/{size}/crc32"] = np.array([zlib.crc32(image.tobytes()) for image in counts], dtype=np.uint32)
        file.create_group("ct")
        file.attrs["complete"] = True
    return path


def write_folder(folder: Path, patients: int = 8, angles_deg: list = ANGLES_DEG, levels: tuple = (32, 16)) -> Path:
    """A folder of shards of random bodies, `P-00.h5` ..., the same at every call."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(patients):
        body = random_body(np.random.default_rng(index))
        write_shard(folder / f"P-{index:02d}.h5", f"P-{index:02d}", body, angles_deg, levels)
    return folder
