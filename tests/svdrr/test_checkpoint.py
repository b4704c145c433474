"""Checkpoints come back bit for bit, and a kill or a full disk at any moment leaves the one before."""

import contextlib
import copy
import resource
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from svdrr import processes
from svdrr.checkpoint import Checkpoint, load, newest, restore, save, state
from svdrr.errors import InputError


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    data = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
    model(data).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_going_on_from_a_checkpoint_is_as_if_never_stopped(tmp_path: Path) -> None:
    model = network()
    ema, optimizer = copy.deepcopy(model), torch.optim.AdamW(model.parameters(), lr=0.1)
    for seed in range(3):
        step(model, optimizer, seed)
    save(tmp_path, Checkpoint("64px", 3, state(model, ema, optimizer)), keep=2)

    other = network()
    other_ema, other_optimizer = network(), torch.optim.AdamW(other.parameters(), lr=0.1)
    checkpoint = load(newest(tmp_path))
    assert (checkpoint.stage, checkpoint.step) == ("64px", 3)
    restore(checkpoint, other, other_ema, other_optimizer)
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(other, other_optimizer, seed)
    for ours, theirs in ((model, other), (ema, other_ema)):
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name])


def test_spread_weights_are_whole_in_the_main_process_and_nowhere_else(tmp_path: Path) -> None:
    """A device that has room for its share only has none for the whole model, its average and the moments at once."""
    accelerator = processes.accelerator("no")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = network()
        before = {f"model/{name}": value.clone() for name, value in model.state_dict().items()}
        ema = copy.deepcopy(model)
        processes.spread(model, [])
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        shares = state(model, ema, optimizer)
        assert all(isinstance(shares[name], DTensor) for name in before)
        together = processes.whole_on_main(accelerator, shares)
        assert together.keys() == shares.keys()
        assert all(type(value) is torch.Tensor for value in together.values())
        assert all(torch.equal(together[name], value) for name, value in before.items())
        assert processes.whole_on_main(SimpleNamespace(is_main_process=False), shares) == {}
    finally:
        torch.distributed.destroy_process_group()


def number(value: int) -> Checkpoint:
    return Checkpoint("vae", value, {"model/value": torch.full((1000,), float(value))})


def test_the_digest_is_of_stage_step_and_every_bit_and_not_of_the_file(tmp_path: Path) -> None:
    """Tensors of no dimension and of 16 bits are among them."""
    tensors = {"model/value": torch.arange(6.0).reshape(2, 3), "optimizer/step": torch.tensor(3.0)}
    tensors["ema/half"] = torch.ones(2, dtype=torch.bfloat16)
    one = Checkpoint("vae", 3, tensors)
    assert load(save(tmp_path, one, keep=2)).digest == one.digest
    others = [Checkpoint("vae", 4, tensors), Checkpoint("64px", 3, tensors)]
    for name, value in tensors.items():
        changed = value.clone()
        changed.reshape(-1).view(torch.uint8)[-1] ^= 1
        others.append(Checkpoint("vae", 3, tensors | {name: changed}))
    assert len({checkpoint.digest for checkpoint in (one, *others)}) == 6


def test_a_checkpoint_that_others_see_and_this_process_does_not(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not there, or not yet: wait a minute and run the same command"):
        load(tmp_path / "000001-vae-0000003.safetensors")


def test_a_flipped_bit_anywhere_is_damage(tmp_path: Path) -> None:
    """In the header as in the numbers, but where it changes nothing that is read."""
    one = Checkpoint("vae", 3, {"model/value": torch.ones(4)})
    path = save(tmp_path, one, keep=1)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :])
        with contextlib.suppress(InputError):
            assert load(path).digest == one.digest


def test_keeps_the_last_few(tmp_path: Path) -> None:
    assert newest(tmp_path / "nothing yet") is None
    for value in range(12):
        save(tmp_path, number(value), keep=3)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert load(newest(tmp_path)).step == 11


def test_a_kill_before_the_rename_leaves_the_one_before(tmp_path: Path) -> None:
    save(tmp_path, number(1), keep=2)
    whole = save(tmp_path, number(2), keep=2).read_bytes()
    (tmp_path / "partial").write_bytes(whole[: len(whole) // 2])
    assert load(newest(tmp_path)).step == 2
    save(tmp_path, number(3), keep=2)
    assert load(newest(tmp_path)).step == 3
    assert not (tmp_path / "partial").exists()


def test_a_full_disk_leaves_the_one_before(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the kernel refuses the write in the same place."""
    save(tmp_path, number(1), keep=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(InputError, match="the previous checkpoint is intact, so make room"):
            save(tmp_path, number(2), keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert load(newest(tmp_path)).step == 1
    assert not (tmp_path / "partial").exists()


def test_a_damaged_checkpoint_is_refused_with_the_cure(tmp_path: Path) -> None:
    path = save(tmp_path, number(1), keep=2)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"is damaged .*delete it to go on from the one before"):
        load(newest(tmp_path))
