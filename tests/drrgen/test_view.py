"""Pictures of shards: what is in the page, that it fits, and that a person can turn the patient in a browser."""

import base64
import hashlib
import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import av
import h5py
import numpy as np
import pytest
from PIL import Image
from tests.drrgen import browser
from tests.drrgen.test_shards import nodule
from tests.drrgen.volumes import create, volume

from drrgen import grid, shards, view
from drrgen.errors import InputError
from drrgen.geometry import Detector, Views, view_axes
from drrgen.nodules import AnnotatedNodule
from drrgen.render import quantised
from drrgen.shards import Shard
from drrgen.view import orbit, page
from drrgen.view.output import between_deg, frame, grey, white_level

HOSTILE = "</script><script>throw 1</script><!-- {{others}} &amp; \u2028 \" ' \\ 肺"


def write(
    path: Path,
    angles: grid.Angles,
    size: int = 32,
    noise: float = 0.0,
    patient_id: str = "TEST-01",
    attribution: str = "nobody",
    marks: bool = False,
    nodules: list[AnnotatedNodule] | None = None,
) -> Path:
    """Each view is of one line integral of its own, `shade`, with noise; levels of `size` and half as many pixels."""
    views = Views(*angles, np.zeros(3), 1800.0, 1640.0)
    about = volume()
    about = replace(about, origin=replace(about.origin, patient_id=patient_id))
    random = np.random.default_rng(0)
    with create(
        path,
        about,
        views,
        [Detector(size, 512 / size), Detector(size // 2, 1024 / size)],
        table_removed=True,
        config_json='{"grid": "15deg"}',
        licence="CC0",
        attribution=attribution,
        nodules=nodules,
    ) as writer:
        for number in range(len(views)):
            image = shade(number, len(views)) + noise * random.random((1, size, size))
            fine = quantised(image.astype(np.float32))
            truncated = np.zeros((1, size, size), np.uint8)
            truncated[:, : number % 2 * size // 4] = 1  # in every other view, the upper quarter
            writer.append({size: fine, size // 2: shards.halved(fine)}, truncated if marks else None)
    return path


def shade(number: int, num_views: int) -> float:
    return 1 + 6 * number / num_views


@pytest.fixture(scope="module")
def sphere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """266 views, two nodules, the second beyond the image, and texts that try to break out of the page."""
    path = tmp_path_factory.mktemp("view") / "sphere.h5"
    nodules = [nodule(0, 3), nodule(400, 1)]
    return write(path, grid.directions("15deg"), 256, 0.0, HOSTILE, HOSTILE, marks=True, nodules=nodules)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Views that no JPEG makes small: 62 of them."""
    return write(tmp_path_factory.mktemp("view") / "noisy.h5", grid.directions("30deg"), size=256, noise=4.0)


def about(content: str) -> dict:
    (block,) = re.findall(r'<script type="application/json" id="about">(.*?)</script>', content, re.DOTALL)
    return json.loads(block)


def sheets(content: str, kind: str) -> dict[int, np.ndarray]:
    found = re.findall(rf'<script type="image/\w+" id="{kind}-(\d+)">(.*?)</script>', content)
    return {int(number): np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for number, data in found}


def test_page_holds_every_view_and_its_line_integrals(sphere: Path, tmp_path: Path) -> None:
    with Shard(sphere) as shard:
        view.html(shard, tmp_path / "a.html", 24)
        angles = np.stack([shard.azimuth_deg, shard.elevation_deg], -1)
    content = (tmp_path / "a.html").read_text("utf-8")
    told = about(content)
    size, count = told["size"], told["viewsPerSheet"]
    assert size == 256
    stored = np.concatenate([image for _, image in sorted(sheets(content, "sheet").items())]).reshape(-1, size, size)
    order = [
        int(np.argmin(np.abs(angles - one).sum(-1))) for one in zip(told["azimuth"], told["elevation"], strict=True)
    ]
    assert sorted(order) == list(range(len(angles)))
    for number, image in zip(order, stored, strict=True):
        # half of one of 255 steps, and two of JPEG's
        assert np.abs(image / 255 * told["top"] - shade(number, len(angles))).max() <= 2.5 * told["top"] / 255
    marks = sheets(content, "marks")
    for place, number in enumerate(order):
        mark = marks[place // count].reshape(-1, told["marksSize"], told["marksSize"])[place % count]
        assert mark.mean() == number % 2 / 4
    assert (told["azimuth"][told["start"]], told["elevation"][told["start"]]) == (0, 0)
    # PA: the nodule in the middle is 1800 / 1630 * 20 mm of 512 mm wide; the other one is beyond the image
    left, top, right, bottom = (edge / told["boxUnits"] for edge in told["boxes"][told["start"]][0])
    assert (right - left, bottom - top) == pytest.approx((1800 / 1630 * 20 / 512,) * 2, abs=2e-4)
    assert (left + right, top + bottom) == pytest.approx((1, 1), abs=2e-4)
    assert told["boxes"][told["start"]][1][0] > told["boxUnits"]


def test_texts_of_a_shard_never_become_markup(sphere: Path, tmp_path: Path) -> None:
    with Shard(sphere) as shard:
        view.html(shard, tmp_path / "a.html", 24)
    content = (tmp_path / "a.html").read_text("utf-8")
    assert about(content)["patient"] == about(content)["attribution"] == HOSTILE
    assert "throw 1</script" not in content
    assert "<!--" not in content
    # the page's own script is the only one that may run, and nothing may be loaded
    (script,) = re.findall(r"<script>(.*?)</script>", content, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert (
        f"default-src 'none'; img-src data: blob:; base-uri 'none'; form-action 'none'; script-src 'sha256-{digest}'"
        in content
    )
    assert not re.search(r"https?:|src=|url\(|@import", content.split('id="about"')[0] + script)


@pytest.mark.parametrize("max_mb", [6, 3, 1, 0.3, 0.12])
def test_page_fits(noisy: Path, tmp_path: Path, max_mb: float) -> None:
    path = tmp_path / "a.html"
    with Shard(noisy) as shard:
        line = view.html(shard, path, max_mb)
    # less would waste what the user allows; frames shrink by 0.9 a side, or one block
    assert (
        0.6 * max_mb * page.MB <= path.stat().st_size <= max_mb * page.MB
        or about(path.read_text("utf-8"))["size"] == 256
    )
    told = about(path.read_text("utf-8"))
    num_views = len(told["azimuth"])
    assert f"{num_views}{' of 62' * (num_views < 62)} views of {told['size']} pixels" in line
    assert told["size"] >= 128
    if num_views < 62:
        assert told["size"] == 128
    assert told["boxes"] is None
    assert told["marksSize"] == 0


def test_what_cannot_fit_is_refused_and_leaves_nothing(noisy: Path, tmp_path: Path) -> None:
    for max_mb in (0.02, 0, -1, float("nan")):
        with Shard(noisy) as shard, pytest.raises(InputError, match=r"--max-mb .* is too little"):
            view.html(shard, tmp_path / "a.html", max_mb)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["15deg", "fibonacci:200"])
def test_views_left_out_lie_close_to_views_kept(name: str, tmp_path: Path) -> None:
    """No view is farther from a kept one than kept ones are from one another: none left out would have been better."""
    with Shard(write(tmp_path / "a.h5", grid.directions(name))) as shard:
        kept = page._spread(shard, 40)
        known = view_axes(shard.azimuth_deg, shard.elevation_deg)[2]
    assert len(set(kept)) == 40
    between = between_deg(known[kept][:, None], known[kept]) + 360 * np.eye(40)
    assert between_deg(known[:, None], known[kept]).min(axis=1).max() <= between.min() + 1e-6
    assert known[kept[0]] @ [0, -1, 0] == pytest.approx(1)


def test_spacing_is_the_distance_between_neighbours(sphere: Path) -> None:
    with Shard(sphere) as shard:
        assert page._spacing_deg(shard, list(range(len(shard)))) == pytest.approx(15)
        assert page._spacing_deg(shard, [3]) == 180


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ({}, [0, 45, 90, 135, -180, -135, -90, -45]),
        ({"azimuth": "-90:90", "elevation": "-45:45"}, [-90, -45, 0, 45, 90, 45, 0, -45]),
        ({"azimuth": "90:270", "elevation": "-45:45"}, [90, 135, -180, -135, -90, -135, -180, 135]),
        ({"azimuth": "45:45", "elevation": "0:0"}, [45]),
    ],
)
def test_orbit_goes_round_or_back_and_forth(cut: dict, expected: list[int], tmp_path: Path) -> None:
    with Shard(write(tmp_path / "a.h5", grid.directions("45deg", **cut))) as shard:
        views = orbit.orbit(shard)
        assert shard.azimuth_deg[views].tolist() == expected
        assert set(shard.elevation_deg[views]) == {0}
        view.gif(shard, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as picture:
        assert (getattr(picture, "n_frames", 1), picture.size) == (len(expected), (32, 32))


def film(path: Path) -> tuple[list[np.ndarray], float]:
    """The frames of an MP4 as 8 bit grey, and its length in seconds."""
    with av.open(str(path)) as opened:
        (stream,) = opened.streams
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        planes = [frame.to_ndarray() for frame in opened.decode(stream)]
        luma = [one[: one.shape[1]].astype(float) for one in planes]
        return [(one - 16) * 255 / 219 for one in luma], float(stream.duration * stream.time_base)


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ({}, [0, 45, 90, 135, -180, -135, -90, -45]),
        ({"azimuth": "-90:90"}, [-90, -45, 0, 45, 90, 45, 0, -45]),
        ({"azimuth": "45:45", "elevation": "0:0"}, [45]),
    ],
)
def test_film_shows_the_orbit_in_the_gifs_time(cut: dict, expected: list[int], tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with Shard(write(tmp_path / "a.h5", grid.directions("45deg", **cut))) as shard:
        line = view.mp4(shard, path)
        first = path.read_bytes()
        view.mp4(shard, path)
        views = orbit.orbit(shard)
        white = white_level(np.stack([frame(shard, one, 32) for one in views]))
        greys = np.array([255 * shade(number, len(shard)) / white for number in range(len(shard))])
    assert path.read_bytes() == first
    assert first.index(b"moov") < first.index(b"mdat")  # a browser shows it before it has all of it
    frames, seconds = film(path)
    assert seconds == 6
    assert line == f"{path}: {len(expected)} frames of 32 pixels, 6.0 s"
    assert {one.shape for one in frames} == {(32, 32)}
    # each frame is of one grey, by which its view is known; others are 8 of 255 away, where it is not white
    assert len(frames) == len(views)
    for one, number in zip(frames, views, strict=True):
        assert np.abs(one - min(greys[number], 255)).max() <= 3
    assert shard.azimuth_deg[views].tolist() == expected
    # after the last comes the first: a step away, as all others
    assert {abs((b - a + 180) % 360 - 180) for a, b in zip(expected, expected[1:] + expected[:1], strict=True)} <= {
        45,
        0,
    }


def test_film_of_a_fine_grid_is_as_smooth_as_screens_are(tmp_path: Path) -> None:
    """One way 241 views, the other way 239: in 6 s they would be 80 a second."""
    with Shard(write(tmp_path / "a.h5", grid.directions("1deg", "-120:120", "0:0"), size=16)) as shard:
        view.mp4(shard, tmp_path / "a.mp4")
    frames, seconds = film(tmp_path / "a.mp4")
    assert (len(frames), seconds) == (480, 8)


def test_film_looks_like_the_view_it_shows(tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "contract" / "golden" / "1.0" / "tiny.h5"
    with Shard(golden) as shard:
        view.mp4(shard, tmp_path / "a.mp4")
        views = orbit.orbit(shard)
        stored = [frame(shard, one, 64) for one in views]
    frames, _ = film(tmp_path / "a.mp4")
    for number, one in enumerate(frames):
        expected = grey(stored[number], white_level(np.stack(stored)))
        # the encoder loses 1 of 255; a view upside down or of another side is more than 10 away
        assert np.abs(one - expected).mean() < 2
        assert np.abs(one[::-1] - expected).mean() > 10
        assert np.abs(frames[number - 1] - expected).mean() > 10


def test_film_without_its_package_is_one_line(sphere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with Shard(sphere) as shard, pytest.raises(InputError, match=r"--mp4 needs av, .*: pip install 'drrgen\[mp4\]'"):
        view.mp4(shard, tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []


def test_orbit_off_the_equator_and_on_a_lattice_of_no_latitudes(tmp_path: Path) -> None:
    with Shard(write(tmp_path / "a.h5", grid.directions("45deg", elevation="40:80"))) as shard:
        assert set(shard.elevation_deg[orbit.orbit(shard)]) == {45}
    with Shard(write(tmp_path / "b.h5", grid.directions("fibonacci:300"))) as shard:
        views = orbit.orbit(shard)
        turn = np.diff(shard.azimuth_deg[[*views, views[0]]])
        assert ((turn + 180) % 360 - 180 > 0).all()
        # 300 views are 12 degrees apart
        assert np.abs(shard.elevation_deg[views]).max() <= 12


def test_synthesised_shards_and_odd_settings(sphere: Path, tmp_path: Path) -> None:
    """No /ct, no boxes or marks, and settings that are not a renderer's."""
    path = tmp_path / "made.h5"
    with h5py.File(write(path, grid.directions("45deg")), "r+") as file:
        del file["ct"]
        settings = "[1]"
        file.attrs.update(
            kind="synthesised", config_json=settings, config_sha256=hashlib.sha256(settings.encode()).hexdigest()
        )
    with Shard(path) as shard:
        view.html(shard, tmp_path / "a.html", 24)
    told = about((tmp_path / "a.html").read_text("utf-8"))
    assert (told["kind"], told["boxes"], told["marksSize"]) == ("synthesised", None, 0)
    assert "Grid" not in dict(told["facts"])


needs_chromium = pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium on this machine")

TEXT = "document.getElementById('{}').textContent"
# [red, green, blue, alpha, ...] of a canvas, through a copy: browsers warn of canvases that are read
PIXELS = (
    "(() => {{ const of = document.getElementById('{}'), copy = new OffscreenCanvas(of.width, of.height),"
    " on = copy.getContext('2d', {{ willReadFrequently: true }}); on.drawImage(of, 0, 0);"
    " return on.getImageData(0, 0, of.width, of.height).data; }})()"
)
GREY = PIXELS.format("image") + "[4 * 256 * 128]"


@needs_chromium
def test_a_person_turns_the_patient(sphere: Path, tmp_path: Path) -> None:
    with Shard(sphere) as shard:
        view.html(shard, tmp_path / "a.html", 24)
        angles = list(zip(shard.azimuth_deg, shard.elevation_deg, strict=True))
    told = about((tmp_path / "a.html").read_text("utf-8"))

    def shown(azimuth: int, elevation: int, name: str) -> None:
        signed = [f"{'−' if angle < 0 else '+'}{abs(angle)}°" for angle in (azimuth, elevation)]
        is_said = [
            f"{TEXT.format(id)} === {json.dumps(text)}"
            for id, text in zip(("azimuth", "elevation"), signed, strict=True)
        ]
        opened.until(" && ".join(is_said))
        assert opened.value(TEXT.format("name")) == name
        expected = min(255 * shade(angles.index((azimuth, elevation)), len(angles)) / told["white"], 255)
        assert opened.value(GREY) == pytest.approx(expected, abs=4)  # three steps of 8 bits, stretched

    with browser.Page(tmp_path / "a.html", tmp_path / "profile") as opened:
        assert opened.value(TEXT.format("patient")) == HOSTILE
        width = opened.value("document.getElementById('view').clientWidth")
        shown(0, 0, "PA")
        assert [opened.value(TEXT.format(id)) for id in ("left", "right", "top", "bottom")] == ["R", "L", "H", "F"]

        opened.drag(-round(width / 2), round(width / 6))  # half the width is a quarter turn
        shown(90, 30, "left lateral, cranial 30°")
        assert opened.value(TEXT.format("left")) == "A"
        for key in ("ArrowRight", "ArrowUp", "ArrowUp"):
            opened.press(key)
        shown(105, 60, "LAO 105°, cranial 60°")
        for _ in range(3):
            opened.press("ArrowUp")
        shown(0, 90, "detector at the head")
        opened.press("Home")
        shown(0, 0, "PA")
        for _ in range(13):
            opened.press("ArrowLeft")
        shown(165, 0, "LAO 165°")
        opened.press("ArrowDown")
        shown(165, -15, "LAO 165°, caudal 15°")

        opened.press("Home")
        shown(0, 0, "PA")
        before = opened.value(GREY)
        opened.press("i")
        opened.until(f"{GREY} === {255 - before}")
        opened.press("i")
        opened.until(f"{GREY} === {before}")
        opened.drag(round(width / 4), 0, button="right")  # a wider window: less grey
        opened.until(f"{GREY} < {before}")
        shown_width = float(opened.value(TEXT.format("width-value")))
        assert shown_width == pytest.approx(told["white"] + told["top"] / 4, abs=0.05)

        drawn = PIXELS.format("overlay") + ".some(value => value > 0)"
        assert opened.value(drawn)
        opened.press("n")
        opened.until(f"!{drawn}")
        opened.press("ArrowRight" if angles.index((0, 0)) % 2 == 0 else "Home")  # to a view with marks
        opened.press("t")
        opened.until(drawn)

        opened.press(" ")
        opened.until("document.getElementById('play').getAttribute('aria-pressed') === 'true'")
        opened.until(f"{TEXT.format('azimuth')} === '+45°'")
        opened.press(" ")
        opened.until("document.getElementById('play').getAttribute('aria-pressed') === 'false'")
        assert opened.complaints == []
        assert opened.requests == [(tmp_path / "a.html").as_uri()]


@needs_chromium
def test_on_a_phone(noisy: Path, tmp_path: Path) -> None:
    """A finger turns and does not scroll; nothing is wider than the screen; what is not known is not offered."""
    with Shard(noisy) as shard:
        view.html(shard, tmp_path / "a.html", 1)
    with browser.Page(tmp_path / "a.html", tmp_path / "profile", width=390, height=844, phone=True) as opened:
        opened.swipe(-65, 65)
        opened.until(f"{TEXT.format('azimuth')} === '+30°' && {TEXT.format('elevation')} === '+30°'")
        assert opened.value("scrollY") == 0
        assert opened.value("document.documentElement.scrollWidth") <= 390
        hidden = "['show-boxes', 'show-marks'].every(id => document.getElementById(id).offsetParent === null)"
        assert opened.value(hidden)
        assert opened.complaints == []
        assert len(opened.requests) == 1
