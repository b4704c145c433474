"""The training loop: gradient steps from a checkpoint to the end, in one process or many, exactly resumable.

A step depends on nothing but the state before it and on (seed, stage, step): neither on how many processes share the
rows of its batch, nor on how many rows are taken at once, but for the order in which sums are rounded.
"""

import contextlib
import copy
import functools
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from svdrr.checkpoint import Checkpoint, restore, save, state
from svdrr.errors import InputError
from svdrr.processes import gathered, my_rows, spread, unless_one_fails, whole, whole_on_main
from svdrr.stop import StopRequest

READ_AHEAD = 4
"""Steps, and threads: decoding and augmenting images takes longer than a GPU's step, reading latents far less."""

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Task:
    """What is trained, for how long, and on what.

    name: of the stage. batch: rows of a step, of all processes together.
    read: (step, rows) to what these rows of the step's batch need from the disk; called ahead, in a thread.
    losses: (model, what was read, step, rows) to the loss of each row, [rows].
    describe: (step, row) to words that name what the row is.
    watches: pairs of (every so many steps and at the end, what is then done with the average of the weights and the
        number of steps); it returns values for the log. All processes call it.
    rates: names of parts of the model, each with a factor on its learning rate.
    """

    name: str
    steps: int
    batch: int
    learning_rate: float
    read: Callable[[int, slice], Any]
    losses: Callable[[nn.Module, Any, int, slice], Tensor]
    describe: Callable[[int, int], str]
    watches: Sequence[tuple[int, Callable[[nn.Module, int], dict[str, float]]]] = ()
    rates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Habits:
    """What all tasks of a run have in common.

    betas: of AdamW. decay: the learning rate falls, and does not stay as it is after the warm-up.
    at_once: rows that a process takes at once; None is all of its own. log: takes the values of a step, in the main
    process only.
    """

    warmup_steps: int
    decay: bool
    betas: tuple[float, float]
    weight_decay: float
    clip_norm: float
    ema_decay: float
    log_every: int
    checkpoint_every: int
    keep_checkpoints: int
    checkpoints: Path
    at_once: int | None
    log: Callable[..., None]


