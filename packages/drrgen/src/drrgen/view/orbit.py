"""The patient turning: an animation of the views along one latitude."""

from pathlib import Path

import numpy as np
from PIL import Image

from drrgen.geometry import view_axes
from drrgen.shards import Shard
from drrgen.view.output import between_deg, check_suffix, directions, frame, grey, white_level, whole

SIZE = 256
_TURN_MS = 6000
# GIF counts in hundredths of a second, and viewers slow down what asks for less than two.
_MIN_FRAME_MS = 20
# A step this much wider than the usual one is an end, not a step.
_GAP = 2.5


def gif(shard: Shard, path: Path) -> str:
    """Write the orbit as an animated GIF; returns a line that says what is in it.

    All frames share one window, from 0 (black) on.
    """
    check_suffix("--gif", path, ".gif")
    views = orbit(shard)
    size = min(SIZE, max(shard.levels))
    frames = [frame(shard, view, size) for view in views]
    white = white_level(np.stack(frames))
    first, *others = (Image.fromarray(grey(one, white)) for one in frames)
    duration_ms = max(_TURN_MS // len(views) // 10 * 10, _MIN_FRAME_MS)
    with whole(path) as partial:
        first.save(partial, "GIF", save_all=True, append_images=others, duration=duration_ms, loop=0, optimize=False)
    return f"{path}: {len(views)} frames of {size} pixels"


def orbit(shard: Shard) -> list[int]:
    """The views nearest to the equator's points, a degree apart, eastward from PA; of a grid of angles, one latitude.

    Where they do not go all the way round, from one end to the other and back again.
    """
    around = view_axes(np.arange(-180.0, 180.0), np.zeros(360))[2]
    known = directions(shard)
    nearest = [int(np.argmax(known @ point)) for point in around]
    views = [view for view, before in zip(nearest, nearest[-1:] + nearest[:-1], strict=True) if view != before]
    if len(views) < 3:
        return list(dict.fromkeys(nearest))
    steps = between_deg(known[views], known[np.roll(views, -1)])
    widest = int(np.argmax(steps))
    if steps[widest] > _GAP * np.median(steps):
        forth = views[widest + 1 :] + views[: widest + 1]
        return forth + forth[-2:0:-1]
    start = views.index(nearest[180])
    return views[start:] + views[:start]
