"""A run folder: what is in it, whether a command may go on with it, and which model `sample` means.

- config.json: what decides the weights, the data's digest, and the versions that it was started with
- checkpoints/: the newest states of training
- vae/, latents/: the finished autoencoder, and every view encoded by it
- coarse/: the finished coarse branch, where the run has one
- model/: the finished pipeline
- log.jsonl: a line per few steps; what was done twice, after a kill, is there twice
- tensorboard/: the same as curves. samples/: views of patients for validation, synthesised in between
"""

import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from datetime import date, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from diffusers.models.modeling_utils import ModelMixin
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError

from svdrr import hub
from svdrr.config import TrainConfig
from svdrr.durable import check, give_name, seal
from svdrr.errors import InputError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

MODEL_INDEX = "model_index.json"
"""Without it a folder is no pipeline."""

Part = TypeVar("Part", bound=ModelMixin)

CONFIG_PARTIAL = "config.partial"
"""All that a run has whose making was broken off."""

RUNS = Path("runs")
LATEST = RUNS / "latest"
RECORDED_VERSIONS = ("svdrr", "torch", "diffusers", "accelerate")


class Run:
    """One run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.latents = folder / "latents"
        self.vae = folder / "vae"
        self.coarse = folder / "coarse"
        self.model = folder / "model"
        self.samples = folder / "samples"
        self.tensorboard = folder / "tensorboard"
        self._claim: str | None = None  # where files have no locks: what the lock's file says while the run is ours

    @property
    def finished(self) -> bool:
        """Whether the model is there. Raises InputError where half of it is."""
        if self.model.is_dir() and not (self.model / MODEL_INDEX).exists():
            raise InputError(f"{self.model} is not whole: delete it, and the same command makes it again")
        return self.model.is_dir()

    def read(self, kind: type[Part], folder: Path, is_copy: bool = False) -> Part:
        """The network of this kind that the run keeps in its `folder`, vae or coarse. Raises InputError: damaged.

        is_copy: of what the run was given; then the same command makes the very same again, and nothing else is lost.
        """
        if not folder.is_dir():
            raise InputError(f"{folder} is not there, or not yet: wait a minute and run the same command")
        try:
            check(folder)
            part, found = kind.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
            if found["missing_keys"]:
                raise ValueError(f"{len(found['missing_keys'])} weights are missing")
        except hub.UNREADABLE as error:
            lost = [] if is_copy else [path for path in (self.coarse, self.checkpoints) if path.is_dir()]
            names = " and ".join(map(str, dict.fromkeys([folder, *lost])))
            raise InputError(
                f"{folder} is damaged ({hub.reason(error)}): put it back from a copy, or delete {names}, and the same "
                "command makes all that again"
            ) from error
        return part

    @functools.cached_property
    def _board(self) -> "SummaryWriter":
        from torch.utils.tensorboard import SummaryWriter  # takes a second, which only training needs to

        return SummaryWriter(str(self.tensorboard))

    def log(self, stage: str, step: int = 0, **values: float) -> None:
        """Appends one line to log.jsonl, and a point to each value's curve. Raises InputError: see `locked`."""
        if self._claim is not None and (owner := (self.folder / "lock").read_text()) != self._claim:
            raise InputError(f"{owner} has begun with {self.folder} since: this `svdrr train` leaves it to that one")
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps({"time": round(time.time(), 1), "stage": stage, "step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{stage}/{name}", value, step)
        self._board.flush()

    def show(self, stage: str, step: int, picture: NDArray[np.uint8]) -> None:
        """Keeps a picture [rows, columns] as a PNG in samples/, and for TensorBoard."""
        self.samples.mkdir(exist_ok=True)
        Image.fromarray(picture).save(self.samples / f"{stage}-{step:07d}.png")
        self._board.add_image(f"{stage}/samples", picture[None], step)
        self._board.flush()

    def mirror(self, project: str) -> None:
        """From now on what goes to tensorboard/ goes to this project of Weights & Biases, too: see require_wandb."""
        import wandb

        record = (self.folder / "config.json").read_bytes()
        wandb.init(
            project=project,
            name=self.folder.name,
            id=hashlib.sha256(str(self.folder.resolve()).encode() + record).hexdigest()[:16],
            resume="allow",
            dir=self.folder,
            config=json.loads(record),
            sync_tensorboard=True,
        )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second trainer out. The lock ends with the process, however that ends.

        Where files have no locks, the second goes on, and the first ends with an InputError when it next logs a line.
        """
        with (self.folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"another `svdrr train` is at work in {self.folder}: wait for it") from error
            except OSError as error:
                # Lustre and NFS are often mounted without locks. Refusing would make training there impossible, and a
                # file that keeps others out would outlive a kill, after which a scheduler starts the same command. So
                # the newest trainer has the run: whether the one before still lives, only that one can know.
                self._claim = f"process {os.getpid()} on {socket.gethostname()}, of {datetime.now().isoformat()},"
                file.write(self._claim)
                file.flush()
                print(
                    f"no locks on the file system of {self.folder} ({error.strerror}): start no second `svdrr train` "
                    "in it, for that would end this one",
                    file=sys.stderr,
                )
            yield


def require_wandb() -> None:
    """Raises InputError where the package of Weights & Biases is missing."""
    try:
        import wandb  # noqa: F401 - whether it can be
    except ModuleNotFoundError as error:
        raise InputError(f"--wandb needs {error.name}, which is not installed: pip install 'svdrr[wandb]'") from error


def open_run(config: TrainConfig, data_digest: str, out: Path | None) -> Run:
    """The run that this command is about: `out`, or runs/latest where it is the same, or a new runs/<date>-<preset>.

    Raises InputError where `out` holds another run, naming what differs.
    """
    record = {"config": config.to_json(), "data": data_digest}
    if out is None:
        if LATEST.exists() and not LATEST.is_symlink():
            raise InputError(f"{LATEST} is no link to a run, as copying may have made it: give it another name")
        if LATEST.is_dir() and not _differences(LATEST, record):
            return Run(RUNS / LATEST.readlink())
        folder = _new_folder(config.preset)
    else:
        folder = out
        if (folder / "config.json").exists():
            if differences := _differences(folder, record):
                raise InputError(f"{folder} holds another run ({'; '.join(differences)}): give another --out")
            return Run(folder)
        if folder.is_dir() and set(folder.iterdir()) - {folder / CONFIG_PARTIAL}:
            raise InputError(f"{folder} is not empty and not a run: give another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder} ({error.strerror}): give another --out") from error
    record["versions"] = {name: version(name) for name in RECORDED_VERSIONS}
    partial = folder / CONFIG_PARTIAL
    partial.write_text(json.dumps(record, indent=2) + "\n")
    give_name(partial, folder / "config.json")
    if out is None:
        link = RUNS / "latest.partial"
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
        link.replace(LATEST)
    return Run(folder)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, that gets its name when all of it is on the disk. Raises InputError where that cannot be."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        seal(partial)
        give_name(partial, folder)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {folder} ({error}): make room and run the same command") from error


def model_folder(model: Path | None) -> Path:
    """The pipeline's folder: in this run (by default runs/latest) or itself. Raises InputError where there is none."""
    folder = LATEST if model is None else model
    for candidate in (folder / "model", folder):
        if (candidate / MODEL_INDEX).exists():
            return candidate
    if (folder / "config.json").exists():
        raise InputError(f"the run {folder} is not finished: go on with the same `svdrr train` command")
    if model is None:
        raise InputError("no model in runs/latest: train one with `svdrr train --shards shards`, or give --model")
    raise InputError(f"no model in {folder}: give --model a run of `svdrr train`")


def _new_folder(preset: str) -> Path:
    first = RUNS / f"{date.today().isoformat()}-{preset}"
    others = (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))
    return next(folder for folder in itertools.chain([first], others) if not folder.exists())


def _differences(folder: Path, record: dict[str, Any]) -> list[str]:
    """What the run in the folder was started with, against the record; in words, empty where it is the same."""
    try:
        stored = json.loads((folder / "config.json").read_text())
        there, here = _flat(stored["config"]), _flat(json.loads(json.dumps(record["config"])))
        data = stored["data"]
    except (OSError, ValueError, KeyError):
        return [f"{folder}/config.json cannot be read"]
    names = sorted(there.keys() | here.keys())
    words = [f"its {n} is {there.get(n)}, not {here.get(n)}" for n in names if there.get(n) != here.get(n)]
    if data != record["data"]:
        words.append(f"its shards are {data[:12]}, not {record['data'][:12]}")
    return words


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {name: value}
    leaves: dict[str, Any] = {}
    for part, inner in value.items():
        leaves |= _flat(inner, f"{name}.{part}" if name else str(part))
    return leaves
