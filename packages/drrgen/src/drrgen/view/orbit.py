"""The patient turning: an animation of the views along one latitude, as GIF or as film."""

from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from drrgen.errors import InputError
from drrgen.geometry import view_axes
from drrgen.shards import Shard
from drrgen.view.output import between_deg, check_suffix, directions, frame, grey, white_level, whole

SIZE = 256
FILM_SIZE = 512
_TURN_MS = 6000
# GIF counts in hundredths of a second, and viewers slow down what asks for less than two.
_MIN_FRAME_MS = 20
# What screens show.
_MAX_FRAMES_PER_S = 60
# x264's constant rate factor: on 512 pixels of a chest, half a grey of 255 from the frame in the mean.
_QUALITY = 18
# Video has 16 for black, 235 for white and 128 for no colour.
_BLACK, _WHITE, _NO_COLOUR = 16, 235, 128
# A step this much wider than the usual one is an end, not a step.
_GAP = 2.5


def gif(shard: Shard, path: Path) -> str:
    """Write the orbit as an animated GIF; returns a line that says what is in it.

    All frames share one window, from 0 (black) on.
    """
    check_suffix("--gif", path, ".gif")
    views = orbit(shard)
    frames = _small_frames(shard, views)
    size, white = len(frames[0]), white_level(np.stack(frames))
    first, *others = (Image.fromarray(grey(one, white)) for one in frames)
    duration_ms = max(_TURN_MS // len(views) // 10 * 10, _MIN_FRAME_MS)
    with whole(path) as partial:
        first.save(partial, "GIF", save_all=True, append_images=others, duration=duration_ms, loop=0, optimize=False)
    return f"{path}: {len(views)} frames of {size} pixels"


def mp4(shard: Shard, path: Path) -> str:
    """Write the orbit as a film, H.264 in MP4, in the GIF's window and time; returns a line that says what is in it.

    The same shard gives the same bytes. Raises InputError where the package `av` is missing.
    """
    check_suffix("--mp4", path, ".mp4")
    try:
        import av
    except ModuleNotFoundError as error:
        raise InputError(f"--mp4 needs {error.name}, which is not installed: pip install 'drrgen[mp4]'") from error
    views = orbit(shard)
    white = white_level(np.stack(_small_frames(shard, views)))
    # colour has half the resolution, so sides are even
    size = max(min(FILM_SIZE, max(shard.levels)) // 2 * 2, 2)
    rate = min(Fraction(1000 * len(views), _TURN_MS), Fraction(_MAX_FRAMES_PER_S))
    with whole(path) as partial:
        # where that is not possible Python's error names the file, and PyAV's does not
        partial.touch()
        # faststart: what a player needs first is at the beginning of the file
        with av.open(str(partial), "w", "mp4", options={"movflags": "faststart"}) as film:
            stream = film.add_stream("libx264", rate, options={"crf": str(_QUALITY)})
            stream.width = stream.height = size
            stream.pix_fmt = "yuv420p"
            # with more than one, the bytes depend on how many
            stream.codec_context.thread_count = 1
            for view in views:
                picture = av.VideoFrame.from_ndarray(_video(grey(frame(shard, view, size), white)), "yuv420p")
                film.mux(stream.encode(picture))
            film.mux(stream.encode())
    return f"{path}: {len(views)} frames of {size} pixels, {float(len(views) / rate):.1f} s"


def _small_frames(shard: Shard, views: list[int]) -> list[NDArray[np.float32]]:
    """The GIF's."""
    return [frame(shard, view, min(SIZE, max(shard.levels))) for view in views]


def _video(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Of 8 bit grey, [size, size]: luma, then both colours at half the resolution, [3 / 2 size, size]."""
    planes = np.full((len(image) * 3 // 2, len(image)), _NO_COLOUR, np.uint8)
    planes[: len(image)] = np.rint(_BLACK + image * ((_WHITE - _BLACK) / 255))
    return planes


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
