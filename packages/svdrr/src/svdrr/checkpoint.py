"""The state of a training run as one safetensors file: written whole or not at all, and read back bit for bit."""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.amp import GradScaler

from svdrr.durable import give_name
from svdrr.errors import InputError
from svdrr.processes import shared_like


@dataclass(frozen=True)
class Checkpoint:
    """What is needed to go on: `step` steps of `stage` are done. tensors: by flat name, 'model/...', 'ema/...', ..."""

    stage: str
    step: int
    tensors: dict[str, Tensor]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of one part, such as 'ema', by their names within it."""
        prefix = f"{name}/"
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of all of it."""
        total = hashlib.sha256(repr((self.stage, self.step)).encode())
        for name, tensor in sorted(self.tensors.items()):
            total.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
            total.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        return total.hexdigest()


def state(
    model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, scaler: GradScaler | None = None
) -> dict[str, Tensor]:
    """Everything that a training step changes, by flat name. The optimizer's moments carry their parameter's name.

    scaler: of the loss, where gradients have 16 bits. Weights that are spread over processes come as their shares.
    """
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"ema/{name}": tensor for name, tensor in ema.state_dict().items()}
    for name, parameter in model.named_parameters():
        moments = optimizer.state.get(parameter, {})
        tensors |= {f"optimizer/{moment}/{name}": tensor for moment, tensor in moments.items()}
    if scaler is not None:
        tensors |= {f"scaler/{name}": torch.tensor(float(value)) for name, value in scaler.state_dict().items()}
    return tensors


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: GradScaler | None = None,
) -> None:
    """Puts the state back into a model, its average, an optimizer and a scaler that were built the same way."""
    for name, network in (("model", model), ("ema", ema)):
        there = network.state_dict()
        stored = checkpoint.part(name)
        network.load_state_dict({key: shared_like(value, there[key]) for key, value in stored.items()})
    parameters = dict(model.named_parameters())
    for key, value in checkpoint.part("optimizer").items():
        moment, name = key.split("/", maxsplit=1)
        parameter = parameters[name]
        # clone: tensors of a mapped file need not be aligned, and alignment may decide the last bit of a sum
        moved = value.clone().to(parameter.device)
        optimizer.state[parameter][moment] = shared_like(moved, parameter) if value.ndim else moved
    if scaler is not None:
        kinds = {name: type(value) for name, value in scaler.state_dict().items()}
        scaler.load_state_dict({name: kinds[name](value.item()) for name, value in checkpoint.part("scaler").items()})


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes the checkpoint beside older ones, of which `keep` - 1 stay. Raises InputError where the disk is full."""
    folder.mkdir(parents=True, exist_ok=True)
    order = 1 + max((_order(path) for path in folder.glob("*.safetensors")), default=0)
    path = folder / f"{order:06d}-{checkpoint.stage}-{checkpoint.step:07d}.safetensors"
    partial = folder / "partial"
    tensors = {name: tensor.detach().contiguous() for name, tensor in checkpoint.tensors.items()}
    try:
        metadata = {"stage": checkpoint.stage, "step": str(checkpoint.step), "digest": checkpoint.digest}
        save_file(tensors, partial, metadata)
        give_name(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise InputError(
            f"cannot write {path} ({error}): the previous checkpoint is intact, so make room and run the same command"
        ) from error
    for old in sorted(folder.glob("*.safetensors"))[:-keep]:
        old.unlink()
    return path


def newest(folder: Path) -> Path | None:
    """The file of the newest checkpoint of the folder; None where there is none."""
    return max(folder.glob("*.safetensors"), default=None)


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint. Raises InputError where that cannot be."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        checkpoint = Checkpoint(stage=metadata["stage"], step=int(metadata["step"]), tensors=tensors)
        if checkpoint.digest != metadata["digest"]:
            raise ValueError("it fails its checksum")
    except FileNotFoundError as error:
        raise InputError(f"{path} is not there, or not yet: wait a minute and run the same command") from error
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}): delete it to go on from the one before") from error
    return checkpoint


def _order(path: Path) -> int:
    return int(path.name.split("-")[0])
