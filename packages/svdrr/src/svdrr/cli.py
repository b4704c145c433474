"""The command line: text in, one call. Heavy imports wait inside the commands, so that --help is quick."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from svdrr.errors import InputError

app = typer.Typer(
    help="One X-ray in, the view from any other direction out. Research only: never for diagnosis.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command("train")
def train_command(
    shards: Annotated[Path, typer.Option(help="Folder of shards, as `drrgen render` writes it.")] = Path("shards"),
    preset: Annotated[str, typer.Option(help="The recipe: toy, small, base, svdrr-xl.")] = "toy",
    out: Annotated[Path | None, typer.Option(help="The run's folder; runs/<date>-<preset> by default.")] = None,
    vae: Annotated[
        str | None, typer.Option(help="A trained autoencoder's folder or Hub id, instead of training one.")
    ] = None,
    max_minutes: Annotated[float | None, typer.Option(min=0, help="Save and stop after this time.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random; 0 by default.")] = None,
    settings: Annotated[
        Path | None, typer.Option(help="A file as --dry-run prints it, instead of a preset's settings.")
    ] = None,
    init: Annotated[str | None, typer.Option(help="PixArt's weights to begin from: a folder or a hub id.")] = None,
    stage: Annotated[str | None, typer.Option(help="Train this one only: vae, coarse, or a size as 256px.")] = None,
    at_once: Annotated[
        int | None, typer.Option(min=1, help="Pairs that a process takes at once; the batch stays as it is.")
    ] = None,
    wandb: Annotated[str | None, typer.Option(help="Send the curves to this project of Weights & Biases.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the settings and stop.")] = False,
) -> None:
    """Train a model on shards. The same command goes on where a run was stopped."""
    import json
    from dataclasses import replace

    from svdrr import presets
    from svdrr.config import read_config

    config = presets.preset(preset, seed or 0) if settings is None else read_config(settings)
    config = replace(config, seed=config.seed if seed is None else seed, init=init or config.init, pretrained_vae=None)
    if dry_run:
        typer.echo(json.dumps(config.to_json(), indent=2))
        return
    from svdrr.train import train

    train(config, shards, out, max_minutes, vae, stage, at_once, wandb)


@app.command("sample")
def sample_command(
    image: Annotated[Path, typer.Option(help="The X-ray, PNG or JPEG.")],
    theta: Annotated[float, typer.Option(help="Azimuth of the view to make, degrees: 90 is the left lateral.")],
    phi: Annotated[float, typer.Option(min=-90, max=90, help="Its elevation, degrees: up is cranial.")] = 0.0,
    model: Annotated[Path | None, typer.Option(help="A run of `svdrr train`; runs/latest by default.")] = None,
    source_theta: Annotated[float, typer.Option(help="Azimuth of the given X-ray: 0 is PA.")] = 0.0,
    source_phi: Annotated[float, typer.Option(min=-90, max=90, help="Its elevation.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the noise that the view starts from.")] = 0,
    samples: Annotated[int, typer.Option(min=1, help="How many views, of seeds counting up.")] = 1,
    out: Annotated[Path | None, typer.Option(help="The PNG to write; named after image and angles by default.")] = None,
) -> None:
    """Synthesise the view from another direction, as 16-bit PNG."""
    from svdrr.sample import WARNING, sample

    for path in sample(image, (theta, phi), (source_theta, source_phi), model, seed, samples, out):
        typer.echo(path)
    typer.echo(f"{WARNING}: research use only, an estimate and not an acquired view", err=True)


def main() -> None:
    """The entry point: bad input, and a disk or folder that does not take our files, is one line and exit code 2."""
    try:
        app()
    except (InputError, OSError) as error:
        rank = os.environ.get("RANK", "0")
        print(f"{'' if rank == '0' else f'process {rank}: '}svdrr: {error}", file=sys.stderr)
        sys.exit(2)
