"""The cache encodes once per shard, autoencoder and level, never serves what is of another, equals encoding anew."""

import resource
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from svdrr import latents
from svdrr import vae as autoencoder
from svdrr.errors import InputError
from svdrr.latents import Reader, cached, encoded, latent_path, read_images, read_truncated
from svdrr.shards import Shard, open_folder


@pytest.fixture
def opened(shards: Path) -> list[Shard]:
    return open_folder(shards)[:3]


class Encoder:
    """Every 4th pixel; counts the images that it saw."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return images[..., ::4, ::4]


SOME = np.array([1, 0, 1, 1, 1]), np.array([6, 0, 2, 3, 6])
"""Five views of two shards, one of them twice."""


def some(read: Reader) -> latents.Latents:
    return read(*SOME)


def test_encodes_once_per_autoencoder_and_level(opened: list[Shard], tmp_path: Path) -> None:
    encoder, views = Encoder(), sum(map(len, opened))
    values = some(cached(opened, 32, encoder, "vae 1", tmp_path)).values
    assert values.shape == (5, 1, 8, 8)
    assert np.array_equal(values[2, 0], opened[1].images(32, [2])[0, ::4, ::4].astype(np.float16))
    assert torch.equal(values[0], values[4])
    for vae, size, expected in (("vae 1", 32, views), ("vae 2", 32, 2 * views), ("vae 2", 16, 3 * views)):
        cached(opened, size, encoder, vae, tmp_path)
        assert encoder.seen == expected


def test_another_content_of_a_shard_is_encoded_again(make_shards: Callable[..., Path], tmp_path: Path) -> None:
    encoder, folder = Encoder(), make_shards(patients=2)
    cached(open_folder(folder), 32, encoder, "vae", tmp_path)
    (folder / "P-00.h5").unlink()
    (folder / "P-01.h5").rename(folder / "P-00.h5")
    before = encoder.seen
    renamed = open_folder(folder)
    read = cached(renamed, 32, encoder, "vae", tmp_path)
    assert encoder.seen == before, "a shard's name is not its content"
    expected = renamed[0].images(32, [3])[0, ::4, ::4]
    assert np.array_equal(read(np.array([0]), np.array([3])).values[0, 0], expected.astype(np.float16))

    with h5py.File(folder / "P-00.h5", "r+") as file:
        file["images/32"].attrs["scale"] = 1 / 2048
    read = cached(open_folder(folder), 32, encoder, "vae", tmp_path)
    assert encoder.seen == before + len(renamed[0])
    assert np.array_equal(read(np.array([0]), np.array([3])).values[0, 0], (2 * expected).astype(np.float16))


def test_goes_on_after_the_last_finished_shard(opened: list[Shard], tmp_path: Path) -> None:
    encoder = Encoder()
    cached(opened, 32, encoder, "vae", tmp_path, is_over=lambda: True)
    assert encoder.seen == len(opened[0])
    latent_path(tmp_path, opened[1], 32, "vae").with_suffix(".partial").write_bytes(b"half a file, from a kill")
    cached(opened, 32, encoder, "vae", tmp_path)
    assert encoder.seen == sum(map(len, opened))
    assert not list(tmp_path.rglob("*.partial"))


def test_processes_share_the_shards(opened: list[Shard], tmp_path: Path) -> None:
    encoders = Encoder(), Encoder()
    for index, encoder in enumerate(encoders):
        cached(opened, 32, encoder, "vae", tmp_path, (index, 2))
    assert [encoder.seen for encoder in encoders] == [sum(map(len, opened[index::2])) for index in (0, 1)]
    cached(opened, 32, encoders[0], "vae", tmp_path)
    assert sum(encoder.seen for encoder in encoders) == sum(map(len, opened))


def test_a_shard_that_is_there_twice_is_one_process_s(opened: list[Shard], tmp_path: Path) -> None:
    """Two that encode it at once would write the same file."""
    encoders, twice = (Encoder(), Encoder()), [opened[0], opened[0]]
    read = cached(twice, 32, encoders[0], "vae", tmp_path / "first", (0, 2))
    assert len(read(np.array([0, 1]), np.array([3, 3])).values) == 2
    cached(twice, 32, encoders[1], "vae", tmp_path / "second", (1, 2))
    assert [encoder.seen for encoder in encoders] == [len(opened[0]), 0]


def test_what_is_not_whole_does_not_count(opened: list[Shard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended in the middle of the first shard, at any of its batches; later cut by a disk."""
    monkeypatch.setattr(latents, "MAX_BATCH", 2)
    for batches in range(4):
        encoder = Encoder()

        def end(images: Tensor, encoder: Encoder = encoder, after: int = 2 * batches) -> Tensor:
            if encoder.seen == after:
                raise KeyboardInterrupt
            return encoder(images)

        with pytest.raises(KeyboardInterrupt):
            cached(opened[:1], 32, end, "vae", tmp_path)
        assert not list(tmp_path.rglob("*.npy"))

    encoder = Encoder()
    before = some(cached(opened, 32, encoder, "vae", tmp_path))
    path = latent_path(tmp_path, opened[0], 32, "vae")
    for length in (0, 5, 100, path.stat().st_size - 1):
        path.write_bytes(path.read_bytes()[:length])
        after = some(cached(opened, 32, encoder, "vae", tmp_path))
        assert torch.equal(before.values, after.values)
    assert encoder.seen == sum(map(len, opened)) + 4 * len(opened[0])


