"""A second run in a directory is refused; the lock of a dead one is no obstacle."""

import json
import os
import subprocess
import sys

import pytest

from itune.runtime.lock import RunLock
from itune.types import InputError, RunError


def test_second_run_is_refused_naming_the_first(tmp_path):
    message = rf"in use by another run \(host .*, process {os.getpid()}, started"
    with RunLock(tmp_path), pytest.raises(RunError, match=message):
        RunLock(tmp_path).__enter__()
    with RunLock(tmp_path):
        pass


def test_a_folder_that_takes_no_file_is_named():
    with pytest.raises(InputError, match=r"--workdir /proc/self: cannot be written: "):
        RunLock("/proc/self").__enter__()


def test_lock_of_a_killed_process_is_stale(tmp_path):
    code = (f"from itune.runtime.lock import RunLock; import os, signal; lock = RunLock({str(tmp_path)!r}); "
            "lock.__enter__(); os.kill(os.getpid(), signal.SIGKILL)")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] != os.getpid()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
