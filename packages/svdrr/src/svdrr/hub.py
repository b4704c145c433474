"""Models from a folder, the Hub's cache on this machine, or the Hub; and why one could not be had, for one line."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import nn

UNREADABLE = (AttributeError, KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError)
"""What diffusers and transformers raise at files that are damaged, or of something else."""

DIFFUSERS_FILES = ("config.json", "diffusion_pytorch_model.safetensors*", "diffusion_pytorch_model-*.safetensors")
"""Of a model of diffusers, in 32 bits, in one piece or many."""

Found = TypeVar("Found")


def had(name: str, files: Sequence[str], read: Callable[[], Found]) -> Found:
    """What `read` makes of a model's folder, or of the Hub's cache on this machine, where it is fetched to if need be.

    read: looks into both, and raises OSError where the model is in neither; files: patterns of those that it needs.
    The network is asked once: diffusers and transformers ask six times, over 24 s, before they say that there is none.
    Raises what `read` does, OSError where the Hub does not give the model, and ValueError at what is no name there.
    """
    try:
        return read()
    except OSError:
        if Path(name).exists():
            raise
    snapshot_download(name, allow_patterns=list(files))
    return read()


def reason(error: Exception) -> str:
    """The first sentence of what the libraries say, but where it hides that the Hub was out of reach."""
    if isinstance(error, LocalEntryNotFoundError) or isinstance(error.__context__, LocalEntryNotFoundError):
        return "the Hub is out of reach, and its cache on this machine has none"
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")


def digest(settings: object, model: nn.Module) -> str:
    """SHA-256 of the model's weights and of what else decides what it makes of an image, as `repr` writes it."""
    total = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()