def test_equals_what_is_encoded_anew_within_16_bits(opened: list[Shard], tmp_path: Path) -> None:
    """A real autoencoder. Half a unit of float16 is 2^-11 of the value; 1e-5 is for batches of another shape."""
    torch.manual_seed(0)
    vae = autoencoder.build(latent_channels=2, block_channels=(4, 8), layers_per_block=1)

    def encode(images: Tensor) -> Tensor:
        return autoencoder.encode(vae, images)

    kept = some(cached(opened, 32, encode, autoencoder.digest(vae), tmp_path)).values
    fresh = encoded(read_images(opened, 32, *SOME), encode)
    assert kept.dtype == fresh.dtype == torch.float32
    assert torch.allclose(kept, fresh, rtol=2**-11, atol=1e-5)
    assert not torch.equal(kept[0], kept[2])


def test_truncation_goes_along_as_the_share_of_each_cell(make_shards: Callable[..., Path], tmp_path: Path) -> None:
    """View v of one shard has v marked rows at the bottom; the other shard has no marks at all."""
    folder = make_shards(patients=2)
    views, size = len(open_folder(folder)[0]), 16
    marks = np.zeros((views, size, size), np.uint8)
    for view in range(views):
        marks[view, size - view :] = 1
    with h5py.File(folder / "P-01.h5", "r+") as file:
        file.create_dataset(f"truncation/{size}", data=marks, chunks=(1, size, size), compression="gzip")
    opened = open_folder(folder)
    expected = torch.zeros(5, 4, 4)
    for row, view in ((0, 6), (2, 2), (3, 3), (4, 6)):
        expected[row, 3], expected[row, 2] = min(view, 4) / 4, max(view - 4, 0) / 4
    assert torch.equal(read_truncated(opened, size, 4, *SOME), expected)
    kept = some(cached(opened, size, Encoder(), "vae", tmp_path)).truncated
    assert torch.allclose(kept, expected, atol=0.5 / 255)  # kept in steps of 1/255


def test_marks_that_come_later_are_seen(make_shards: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_shards(patients=1)
    cached(open_folder(folder), 16, Encoder(), "vae", tmp_path)
    with h5py.File(folder / "P-00.h5", "r+") as file:
        file["truncation/16"] = np.ones((7, 16, 16), np.uint8)
    read = cached(open_folder(folder), 16, Encoder(), "vae", tmp_path)
    assert read(np.array([0]), np.array([0])).truncated.min() == 1


ALL = np.zeros(7, np.int64), np.arange(7)
"""The views of the first shard."""


def flip(path: Path, place: int) -> None:
    """Some bits of one byte, of each byte others; to flip it again puts it right."""
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ (1 + place % 255)]))


def test_a_flipped_byte_of_any_view_is_found_and_of_no_other(opened: list[Shard], tmp_path: Path) -> None:
    """Every byte of every record, by a reader that is at work; and the cure that is said helps."""
    encoder, again = Encoder(), "delete it and run the same command, which encodes it again"
    read = cached(opened[:1], 16, encoder, "vae", tmp_path)
    before, path = read(*ALL), latent_path(tmp_path, opened[0], 16, "vae")
    length, itemsize = path.stat().st_size, np.load(path).dtype.itemsize
    for place in range(length - 7 * itemsize, length):
        damaged = 6 - (length - 1 - place) // itemsize
        flip(path, place)
        with pytest.raises(InputError, match=rf"{path.name} is damaged \(view {damaged} fails its checksum\): {again}"):
            read(*ALL)
        others = ALL[1] != damaged
        assert torch.equal(read(ALL[0][others], ALL[1][others]).values, before.values[others])
        flip(path, place)
    flip(path, length - 1)
    path.unlink()
    assert torch.equal(cached(opened[:1], 16, encoder, "vae", tmp_path)(*ALL).values, before.values)


