"""One self-contained HTML file in which a person turns the patient: `page.html` and a shard's views, made to fit.

Views are stored as line integrals p in 8 bits, 0 to 255 for 0 to `top`, so that the page's window is one in p. A
sheet is a JPEG of a few neighbouring views, one below the other, that the page decodes when one of them is wanted.
"""

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from drrgen.errors import InputError
from drrgen.shards import Shard
from drrgen.view.output import between_deg, check_suffix, directions, frame, grey, level_for, white_level, whole

MB = 1_000_000
_QUALITY = 88
# Frames shrink by this factor, to multiples of JPEG's blocks and to no less than this: then views are left out.
_SHRINKING, _BLOCK, _MIN_SIZE = 0.9, 16, 128
_THINNING = 0.93
# Decoding a sheet takes as long as a frame on the screen may; phones refuse higher images.
_VIEWS_PER_SHEET, _SHEET_ROWS = 4, 8192
# Marks need no more pixels than this.
_MARKS_SIZE = 128
# That many views, evenly spread, tell a frame's usual size and the window.
_SAMPLE = 32
# Boxes are kept as integers, this many to the width of the image.
_BOX_UNITS = 10_000


@dataclass(frozen=True)
class Choice:
    """What of a shard goes into the page: `views`, as indices in the page's order, in frames of `size` pixels."""

    views: list[int]
    size: int


def html(shard: Shard, path: Path, max_mb: float) -> str:
    """Write the page, of at most `max_mb` million bytes; returns a line that says what was chosen to fit.

    Raises InputError where not even one view fits.
    """
    check_suffix("--html", path, ".html", ".htm")
    most, smallest = max_mb * MB, math.inf
    top = _top(shard)
    sample = _spread(shard, _SAMPLE)
    per_view: dict[int, float] = {}
    for size, num_views in _choices(shard):
        if size not in per_view:
            per_view[size] = float(np.mean([len(_sheet(shard, [view], size, top)) for view in sample]))
        usual = per_view[size] * num_views
        smallest = min(smallest, usual)
        # sheets of several views are a little smaller than the sum of single ones
        if not 0.9 * usual <= most:
            continue
        views = _spread(shard, num_views) if num_views < len(shard) else list(range(len(shard)))
        content = _page(shard, Choice(_in_rows(shard, views), size), top)
        smallest = min(smallest, len(content))
        if len(content) <= most:
            with whole(path) as partial:
                partial.write_bytes(content)
            of = f" of {len(shard)}" if num_views < len(shard) else ""
            return f"{path}: {num_views}{of} views of {size} pixels, {len(content) / MB:.2f} MB"
    raise InputError(f"--max-mb {max_mb:g} is too little for one view of {shard.path}: try {smallest / MB + 0.1:.1f}")


