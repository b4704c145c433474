"""One small shard, written by drrgen from a phantom, for all contract tests."""

from pathlib import Path

import pytest

from drrgen.config import RenderConfig
from drrgen.run import render_folder, write_phantoms


@pytest.fixture(scope="session")
def shard_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contract")
    write_phantoms(folder / "ct", patients=1, seed=0, matrix=64, table=False)
    config = RenderConfig(grid="45deg", elevation="-45:45", size=64, levels=(64, 32))
    render_folder(folder / "ct", folder / "shards", config, on_defect="reject", overwrite=False)
    (path,) = (folder / "shards").glob("*.h5")
    return path
