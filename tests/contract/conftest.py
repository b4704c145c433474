"""Two small shards, written by drrgen from one phantom, for all contract tests."""

from pathlib import Path

import pytest

from drrgen.config import RenderConfig
from drrgen.run import render_folder, write_phantoms


@pytest.fixture(scope="session")
def shard_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rendered(tmp_path_factory.mktemp("contract"), "deflate")


@pytest.fixture(scope="session")
def zstd_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as in `shard_path`."""
    return rendered(tmp_path_factory.mktemp("contract"), "zstd")


def rendered(folder: Path, compression: str) -> Path:
    write_phantoms(folder / "ct", patients=1, seed=0, matrix=64, table=False)
    config = RenderConfig(grid="45deg", elevation="-45:45", size=64, levels=(64, 32), compression=compression)
    render_folder(folder / "ct", folder / "shards", config, on_defect="reject", overwrite=False)
    (path,) = (folder / "shards").glob("*.h5")
    return path
