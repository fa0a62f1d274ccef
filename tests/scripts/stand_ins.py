"""Stand-ins of gcloud, srun and what they start: calls recorded, faults injected."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GCLOUD = r"""#!/usr/bin/env bash
# states.txt: one line a look at the queued resource, LOGIN for no answer, HANG where it waits; fail.txt: words of a
# call that fails
cd "$STAND_IN" || exit 1
printf '%s\n' "$*" | head -n 1 >> calls.txt
if [ -s fail.txt ] && [[ "$*" == *$(cat fail.txt)* ]]; then echo "ERROR: injected" >&2; exit 1; fi
case "$*" in
  *queued-resources\ describe*)
    now=$(head -n 1 states.txt)
    case $now in
      LOGIN) printf 'ERROR: (gcloud) Your default credentials were not found.\n- log in\n' >&2 ;;
      ABSENT) echo "ERROR: (gcloud) NOT_FOUND: Resource 'projects/p/queuedResources/tune' was not found" >&2 ;;
      EMPTY) ;;
      HANG) sleep 60 ;;
      *) echo "WARNING: a new gcloud is there" >&2; echo "$now" ;;
    esac
    [ "$(wc -l < states.txt)" -gt 1 ] && sed -i 1d states.txt
    case $now in LOGIN|ABSENT) exit 1 ;; esac ;;
  *tpu-vm\ describe*) echo 10.0.0.1 ;;
  *queued-resources\ delete*) rm -rf home; mkdir home ;;
  *tpu-vm\ ssh*)
    cd home
    for word in "$@"; do
      case $word in --command=*) HOME=$PWD bash -c "${word#--command=}"; exit $? ;; esac
    done ;;
  *tpu-vm\ scp*) for word in "$@"; do case $word in /*.tar.gz) cp "$word" home/ ;; esac; done ;;
esac
exit 0
"""
# -c: is it new enough? -m venv DIR: an environment whose Python says what it was asked and does nothing
PYTHON = r"""#!/bin/sh
echo "$(basename "$0") $*" >> pythons.txt
case "$*" in
  -c*) exit "${TOO_OLD:-0}" ;;
  *venv*)
    for folder in "$@"; do :; done
    mkdir -p "$folder/bin"
    printf '#!/bin/sh\necho "$@" > pip.txt\n' > "$folder/bin/python"
    chmod +x "$folder/bin/python" ;;
esac
"""
PYTHONS = ("python3", "python3.11", "python3.12", "python3.13")
GCSFUSE = '#!/bin/sh\necho "$@" > gcsfuse.txt\n'
SCONTROL = """#!/bin/sh
echo "scontrol $*" >> "$STAND_IN/calls.txt"
[ "$1" = show ] && printf "node7\\nnode8\\n" || true
"""
SRUN = '#!/bin/sh\nshift\nSLURM_PROCID=1 exec "$@"\n'


def install(folder: Path, **programs: str) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


@pytest.fixture
def stand_in(tmp_path):
    """A PATH with the stand-in; `run(*arguments, states=, fail=, interrupt=)` calls the script."""
    (tmp_path / "home").mkdir()
    (tmp_path / "calls.txt").touch()
    install(tmp_path / "bin", gcloud=GCLOUD, gcsfuse=GCSFUSE, **dict.fromkeys(PYTHONS, PYTHON))

    def run(*arguments, states="ACTIVE", fail="", script="tpu_vm.sh", cwd=ROOT, interrupt="", **variables):
        (tmp_path / "states.txt").write_text("\n".join(states.split()) + "\n")
        (tmp_path / "fail.txt").write_text(fail)
        environment = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "STAND_IN": str(tmp_path),
            "HOME": str(tmp_path / "home"), "USER": "user", "TPU_NAME": "tune", "TPU_ZONE": "us-west4-a",
            "TPU_TYPE": "v5litepod-16", **variables,
        }  # fmt: skip
        default = ["env", "--default-signal=INT"] if interrupt else []  # pytest may be one that runs in the background
        process = subprocess.Popen(
            [*default, "bash", str(ROOT / "scripts" / script), *arguments], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=cwd, start_new_session=True,
        )  # fmt: skip
        if interrupt:  # Ctrl-C, once such a call was made
            while not any(interrupt in call for call in run.calls()) and process.poll() is None:
                subprocess.run(["sleep", "0.05"], check=True)
            subprocess.run(["sleep", "0.3"], check=True)
            os.killpg(process.pid, signal.SIGINT)
        try:
            stdout, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    run.calls = lambda: (tmp_path / "calls.txt").read_text().splitlines()
    run.home = tmp_path / "home"
    return run
