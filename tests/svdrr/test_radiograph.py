"""What we write comes back exactly; films of every kind become line integrals; what is no image is refused."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svdrr import radiograph
from svdrr.errors import InputError


@pytest.fixture
def line_integrals() -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 8, (20, 20)).astype(np.float32)


def test_our_own_png_comes_back_count_for_count(line_integrals: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "view.png"
    radiograph.write_png(path, line_integrals, {"Warning": "SYNTHETIC - NOT FOR DIAGNOSIS"})
    with Image.open(path) as image:
        assert image.text["Warning"] == "SYNTHETIC - NOT FOR DIAGNOSIS"
        assert np.array_equal(np.asarray(image), np.round(line_integrals / radiograph.PNG_SCALE))
    first = radiograph.read(path)
    assert not first.is_film
    half_a_count = radiograph.PNG_SCALE / 2 * 1.01  # and float32's rounding
    assert np.abs(first.pixels - line_integrals).max() < half_a_count
    radiograph.write_png(path, first.pixels, {})
    assert np.array_equal(radiograph.read(path).pixels, first.pixels)


def test_line_integrals_beyond_the_scale_are_clipped(tmp_path: Path) -> None:
    radiograph.write_png(tmp_path / "x.png", np.array([[-1, 17]], dtype=np.float32), {})
    assert radiograph.read(tmp_path / "x.png").pixels.tolist() == [[0, 16]]


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_8_bit_grey_and_colour(mode: str, suffix: str, tmp_path: Path) -> None:
    ramp = np.tile(np.arange(256, dtype=np.uint8), (16, 1))
    Image.fromarray(ramp).convert(mode).save(tmp_path / f"film{suffix}", quality=100)
    film = radiograph.read(tmp_path / f"film{suffix}")
    assert film.is_film
    lossy = 2 / 255 if suffix == ".jpg" else 1e-6
    assert np.abs(film.pixels - ramp / 255).max() < lossy


def test_16_bit_palette_and_transparency(tmp_path: Path) -> None:
    deep = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.allclose(radiograph.read(tmp_path / "deep.png").pixels, deep / 65535, atol=1e-6)
    for mode in ("P", "RGBA", "LA", "1"):
        Image.new("L", (8, 8), 255).convert(mode).save(tmp_path / f"{mode}.png")
        assert np.all(radiograph.read(tmp_path / f"{mode}.png").pixels == 1)


def test_a_film_takes_on_the_percentiles_and_keeps_its_order() -> None:
    film = np.random.default_rng(0).beta(2, 5, (100, 100)).astype(np.float32)
    percentiles, wanted = (1.0, 25.0, 50.0, 75.0, 99.0), (0.0, 0.5, 1.5, 3.0, 6.0)
    result = radiograph.from_film(film, percentiles, wanted)
    assert np.percentile(result, percentiles) == pytest.approx(wanted, abs=0.01)  # 10^4 pixels, interpolated
    order = film.ravel().argsort()
    assert np.all(np.diff(result.ravel()[order]) >= 0)


def test_a_film_with_a_black_border_keeps_it_as_air() -> None:
    film = np.zeros((100, 100), np.float32)
    film[30:70, 30:70] = np.random.default_rng(0).uniform(0.2, 1, (40, 40))
    result = radiograph.from_film(film, (1.0, 25.0, 50.0, 75.0, 99.0), (0.1, 0.5, 1.5, 3.0, 6.0))
    assert np.all(result[0] == np.float32(0.1))


def test_a_film_of_one_grey_is_refused() -> None:
    with pytest.raises(InputError, match="one grey"):
        radiograph.from_film(np.full((8, 8), 0.3, np.float32), (1.0, 99.0), (0.0, 6.0))


@pytest.mark.parametrize("shape", [(40, 20), (20, 40), (41, 20)])
def test_a_film_that_is_not_square_is_padded_with_air_not_squashed(shape: tuple[int, int]) -> None:
    square = radiograph.to_square(np.ones(shape, np.float32), max(shape))
    assert square.shape == (max(shape), max(shape))
    assert square.sum() == shape[0] * shape[1]
    assert square[max(shape) // 2, max(shape) // 2] == 1
    assert square[0, 0] == (1 if shape[0] == shape[1] else 0)


def test_smaller_is_the_mean_over_boxes(line_integrals: np.ndarray) -> None:
    boxes = line_integrals.reshape(10, 2, 10, 2).mean(axis=(1, 3))
    assert np.allclose(radiograph.to_square(line_integrals, 10), boxes, atol=1e-5)
    assert np.array_equal(radiograph.to_square(line_integrals, 20), line_integrals)
    assert radiograph.to_square(line_integrals, 40).shape == (40, 40)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no image", "is neither PNG nor JPEG: give --image an X-ray"),
        (b"", "is neither PNG nor JPEG"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "neither PNG nor JPEG|is damaged"),
    ],
)
def test_refuses_what_is_no_image(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        radiograph.read(path)


def test_refuses_a_truncated_a_missing_and_a_huge_image(
    line_integrals: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.png"
    radiograph.write_png(path, line_integrals, {})
    whole = path.read_bytes()
    path.write_bytes(whole[:-200])
    with pytest.raises(InputError, match=r"is damaged .*: export it again"):
        radiograph.read(path)
    with pytest.raises(InputError, match="no file"):
        radiograph.read(tmp_path / "nothing.png")
    with pytest.raises(InputError, match="no file"):
        radiograph.read(tmp_path)
    path.write_bytes(whole)
    for limit in (300, 100):  # Pillow warns up to twice its limit and refuses beyond
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(InputError, match=f"over {limit} pixels: make it smaller"):
            radiograph.read(path)


@pytest.mark.parametrize("scale", ["a lot", "nan", "inf", "-1", "0"])
def test_refuses_a_scale_that_is_none(scale: str, tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(radiograph.SCALE_KEY, scale)
    Image.new("L", (8, 8)).save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(InputError, match=f"'{scale}', not a number"):
        radiograph.read(tmp_path / "x.png")
