"""What all tests share: where the real data lies, caches of their own, and `svdrr` as typed."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import svdrr.cli
from drrgen import projectors

# A worker of `make test` has others beside it, and threads that wait for one another are slow where processors are few.
# torch looks when it is imported; so do commands that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")

# Without a GPU the kernel of the `cuda` projector runs in Triton's interpreter. Triton looks when it is imported.
if projectors.resolve("auto") != "cuda":
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"


def pytest_collection_finish() -> None:
    """What is imported stays: no collection of garbage, of which a training run asks for several, looks at it again."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither read nor fill the user's caches; commands that they start inherit this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real CTs and radiographs beside the repository; none of it is ever part of the repository."""
    if not DATA.is_dir():
        pytest.skip(f"no real data at ../{DATA.parent.name}/{DATA.name}")
    return DATA


@pytest.fixture
def typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `svdrr` in this process, in this test's folder: importing torch anew would take seconds each time."""

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = ["svdrr", *map(str, words)]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as end:
            svdrr.cli.main()
        return subprocess.CompletedProcess(command, end.value.code or 0, *capsys.readouterr())

    monkeypatch.chdir(tmp_path)
    return run
