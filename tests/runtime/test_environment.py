"""What a run says of the machine it is on."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import tiny_run

from itune.runtime import environment


def kernel_says(file, name):
    """Bytes, of a line such as `MemTotal:  24615852 kB`."""
    return next(int(line.split()[1]) * 1024 for line in open(file) if line.startswith(name))


def test_memory_of_the_process_and_of_the_machine():
    assert 0 < environment.machine_memory() <= kernel_says("/proc/meminfo", "MemTotal:")
    before = environment.resident_memory()
    held = np.ones(100 << 20, np.uint8)
    grown = environment.resident_memory() - before
    assert 90 << 20 <= grown <= 130 << 20 and held.any()
    assert abs(environment.resident_memory() - kernel_says("/proc/self/status", "VmRSS:")) < 10 << 20


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    (tmp_path / "none").write_text("max\n")
    (tmp_path / "some").write_text("1000000\n")
    for names, expected in ((["none", "absent"], kernel_says("/proc/meminfo", "MemTotal:")), (["none", "some"], 10**6)):
        monkeypatch.setattr(environment, "_LIMITS", [tmp_path / name for name in names])
        assert environment.machine_memory() == expected


@pytest.mark.parametrize("name", ["cuda", "nope"])
def test_a_platform_that_is_not_here_is_one_message(name, tiny_folder):
    words = tiny_run.command(tiny_folder, tiny_folder / "elsewhere")
    done = subprocess.run([sys.executable, "-m", "itune", *words], capture_output=True, check=False,
                          env={**tiny_run.environment(tiny_folder), "JAX_PLATFORMS": name})
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1, done.stderr
    assert f"itune: JAX_PLATFORMS={name}: jax finds no such device here".encode() in done.stderr
