"""The split of docs/shard-schema.md, and pairs that depend on nothing but their seed."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from svdrr.augment import augmented
from svdrr.data import (
    Batch,
    Pairs,
    draw_augmentations,
    draw_noise,
    draw_pairs,
    encode_batch,
    read_batch,
    split,
    step_seed,
    training_shards,
)
from svdrr.errors import InputError
from svdrr.latents import Latents, Reader, cached
from svdrr.shards import Shard, open_folder


def test_the_split_is_that_of_the_document() -> None:
    """Digits computed with `printf drr-sphere:NAME | sha256sum`: divided by 2^32 they are h."""
    known = {"P-00": "train", "P-01": "val", "P-02": "val", "P-47": "test", "LIDC-IDRI-0001": split("LIDC-IDRI-0001")}
    assert {name: split(name) for name in known} == known


def test_the_split_has_the_shares_that_it_claims() -> None:
    """5000 names: three standard deviations of a share of 0.8 are 0.017."""
    names = [split(f"patient {number}") for number in range(5000)]
    assert names.count("train") / 5000 == pytest.approx(0.8, abs=0.017)
    assert names.count("val") / 5000 == pytest.approx(0.1, abs=0.017)


def test_adding_patients_moves_nobody(make_shards: Callable[..., Path]) -> None:
    few, _ = training_shards(open_folder(make_shards(patients=3)))
    more, _ = training_shards(open_folder(make_shards(patients=6)))
    assert {shard.patient_id for shard in few} <= {shard.patient_id for shard in more}


def test_the_splits_beside_the_shards_decide(make_shards: Callable[..., Path]) -> None:
    folder = make_shards(patients=3)
    (folder / "splits.json").write_text('{"rule": "x", "patients": {"P-00": "test", "P-01": "train", "P-02": "val"}}')
    train, val = training_shards(open_folder(folder))
    assert [[shard.patient_id for shard in some] for some in (train, val)] == [["P-01"], ["P-02"]]


def test_one_patient_is_not_enough(make_shards: Callable[..., Path]) -> None:
    shards = open_folder(make_shards(patients=1))
    with pytest.raises(InputError, match=r"one patient only \(P-00\)"):
        training_shards(shards)
    with pytest.raises(InputError, match="one patient only"):
        training_shards(shards * 2)


def test_patients_that_all_fall_into_validation_cannot_be_trained_on(make_shards: Callable[..., Path]) -> None:
    shards = [shard for shard in open_folder(make_shards(patients=3)) if split(shard.patient_id) == "val"]
    assert len(shards) == 2
    with pytest.raises(InputError, match="none of the 2 patients falls into the training split"):
        training_shards(shards)


def test_pairs_depend_on_the_seed_alone(shards: Path) -> None:
    opened = open_folder(shards)
    seeds = [step_seed(0, "64px", 7), step_seed(0, "64px", 8), step_seed(0, "128px", 7), step_seed(1, "64px", 7)]
    assert len(set(seeds)) == 4
    drawn = [draw_pairs(opened, 16, 0.5, seed) for seed in (*seeds, seeds[0])]
    assert all(np.array_equal(a, b) for a, b in zip(drawn[0], drawn[4], strict=True))
    assert not any(np.array_equal(drawn[0].target, other.target) for other in drawn[1:4])


def test_patients_are_seen_equally_often_and_pa_as_often_as_asked(shards: Path) -> None:
    """4000 draws: three standard deviations of a share of 1/2 are 0.024. A patient with two series counts once."""
    opened = open_folder(shards)[:2]
    opened.append(opened[0])
    pairs = draw_pairs(opened, 4000, 0.4, seed=0)
    assert np.mean(pairs.shard == 1) == pytest.approx(1 / 2, abs=0.024)
    pa, views = opened[0].nearest_view(0, 0), len(opened[0])
    assert np.mean(pairs.source == pa) == pytest.approx(0.4 + 0.6 / views, abs=0.024)
    assert np.mean(pairs.target == pa) == pytest.approx(1 / views, abs=0.024)


def encode(images: torch.Tensor) -> torch.Tensor:
    """Every 4th pixel, of which a latent has two channels."""
    return images[..., ::4, ::4].expand(-1, 2, -1, -1)


def a_batch(opened: list[Shard], stored: Reader | None, pairs: Pairs, augmentations: list) -> Batch:
    read = read_batch(opened, stored, pairs, augmentations, 32, 8)
    return encode_batch(read, encode, 32, True, torch.device("cpu"))


def test_a_batch_holds_the_latents_and_the_rays_of_its_pairs(shards: Path) -> None:
    opened = open_folder(shards)

    def stored(shard: np.ndarray, view: np.ndarray) -> Latents:
        known = torch.tensor(2 * shard + view / 16).float()[:, None, None]
        return Latents(known[:, None].expand(-1, 2, 8, 8), (known / 100).expand(-1, 8, 8))

    pairs = draw_pairs(opened, 5, 0.5, seed=3)
    batch = a_batch(opened, stored, pairs, [None] * 5)
    assert torch.equal(batch.target_truncated, batch.target_latent[:, 0] / 100)
    assert torch.equal(batch.target_latent[:, 0, 0, 0], torch.tensor(2 * pairs.shard + pairs.target / 16).float())
    source = batch.condition["source_latent"]
    assert torch.equal(source[:, 0, 0, 0], torch.tensor(2 * pairs.shard + pairs.source / 16).float())
    assert batch.condition["source_rays"].shape == batch.condition["target_rays"].shape == (5, 6, 8, 8)
    same = pairs.source == pairs.target
    rays = [batch.condition[name] for name in ("source_rays", "target_rays")]
    assert [torch.equal(a, b) for a, b in zip(*rays, strict=True)] == same.tolist()


def test_augmented_sources_are_encoded_and_nothing_else_is_touched(shards: Path, tmp_path: Path) -> None:
    """Rows 1 and 4 of five; from the cache and, bit for bit but for its 16 bits (2^-11), without one."""
    opened = open_folder(shards)[:3]
    stored = cached(opened, 32, encode, "vae", tmp_path)
    pairs = draw_pairs(opened, 5, 0.5, seed=3)
    plain = a_batch(opened, stored, pairs, [None] * 5)
    for reader, tolerance in ((stored, 0), (None, 2**-11)):
        rngs = [np.random.default_rng(row) if row in (1, 4) else None for row in range(5)]
        batch = a_batch(opened, reader, pairs, rngs)
        assert torch.allclose(batch.target_latent, plain.target_latent, rtol=tolerance, atol=tolerance)
        rows = zip(batch.condition["source_latent"], plain.condition["source_latent"], strict=True)
        for row, (source, before) in enumerate(rows):
            if row in (1, 4):
                view = opened[pairs.shard[row]].images(32, [pairs.source[row]])[0]
                changed = torch.from_numpy(augmented(view, np.random.default_rng(row)))
                assert torch.equal(source, encode(changed[None, None])[0])
                assert not torch.allclose(source, before, atol=0.01)
            else:
                assert torch.allclose(source, before, rtol=tolerance, atol=tolerance)


def test_a_row_is_the_same_whoever_computes_it(shards: Path, tmp_path: Path) -> None:
    """Six rows at once and as two and four: every tensor of the batch, and all that is drawn besides."""
    opened = open_folder(shards)[:3]
    stored = cached(opened, 32, encode, "vae", tmp_path)

    def tensors(rows: slice) -> list[torch.Tensor]:
        pairs = draw_pairs(opened, 6, 0.5, seed=3).rows(rows)
        batch = a_batch(opened, stored, pairs, draw_augmentations(6, 0.5, seed=3)[rows])
        draws = draw_noise(6, (2, 8, 8), 0.5, seed=3).rows(rows)
        return [batch.target_latent, batch.target_truncated, *batch.condition.values(), *draws]

    for whole, first, last in zip(*map(tensors, (slice(6), slice(2), slice(2, 6))), strict=True):
        assert torch.equal(whole, torch.cat([first, last]))


def test_streams_are_dropped_together_and_alone_as_often_as_asked() -> None:
    """4000 draws: three standard deviations of a share of 0.1 are 0.015. What else is drawn does not change."""
    draws = draw_noise(4000, (1,), 0.1, seed=0, drop_stream=0.05)
    first, second = draws.drop.unbind(dim=1)
    for chosen, expected in [(first & second, 0.1), (first & ~second, 0.05), (second & ~first, 0.05)]:
        assert chosen.double().mean() == pytest.approx(expected, abs=0.015)
    plain = draw_noise(4000, (1,), 0.1, seed=0)
    assert torch.equal(plain.noise, draws.noise)
    assert torch.equal(plain.drop, (first & second)[:, None].expand(-1, 2))


def test_sources_are_augmented_as_often_as_asked() -> None:
    """4000 draws: three standard deviations of a share of 0.3 are 0.022. One more row changes none before it."""
    chosen = [rng is not None for rng in draw_augmentations(4000, 0.3, seed=0)]
    assert np.mean(chosen) == pytest.approx(0.3, abs=0.022)
    assert [rng is not None for rng in draw_augmentations(10, 0.3, seed=0)] == chosen[:10]
    assert draw_augmentations(3, 0.0, seed=0) == [None] * 3


def test_synthesised_shards_and_a_second_geometry_are_refused(make_shards: Callable[..., Path]) -> None:
    folder = make_shards(patients=4)
    training_shards(open_folder(folder))
    with h5py.File(folder / "P-03.h5", "r+") as file:
        file["views"].attrs["sod_mm"] = 1500.0
    with pytest.raises(InputError, match=r"P-00.h5 has SOD 1640 mm and .*P-03.h5 1500 mm: .* render one of them again"):
        training_shards(open_folder(folder))
    with h5py.File(folder / "P-03.h5", "r+") as file:
        file.attrs["kind"] = "synthesised"
    with pytest.raises(InputError, match=r"P-03.h5 is synthesised, and a model learns from rendered views: move it"):
        training_shards(open_folder(folder))
    (folder / "splits.json").write_text(
        '{"rule": "x", "patients": {"P-00": "train", "P-01": "val", "P-02": "val", "P-03": "test"}}'
    )
    training_shards(open_folder(folder))
