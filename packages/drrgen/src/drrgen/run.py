"""A folder of CTs in, a folder of shards out: every series is rendered, skipped because finished, or rejected aloud."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from drrgen import anatomy, attenuation, body, catalog, dicom, grid, lidc, phantom, projectors, shards
from drrgen.config import RenderConfig
from drrgen.defects import POLICIES, SeriesRejected, printable
from drrgen.errors import InputError
from drrgen.geometry import Views
from drrgen.render import render
from drrgen.volume import Volume
from drrgen.worker import Worker

_PHANTOM_MANUFACTURER = "drrgen phantom"
# What a phantom's CT covers: the field of view in plane, and its length.
_FIELD_MM, _LENGTH_MM = 400.0, 340.0
_SLICE_STEP_MM = 2.5


@dataclass
class Summary:
    rendered: int = 0
    skipped: int = 0
    rejected: int = 0


def render_folder(ct_dir: Path, out: Path, config: RenderConfig, on_defect: str, overwrite: bool) -> Summary:
    """Render every CT below `ct_dir` to a shard in `out`; finished shards of the same settings are left alone.

    on_defect, one of POLICIES, is no part of the settings: it makes no difference to a series without defects.
    Raises InputError where there is no CT, or `out` holds a shard of other settings and `overwrite` is not set.
    """
    if on_defect not in POLICIES:
        raise InputError(f"--on-defect {on_defect!r} does not exist: choose one of {', '.join(POLICIES)}")
    entries = [one for one in catalog.scan(ct_dir) if one.copy_of is None]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out} cannot be a folder for shards ({error.strerror}): choose another") from error
    todo = [one for one in entries if overwrite or not _is_finished(out / shards.file_name(one.origin), config)]
    summary = Summary(skipped=len(entries) - len(todo))
    num_views = len(grid.directions(config.grid, config.azimuth, config.elevation)[0])
    with tqdm(total=len(todo) * num_views, unit="view", disable=not todo) as bar, Worker() as worker:
        for one in todo:
            bar.set_description(one.origin.patient_id)
            try:
                volume = catalog.read(one, on_defect, worker)
                _render_volume(volume, one, out / shards.file_name(one.origin), config, bar)
                summary.rendered += 1
            except SeriesRejected as error:
                bar.total -= num_views
                name = f"{one.origin.patient_id} {one.origin.series_uid}".strip()
                bar.write(f"rejected {name} in {printable(one.path)}: {error}{_cure(error)}", file=sys.stderr)
                summary.rejected += 1
    return summary


def _cure(error: SeriesRejected) -> str:
    return "; --on-defect repair renders it" if all(one.repair for one in error.defects) else ""


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


def _render_volume(volume: Volume, entry: catalog.Entry, path: Path, config: RenderConfig, bar: tqdm) -> None:
    if not config.keep_table:
        volume = volume.with_hu(body.remove_table(volume))
    azimuth_deg, elevation_deg = grid.directions(config.grid, config.azimuth, config.elevation)
    views = Views(azimuth_deg, elevation_deg, volume.centre_mm, config.setup.sdd_mm, config.setup.sod_mm)
    project = projectors.get(config.projector)(attenuation.mu_per_mm(volume.hu), volume.voxel_from_world)
    batches = render(project, views, config.detectors[0], [detector.shape for detector in config.detectors])
    slices = entry.source.slices if isinstance(entry.source, dicom.Series) else None
    with shards.create(
        path,
        volume,
        views,
        config.detectors,
        table_removed=not config.keep_table,
        config_json=config.to_json(),
        nodules=None if slices is None else lidc.nodules(volume.origin.series_uid, slices),
        **_terms(volume, config),
    ) as writer:
        for images in batches:
            writer.append(images)
            bar.update(len(images[config.size]))
        if saturated := writer.saturated[config.size]:
            bar.write(f"{path}: {saturated} pixels are at the end of the scale, a line integral of 16", file=sys.stderr)


def _terms(volume: Volume, config: RenderConfig) -> dict[str, str]:
    """Data set, licence and attribution of a CT: as the settings say, or as far as the CT itself can tell."""
    if lidc.expected_slices(volume.origin.series_uid) is not None:
        known = ("LIDC-IDRI", lidc.LICENCE, lidc.ATTRIBUTION)
    elif volume.origin.manufacturer == _PHANTOM_MANUFACTURER and volume.origin.patient_id.startswith("PHANTOM-"):
        known = ("drrgen phantom", "none needed: synthetic", "drrgen phantom")
    else:
        known = ("", "unknown", "unknown: see where the CT came from")
    return {
        "dataset": config.dataset or known[0],
        "licence": config.licence or known[1],
        "attribution": config.attribution or known[2],
    }


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
