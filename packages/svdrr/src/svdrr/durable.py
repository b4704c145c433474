"""What has its name is whole: its bytes are on the disk before it, so that a power cut leaves all of it or nothing."""

import os
from pathlib import Path


def give_name(partial: Path, path: Path) -> None:
    """Names a file, or a folder and all that is in it, replacing a file of that name. Raises OSError."""
    for one in (*partial.rglob("*"), partial):
        _sync(one)
    partial.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Forces a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
