"""What the presets weigh and cost, counted on torch's meta device: shapes without numbers, so any machine will do.

`make sizes` runs it and renews the tables of docs/training.md, which says how to read them.
"""

import argparse
import ctypes
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from tests.benchmarks import report
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from svdrr import vae as autoencoder
from svdrr.config import TrainConfig
from svdrr.data import Batch, Draws
from svdrr.pose import Views
from svdrr.presets import PRESETS, preset
from svdrr.start import untrained
from svdrr.tasks import pair_losses
from svdrr.transformer import ViewTransformer, condition

META = torch.device("meta")

MOMENTS = 2
"""Of AdamW, each as large as the weights."""

CARDS_GB = (24, 80, 139)
SPARE = 0.1
"""Of a card, for what is not counted: the CUDA context, what lives for one operation only, and gaps."""

GPUS = 8
"""Over so many, where weights are spread."""

WHOLE_AT_START = 2
"""Copies of the weights: `loop.fit` brings the model to the GPU, copies it for the average, and then spreads both."""

H200_TFLOP_S = 790.0
UTILISATION = {"small": 0.15, "base": 0.25, "svdrr-xl": 0.35}
"""Of these, on an H200: assumed, not measured. The estimate of hours stands on them."""

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRODUCTS = {functional.linear, functional.conv2d, functional.scaled_dot_product_attention}
NORMS = {functional.layer_norm, functional.rms_norm, functional.group_norm}


class AsOnGPU(TorchFunctionMode):
    """Has the meta device do what a GPU does under autocast to this precision, as far as our models need it.

    The meta device knows no autocast, and takes attention apart into products that keep a matrix of scores, and RMS
    norms into steps that keep one tensor more. A GPU has a kernel for each: attention keeps queries, keys, values,
    result and a number per query; a norm keeps its input, in float32.
    """

    def __init__(self, precision: torch.dtype) -> None:
        super().__init__()
        self.precision = precision

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS | NORMS:
            dtype = self.precision if func in PRODUCTS else torch.float32
            args = [arg.to(dtype) if isinstance(arg, Tensor) else arg for arg in args]
        if func is functional.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
        if func is functional.rms_norm:
            func = functional.layer_norm  # keeps the same, and a mean per row
        return func(*args, **(kwargs or {}))


def parts(config: TrainConfig) -> tuple[AutoencoderKL, ViewTransformer]:
    """The autoencoder and the transformer of this recipe, on the meta device."""
    with torch.device("meta"):
        vae = autoencoder.build(config.vae.latent_channels, config.vae.block_channels, config.vae.layers_per_block)
        return vae, untrained(config)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def view_flops(config: TrainConfig, vae: AutoencoderKL, transformer: ViewTransformer, size: int) -> tuple[int, int]:
    """FLOPs of one call of the transformer, and of encoding one view, at `size` pixels; a multiply-add counts as 2."""
    cells = size // 2 ** (len(config.vae.block_channels) - 1)
    with torch.device("meta"), torch.no_grad():
        latent = torch.empty(1, config.vae.latent_channels, cells, cells)
        views = Views(*torch.empty(5, 1))
        told = condition(latent, views, views, size, config.model.absolute_pose)
        if config.model.image_embedding:
            told["image_embedding"] = torch.empty(1, config.model.image_embedding)
        with FlopCounterMode(display=False) as of_transformer:
            transformer(latent, torch.empty(1), **told)
        with FlopCounterMode(display=False) as of_vae:
            vae.encode(torch.empty(1, 1, size, size))
    return of_transformer.get_total_flops(), of_vae.get_total_flops()


class Cost(NamedTuple):
    """Of a training step on one device: bytes that autograd keeps from forward to backward, for each row and for any
    number of rows (the weights in 16 bits), and the FLOPs of a row, forward and backward."""

    row_bytes: int
    fixed_bytes: int
    row_flops: int


def cost(losses: Callable[[int], Tensor], model: nn.Module) -> Cost:
    """losses: a number of rows to their losses by `model`, on the meta device.

    What grows with the rows is theirs, so two counts tell it from the rest.
    """
    (one, flops_of_one), (two, flops_of_two) = (kept(losses, model, rows) for rows in (1, 2))
    return Cost(two - one, 2 * one - two, flops_of_two - flops_of_one)


def kept(losses: Callable[[int], Tensor], model: nn.Module, rows: int) -> tuple[int, int]:
    """Bytes of the storages that autograd keeps, without the model's own, and FLOPs, forward and backward."""
    known = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            storages[storage._cdata] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            total = losses(rows).sum()
        total.backward()
    return sum(storages.values()), counter.get_total_flops()


