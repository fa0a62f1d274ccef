"""A second opinion on an exported folder, by a library that the package never imports, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import itune
from itune.types import InputError, RunError


def check_with(name: str, folder: Path) -> dict[str, Any]:
    """What scripts/check_with_NAME.py finds of a folder. Raises RunError with its words when it does not agree."""
    script = script_of(name)
    home = str(Path(itune.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))}
    # on CPU: the accelerators are taken by this process, and float32 is to mean float32
    environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "XLA_FLAGS": ""}
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "found.json"
        command = [sys.executable, str(script), str(folder), "--json", str(out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode == 0:
            found: dict[str, Any] = json.loads(out.read_text())
            return found
    said = (done.stderr.strip() or done.stdout.strip() or "(it said nothing)").splitlines()
    raise RunError(f"{folder}: {name} does not agree (exit code {done.returncode}): " + "\n  ".join(said[-12:]))


def script_of(name: str) -> Path:
    """The script of a check: in an installed package beside it, in a checkout in scripts/."""
    for home in (Path(itune.__file__).parent, Path(itune.__file__).parents[1]):
        script = home / "scripts" / f"check_with_{name}.py"
        if script.is_file():
            return script
    raise InputError(f"--check={name}: scripts/check_with_{name}.py is neither in the package nor beside it")