@pytest.mark.filterwarnings("ignore:Reading .* required additional header parsing")
def test_a_header_with_a_flipped_byte_is_never_misread(opened: list[Shard], tmp_path: Path) -> None:
    """Such a file is encoded anew, or means the same. Every seventh byte, of it and of the first record."""
    encoder = Encoder()
    before = cached(opened[:1], 16, encoder, "vae", tmp_path)(*ALL)
    path = latent_path(tmp_path, opened[0], 16, "vae")
    begin = path.stat().st_size - 6 * np.load(path).dtype.itemsize
    for place in range(0, begin, 7):
        flip(path, place)
        after = cached(opened[:1], 16, encoder, "vae", tmp_path)(*ALL)
        assert all(torch.equal(one, other) for one, other in zip(before[:2], after[:2], strict=True)), place
    assert encoder.seen > 0.8 * begin


def test_a_file_of_something_else_is_not_read(opened: list[Shard], tmp_path: Path) -> None:
    """Of another shard, level or autoencoder, of fewer views, of the layout without checksums, or of plain numbers."""
    encoder = Encoder()
    before = some(cached(opened, 32, encoder, "vae", tmp_path))
    cached(opened, 32, encoder, "other", tmp_path)
    cached(opened, 16, encoder, "vae", tmp_path)
    path = latent_path(tmp_path, opened[0], 32, "vae")
    records = np.load(path)
    of = [(opened[1], 32, "vae"), (opened[0], 16, "vae"), (opened[0], 32, "other")]
    others = [np.load(latent_path(tmp_path, *one)) for one in of]
    others += [records[:5], records["content"].copy(), np.zeros(7), np.float32(0)]
    others += [records.view(records.dtype.newbyteorder()), records[None]]
    for number, wrong in enumerate(others):
        np.save(path, wrong)
        seen = encoder.seen
        after = some(cached(opened, 32, encoder, "vae", tmp_path))
        assert encoder.seen == seen + len(opened[0]), number
        assert all(torch.equal(one, other) for one, other in zip(before[:2], after[:2], strict=True)), number


def test_files_of_the_layout_without_checksums_are_left_alone(opened: list[Shard], tmp_path: Path) -> None:
    old = tmp_path / "vae" / "32" / f"{opened[0].digest[:32]}.npy"
    old.parent.mkdir(parents=True)
    record = np.dtype([("latents", "<f2", (1, 8, 8)), ("truncated", "u1", (8, 8))])
    np.save(old, np.zeros(len(opened[0]), record))
    before, encoder = old.read_bytes(), Encoder()
    values = some(cached(opened, 32, encoder, "vae", tmp_path)).values
    assert encoder.seen == sum(map(len, opened))
    assert values[1].any()
    assert old.read_bytes() == before


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted in /proc")
def test_opening_reads_no_latents_and_holds_few_files(
    opened: list[Shard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard of 16 GiB of zeros, almost none of it on the disk; fewer files stay open than there are shards."""
    cached(opened, 32, Encoder(), "vae", tmp_path)
    opened[0] = replace(opened[0], azimuth_deg=np.zeros(2000), elevation_deg=np.zeros(2000))
    path = latent_path(tmp_path, opened[0], 32, "vae")
    content = np.dtype([("latents", "<f2", (4, 1024, 1024)), ("truncated", "u1", (1024, 1024))])
    record = np.dtype([("crc32", "<u4"), ("content", content)])
    records = np.lib.format.open_memmap(path, "w+", record, (2000,))
    start = latents._start(record, opened[0], 32, "vae")
    records["crc32"][[0, 1999]] = zlib.crc32(bytes(content.itemsize), start)
    del records
    monkeypatch.setattr(latents, "MAX_OPEN", 1)
    files = len(list(Path("/proc/self/fd").iterdir()))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read = cached(opened, 32, Encoder(), "vae", tmp_path)
    assert read(np.array([0]), np.array([1999])).values.shape == (1, 4, 1024, 1024)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB; one view is 16 MiB
    read(np.array([1, 2, 1, 2]), np.array([0, 0, 1, 1]))
    assert len(list(Path("/proc/self/fd").iterdir())) <= files + 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_line_and_leaves_nothing(opened: list[Shard], tmp_path: Path) -> None:
    partial = latent_path(tmp_path, opened[0], 32, "vae").with_suffix(".partial")
    partial.parent.mkdir(parents=True)
    partial.symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"cannot write .*: make room and run the same command"):
        cached(opened, 32, Encoder(), "vae", tmp_path)
    assert not list(partial.parent.iterdir())


def test_a_large_level_is_encoded_in_smaller_batches() -> None:
    assert [latents._batch(size) for size in (64, 256, 512, 1024, 4096)] == [32, 4, 1, 1, 1]
