"""Files under way are told from those that dead processes have left."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from drrgen import temporary


@pytest.fixture
def dead() -> int:
    """The number of a process that was."""
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    return int(done.stdout)


def test_a_name_is_hidden_and_in_the_folder_of_what_it_becomes(tmp_path: Path) -> None:
    name = temporary.name_for(tmp_path / "a.h5")
    assert name.parent == tmp_path
    assert name.name == f".a.h5.tmp-{socket.gethostname()}-{os.getpid()}"
    assert name not in tmp_path.glob("*.h5")


def test_what_a_dead_process_left_is_swept_and_what_is_under_way_is_not(tmp_path: Path, dead: int) -> None:
    ours, parents = temporary.name_for(tmp_path / "a.h5"), tmp_path / f".b.h5.tmp-{socket.gethostname()}-{os.getppid()}"
    theirs = tmp_path / f".c.h5.tmp-{socket.gethostname()}-{dead}"
    nobodys = tmp_path / f".d.h5.tmp-{socket.gethostname()}-{10**18}"  # more than a process can have
    for path in (ours, parents, theirs, nobodys):
        path.touch()
    assert temporary.left_over(tmp_path) == [theirs, nobodys]
    assert temporary.sweep(tmp_path) == [theirs, nobodys]
    assert sorted(tmp_path.iterdir()) == [ours, parents]
    assert temporary.sweep(tmp_path) == []


def test_another_machine_has_a_day(tmp_path: Path, dead: int) -> None:
    today, old = (tmp_path / f".{name}.h5.tmp-node-17.cluster-{dead}" for name in "ab")
    for path, hours in ((today, 23), (old, 25)):
        path.touch()
        os.utime(path, (time.time() - 3600 * hours,) * 2)
    assert temporary.sweep(tmp_path) == [old]
    assert today.exists()


@pytest.mark.parametrize(
    "name", ["a.h5", ".a.h5", ".lock", "a.h5.tmp-{host}-{dead}", ".a.h5.tmp-{host}", ".tmp-{dead}"]
)
def test_nothing_else_is_swept(tmp_path: Path, dead: int, name: str) -> None:
    (tmp_path / name.format(host=socket.gethostname(), dead=dead)).touch()
    (tmp_path / f".folder.tmp-{socket.gethostname()}-{dead}").mkdir()
    assert temporary.sweep(tmp_path) == []
