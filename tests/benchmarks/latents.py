"""What a training step costs and what of it is reading, with cached latents and with images that it encodes itself.

    python tests/benchmarks/latents.py SHARDS [--preset toy] [--stages 2] [--batch 16] [--vae PATH]

Seconds are those of one core, so that other work on the machine does not count. "read" is phase one of a batch, which
the loop leaves to another thread; "step" is all of it: read, encode what is still an image, loss, gradient. The
autoencoder is untrained: its time does not depend on its weights. All ways take turns, with the same pairs.
"""

import argparse
import functools
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from svdrr import presets
from svdrr import vae as autoencoder
from svdrr.data import draw_augmentations, draw_noise, draw_pairs, encode_batch, read_batch
from svdrr.latents import cached
from svdrr.shards import open_folder
from svdrr.tasks import images, pair_losses
from svdrr.train import fitting_vae, untrained

CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shards", type=Path)
    parser.add_argument("--preset", default="toy")
    parser.add_argument("--stages", type=int, help="so many of the preset's, from the first on; all by default")
    parser.add_argument("--batch", type=int, help="instead of the preset's, where that takes too long here")
    parser.add_argument("--vae")
    parser.add_argument("--batches", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    shards, config = open_folder(options.shards), presets.preset(options.preset, seed=0)
    if options.vae is None:
        shape = config.vae.latent_channels, config.vae.block_channels, config.vae.layers_per_block
        vae = autoencoder.build(*shape)
    else:
        vae = fitting_vae(options.vae, config)
    vae.requires_grad_(False)
    autoencoder.measure_latents(vae, images(shards, config.stages[0].size, draw_pairs(shards, 4, 0, seed=0)).split(1))
    encode = functools.partial(autoencoder.encode, vae)

    print("| size | batch | views | read, ms a pair | step, ms a pair | pairs/s | read / step |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for stage in config.stages[: options.stages]:
            model = untrained(replace(config, stages=(stage,)))
            batch = options.batch or stage.batch
            stored = cached(shards, stage.size, encode, "vae", Path(folder))
            ways = {
                "cached": (stored, 0.0),
                "cached, half of the sources augmented": (stored, 0.5),
                "images": (None, 0.0),
                "images, half of the sources augmented": (None, 0.5),
            }
            seconds = {name: [0.0, 0.0] for name in ways}
            for seed in range(options.batches + 1):
                for name, (reader, fraction) in ways.items():
                    begin = time.thread_time()
                    pairs = draw_pairs(shards, batch, config.pa_fraction, seed)
                    augmentations = draw_augmentations(batch, fraction, seed)
                    side = stage.size // autoencoder.cell(vae)
                    read = read_batch(shards, reader, pairs, augmentations, stage.size, side)
                    middle = time.thread_time()
                    loss(model, encode_batch(read, encode, stage.size, True, CPU), config, stage, seed).backward()
                    end = time.thread_time()
                    if seed:  # the first does not count
                        seconds[name][0] += middle - begin
                        seconds[name][1] += end - begin
            for name, spent in seconds.items():
                reading, step = (1000 * one / batch / options.batches for one in spent)
                print(
                    f"| {stage.size} | {batch} | {name} | {reading:.3f} | {step:.1f} | {1000 / step:.1f} | "
                    f"{100 * reading / step:.1f} % |"
                )


def loss(model: torch.nn.Module, batch, config, stage, seed: int) -> Tensor:
    draws = draw_noise(len(batch.target_latent), batch.target_latent.shape[1:], config.drop_source, seed)
    return pair_losses(model, batch, draws, config.model.prediction, stage.shift).mean()


if __name__ == "__main__":
    main()
