"""scripts/tpu_vm.sh and slurm.sh against stand-ins of gcloud and srun: calls recorded, faults injected, and what would
run on a worker run for real in a home of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GCLOUD = r"""#!/usr/bin/env bash
# states.txt: one line a look at the queued resource; fail.txt: a word of a call that fails
cd "$STAND_IN" || exit 1
printf '%s\n' "$*" | head -n 1 >> calls.txt
if [ -s fail.txt ] && [[ "$*" == *$(cat fail.txt)* ]]; then echo "ERROR: injected" >&2; exit 1; fi
case "$*" in
  *queued-resources\ describe*)
    head -n 1 states.txt
    [ "$(wc -l < states.txt)" -gt 1 ] && sed -i 1d states.txt ;;
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
# python3 -m venv DIR: an environment whose Python says what it was asked and does nothing
PYTHON = r"""#!/bin/sh
mkdir -p "$3/bin"
printf '#!/bin/sh\necho "$@" > pip.txt\n' > "$3/bin/python"
chmod +x "$3/bin/python"
"""
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
    """A PATH with the stand-in; `run(*arguments, states=, fail=)` calls the script."""
    (tmp_path / "home").mkdir()
    (tmp_path / "calls.txt").touch()
    install(tmp_path / "bin", gcloud=GCLOUD, python3=PYTHON, gcsfuse=GCSFUSE)

    def run(*arguments, states="ACTIVE", fail="", script="tpu_vm.sh", cwd=ROOT, **variables):
        (tmp_path / "states.txt").write_text("\n".join(states.split()) + "\n")
        (tmp_path / "fail.txt").write_text(fail)
        environment = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "STAND_IN": str(tmp_path),
            "HOME": str(tmp_path / "home"), "USER": "user", "TPU_NAME": "tune", "TPU_ZONE": "us-west4-a",
            "TPU_TYPE": "v5litepod-16", **variables,
        }  # fmt: skip
        return subprocess.run(
            ["bash", str(ROOT / "scripts" / script), *arguments], capture_output=True, text=True, env=environment,
            cwd=cwd, timeout=60,
        )

    run.calls = lambda: (tmp_path / "calls.txt").read_text().splitlines()
    run.home = tmp_path / "home"
    return run