class Losses(nn.Module):
    """A model as the function that is differentiated, so that whoever wraps it sees one call of `forward`."""

    def __init__(self, model: nn.Module, losses: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self._losses = losses

    def forward(self, *what: Any) -> Tensor:
        return self._losses(self.model, *what)


def fit(
    task: Task,
    habits: Habits,
    model: Network,
    checkpoint: Checkpoint | None,
    accelerator: Accelerator,
    stop: StopRequest,
    blocks: Sequence[nn.Module] = (),
) -> Network:
    """From `model`, or from the checkpoint where it is of this task, to the end; returns the weights' average.

    blocks: parts of the model whose weights are spread over the processes (FSDP); none: each process has all (DDP).
    Raises StoppedError, with everything saved, where it was asked to stop, and InputError where a loss is no number.
    """
    rows = my_rows(accelerator, task.batch, habits.at_once)
    spreading = bool(blocks) and accelerator.num_processes > 1
    whole_average = copy.deepcopy(model).requires_grad_(False).eval() if spreading else None
    model = model.to(accelerator.device).requires_grad_(True).train()
    average = copy.deepcopy(model).requires_grad_(False).eval()
    if spreading:
        twins = dict(zip(model.modules(), average.modules(), strict=True))
        spread(average, [twins[block] for block in blocks])
        spread(model, blocks)
    parameters = list(model.parameters())
    factors = {
        parameter: factor for part, factor in task.rates.items() for parameter in model.get_submodule(part).parameters()
    }
    groups = [
        {"params": [parameter for parameter in parameters if factors.get(parameter, 1.0) == factor], "factor": factor}
        for factor in sorted({1.0, *factors.values()})
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=task.learning_rate, betas=habits.betas, weight_decay=habits.weight_decay, fused=True
    )
    first = 0
    if checkpoint is not None and checkpoint.stage == task.name:
        restore(checkpoint, model, average, optimizer, accelerator.scaler)
        first = checkpoint.step
    losses_of = Losses(model, task.losses)
    if not spreading:
        losses_of = accelerator.prepare(losses_of)
    stepper = accelerator.prepare(optimizer)
    is_main = accelerator.is_main_process

    losses: list[float] = []
    waited_s = taken_s = 0.0
    bar = tqdm(
        range(first, task.steps),
        desc=task.name,
        initial=first,
        total=task.steps,
        unit="step",
        mininterval=0.5,
        disable=not is_main,
    )
    with contextlib.closing(ahead(task.read, first, task.steps, rows)) as batches:
        for step in bar:
            # one training step
            began = time.monotonic()
            batch = unless_one_fails(accelerator, functools.partial(next, batches))
            waited_s += time.monotonic() - began
            rate = task.learning_rate * schedule(step, task.steps, habits.warmup_steps, habits.decay)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["factor"]
            of_rows = []
            for piece, read in zip(rows, batch, strict=True):
                is_last = piece is rows[-1]
                with contextlib.nullcontext() if is_last else accelerator.no_sync(losses_of), accelerator.autocast():
                    of_piece = losses_of(read, step, piece)
                    # the processes' gradients are averaged, so that each one's weighs as many times more
                    accelerator.backward(of_piece.sum() * (accelerator.num_processes / task.batch))
                of_rows.append(of_piece.detach())
            norm = whole(accelerator.clip_grad_norm_(parameters, habits.clip_norm)).item()
            mine = torch.cat(of_rows).double()
            told = gathered(accelerator, torch.cat([mine, mine.new_tensor([stop.code])]))
            of_all = told.unflatten(0, (accelerator.num_processes, -1))
            of_batch, code = of_all[:, :-1].flatten(), int(of_all[:, -1].max())
            # in 16 bits with a scale of their own, gradients may overflow: the step is then left out
            if not (of_batch.isfinite().all() and (math.isfinite(norm) or accelerator.scaler is not None)):
                raise InputError(not_a_number(task, step, of_batch, norm, habits.checkpoints))
            stepper.step()
            stepper.zero_grad()
            update_average(average, model, min(habits.ema_decay, (step + 1) / (step + 10)))
            losses.append(of_batch.mean().item())
            taken_s += time.monotonic() - began
            done = step + 1

            # report
            if is_main and (done % habits.log_every == 0 or done == task.steps):
                habits.log(
                    stage=task.name,
                    step=done,
                    loss=math.fsum(losses) / len(losses),
                    learning_rate=rate,
                    gradient_norm=norm,
                    samples_per_s=round(task.batch * len(losses) / taken_s, 2),
                    waited_for_data=round(waited_s / taken_s, 4),
                    **memory(accelerator.device),
                )
                losses, waited_s, taken_s = [], 0.0, 0.0

            # watch
            for every, watch in task.watches:
                if done % every == 0 or done == task.steps:
                    with torch.no_grad():
                        values = watch(average, done)
                    if is_main and values:
                        habits.log(stage=task.name, step=done, **values)

            # checkpoint
            if done % habits.checkpoint_every == 0 or done == task.steps or code:
                tensors = whole_on_main(accelerator, state(model, average, optimizer, accelerator.scaler))
                if is_main:
                    save(habits.checkpoints, Checkpoint(task.name, done, tensors), habits.keep_checkpoints)
                del tensors  # which is as much as a whole model and its moments, where weights are spread

            # stop?
            stop.obey(code, f"stage {task.name}, step {done}")
    accelerator.free_memory()
    if whole_average is None:
        return average
    whole_average.load_state_dict({name: whole(tensor).cpu() for name, tensor in average.state_dict().items()})
    return whole_average


def ahead(read: Callable[[int, slice], Any], first: int, steps: int, rows: Sequence[slice]) -> Generator[list[Any]]:
    """What each step reads, piece by piece, made in threads while the READ_AHEAD steps before it are computed."""

    def batch(step: int) -> list[Any]:
        return [read(step, piece) for piece in rows]

    with ThreadPoolExecutor(READ_AHEAD) as readers:
        waiting = deque(readers.submit(batch, step) for step in range(first, min(first + READ_AHEAD, steps)))
        try:
            for step in range(first + READ_AHEAD, steps + READ_AHEAD):
                yield waiting.popleft().result()
                if step < steps:
                    waiting.append(readers.submit(batch, step))
        finally:
            for one in waiting:
                one.cancel()


def schedule(step: int, steps: int, warmup_steps: int, decay: bool) -> float:
    """The factor on the learning rate: up in a line over the warm-up; with `decay`, down in half a cosine after."""
    warm = min(1.0, (step + 1) / warmup_steps)
    return warm * (1 + math.cos(math.pi * step / steps)) / 2 if decay else warm


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """One step of the exponential moving average of the weights."""
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)


def not_a_number(task: Task, step: int, losses: Tensor, norm: float, checkpoints: Path) -> str:
    """What to say where a step's losses [batch], or its gradient, are no numbers, naming what it was shown."""
    wrong = [row for row, loss in enumerate(losses.tolist()) if not math.isfinite(loss)]
    shown = wrong or range(task.batch)
    words = "; ".join(task.describe(step, row) for row in list(shown)[:4])
    what = (
        f"the loss of {len(wrong)} of {task.batch} rows" if wrong else f"the gradient ({norm:g}) of {task.batch} rows"
    )
    return (
        f"{what} is no number at stage {task.name}, step {step} ({words}{', ...' if len(shown) > 4 else ''}); "
        f"the weights in {checkpoints} are from before: train again with a lower learning rate"
    )


def memory(device: torch.device) -> dict[str, float]:
    """The most GB that a GPU held since the last report; nothing where there is none."""
    if device.type != "cuda":
        return {}
    held = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {"gpu_gb": round(held / 1e9, 3)}
