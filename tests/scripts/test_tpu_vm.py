"""scripts/tpu_vm.sh against a stand-in of gcloud: calls recorded, faults injected, and what would run on a worker run
for real in a home of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from stand_ins import PYTHONS, ROOT


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


def test_a_failed_request_is_the_end(stand_in):
    done = stand_in("create", fail="queued-resources create")
    assert done.returncode == 1 and done.stderr == "ERROR: injected\n" and len(stand_in.calls()) == 1


def test_create_waits_through_looks_without_an_answer(stand_in):
    done = stand_in("create", "--poll", "0", states="LOGIN ACTIVE")
    assert done.returncode == 0 and "no answer about tune: ERROR: (gcloud) Your default cred" in done.stderr
    assert stand_in("create", "--poll", "0", states="ABSENT").returncode == 1


def test_setup_copies_the_checkout_to_every_worker(stand_in, tmp_path):
    checkout = tmp_path / "checkout"
    (checkout / ".git").mkdir(parents=True)
    (checkout / "pyproject.toml").write_text("[project]\n")
    (checkout / "scripts").mkdir()
    script = shutil.copy(ROOT / "scripts" / "tpu_vm.sh", checkout / "scripts")
    done = stand_in("setup", "--bucket", "gs://my-bucket", script=script, cwd=tmp_path)  # from any folder
    assert done.returncode == 0, done.stderr
    assert f"{stand_in.home}/itune[tpu,gcs]" in (stand_in.home / "pip.txt").read_text()
    assert "--implicit-dirs" in (stand_in.home / "gcsfuse.txt").read_text()
    assert (stand_in.home / "itune" / "pyproject.toml").read_text() == "[project]\n"
    assert not (stand_in.home / "itune" / ".git").exists()
    assert any("tpu-vm scp" in call and "--worker=all" in call for call in stand_in.calls())


def test_setup_finds_the_checkout_through_a_symlink(stand_in, tmp_path):
    for link in (tmp_path / "one", tmp_path / "two"):
        link.symlink_to(tmp_path / "one" if link.name == "two" else ROOT / "scripts" / "tpu_vm.sh")
    done = stand_in("setup", "--dry-run", script=tmp_path / "two", cwd=tmp_path)
    assert f" -C {ROOT} " in done.stdout, done.stderr


@pytest.mark.parametrize("verb", [["setup"], ["setup", "--revision", "HEAD"], ["run", "--watch", "--", "true"]])
def test_a_folder_that_is_no_checkout_is_not_copied(stand_in, tmp_path, verb):
    script = shutil.copy(ROOT / "scripts" / "tpu_vm.sh", tmp_path / "bin")
    done = stand_in(*verb, script=script)
    message = f"tpu_vm: {tmp_path} is no checkout of itune: it has no pyproject.toml\n"
    assert (done.returncode, done.stderr, stand_in.calls()) == (2, message, [])


def test_the_slash_of_a_bucket_is_left_out(stand_in):
    assert stand_in("setup", "--revision", "HEAD", TPU_BUCKET="gs://my-bucket/").returncode == 0
    assert (stand_in.home / "gcsfuse.txt").read_text().split()[-2:] == ["my-bucket", f"{stand_in.home}/bucket"]


@pytest.mark.parametrize("bucket", ["b", "gs://", "gs://b;rm -rf x", "gs://my-bucket/sub", "gs://b\nls", "s3://bucket"])
@pytest.mark.parametrize("verb", [["setup"], ["run", "--watch", "--", "true"]])
def test_no_bucket_is_one_message(stand_in, verb, bucket):
    done = stand_in(*verb, TPU_BUCKET=bucket)
    message = f"tpu_vm: --bucket (or TPU_BUCKET) '{bucket}': expected gs://NAME, without a folder\n"
    assert (done.returncode, done.stderr, stand_in.calls()) == (2, message, [])


@pytest.mark.parametrize("verb", ["create", "logs", "status", "stop", "delete"])
def test_a_verb_that_needs_no_bucket_does_not_look_at_it(stand_in, verb):
    assert "bucket" not in stand_in(verb, TPU_BUCKET="gs://b;rm -rf x").stderr and stand_in.calls()


@pytest.mark.parametrize("old", [False, True], ids=["new", "3.10"])
def test_setup_brings_a_python_where_the_image_has_an_old_one(stand_in, old):
    assert stand_in("setup", "--revision", "HEAD", TOO_OLD=str(int(old))).returncode == 0
    assert stand_in("setup", "--revision", "HEAD", TOO_OLD=str(int(old))).returncode == 0  # takes what is there
    asked = (stand_in.home / "pythons.txt").read_text().splitlines()
    wanted = "python3 -m uv venv -q --clear --seed --python 3.12" if old else "python3 -m venv"
    assert asked[-1].startswith(wanted)
    assert [line.split()[0] for line in asked if " -c " in line] == [*PYTHONS[:1], *PYTHONS[:0:-1]][: 4 if old else 1]


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


@pytest.mark.parametrize(
    ("states", "fail", "code", "said"),
    [
        ("ACTIVE", "tpu-vm ssh", 1, "TPU: ACTIVE\ncommand: worker 0 does not answer\n"),
        ("LOGIN", "", 1, "TPU: UNKNOWN\ncommand: never\n"),
        ("CREATING", "tpu-vm ssh", 0, "TPU: CREATING\ncommand: worker 0 does not answer\n"),
        ("ACTIVE", "", 0, "TPU: ACTIVE\ncommand: never\n"),
    ],
)
def test_status_says_what_it_could_not_find_out(stand_in, states, fail, code, said):
    done = stand_in("status", states=states, fail=fail)
    assert (done.returncode, done.stdout) == (code, said)


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
    assert "does not run (TPU: SUSPENDED" in done.stdout and "the command is done" in done.stdout
    assert finished.read_text() == "resumed\n"
    words = [next((w for w in ("delete", "create", "scp") if f" {w} " in call), "") for call in stand_in.calls()]
    assert [word for word in words if word] == ["delete", "create", "scp"]


def test_watch_leaves_a_tpu_alone_that_it_hears_nothing_of(stand_in):
    done = stand_in("run", "--watch", "--poll", "0.2", "--", "sleep", "1", states="ACTIVE LOGIN EMPTY CREATING ACTIVE")
    assert done.returncode == 0, done.stderr
    assert "no answer about tune" in done.stderr and "the command is done" in done.stdout
    assert not any(" delete " in call or " create " in call for call in stand_in.calls())


SAME = "--name tune --zone us-west4-a --project p"
STAYS = f"tune stays requested and may begin to cost money; end it with: scripts/tpu_vm.sh delete {SAME}\n"
GOES_ON = "what runs on tune goes on; "
GOES_ON += f"see it with: scripts/tpu_vm.sh logs {SAME}; stop it with: scripts/tpu_vm.sh stop {SAME}\n"


@pytest.mark.parametrize(
    ("verb", "states", "message"),
    [
        ("create", "WAITING_FOR_RESOURCES", STAYS),
        ("create", "HANG", STAYS),
        ("run", "ACTIVE", GOES_ON),
        ("run", "HANG", GOES_ON),
        ("run", "SUSPENDED WAITING_FOR_RESOURCES", STAYS),
    ],
)
def test_ctrl_c_says_what_it_leaves_behind(stand_in, verb, states, message):
    interrupt = "queued-resources create" if "WAIT" in states else "queued-resources describe"
    command = () if verb == "create" else ("--watch", "--", "sleep", "1")
    done = stand_in(verb, "--poll", "30", "--project", "p", *command, states=states, interrupt=interrupt)
    assert (done.returncode, done.stderr) == (130, f"tpu_vm: interrupted: {message}")


def test_watch_asks_again_where_no_tpu_came_after_a_preemption(stand_in):
    done = stand_in(
        *("run", "--watch", "--poll", "0.2", "--tries", "3", "--revision", "HEAD", "--"),
        *("bash", "-c", "[ -d ~/venv ] || sleep 30"), states="ACTIVE ABSENT FAILED SUSPENDED ACTIVE",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tune is FAILED: no TPU came" in done.stderr and "the next attempt in 0.2 s" in done.stderr
    assert sum(" create " in call for call in stand_in.calls()) == 2


def test_watch_mounts_the_bucket_again_on_a_worker_that_was_restarted(stand_in):
    """Its job.pid names a process that is gone; what runs on other workers ends before all begin again."""
    command = "if [ -f second ]; then exit 0; fi; touch second; echo $$ > $HOME/left; sleep 30 & kill -9 $PPID; wait"
    done = stand_in("run", "--watch", "--poll", "0.3", "--bucket", "gs://my-bucket", "--", "bash", "-c", command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "command: lost" in done.stdout and "the command is done" in done.stdout
    assert (stand_in.home / "gcsfuse.txt").exists()
    left = int((stand_in.home / "left").read_text())
    assert not Path(f"/proc/{left}").exists() or "Z" in Path(f"/proc/{left}/stat").read_text().split()[2]


@pytest.mark.parametrize(("type_", "message"), [("", "--type (or TPU_TYPE) is missing"), ("v9-4", "give --version")])
def test_watch_asks_at_once_for_what_a_preemption_will_need(stand_in, type_, message):
    done = stand_in("run", "--watch", "--", "true", TPU_TYPE=type_)
    assert done.returncode == 2 and message in done.stderr and stand_in.calls() == []


def test_watch_gives_up_after_so_many_tries(stand_in):
    done = stand_in("run", "--watch", "--poll", "0", "--tries", "2", "--", "sleep", "3", states="FAILED")
    assert done.returncode == 1 and "2 attempts, and it does not run; giving up" in done.stderr
    assert sum(" create " in call for call in stand_in.calls()) == 2


def test_watch_gives_up_on_a_failed_command_and_shows_its_end(stand_in):
    done = stand_in("run", "--watch", "--poll", "0.2", "--", "bash", "-c", "echo 'data.train is empty' >&2; exit 2")
    assert done.returncode == 1
    assert "ended with code 2" in done.stderr and "data.train is empty" in done.stderr


def test_several_slices_know_each_other(stand_in):
    done = stand_in("run", "--slices", "2", "--dry-run", "--", "env")
    first, second = done.stdout.split("+ gcloud compute tpus tpu-vm ssh ")[1:]
    assert done.stdout.startswith("+ gcloud compute tpus tpu-vm describe tune-0 ")
    assert "tune-0" in first and "MEGASCALE_NUM_SLICES=2 MEGASCALE_SLICE_ID=0" in first
    assert "tune-1" in second and "MEGASCALE_SLICE_ID=1" in second
    assert "MEGASCALE_COORDINATOR_ADDRESS" in second


@pytest.mark.parametrize("verb", ["create", "setup", "run", "logs", "status", "fetch", "stop", "delete"])
def test_a_dry_run_prints_and_does_nothing(stand_in, verb):
    done = stand_in(verb, "--dry-run", "--bucket", "gs://my-bucket", "--from", "gs://b/x", "--", "itune", "train")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("+ ") and stand_in.calls() == []


def test_the_dry_run_in_the_docs_is_what_the_script_prints(stand_in):
    """docs/launch.md: every command of a 16-chip job; a line that begins with $ is what was typed."""
    page = (ROOT / "docs" / "launch.md").read_text()
    block = page.split("## The dry run of a 16-chip job")[1].split("```\n")[1]
    said = ""
    for line in (line for line in block.splitlines() if line.startswith("$ ")):
        done = stand_in(*line.split()[2:], TPU_BUCKET="gs://my-bucket")
        assert done.returncode == 0, done.stderr
        said += f"{line}\n{done.stdout}"
    assert said.replace(str(ROOT), "CHECKOUT") == block


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
        (["setup", "--bucket", "b"], "expected gs://NAME"),
        *[
            (["run", "--watch", option, value, "--", "true"], f"'{value}': expected a {kind}")
            for option, kind, values in (
                ("--poll", "number of seconds", ("abc", "-1", "")),
                ("--tries", "whole number", ("abc", "-1", "1.5", "08", "9" * 20)),
                ("--slices", "number from 1", ("abc", "0", "9" * 9)),
                ("--worker", "number, such as 0, or all", ("abc", "-1")),
            )
            for value in values
        ],
        (["fetch", "--from", "s3://b/x"], "--from 's3://b/x': expected a folder on worker 0, or gs://..."),
        (["fetch", "--from", "gs://"], "--from 'gs://': expected a folder on worker 0, or gs://..."),
    ],
)
def test_bad_usage_is_one_line(stand_in, arguments, message):
    done = stand_in(*arguments)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert stand_in.calls() == []


def test_a_number_in_the_environment_is_looked_at_too(stand_in):
    done = stand_in("run", "--", "true", TPU_SLICES="abc")
    assert done.returncode == 2 and "--slices (or TPU_SLICES) 'abc': expected a number" in done.stderr


def test_shellcheck_finds_nothing():
    scripts = [*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"]
    done = subprocess.run([Path(sys.executable).parent / "shellcheck", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
