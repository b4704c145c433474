"""The contact sheet: many views on one page."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from drrgen.shards import Shard
from drrgen.view.output import check_suffix, grey, level_for, white_level, whole

# The sheet shows at most this many views across and down, in tiles of at least this many pixels.
COLUMNS, ROWS, TILE = 13, 9, 128


def sheet(shard: Shard, path: Path) -> str:
    """Write a contact sheet with the angles on every view: azimuth across, elevation down, the head's side on top.

    A grid that is no lattice of angles is shown in its own order. All views share one window, from 0 (black) on.
    Returns a line that says what is in it.
    """
    check_suffix("--sheet", path, ".png")
    size = level_for(shard, TILE)
    rows = _lattice(shard) or _in_order(shard)
    images = {view: shard.line_integrals(size, view) for row in rows for view in row}
    white = white_level(np.stack(list(images.values())))
    page = Image.new("L", (size * max(len(row) for row in rows), size * len(rows)))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size / 11)
    for top, row in enumerate(rows):
        for left, view in enumerate(row):
            page.paste(Image.fromarray(grey(images[view], white)), (left * size, top * size))
            label = f"{shard.azimuth_deg[view]:+.4g}, {shard.elevation_deg[view]:+.4g}"
            draw.text((left * size + 3, top * size + 2), label, fill=255, font=font, stroke_width=1, stroke_fill=0)
    with whole(path) as partial:
        page.save(partial, format="PNG")
    return f"{path}: {len(images)} views of {size} pixels"


def _lattice(shard: Shard) -> list[list[int]] | None:
    elevations = np.unique(shard.elevation_deg)[::-1]
    if len(elevations) > len(shard) / 3:
        return None
    rows = [np.flatnonzero(shard.elevation_deg == elevation) for elevation in _thinned(elevations, ROWS)]
    return [_thinned(row, COLUMNS).tolist() for row in rows]


def _in_order(shard: Shard) -> list[list[int]]:
    views = _thinned(np.arange(len(shard)), COLUMNS * ROWS).tolist()
    return [views[start : start + COLUMNS] for start in range(0, len(views), COLUMNS)]


def _thinned(values: NDArray, count: int) -> NDArray:
    """At most `count` of the values, evenly spread, ends kept."""
    if len(values) <= count:
        return values
    return values[np.linspace(0, len(values) - 1, count).round().astype(int)]
