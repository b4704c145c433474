"""What all tests share: where the real data lies, and a small rendered patient."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real CTs and radiographs beside the repository; none of it is ever part of the repository."""
    if not DATA.is_dir():
        pytest.skip(f"no real data at ../{DATA.parent.name}/{DATA.name}")
    return DATA
