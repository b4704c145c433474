"""What the presets weigh and cost, counted on torch's meta device: shapes without numbers, so any machine will do.

`make sizes` runs it and renews the tables of docs/training.md, which says how to read them.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from tests.benchmarks import report
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from svdrr import vae as autoencoder
from svdrr.config import TrainConfig
from svdrr.pose import Views
from svdrr.presets import PRESETS, preset
from svdrr.train import untrained
from svdrr.transformer import ViewTransformer, condition

MOMENTS = 2
"""Of AdamW, each as large as the weights."""


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


def tables() -> str:
    """Both tables, as Markdown."""
    weights, views = [], []
    for name in PRESETS:
        config = preset(name, seed=0)
        vae, transformer = parts(config)
        shape = f"{config.model.num_layers} x {config.model.num_heads * config.model.head_dim}"
        count = parameters(transformer)
        gigabytes = [4e-9 * count * copies for copies in (1, 1, MOMENTS, 1)]
        columns = [f"{value:.3f}" for value in (*gigabytes, sum(gigabytes))]
        weights.append([f"`{name}`", shape, f"{count / 1e6:.1f} M", f"{parameters(vae) / 1e6:.1f} M", *columns])
        for stage in config.stages:
            call, encoding = view_flops(config, vae, transformer, stage.size)
            side = stage.size // 2 ** (len(config.vae.block_channels) - 1) // config.model.patch_size
            views.append([f"`{name}`", stage.size, side**2, f"{call / 1e9:.2f}", f"{encoding / 1e9:.2f}"])
    heads = "preset,layers x width,transformer,autoencoder,weights,gradients,AdamW,average,together".split(",")
    view_heads = "preset,pixels,tokens,GFLOP a call,GFLOP to encode".split(",")
    return "\n\n".join(
        [
            "Parameters, and what the transformer's training keeps of them in float32, in GB (computed):",
            report.table(heads, weights),
            "One view forward (computed; a multiply-add is 2 FLOP):",
            report.table(view_heads, views),
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--document", type=Path, help="put the tables between this document's markers")
    arguments = parser.parse_args()
    if arguments.document:
        report.publish(arguments.document, "sizes", tables())
    else:
        print(tables())
