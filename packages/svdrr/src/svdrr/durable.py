"""What has its name is whole: its bytes are on the disk before it, and a folder says what they have to be."""

import hashlib
import os
from pathlib import Path

SUMS = "SHA256SUMS"
"""A folder's list of its files' checksums, which `sha256sum --check` reads, too."""


def seal(folder: Path) -> None:
    """Lists the checksums of all files in the folder. Raises OSError."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    (folder / SUMS).write_text("".join(f"{_digest(folder / name)}  {name}\n" for name in names))


def check(folder: Path) -> None:
    """Raises OSError or ValueError where a file is not as it was listed. A folder without a list is taken as it is."""
    if not (folder / SUMS).exists():
        return
    for line in (folder / SUMS).read_text().splitlines():
        digest, _, name = line.partition("  ")
        if _digest(folder / name) != digest:
            raise ValueError(f"{name} is not what {SUMS} says")


def give_name(partial: Path, path: Path) -> None:
    """Names a file, or a folder and all that is in it, replacing a file of that name. Raises OSError."""
    for one in (*partial.rglob("*"), partial):
        _sync(one)
    partial.replace(path)
    _sync(path.parent)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Forces a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
