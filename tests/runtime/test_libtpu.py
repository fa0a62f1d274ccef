"""libtpu, installed for its compiler, says nothing of the TPU that this machine has not."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import itune

BASE = Path(itune.__file__).parent / "demo" / "assets" / "base"


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_verb_that_computes_prints_no_error_of_libtpu(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(BASE, model)
    (model / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }} {% endfor %}")
    names = ("JAX_PLATFORMS", "XLA_FLAGS", "TPU_SKIP_MDS_QUERY", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-m", "itune", "chat", "--model", str(model), "--max-new-tokens", "2"],
        input="Say one.\n", env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "TPU" not in done.stderr and "libtpu" not in done.stderr
