"""Names for files under way: hidden, beside the file that they become, and of a process that can be asked for."""

import os
import re
import socket
import time
from pathlib import Path

# Of a process on another machine nothing is known: one that writes touches its file within minutes.
_UNTOUCHED_S = 24 * 3600.0


def name_for(path: Path) -> Path:
    """The name to write `path` under until it is whole: in the same folder, and says which process of which machine."""
    return path.with_name(f".{path.name}.tmp-{socket.gethostname()}-{os.getpid()}")


def left_over(folder: Path) -> list[Path]:
    """Temporary files whose process is dead, sorted; one of another machine counts as dead after a day untouched."""
    return sorted(path for path in folder.glob(".*.tmp-*-*") if _is_left_over(path))


def sweep(folder: Path) -> list[Path]:
    """Remove what is left over in a folder; returns what was removed."""
    removed = left_over(folder)
    for path in removed:
        path.unlink(missing_ok=True)  # another process may sweep, too
    return removed


def _is_left_over(path: Path) -> bool:
    known = re.fullmatch(r"\..+\.tmp-(.+)-(\d+)", path.name)
    try:
        if known is None or not path.is_file():
            return False
        if known[1] == socket.gethostname():
            return not _is_alive(int(known[2]))
        return time.time() - path.stat().st_mtime > _UNTOUCHED_S
    except FileNotFoundError:
        return False  # it got its name, or was swept, this very moment


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing, asks whether it could
    except PermissionError:
        return True  # another user's
    except (ProcessLookupError, OverflowError):
        return False
    return True