def pair_losses_of(config: TrainConfig, model: ViewTransformer, size: int, device: torch.device, rows: int) -> Tensor:
    """The losses of pairs of nothing at `size` pixels, as a training step computes them."""
    cells = size // 2 ** (len(config.vae.block_channels) - 1)
    latents = torch.zeros(rows, config.vae.latent_channels, cells, cells, device=device)
    views = Views(*torch.ones(5, rows, device=device))
    told = condition(latents, views, views, size, config.model.absolute_pose)
    if config.model.image_embedding:
        told["image_embedding"] = torch.zeros(rows, config.model.image_embedding, device=device)
    batch = Batch(latents, told, latents[:, 0], views, views)
    half, kept = torch.full((rows,), 0.5, device=device), torch.zeros(rows, 2, dtype=torch.bool, device=device)
    return pair_losses(model, batch, Draws(latents, half, kept), config.model.prediction, shift=1.0)


def view_cost(config: TrainConfig, transformer: ViewTransformer, size: int) -> Cost:
    """Of a step of the transformer."""
    with AsOnGPU(PRECISIONS[config.mixed_precision]):
        return cost(lambda rows: pair_losses_of(config, transformer, size, META, rows), transformer)


def vae_cost(config: TrainConfig, vae: AutoencoderKL) -> Cost:
    """Of a step of the autoencoder."""
    settings = config.vae
    weights = settings.kl_weight, settings.gradient_weight, settings.equivariance_weight

    def losses(rows: int) -> Tensor:
        crops = torch.empty(rows, 1, settings.crop, settings.crop, device=META)
        return autoencoder.loss(vae, crops, *weights, torch.Generator(), rows, slice(None))

    with AsOnGPU(PRECISIONS[config.mixed_precision]):
        return cost(losses, vae)


def tables() -> str:
    """All tables, as Markdown."""
    weights, views, memory, starts, hours = [], [], [], [], []
    for name in PRESETS:
        config = preset(name, seed=0)
        vae, transformer = parts(config)
        shape = f"{config.model.num_layers} x {config.model.num_heads * config.model.head_dim}"
        count, of_vae = parameters(transformer), parameters(vae)
        gigabytes = [4e-9 * count * copies for copies in (1, 1, MOMENTS, 1)]
        columns = [f"{value:.3f}" for value in (*gigabytes, sum(gigabytes))]
        weights.append([f"`{name}`", shape, f"{count / 1e6:.1f} M", f"{of_vae / 1e6:.1f} M", *columns])
        held_gb, frozen_gb = sum(gigabytes), 4e-9 * of_vae
        # shares, and the two blocks that are put together at a time
        spread_gb = held_gb / GPUS + 4e-9 * count * 2 / config.model.num_layers
        if config.spread_weights:
            whole_gb = 4e-9 * count * WHOLE_AT_START
            starts.append(f"`{name}` {whole_gb:.2f} GB, {whole_gb + frozen_gb:.2f} with the frozen autoencoder")
        if config.vae.steps:
            of_step = vae_cost(config, vae)
            where = [f"`{name}`", f"autoencoder, crops of {config.vae.crop}"]
            memory.append([*where, *fits(of_step, config.vae.batch, 5 * frozen_gb)])
            work = config.vae.steps * config.vae.batch
            hours += estimate(name, where[1], work, of_step.row_flops, 0.0)
        batches = {stage.size: stage for stage in config.stages}
        for size in dict.fromkeys([*batches, *([] if name == "toy" else [1024])]):
            call, encoding = view_flops(config, vae, transformer, size)
            of_step, stage = view_cost(config, transformer, size), batches.get(size)
            side = size // 2 ** (len(config.vae.block_channels) - 1) // config.model.patch_size
            flops = (call, of_step.row_flops, encoding)
            views.append([f"`{name}`", size, side**2, *(f"{one / 1e9:.2f}" for one in flops)])
            batch = stage.batch if stage else None
            memory.append([f"`{name}`", size, *fits(of_step, batch, held_gb + frozen_gb)])
            if config.spread_weights:
                share = batch // GPUS if batch else None
                where = f"{size}, weights over {GPUS} GPUs"
                memory.append([f"`{name}`", where, *fits(of_step, share, spread_gb + frozen_gb)])
            if stage:
                # sources that are augmented are encoded in each step, in float32: a GPU convolves it at half the speed
                encoded_flops = 2 * config.augment_fraction * encoding
                hours += estimate(name, str(size), stage.steps * stage.batch, of_step.row_flops, encoded_flops)
    heads = "preset,layers x width,transformer,autoencoder,weights,gradients,AdamW,average,together".split(",")
    view_heads = "preset,pixels,tokens,GFLOP a call,GFLOP a pair in training,GFLOP to encode".split(",")
    memory_heads = ["preset", "pixels", "batch", "MB a pair", "GB of the batch", "GB besides"]
    memory_heads += [f"`--at-once` in {card} GB" for card in CARDS_GB]
    hours_heads = [
        "preset",
        "stage",
        "million pairs",
        "utilisation (assumed)",
        "pairs/s (estimated)",
        "hours (estimated)",
    ]
    return "\n\n".join(
        [
            "Parameters, and what the transformer's training keeps of them in float32, in GB (computed):",
            report.table(heads, weights),
            "One view forward, and one pair forward and backward (computed; a multiply-add is 2 FLOP):",
            report.table(view_heads, views),
            "Memory of a GPU (computed):",
            report.table(memory_heads, memory),
            "Before weights are spread, at a stage's start, each GPU holds the whole model and its whole average for a "
            f"moment, and nothing of a step (computed): {'; '.join(starts)}.",
            "Time on one H200 (estimated from the FLOPs; nothing of it was run):",
            report.table(hours_heads, hours),
        ]
    )


