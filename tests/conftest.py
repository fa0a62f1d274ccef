"""Shared test set-up: eight CPU devices for meshes, highest matmul precision, the shared data folder."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real instruction data; a test that needs it says what it skipped when it is absent."""
    folder = Path(os.environ.get("ITUNE_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real instruction data is absent: no folder {folder}; set ITUNE_SHARED_DATA")
    return folder
