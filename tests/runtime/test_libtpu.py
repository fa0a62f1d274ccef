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
from itune.runtime.libtpu import SETTINGS

BASE = Path(itune.__file__).parent / "demo" / "assets" / "base"


def itune_verb(*words, **options):
    """A verb in a process that nothing has told of platforms or TPUs (a test of this process may have)."""
    told = ("JAX_PLATFORMS", "XLA_FLAGS", *SETTINGS)
    environment = {name: value for name, value in os.environ.items() if name not in told}
    return subprocess.run([sys.executable, "-m", "itune", *words], env=environment, capture_output=True, text=True,
                          **options)  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_verb_that_computes_prints_no_error_of_libtpu(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(BASE, model)
    (model / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }} {% endfor %}")
    done = itune_verb("chat", "--model", str(model), "--max-new-tokens", "2", input="Say one.\n")
    assert done.returncode == 0, done.stderr
    assert "TPU" not in done.stderr and "libtpu" not in done.stderr


def test_a_plan_for_other_chips_looks_for_no_device_here():
    done = itune_verb("plan", "--config", "sft", "--topology", "v5e:2x2", "--formula", f"--config.model.path={BASE}",
                      "--config.train.max_steps=3")  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
