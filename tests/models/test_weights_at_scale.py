"""Loading takes the memory of the parameters and reads what the devices hold; an export takes one shard more.

The rows of benchmarks/weights.py on a checkpoint small enough for every run; 2 GB and time: run the benchmark.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from load_script import load_script

from itune.models.hf.files import read_header

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "weights.py"


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A Llama folder of about 160 MB in several files."""
    module = load_script("benchmarks/weights.py")
    folder = tmp_path_factory.mktemp("big") / "model"
    module.make(folder, 160e6)
    return folder


def test_memory_and_bytes(big):
    home = str(BENCHMARK.parents[1])
    command = [sys.executable, str(BENCHMARK), "--part", "load,mesh,export", str(big)]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": home}
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    load, mesh, export = map(json.loads, done.stdout.splitlines())
    size = sum(t.stop - t.start for file in big.glob("*.safetensors") for t in read_header(file).values())
    assert load["parameters_bytes"] == size > 120e6 and len(list(big.glob("*.safetensors"))) > 3
    assert load["ratio"] <= 1.15
    assert mesh["devices"] == 8 and mesh["held_bytes"] == size and mesh["ratio"] <= 1.05
    assert export["peak_over_parameters"] <= export["largest_shard"]
