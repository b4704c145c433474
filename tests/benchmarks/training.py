"""What a step of the real training loop costs on this machine: its rate, what of it is reading, its FLOPs of the peak.

    make bench-training SHARDS=shards PRESET=small

On a GPU, and with `--wall`, seconds are those of the clock. Without, they are those of one core, so that other work on
the machine does not count: of the thread that computes, and of the threads that read ahead, added. The autoencoder and
the model are untrained: their time does not depend on their weights. All ways take turns.
"""

import argparse
import functools
import statistics
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tests.benchmarks import report
from tests.benchmarks.model_sizes import PRECISIONS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from svdrr import presets, processes
from svdrr import vae as autoencoder
from svdrr.config import StageConfig, TrainConfig
from svdrr.data import draw_pairs
from svdrr.latents import cached
from svdrr.loop import READ_AHEAD, Habits, fit
from svdrr.shards import Shard, open_folder
from svdrr.start import untrained
from svdrr.stop import StopRequest
from svdrr.tasks import Data, images, view_task

PATIENTS = 6
"""Whose views are read: the first of the folder."""

ROUNDS = 2
"""Runs of each way. The first and last READ_AHEAD steps of each do not count: there fewer batches are read."""

WAYS = {
    "cached latents": (True, 0.0),
    "the same, half of the sources augmented": (True, 0.5),
    "images": (False, 0.0),
}
"""Whether latents come from the cache, and which part of the sources is augmented."""

VERSIONS = "svdrr torch diffusers accelerate".split()


@dataclass
class Spent:
    """step_s: of each step that counts. reading_s: of each batch. waited: of each step that counts, the share."""

    step_s: list[float] = field(default_factory=list)
    reading_s: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    gpu_gb: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--preset", default="toy")
    parser.add_argument("--stages", type=int, help="so many of the preset's, from the first on; all by default")
    parser.add_argument("--batch", type=int, help="instead of the preset's, where that takes too long here")
    parser.add_argument("--precision", choices=PRECISIONS, help="instead of the preset's, where this machine has none")
    parser.add_argument("--steps", type=int, default=12, help="of each run, that count")
    parser.add_argument(
        "--wall", action="store_true", help="seconds of the clock, on a CPU that has nothing else to do"
    )
    parser.add_argument("--document", type=Path, help="put the table between this document's markers")
    options = parser.parse_args()
    config = presets.preset(options.preset, seed=0)
    config = replace(config, mixed_precision=options.precision or config.mixed_precision)
    accelerator = processes.accelerator(config.mixed_precision)
    wall = options.wall or accelerator.device.type == "cuda"
    if not wall:
        torch.set_num_threads(1)
    torch.use_deterministic_algorithms(accelerator.device.type == "cpu")  # as `svdrr train` does
    torch.utils.deterministic.fill_uninitialized_memory = False
    shards = open_folder(options.shards)[:PATIENTS]
    peak = peak_flops(accelerator.device, PRECISIONS[config.mixed_precision], wall)
    lines = []
    for stage in config.stages[: options.stages]:
        batch = options.batch or stage.batch
        shortened = replace(stage, batch=batch, steps=options.steps + 2 * READ_AHEAD)
        of_ways = measure(config, shortened, shards, accelerator, wall)
        lines += rows(config, stage, batch, of_ways, peak, wall)
    text = f"{report.table(HEADS, lines)}\n\n{caption(config, shards, peak, wall)}"
    if options.document:
        report.publish(options.document, f"{options.preset}-{accelerator.device.type}", text)
    print(text)


def measure(
    config: TrainConfig, stage: StageConfig, shards: list[Shard], accelerator: Accelerator, wall: bool
) -> dict[str, tuple[Spent, int]]:
    """For each of WAYS what the steps of this stage take, and the FLOPs of one."""
    shape = config.vae.latent_channels, config.vae.block_channels, config.vae.layers_per_block
    vae = autoencoder.build(*shape).requires_grad_(False)
    autoencoder.measure_latents(vae, images(shards, stage.size, draw_pairs(shards, 4, 0, seed=0)).split(1))
    vae.to(accelerator.device)
    spent = {name: Spent() for name in WAYS}
    flops = {}

    def encode(images: torch.Tensor) -> torch.Tensor:
        return autoencoder.encode(vae, images.to(accelerator.device))

    with tempfile.TemporaryDirectory() as folder:
        stored = cached(shards, stage.size, encode, "vae", Path(folder))
        side = stage.size // autoencoder.cell(vae)
        run = functools.partial(run_once, accelerator=accelerator, folder=Path(folder) / "checkpoints", wall=wall)
        for turn in range(ROUNDS):
            for name, (from_cache, augmented) in WAYS.items():
                way = replace(config, augment_fraction=augmented, stages=(stage,))
                reader = stored if from_cache else None
                data = Data(shards, [], stage.size, side, reader, None, encode, accelerator.device)
                if turn == 0:
                    # of attention taken apart, for the counter does not know a CPU's in one piece
                    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                        run(way, replace(stage, steps=1), data, Spent())
                    flops[name] = counter.get_total_flops()
                run(way, stage, data, spent[name])
    return {name: (spent[name], flops[name]) for name in WAYS}