def fits(of_step: Cost, batch: int | None, held_gb: float) -> list[str]:
    """The columns of the table of memory. batch: rows of one GPU. held_gb: what is held besides a step's own."""
    row_gb, besides_gb = of_step.row_bytes / 1e9, held_gb + of_step.fixed_bytes / 1e9
    at_once = [int(((1 - SPARE) * card - besides_gb) / row_gb) for card in CARDS_GB]
    columns = (
        ["-", f"{1000 * row_gb:.1f}", "-"]
        if batch is None
        else [batch, f"{1000 * row_gb:.1f}", f"{batch * row_gb:.2f}"]
    )
    return [*map(str, columns), f"{besides_gb:.2f}", *(str(count) if count > 0 else "none" for count in at_once)]


def estimate(name: str, stage: str, pairs: int, train_flops: float, encoded_flops: float) -> list[list[str]]:
    """The line of the table of hours for so many pairs; none where no utilisation is assumed."""
    if name not in UTILISATION:
        return []
    pairs_per_s = UTILISATION[name] * H200_TFLOP_S * 1e12 / (train_flops + encoded_flops)
    columns = [f"{pairs / 1e6:.1f}", f"{100 * UTILISATION[name]:.0f} %", f"{pairs_per_s:.0f}"]
    return [[f"`{name}`", stage, *columns, f"{pairs / pairs_per_s / 3600:.1f}"]]


def check(name: str, size: int, rows: int) -> str:
    """What a step of the transformer really holds on this machine, beside what is computed of it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = preset(name, seed=0)
    model = untrained(config).to(device)
    if device.type == "cpu":
        # A CPU computes as it is asked to; freed memory is to go back at once (M_MMAP_THRESHOLD).
        config = replace(config, mixed_precision="no")
        ctypes.CDLL(None).mallopt(-3, 2**16)
    precision = PRECISIONS[config.mixed_precision]

    def losses(rows: int) -> Tensor:
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            return pair_losses_of(config, model, size, device, rows)

    losses(1).sum().backward()  # gradients, and what libraries hold from then on
    before_gb = held_gb(device)
    total = losses(rows).sum()
    kept_gb = held_gb(device) - before_gb
    forget_peak(device)
    total.backward()
    peak_gb = max(kept_gb, held_gb(device, "VmHWM") - before_gb)
    of_step = view_cost(config, parts(config)[1], size)
    computed_gb = (rows * of_step.row_bytes + of_step.fixed_bytes) / 1e9
    return (
        f"{name}, {size} pixels, {rows} pairs, {config.mixed_precision}, {device}: computed {computed_gb:.3f} GB; kept "
        f"after the forward pass {kept_gb:.3f} GB ({kept_gb / computed_gb:.2f} times); peak of the backward pass "
        f"{peak_gb:.3f} GB ({peak_gb / computed_gb:.2f} times)"
    )


def held_gb(device: torch.device, what: str = "VmRSS") -> float:
    """What is held now, or (VmHWM) was at most since `forget_peak`."""
    if device.type == "cuda":
        most = what == "VmHWM"
        return (torch.cuda.max_memory_allocated() if most else torch.cuda.memory_allocated()) / 1e9
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024 / 1e9


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--document", type=Path, help="put the tables between this document's markers")
    parser.add_argument("--check", nargs=3, metavar=("PRESET", "PIXELS", "PAIRS"), help="the memory of one real step")
    arguments = parser.parse_args()
    if arguments.check:
        print(check(arguments.check[0], *map(int, arguments.check[1:])))
    elif arguments.document:
        report.publish(arguments.document, "sizes", tables())
    else:
        print(tables())
