"""A real full disk, a real read-only folder, a real limit on file sizes, while a checkpoint is being written.

The disks are tmpfs mounts in a namespace of their own (`unshare -rm`), gone when the process ends.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from tiny_run import HERE, command, devices, environment, make_inputs

FILL = "dd if=/dev/zero of={0}/filler bs=64k 2>/dev/null; true"
READ_ONLY = "mount --bind {0} {0} && mount -o remount,ro,bind {0}"
SMALL = "mkdir -p {0} && mount -t tmpfs -o size={1} none {0}"


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Five runs in one namespace: (folder, exit code by name, what stands in each `checkpoints` afterwards).

    full, readonly, quota: the checkpoint of step 8 meets it. whole: the disk of the whole run directory is full at
    step 8; `more` is the same command once there is room. small: no room for one checkpoint.
    """
    tried = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, text=True,
                           check=False)
    if tried.returncode:  # without leave to mount there is nothing to test; the reason is shown
        pytest.skip(f"unshare -rm may not mount a tmpfs here: {tried.stderr.strip()}")
    folder = tmp_path_factory.mktemp("disk")
    make_inputs(folder)

    def plan(name, at, log=None):
        words = command(folder, folder / name, "--config.train.batch_size=4", "--config.train.max_steps=16",
                        "--config.checkpoint.every=4", "--config.evaluators=()")
        return {"arguments": words, "environment": devices(1), "log": f"{folder}/{log or name}.log", "at": at}

    def disk(name, size="40m", inside="/checkpoints"):
        return SMALL.format(f"{folder}/{name}{inside}", size)

    def fails(name, action):
        """What happens when the save of step 8 begins."""
        return plan(name, {"save-begin:8": action})

    whole = f"{folder}/whole"
    plans = {
        "full": fails("full", FILL.format(f"{folder}/full/checkpoints")),
        "readonly": fails("readonly", READ_ONLY.format(f"{folder}/readonly/checkpoints")),
        "quota": fails("quota", 100_000),
        "small": plan("small", {}),
        "whole": fails("whole", FILL.format(whole)),
        "more": plan("whole", {"start": f"ls -A {whole}/checkpoints > {folder}/whole.kept; rm {whole}/filler"}, "more"),
    }
    for name in ("full", "readonly", "quota", "more"):
        run = f"{folder}/{'whole' if name == 'more' else name}"
        plans[f"list {name}"] = {"arguments": ["checkpoints", run, "--json", f"{folder}/{name}.list"],
                                 "environment": {}, "log": f"{folder}/list.log"}
    config = ["--config", f"{whole}/config.json"]
    for name, words in {
        "eval": ["eval", *config, "--workdir", whole, "--config.evaluators=('heldout_loss',)",
                 "--config.data.held_out_share=0.1"],
        "data-report": ["data", "report", *config], "report": ["report", whole],
    }.items():
        plans[name] = {"arguments": [*words, "--out", f"{folder}/none/{name}"], "environment": devices(1),
                       "log": f"{folder}/{name}.log"}
    (folder / "plans.json").write_text(json.dumps(list(plans.values())))
    script = " && ".join([
        disk("full"), disk("readonly"), disk("small", "1m"), disk("whole", inside=""),
        disk("none", "4k", inside=""),
        f"{sys.executable} {HERE / 'killed_runs.py'} {folder}/plans.json",
        *(f"echo $(ls -A {folder}/{name}/checkpoints)" for name in ("full", "readonly", "quota", "small", "whole")),
        f"echo $(find {folder}/none -type f)"])
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False,
                          env={**environment(folder), "TMPDIR": str(folder)})
    assert done.returncode == 0, done.stderr[-3000:]
    codes, *listed = done.stdout.splitlines()
    names = dict(zip(("full", "readonly", "quota", "small", "whole"), (line.split() for line in listed)))
    assert listed[-1] == ""
    return folder, dict(zip(plans, json.loads(codes))), names


def told(folder, name):
    """The one line that ends a failed run; no traceback through our code stands before it."""
    log = (folder / f"{name}.log").read_text()
    lines = [line for line in log.splitlines() if line.startswith("itune: ")]
    assert len(lines) == 1 and not re.search(r'File "[^"]*/itune/[a-z_/]+[.]py"', log), log[-3000:]
    return lines[0]


@pytest.mark.parametrize(("name", "reason"), [
    ("full", "No space left"), ("readonly", "Read-only file system"), ("quota", "File too large")])
def test_disk_that_fails_during_a_save(outcome, name, reason):
    """Exit code 1, told long before the end, the last good checkpoint kept and whole, no litter."""
    folder, codes, names = outcome
    line = told(folder, name)
    assert codes[name] == 1 and codes[f"list {name}"] == 0
    assert "checkpoint of step 8 could not be saved" in line and reason in line
    assert "the checkpoint of step 4 is kept" in line and f"details: {folder}/{name}/crash.json" in line
    assert set(names[name]) - {"filler"} == {"4"}
    assert [(row["step"], row["damage"]) for row in json.loads((folder / f"{name}.list").read_text())] == [(4, [])]
    crash = json.loads((folder / name / "crash.json").read_text())
    assert crash["last_checkpoint"] == 4 and 8 <= crash["step"] <= 12


def test_whole_run_directory_full_and_then_room_again(outcome):
    """Not even the record can be written there: it goes to the temporary folder. With room the run goes on."""
    folder, codes, names = outcome
    line = told(folder, "whole")
    assert codes["whole"] == 1 and "No space left" in line and f"details: {folder}/itune-crash-" in line
    assert (folder / "whole.kept").read_text().split() == ["4"]
    assert codes["more"] == 0 and "resumed from the checkpoint of step 4 of 16" in (folder / "more.log").read_text()
    assert sorted(names["whole"]) == ["12", "16"] and codes["list more"] == 0


@pytest.mark.parametrize("verb", ["eval", "data-report", "report"])
def test_the_other_verbs_on_a_full_disk(outcome, verb):
    folder, codes, _ = outcome
    assert codes[verb] == 1
    assert re.fullmatch(rf"itune: cannot write {folder}/none/{verb}\S*: No space left on device; free .*",
                        told(folder, verb))


def test_disk_too_small_is_said_before_the_first_step(outcome):
    folder, codes, names = outcome
    assert codes["small"] == 1 and "out of disk: a checkpoint needs 0.02 GB" in told(folder, "small")
    assert "step 1/16" not in (folder / "small.log").read_text() and names["small"] == []