def run_once(
    config: TrainConfig,
    stage: StageConfig,
    data: Data,
    spent: Spent,
    accelerator: Accelerator,
    folder: Path,
    wall: bool,
) -> None:
    """Trains a new model by the loop of `svdrr train`, and adds what it took to `spent`."""
    clock = time.perf_counter if wall else time.thread_time
    task = view_task(config, stage, data, None, shared=lambda *_: torch.empty(0), show=lambda *_: None)
    ticks: list[float] = []

    def read(step: int, rows: slice) -> Any:
        began = clock()
        what = task.read(step, rows)
        spent.reading_s.append(clock() - began)
        return what

    def log(**values: Any) -> None:
        ticks.append(clock())
        if READ_AHEAD < len(ticks) <= stage.steps - READ_AHEAD:
            spent.step_s.append(ticks[-1] - ticks[-2])
            spent.waited.append(values["waited_for_data"])
            spent.gpu_gb = max(spent.gpu_gb, values.get("gpu_gb", 0.0))

    habits = Habits(
        warmup_steps=config.warmup_steps,
        decay=config.decay,
        betas=config.betas,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        ema_decay=config.ema_decay,
        log_every=1,
        checkpoint_every=stage.steps,
        keep_checkpoints=1,
        checkpoints=folder,
        at_once=None,
        log=log,
    )
    with StopRequest(None) as stop:
        fit(replace(task, read=read), habits, untrained(config), None, accelerator, stop)


def peak_flops(device: torch.device, precision: torch.dtype, wall: bool) -> float:
    """FLOPs a second of a large product of matrices: the best of several."""
    side, clock = (8192 if device.type == "cuda" else 2048), (time.perf_counter if wall else time.thread_time)
    left, right = torch.randn(2, side, side, device=device).to(precision)
    seconds = []
    for _ in range(6):
        began = clock()
        (left @ right)[0, 0].item()  # which waits for a GPU
        seconds.append(clock() - began)
    return 2 * side**3 / min(seconds)


HEADS = ["preset, pixels", "views", "batch", "ms a pair", "pairs/s", "of images'", "reading, ms a pair", "of all"]
HEADS += ["waited for data", "GFLOP a pair", "of the peak", "GPU GB", "hours (extrapolated)"]


def rows(
    config: TrainConfig, stage: StageConfig, batch: int, of_ways: dict[str, tuple[Spent, int]], peak: float, wall: bool
) -> list[list[str]]:
    """The lines of the table. stage: the preset's, with all its steps."""
    lines, rates = [], {}
    for name, (spent, _) in of_ways.items():
        reading_s = 0.0 if wall else statistics.mean(spent.reading_s)  # the clock ran on while they read
        rates[name] = batch / (statistics.median(spent.step_s) + reading_s)
    for name, (spent, flops) in of_ways.items():
        rate, reading_s = rates[name], statistics.mean(spent.reading_s) / batch
        lines.append(
            [f"`{config.preset}`, {stage.size}", name, str(batch), number(1000 / rate), number(rate)]
            + [f"{rate / rates['images']:.2f}", number(1000 * reading_s), f"{number(100 * reading_s * rate)} %"]
            + [f"{number(100 * statistics.mean(spent.waited))} %", number(1e-9 * flops / batch)]
            + [f"{100 * flops / batch * rate / peak:.0f} %", f"{spent.gpu_gb:.2f}" if spent.gpu_gb else "-"]
            + [number(stage.steps * stage.batch / rate / 3600)]
        )
    return lines


def number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def caption(config: TrainConfig, shards: list[Shard], peak: float, wall: bool) -> str:
    seconds = "the clock" if wall else "one core: of the thread that computes and of those that read, added"
    return (
        f"Precision `{config.mixed_precision}`; peak {peak / 1e12:.3g} TFLOP/s, "
        "a product of matrices in that precision. "
        f"Seconds are those of {seconds}; the share that a step waited for data is of the clock. "
        f"{len(shards)} patients. {report.machine(torch.get_num_threads(), VERSIONS)}"
    )


if __name__ == "__main__":
    main()
