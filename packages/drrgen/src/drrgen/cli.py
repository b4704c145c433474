"""The command line: text in, one call into the library, one clear line out. Heavy imports wait until a command runs."""

import logging
import os
import signal
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Annotated

import typer

from drrgen.errors import InputError

# What shells give for a program that was interrupted.
_STOPPED = 130

app = typer.Typer(
    help="Chest CT in, a dense sphere of physically scaled X-ray views (DRRs) out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Exit code 0: done. 1: some of the work was refused, each refusal with its line. 2: bad input, one line."""
    sys.excepthook, sys.unraisablehook = _report_bug, _interrupt_again
    warnings_to_user = logging.StreamHandler()
    warnings_to_user.setFormatter(logging.Formatter("drrgen: %(message)s"))
    logging.getLogger("drrgen").handlers = [warnings_to_user]
    try:
        typer.main.get_command(app)()  # app() would set an excepthook of its own
    except InputError as error:
        print(f"drrgen: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        # after a failed write HDF5 may crash when Python takes its objects apart, so Python does not
        print(f"drrgen: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        os._exit(2)


def _report_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Traces are for bugs. On a full disk every HDF5 object prints one when it goes; `main` has said it in one line."""
    if not issubclass(kind, OSError) and "Can't decrement id ref count" not in str(error):
        sys.__excepthook__(kind, error, trace)


def _interrupt_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Ctrl-C that comes in a callback (numba's loading of code, a weak reference that goes) ends there: once more."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        main_thread = threading.main_thread().ident
        again = threading.Timer(0.1, signal.pthread_kill, [main_thread, signal.SIGINT])
        again.daemon = True
        again.start()


@app.command()
def phantom(
    out: Annotated[Path, typer.Option(help="Folder for the DICOM files, in the layout of TCIA downloads.")],
    patients: Annotated[int, typer.Option(min=1, max=9999)] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Patient i of seed s is the same whatever the number.")] = 0,
    matrix: Annotated[int, typer.Option(min=32, max=512, help="Rows and columns of a slice; the voxels fit.")] = 256,
    table: Annotated[bool, typer.Option("--table", help="Lay the patients on a CT table.")] = False,
) -> None:
    """Write random synthetic chest CTs as DICOM."""
    from drrgen import run

    run.write_phantoms(out, patients, seed, matrix, table)
    print(f"{patients} patients in {out}")


@app.command()
def scan(
    ct_dir: Annotated[Path, typer.Option(help="Folder with CTs, in any layout: DICOM, NIfTI, MetaImage, NRRD.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
) -> None:
    """List every CT below a folder: what is there, what is missing or wrong, and whether `render` takes it.

    Exit code 0 where something is usable, 1 where nothing is.
    """
    from drrgen import catalog, listing

    entries = catalog.scan(ct_dir)
    if as_json:
        print(listing.to_json(entries))
    else:
        listing.print_table(entries, ct_dir)
    sys.exit(0 if any(not one.refused("repair") for one in entries) else 1)


@app.command()
def render(
    ct_dir: Annotated[Path, typer.Option(help="Folder with CTs, in any layout: DICOM, NIfTI, MetaImage, NRRD.")],
    grid: Annotated[str, typer.Option(help="Directions: 5deg, fibonacci:3000 ...")] = "5deg",
    out: Annotated[Path, typer.Option(help="Folder for the shards.")] = Path("shards"),
    size: Annotated[int, typer.Option(help="Pixels per side of the largest level.")] = 512,
    levels: Annotated[
        str | None, typer.Option(help="Sizes to store, e.g. 256,512. [default: halvings down to 64]")
    ] = None,
    azimuth: Annotated[str, typer.Option(help="Keep only azimuths low:high, in degrees.")] = "-180:180",
    elevation: Annotated[str, typer.Option(help="Keep only elevations low:high, in degrees.")] = "-90:90",
    geometry: Annotated[str, typer.Option(help="chest, portable, carm or lidc-idri-drr.")] = "chest",
    projector: Annotated[str, typer.Option(help="auto, cpu, cuda or siddon (the slow reference).")] = "auto",
    energy: Annotated[float | None, typer.Option(help="A beam of one energy, 10 to 150 keV. [default: 60]")] = None,
    spectrum: Annotated[
        str | None, typer.Option(help="A beam as of a tube instead: chest120, portable90 or carm80; twice the time.")
    ] = None,
    materials: Annotated[
        bool, typer.Option("--materials", help="Store images without bone, and of bone alone, too.")
    ] = False,
    compression: Annotated[
        str, typer.Option(help="deflate, or zstd: smaller, read faster, and only by who has hdf5plugin.")
    ] = "deflate",
    keep_table: Annotated[bool, typer.Option("--keep-table", help="Do not remove what lies outside the body.")] = False,
    on_defect: Annotated[str, typer.Option(help="Series with defects: reject or, where possible, repair.")] = "reject",
    dataset_name: Annotated[str | None, typer.Option(help="Name of the data set, for the shards.")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of the CTs. [default: known for LIDC-IDRI]")] = None,
    attribution: Annotated[str | None, typer.Option(help="Whom to cite for them. [default: as above]")] = None,
    splits: Annotated[
        str, typer.Option(help="Who is trained on: hash, or lidc-idri-drr, which tests on its published patients.")
    ] = "hash",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Render finished shards again.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="CTs rendered at a time; each takes its own memory.")] = 1,
    part: Annotated[str, typer.Option(help="Only the i-th of n parts of the CTs, from 0 on, as i/n.")] = "0/1",
    engine: Annotated[str, typer.Option(help="local, or ray: a cluster of machines.")] = "local",
    profile: Annotated[bool, typer.Option("--profile", help="Print where the time went.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the settings and stop.")] = False,
) -> None:
    """Render every CT below a folder to a shard. The same command goes on where it was stopped."""
    from drrgen.config import RenderConfig

    sizes = _sizes(levels)
    origin = (dataset_name, licence, attribution)
    physics = (energy, spectrum, materials)
    where = (grid, azimuth, elevation)
    config = RenderConfig(*where, size, sizes, geometry, projector, keep_table, *origin, *physics, compression)
    if dry_run:
        print(config.to_json())
        return
    from drrgen import cores, run, stages

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a scheduler sends stops as cleanly as Ctrl-C
    try:
        summary = run.render_folder(
            ct_dir,
            out,
            config,
            on_defect,
            overwrite,
            rule=splits,
            part=_part(part),
            num_workers=workers,
            engine=engine,
        )
    except KeyboardInterrupt:
        print("drrgen: stopped; the same command goes on from here", file=sys.stderr, flush=True)
        # not by way of Python's end: it waits for what is being read, and threads in HDF5 crash in it
        os._exit(_STOPPED)
    if profile and summary.rendered:
        print(stages.table(summary.stages, summary.seconds, cores.usable(), summary.busy))
        print(
            f"{summary.num_views} views, {summary.num_bytes / 1e6:.0f} MB: {summary.num_views / summary.seconds:.0f} "
            f"views/s, {summary.num_bytes / 1e6 / summary.seconds:.0f} MB/s"
        )
    print(
        f"{summary.rendered} rendered by {config.projector}, {summary.skipped} already finished, "
        f"{summary.rejected} rejected; shards in {out}"
    )
    if summary.rejected:
        sys.exit(1)


@app.command()
def validate(
    shards: Annotated[list[Path], typer.Argument(help="Shard files, or folders of them with their manifest.")],
) -> None:
    """Check shards against every MUST of the schema, checksums and pyramid included; exit code 1 where one fails.

    A folder's shards are checked against its manifest, too: each must be there, byte for byte.
    """
    from drrgen import cores, dataset

    exit_code = 0
    for path, line in dataset.listed(shards):
        try:
            found = dataset.violations(path, line, cores.usable())
        except InputError as error:
            print(f"drrgen: {error}", file=sys.stderr)
            exit_code = 2
            continue
        print(f"{path}: {'ok' if not found else f'{len(found)} violations'}")
        for violation in found:
            print(f"  {violation}")
        exit_code = max(exit_code, int(bool(found)))
    sys.exit(exit_code)


@app.command()
def status(
    out: Annotated[Path, typer.Option(help="Folder that `render --out` writes to.")] = Path("shards"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
) -> None:
    """Say how far a folder of shards is: what is done, rejected, missing or damaged, and how fast it goes.

    Damage is judged by the size of files: `validate` reads them.

    Exit code 0 where nothing is missing or rejected, else 1.
    """
    from drrgen import status

    found = status.status(out)
    if as_json:
        print(status.to_json(found))
    else:
        status.print_table(found)
    sys.exit(0 if found.is_done else 1)


@app.command()
def view(
    shard: Annotated[Path, typer.Argument(help="A shard file, rendered or synthesised.")],
    html: Annotated[
        Path | None, typer.Option(help="Write a page to turn the patient in: one file, no network.")
    ] = None,
    sheet: Annotated[Path | None, typer.Option(help="Write a contact sheet with the angles printed, as PNG.")] = None,
    gif: Annotated[Path | None, typer.Option(help="Write the patient turning once, as an animated GIF.")] = None,
    mp4: Annotated[Path | None, typer.Option(help="Write the same as a film, in up to 512 pixels (H.264).")] = None,
    max_mb: Annotated[
        float, typer.Option(help="Largest size of the page; frames shrink, then views are left out, until it fits.")
    ] = 24.0,
) -> None:
    """Make pictures of a shard."""
    from drrgen import view
    from drrgen.shards import Shard

    if not (html or sheet or gif or mp4):
        raise InputError(
            "view: say what to make: --html page.html, --sheet sheet.png, --gif orbit.gif or --mp4 orbit.mp4"
        )
    with Shard(shard) as opened:
        if html:
            print(view.html(opened, html, max_mb))
        if sheet:
            print(view.sheet(opened, sheet))
        if gif:
            print(view.gif(opened, gif))
        if mp4:
            print(view.mp4(opened, mp4))


def _part(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise InputError(f"--part {text!r}: say i/n with i from 0 to n - 1, e.g. 0/8")
    return int(number), int(of)


def _sizes(levels: str | None) -> tuple[int, ...] | None:
    if levels is None:
        return None
    try:
        return tuple(int(size) for size in levels.split(","))
    except ValueError as error:
        raise InputError(f"--levels {levels!r}: name sizes in pixels, e.g. 256,512") from error
