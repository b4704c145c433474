"""Training in several processes at once: who does what, what they tell one another, and weights spread over all.

With one process every function here is the plain thing that it stands for.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from svdrr.errors import InputError

PRECISIONS = ("no", "bf16", "fp16")

PATIENCE = timedelta(hours=2)
"""How long processes wait for the slowest. NCCL's own 10 minutes are less than the first may take to open all shards or
to fetch an encoder, or than some encode longer than others. One that died ends the others at once: `torchrun` does."""

Result = TypeVar("Result")


def accelerator(mixed_precision: str) -> Accelerator:
    """This process, in the group that `torchrun` or `accelerate launch` started, if there is one.

    Raises InputError for a precision that this machine does not have.
    """
    if mixed_precision not in PRECISIONS:  # accelerate has one more, which is tested nowhere here
        raise InputError(f"no mixed_precision {mixed_precision!r}: it is one of {', '.join(PRECISIONS)}")
    if mixed_precision == "fp16" and not torch.cuda.is_available():  # where accelerate would take 32 bits in silence
        raise InputError("mixed_precision fp16 is for GPUs, and this machine has none: take no, or bf16")
    AcceleratorState._reset_state()  # a run before this one, in the same process, may have had another precision
    try:
        return Accelerator(
            mixed_precision=mixed_precision,
            cpu=not torch.cuda.is_available(),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
    except ValueError as error:
        raise InputError(f"mixed_precision {mixed_precision}: {str(error).splitlines()[0]}") from error


def on_main(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """What `work` returns in the main process, told to all.

    Where it raises InputError, that goes on in the main process, and the others leave without a word of their own.
    """
    if accelerator.num_processes == 1:
        return work()
    told: list = [None, False]
    try:
        if accelerator.is_main_process:
            told = [work(), True]
    finally:
        broadcast_object_list(told)
    result, is_done = told
    if not is_done:
        raise SystemExit(2)
    return result


def unless_one_fails(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """What `work` returns in this process; all do theirs, and none goes on to wait for one that could not.

    Where it raises InputError, that goes on there, and the others leave without a word of their own.
    """
    if accelerator.num_processes == 1:
        return work()
    failed = True
    try:
        result = work()
        failed = False
    finally:
        failures = gathered(accelerator, torch.tensor([int(failed)]))
    if failures.any():
        raise SystemExit(2)
    return result


def require_same(accelerator: Accelerator, what: str, digest: Callable[[], str]) -> None:
    """Raises InputError in the main process, and ends the others, where they have not all read the same.

    digest: of what was read, in hexadecimal, of equal length; not asked for where there is one process only.
    """
    if accelerator.num_processes == 1:
        return
    digests = gathered(accelerator, torch.tensor([list(bytes.fromhex(digest()))]))
    others = [index for index, one in enumerate(digests) if not torch.equal(one, digests[0])]
    if others and accelerator.is_main_process:
        raise InputError(
            f"{what} is not the same for process 0 and {', '.join(map(str, others))}: their file system is behind, so "
            "wait a minute and run the same command"
        )
    if others:
        raise SystemExit(2)


def my_rows(accelerator: Accelerator, batch: int, at_once: int | None) -> list[slice]:
    """Which rows of a batch, that all processes can share evenly, are this one's, in pieces of at most `at_once`."""
    share = batch // accelerator.num_processes
    begin, end = accelerator.process_index * share, (accelerator.process_index + 1) * share
    step = min(at_once or share, share)
    return [slice(first, min(first + step, end)) for first in range(begin, end, step)]


def shared(accelerator: Accelerator, count: int, at_once: int | None, values: Callable[[slice], Tensor]) -> Tensor:
    """values(rows) for `count` rows, [count], computed by all processes together, and known to all.

    at_once: rows that a process takes at once. All call `values` equally often, as spread weights ask for; where the
    rows cannot be shared evenly, some are computed twice.
    """
    share = -(-count // accelerator.num_processes)
    begins = [min(index * share, count - share) for index in range(accelerator.num_processes)]
    step, begin = min(at_once or share, share), begins[accelerator.process_index]
    mine = [values(slice(first, min(first + step, begin + share))) for first in range(begin, begin + share, step)]
    of_all = gathered(accelerator, torch.cat(mine)).split(share)
    together = of_all[0].new_empty(count)
    for first, part in zip(begins, of_all, strict=True):
        together[first : first + share] = part
    return together


def gathered(accelerator: Accelerator, mine: Tensor) -> Tensor:
    """The rows of all processes, in their order; each has as many."""
    return accelerator.gather(mine.to(accelerator.device))


def spread(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Leaves each process a share of every weight only; a block's are put together when it is its turn (FSDP)."""
    for block in blocks:
        fully_shard(block)
    fully_shard(model, reshard_after_forward=True)  # also where no backward pass follows


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from its shares; all processes ask for it at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_on_main(accelerator: Accelerator, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """These tensors in the main process, and nothing in the others; all ask for it at once.

    Those that are spread are put together one after the other and come to the CPU: a device that holds a share of a
    model need not have room for all of it.
    """
    together: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        one = whole(tensor)
        if accelerator.is_main_process:
            together[name] = one.cpu() if isinstance(tensor, DTensor) else one
    return together


def shared_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, spread as the other is."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)
