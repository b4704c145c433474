"""What all tests share: where the real data lies, and a small rendered patient."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from drrgen import projectors

# Without a GPU the kernel of the `cuda` projector runs in Triton's interpreter. Triton looks when it is imported.
if projectors.resolve("auto") != "cuda":
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"


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
