"""scripts/slurm.sh against stand-ins of srun and scontrol."""

from __future__ import annotations

import pytest
from stand_ins import SCONTROL, SRUN, install

SLURM = {"SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "script": "slurm.sh"}


def test_slurm_gives_each_node_its_number_and_queues_again_when_preempted(stand_in, tmp_path):
    install(tmp_path / "bin", scontrol=SCONTROL, srun=SRUN)
    done = stand_in("bash", "-c", "env | grep ITUNE_; exit 143", **SLURM)
    assert sorted(done.stdout.splitlines()[:3]) == [
        "ITUNE_COORDINATOR=node7:20123", "ITUNE_NUM_PROCESSES=2", "ITUNE_PROCESS_ID=1",
    ]  # fmt: skip
    assert done.returncode == 143 and stand_in.calls()[-1] == "scontrol requeue 123"
    assert stand_in("-c", "true", **SLURM).returncode == 127  # a command's word, no option of exec


@pytest.mark.parametrize("missing", ["SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_NNODES"])
def test_slurm_script_outside_slurm_is_one_message(stand_in, tmp_path, missing):
    install(tmp_path / "bin", scontrol=SCONTROL, srun=SRUN)
    done = stand_in("true", **{name: value for name, value in SLURM.items() if name != missing})
    assert (done.returncode, done.stderr) == (
        2, f"slurm.sh: {missing} is not set: not under SLURM; start it with sbatch\n",
    )  # fmt: skip


@pytest.mark.parametrize("scontrol", ["#!/bin/sh\n", "#!/bin/sh\necho no controller >&2\nexit 1\n", None])
def test_slurm_without_a_coordinator_starts_nothing(stand_in, tmp_path, scontrol):
    install(tmp_path / "bin", srun=SRUN, **({"scontrol": scontrol} if scontrol else {}))
    done = stand_in("echo", "started", **SLURM)
    assert done.returncode == 2 and "'scontrol show hostnames node[7-8]' names no node" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""


@pytest.mark.parametrize("command", [[], [""]])
def test_slurm_without_a_command_is_one_message(stand_in, command):
    done = stand_in(*command, **SLURM)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "give the command" in done.stderr
