"""How many pairs per second training sees, with cached latents and with those that are encoded online, in one run.

    python tests/benchmarks/latents.py SHARDS [--batches 20] [--vae PATH_OR_HUB_ID]

Seconds are those of one core, so that other work on the machine does not count. "read" is a batch of latents alone,
"step" a whole training step of the preset's model on it: read, loss, gradient. The autoencoder is untrained: its time
does not depend on its weights. Both ways take turns, with the same pairs.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from svdrr import presets
from svdrr import vae as autoencoder
from svdrr.data import draw_pairs, gather
from svdrr.latents import Reader, cached, online
from svdrr.shards import open_folder
from svdrr.train import any_images, fitting_vae, pair_loss, untrained

CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shards", type=Path)
    parser.add_argument("--preset", default="toy")
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
    autoencoder.measure_latents(vae, any_images(shards, config.stages[0].size, 4, seed=0).split(1))

    def encode(images: Tensor) -> Tensor:
        return autoencoder.encode(vae, images)

    print("| size | batch | what | cached, pairs/s | online, pairs/s | ratio |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for stage in config.stages:
            model = untrained(replace(config, stages=(stage,)))
            readers = cached(shards, stage.size, encode, "vae", Path(folder)), online(shards, stage.size, encode)

            def read(reader: Reader, seed: int, stage=stage) -> None:
                pairs = draw_pairs(shards, stage.batch, config.pa_fraction, seed)
                gather(shards, reader, pairs, stage.size, True, CPU)

            def step(reader: Reader, seed: int, stage=stage, model=model) -> None:
                pairs = draw_pairs(shards, stage.batch, config.pa_fraction, seed)
                batch = gather(shards, reader, pairs, stage.size, True, CPU)
                generator = torch.Generator().manual_seed(seed)
                pair_loss(model, batch, config.model.prediction, stage.shift, config.drop_source, generator).backward()

            for work in (read, step):
                rates = [options.batches * stage.batch / seconds for seconds in measure(work, readers, options.batches)]
                print(
                    f"| {stage.size} | {stage.batch} | {work.__name__} | {rates[0]:.0f} | {rates[1]:.0f} | "
                    f"{rates[0] / rates[1]:.1f} |"
                )


def measure(work: Callable[[Reader, int], None], readers: tuple[Reader, ...], batches: int) -> list[float]:
    """Seconds of this many batches by each reader, after one that does not count."""
    seconds = [0.0] * len(readers)
    for seed in range(batches + 1):
        for index, reader in enumerate(readers):
            begin = time.thread_time()
            work(reader, seed)
            if seed:
                seconds[index] += time.thread_time() - begin
    return seconds


if __name__ == "__main__":
    main()
