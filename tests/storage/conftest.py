"""An empty bucket in memory, and a cache of its own."""

import fsspec
import pytest

from itune.storage import fetch


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """The file system behind `memory://`, empty before and after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fetch._fetched_folder.cache_clear()
    fetch.LISTED.clear()
    yield fs
    fs.store.clear()