def test_create_waits_until_the_tpu_is_there(stand_in):
    done = stand_in("create", "--spot", "--poll", "0", states="WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    assert done.returncode == 0, done.stderr
    assert "tune is WAITING_FOR_RESOURCES" in done.stdout and "it costs money until" in done.stdout
    create = stand_in.calls()[0]
    assert "queued-resources create tune --node-id tune --accelerator-type v5litepod-16" in create
    assert "--runtime-version v2-alpha-tpuv5-lite --spot --zone us-west4-a" in create


def test_no_quota_is_said(stand_in):
    done = stand_in("create", "--poll", "0", states="WAITING_FOR_RESOURCES FAILED")
    assert done.returncode == 1 and "tune is FAILED: no TPU came" in done.stderr


def test_setup_copies_the_checkout_to_every_worker(stand_in, tmp_path):
    checkout = tmp_path / "checkout"
    (checkout / ".git").mkdir(parents=True)
    (checkout / "pyproject.toml").write_text("[project]\n")
    done = stand_in("setup", "--bucket", "gs://b", cwd=checkout)
    assert done.returncode == 0, done.stderr
    assert "/home/user/itune[tpu]" in (stand_in.home / "pip.txt").read_text()
    assert "--implicit-dirs" in (stand_in.home / "gcsfuse.txt").read_text()
    assert (stand_in.home / "itune" / "pyproject.toml").read_text() == "[project]\n"
    assert not (stand_in.home / "itune" / ".git").exists()
    assert any("tpu-vm scp" in call and "--worker=all" in call for call in stand_in.calls())


def test_one_worker_down_is_named(stand_in):
    done = stand_in("setup", "--revision", "HEAD", fail="tpu-vm ssh")
    assert done.returncode == 1 and "tune, worker all: the command failed" in done.stderr


def _wait_for(file: Path):
    for _ in range(200):
        if file.exists():
            return file.read_text().strip()
        subprocess.run(["sleep", "0.05"], check=True)
    raise AssertionError(f"{file} did not come")


def test_run_starts_the_command_detached_with_its_words_whole(stand_in):
    assert stand_in("run", "--", "printf", "<%s>", "a b", "it's").returncode == 0
    assert _wait_for(stand_in.home / "job.rc") == "0"
    assert (stand_in.home / "job.log").read_text().splitlines()[-1] == "<a b><it's>"
    assert stand_in("status").stdout == "TPU: ACTIVE\ncommand: 0\n"


def test_stop_lets_the_command_save_and_its_code_be_read(stand_in):
    command = "trap 'echo saved; exit 143' TERM; echo here; while :; do sleep 0.05; done"
    assert stand_in("run", "--", "bash", "-c", command).returncode == 0
    while "here" not in (stand_in.home / "job.log").read_text():
        subprocess.run(["sleep", "0.05"], check=True)
    assert stand_in("run", "--", "true").returncode == 1  # one at a time
    assert "asked to save and leave" in stand_in("stop").stdout
    assert _wait_for(stand_in.home / "job.rc") == "143"
    assert "saved" in (stand_in.home / "job.log").read_text()
    assert "command: stopped" in stand_in("status").stdout


def test_watch_begins_again_after_a_preemption(stand_in, tmp_path):
    # the first time the command never ends and the TPU is taken; a new one has an empty disk, the bucket has the rest
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    kept, finished = bucket / "checkpoint", bucket / "done"
    command = f"if [ -f {kept} ]; then echo resumed > {finished}; else touch {kept}; sleep 30; fi"
    done = stand_in(
        *("run", "--watch", "--spot", "--poll", "0.3", "--revision", "HEAD", "--", "bash", "-c", command),
        states="ACTIVE ACTIVE SUSPENDED ACTIVE",
    )
    assert done.returncode == 0, done.stderr
    assert "tune was taken back (SUSPENDED" in done.stdout and "the command is done" in done.stdout
    assert finished.read_text() == "resumed\n"
    words = [next((w for w in ("delete", "create", "scp") if f" {w} " in call), "") for call in stand_in.calls()]
    assert [word for word in words if word] == ["delete", "create", "scp"]


def test_watch_gives_up_on_a_failed_command_and_shows_its_end(stand_in):
    done = stand_in("run", "--watch", "--poll", "0.2", "--", "bash", "-c", "echo 'data.train is empty' >&2; exit 2")
    assert done.returncode == 1
    assert "ended with code 2" in done.stderr and "data.train is empty" in done.stderr


def test_several_slices_know_each_other(stand_in):
    done = stand_in("run", "--slices", "2", "--dry-run", "--", "env")
    first, second = [line for line in done.stdout.splitlines() if "tpu-vm ssh" in line]
    assert "tune-0" in first and "MEGASCALE_NUM_SLICES=2 MEGASCALE_SLICE_ID=0" in first
    assert "tune-1" in second and "MEGASCALE_SLICE_ID=1" in second
    assert "MEGASCALE_COORDINATOR_ADDRESS" in second


@pytest.mark.parametrize("verb", ["create", "setup", "run", "logs", "status", "fetch", "stop", "delete"])
def test_a_dry_run_prints_and_does_nothing(stand_in, verb):
    done = stand_in(verb, "--dry-run", "--bucket", "gs://b", "--from", "gs://b/x", "--", "itune", "train")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("+ ") and stand_in.calls() == []


@pytest.mark.parametrize("arguments", [["--help"], ["create", "--help"], ["run", "-h"]])
def test_help_comes_with_and_without_a_verb(stand_in, arguments):
    done = stand_in(*arguments)
    assert done.returncode == 0 and "--dry-run" in done.stdout and stand_in.calls() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["launch"], "unknown verb 'launch'; expected create"),
        (["create", "--size", "4"], "unknown option '--size'"),
        (["create", "--type", "v9-4"], "--type 'v9-4': its runtime version is not known; give --version"),
        (["create", "--name", "My TPU"], "--name 'My TPU': expected lower-case"),
        (["run"], "give the command after --"),
        (["create", "--bucket", "b"], "expected gs://NAME"),
    ],
)
def test_bad_usage_is_one_line(stand_in, arguments, message):
    done = stand_in(*arguments)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_slurm_gives_each_node_its_number_and_queues_again_when_preempted(stand_in, tmp_path):
    install(tmp_path / "bin", scontrol=SCONTROL, srun=SRUN)
    job = {"SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "script": "slurm.sh"}
    done = stand_in("bash", "-c", "env | grep ITUNE_; exit 143", **job)
    assert sorted(done.stdout.splitlines()[:3]) == [
        "ITUNE_COORDINATOR=node7:20123", "ITUNE_NUM_PROCESSES=2", "ITUNE_PROCESS_ID=1",
    ]  # fmt: skip
    assert done.returncode == 143 and stand_in.calls()[-1] == "scontrol requeue 123"
    assert stand_in("true", script="slurm.sh").returncode == 2  # not under SLURM


def test_shellcheck_finds_nothing():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    done = subprocess.run(["shellcheck", *map(str, (ROOT / "scripts").glob("*.sh"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
