"""One X-ray image in, synthesised views out as PNG."""

import sys
from pathlib import Path

import torch
from diffusers.utils import logging

from svdrr import hub, radiograph
from svdrr.durable import check
from svdrr.errors import InputError
from svdrr.pipeline import FILM_PERCENTILES, SVDRRPipeline
from svdrr.run import model_folder

WARNING = "SYNTHETIC - NOT FOR DIAGNOSIS"


def sample(
    image: Path,
    target_deg: tuple[float, float],
    source_deg: tuple[float, float],
    model: Path | None,
    seed: int,
    samples: int,
    out: Path | None,
) -> list[Path]:
    """Writes `samples` views at `target_deg`, (azimuth, elevation), and returns where; seeds count up from `seed`.

    The image is taken as seen from `source_deg`, its longer side as the whole detector. Raises InputError where it
    cannot be read, or where there is no model.
    """
    if not all(abs(angle) <= 360 for angle in target_deg + source_deg):
        raise InputError(f"{target_deg} from {source_deg} are no angles: give --theta and --phi in degrees, up to 360")
    if out is not None and (not out.name or out.is_dir() or not out.parent.is_dir()):
        raise InputError(f"no file can be written at {out}: give --out a PNG in a folder that is there")
    folder = model_folder(model)
    picture = radiograph.read(image)
    logging.disable_progress_bar()  # of loading the parts; that of sampling stays
    try:
        check(folder)
        pipeline = SVDRRPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except ModuleNotFoundError as error:
        raise InputError(f"{folder} has parts of {error.name}, which is missing: pip install 'svdrr[clip]'") from error
    except hub.UNREADABLE as error:
        raise InputError(
            f"{folder} is damaged ({hub.reason(error)}): copy it again, or delete it in its run, and the same "
            "`svdrr train` command makes it again"
        ) from error
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    pixels = picture.pixels
    if picture.is_film:
        pixels = radiograph.from_film(pixels, FILM_PERCENTILES, pipeline.config.film_line_integrals)
        print(f"{image} is taken as a film: its grey values are matched to the training views'", file=sys.stderr)
    source = torch.from_numpy(radiograph.to_square(pixels, pipeline.config.size))[None, None]
    seeds = range(seed, seed + samples)
    views = pipeline(
        source,
        source_deg=source_deg,
        targets_deg=[target_deg] * samples,
        generator=[torch.Generator().manual_seed(number) for number in seeds],
    )
    if not views.line_integrals.isfinite().all():
        raise InputError(f"{folder} makes views that are no numbers: train it again, with a lower learning rate")
    if out is None:
        out = Path(f"{image.stem}_theta{target_deg[0]:g}_phi{target_deg[1]:g}.png")
    paths = []
    for number, view in zip(seeds, views.line_integrals[:, 0].cpu().numpy(), strict=True):
        path = out if samples == 1 else out.with_stem(f"{out.stem}_seed{number}")
        text = {
            "Warning": WARNING,
            "azimuth_deg": f"{target_deg[0]:g}",
            "elevation_deg": f"{target_deg[1]:g}",
            "source_azimuth_deg": f"{source_deg[0]:g}",
            "source_elevation_deg": f"{source_deg[1]:g}",
            "seed": str(number),
            "model": str(folder),
        }
        radiograph.write_png(path, view, text)
        paths.append(path)
    return paths
