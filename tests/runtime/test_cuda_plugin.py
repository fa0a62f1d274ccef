"""JAX's CUDA plugin, installed for its compiler, says nothing of the GPU that this machine has not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import itune
from itune.runtime import cuda
from itune.runtime.libtpu import SETTINGS

BASE = Path(itune.__file__).parent / "demo" / "assets" / "base"


@pytest.mark.skipif(not cuda.compiler_here(), reason="JAX's CUDA plugin is absent (pip install 'jax[cuda13-local]')")
@pytest.mark.skipif(cuda.gpu_here(), reason="there is a GPU here")
def test_a_verb_that_computes_prints_no_error_of_cuda(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(BASE, model)
    (model / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }} {% endfor %}")
    told = ("JAX_PLATFORMS", "XLA_FLAGS", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK", *SETTINGS)
    environment = {name: value for name, value in os.environ.items() if name not in told}
    done = subprocess.run([sys.executable, "-m", "itune", "chat", "--model", str(model), "--max-new-tokens", "2"],
                          env=environment, input="Say one.\n", capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "CUDA" not in done.stderr and "cuda" not in done.stderr, done.stderr


def test_only_a_machine_without_a_gpu_is_told_to_skip_the_check_of_cuda(monkeypatch):
    for there in (True, False):
        monkeypatch.delenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", raising=False)
        monkeypatch.setattr(cuda, "gpu_here", lambda there=there: there)
        cuda.set_up_jax()
        assert ("JAX_SKIP_CUDA_CONSTRAINTS_CHECK" in os.environ) != there
