"""The GPU check runs, in tiny form on CPU, with nothing but the libraries that it says it needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# what itune installs or uses elsewhere, and a GPU machine's image may lack
ABSENT = [
    *("datasets", "grain", "ml_collections", "orbax", "tensorstore", "transformers", "tokenizers", "jinja2"),
    *("tensorboardX", "zstandard", "etils", "treescope", "torch", "pandas", "pyarrow", "wandb", "tensorflow"),
]
WITHOUT = f"""
import runpy, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked by the test)", name=name)

sys.meta_path.insert(0, Blocker())
sys.argv = ["gpu_check.py", *sys.argv[1:]]
runpy.run_path({str(ROOT / "scripts" / "gpu_check.py")!r}, run_name="__main__")
"""


def _run(*command):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    environment["PYTHON"] = sys.executable
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def test_it_needs_only_the_libraries_that_it_names():
    done = _run(sys.executable, "-c", WITHOUT, "--cpu-smoke")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["check"] for line in lines] == [
        "device", "backend", "training", "agreement", *["attention"] * 2, "done",
    ]  # fmt: skip
    assert all(line["right"] for line in lines[1:])
    training = lines[2]
    assert training["last_loss"] < training["first_loss"]
    assert training["tokens_per_second"] > 0
    assert "pairs" in training["formula"]


def test_without_a_gpu_it_says_so():
    done = _run("bash", "scripts/gpu_check.sh")
    assert done.returncode == 1
    assert "no NVIDIA GPU, jax sees cpu; --cpu-smoke runs on a CPU" in done.stderr