def _choices(shard: Shard) -> Iterator[tuple[int, int]]:
    """(pixels a side, number of views), best first: all views in smaller and smaller frames, then fewer views."""
    size = max(shard.levels)
    yield size, len(shard)
    while size > _MIN_SIZE:
        size = max(int(size * _SHRINKING) // _BLOCK * _BLOCK, _MIN_SIZE)
        yield size, len(shard)
    num_views = len(shard)
    while num_views > 1:
        num_views = math.floor(num_views * _THINNING)
        yield size, num_views


def _spread(shard: Shard, num_views: int) -> list[int]:
    """That many views, or all, as far from one another as can be, beginning with the one nearest to PA."""
    known = directions(shard)
    chosen = [_nearest_to_pa(shard)]
    closest = known @ known[chosen[0]]
    while len(chosen) < min(num_views, len(shard)):
        closest[chosen[-1]] = np.inf
        chosen.append(int(np.argmin(closest)))
        closest = np.maximum(closest, known @ known[chosen[-1]])
    return chosen


def _nearest_to_pa(shard: Shard) -> int:
    return int(np.argmax(directions(shard) @ np.array([0.0, -1.0, 0.0])))


def _in_rows(shard: Shard, views: list[int]) -> list[int]:
    """Neighbours next to one another, along latitudes about as wide as the views are apart."""
    width_deg = max(_spacing_deg(shard, views), 1e-3)
    rows = np.rint(shard.elevation_deg[views] / width_deg)
    return [views[place] for place in np.lexsort((shard.azimuth_deg[views], rows))]


def _spacing_deg(shard: Shard, views: list[int]) -> float:
    """The largest distance from a view to its nearest neighbour, over some of them; 180 for a single view."""
    known = directions(shard)[views]
    if len(known) == 1:
        return 180.0
    some = np.linspace(0, len(known) - 1, min(len(known), 200)).astype(int)
    cosines = known[some] @ known.T
    cosines[np.arange(len(some)), some] = -np.inf
    return float(between_deg(known[some], known[cosines.argmax(axis=1)]).max())


def _top(shard: Shard) -> float:
    """The line integral that is stored as 255: nothing in the smallest level is larger, half a unit to spare."""
    smallest = min(shard.levels)
    largest = max(float(shard.line_integrals(smallest, view).max()) for view in range(len(shard)))
    return math.ceil(2 * largest + 1) / 2


def _page(shard: Shard, choice: Choice, top: float) -> bytes:
    """The whole file. Everything from the shard is in data blocks, escaped; no text of it becomes markup."""
    count = max(1, min(_VIEWS_PER_SHEET, _SHEET_ROWS // choice.size))
    groups = [choice.views[start : start + count] for start in range(0, len(choice.views), count)]
    marks_size = level_for(shard, min(_MARKS_SIZE, choice.size))
    sheets, has_marks = [], False
    with tqdm(total=len(choice.views), unit="view", disable=None, leave=False) as bar:
        for number, group in enumerate(groups):
            sheets.append(
                f'<script type="image/jpeg" id="sheet-{number}">{_sheet(shard, group, choice.size, top)}</script>'
            )
            if marks := _marks(shard, group, marks_size):
                has_marks = True
                sheets[-1] += f'\n<script type="image/png" id="marks-{number}">{marks}</script>'
            bar.update(len(group))
    start = choice.views.index(_nearest_to_pa(shard))
    about = _about(shard, choice, top) | {
        "start": start,
        "viewsPerSheet": count,
        "marksSize": marks_size if has_marks else 0,
    }
    template = resources.files("drrgen.view").joinpath("page.html").read_text("utf-8")
    first = sheets.pop(start // count)
    parts = {
        # only the page's own script and style run, and nothing is loaded from anywhere
        "policy": f"default-src 'none'; img-src data: blob:; base-uri 'none'; form-action 'none'; "
        f"script-src {_digest(template, 'script')}; style-src {_digest(template, 'style')}",
        "about": _json(about),
        "first": first,
        "others": "\n".join(sheets),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template).encode()


def _digest(template: str, tag: str) -> str:
    """The source expression of a content security policy for the template's only plain <tag>."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _json(value: object) -> str:
    """JSON that may stand in a <script>: without < there is neither an end tag nor a comment."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _about(shard: Shard, choice: Choice, top: float) -> dict[str, object]:
    level = level_for(shard, choice.size)
    return {
        "patient": shard.patient_id,
        "kind": shard.kind,
        "facts": _facts(shard, choice, level),
        "licence": shard.licence,
        "attribution": shard.attribution,
        "size": choice.size,
        "top": top,
        "white": max(round(_white(shard), 2), 0.01),
        "spacing": round(_spacing_deg(shard, choice.views), 4),
        "azimuth": [round(float(angle), 4) for angle in shard.azimuth_deg[choice.views]],
        "elevation": [round(float(angle), 4) for angle in shard.elevation_deg[choice.views]],
        "boxes": _boxes(shard, choice, level),
        "boxUnits": _BOX_UNITS,
    }


def _facts(shard: Shard, choice: Choice, level: int) -> list[tuple[str, str]]:
    """(name, value) rows for people."""
    views = f"{len(choice.views)}" + (f" of {len(shard)}" if len(choice.views) < len(shard) else "")
    pixels = f"{choice.size} × {choice.size}" + (f", from {level} × {level}" if choice.size != level else "")
    facts = [("Views", views), ("Pixels", pixels)]
    try:
        config = json.loads(shard.config_json)
        grid = config.get("grid") if isinstance(config, dict) else None
    except ValueError:
        grid = None
    if isinstance(grid, str):
        facts.append(("Grid", grid))
    return [*facts, ("Made by", shard.created_by)]


def _white(shard: Shard) -> float:
    """White of the first window: right for the median view. Views along the body are denser, and few look at them."""
    smallest = min(shard.levels)
    return float(np.median([white_level(shard.line_integrals(smallest, view)) for view in _spread(shard, _SAMPLE)]))


def _boxes(shard: Shard, choice: Choice, level: int) -> list | None:
    """[view][nodule]: left, top, right, bottom edges from the image's corner, in `_BOX_UNITS` to its width."""
    boxes = shard.boxes(level)
    if boxes is None or boxes.shape[1] == 0:
        return None
    units: NDArray[np.int64] = np.rint((boxes[choice.views] + 0.5) / level * _BOX_UNITS).astype(np.int64)
    return units.tolist()


def _sheet(shard: Shard, views: list[int], size: int, top: float) -> str:
    """A JPEG of the views, one below the other, in base 64."""
    return _encoded(np.concatenate([grey(frame(shard, view, size), top) for view in views]), "JPEG", quality=_QUALITY)


def _marks(shard: Shard, views: list[int], size: int) -> str | None:
    """A PNG of the truncation marks, white, likewise; None where there are none."""
    marks = [found for view in views if (found := shard.truncation(size, view)) is not None]
    if not any(one.any() for one in marks):
        return None
    return _encoded(np.concatenate(marks) * np.uint8(255), "PNG")


def _encoded(pixels: NDArray[np.uint8], kind: str, **options: int) -> str:
    image, out = Image.fromarray(pixels), io.BytesIO()
    (image.convert("1") if kind == "PNG" else image).save(out, kind, optimize=True, **options)
    return base64.b64encode(out.getvalue()).decode()
