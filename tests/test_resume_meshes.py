"""A run that goes on on other devices or processes reads the same batches and loses what it would have lost."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from tiny_run import command, devices, job, make_inputs, run_plans

from itune.checkpoint import Store
from itune.writers import read_metrics

STEPS, LEG = 20, 4
CHAIN = (8, 4, 2, 1, 8)  # devices of the legs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("meshes")
    make_inputs(made)
    return made


def plan(folder, name, environment, batches=None):
    arguments = command(
        folder, folder / name, "--config.train.batch_size=8", f"--config.train.max_steps={STEPS}",
        "--config.optimizer.learning_rate=1e-4", f"--config.checkpoint.every={LEG}", "--config.evaluators=()")
    return {"arguments": arguments, "log": str(folder / f"{name}.log"), "environment": environment,
            "batches": str(batches or folder / f"{name}.batches")}


def chain(folder, name):
    """A leg a number of devices; SIGKILL as soon as its checkpoint is committed, but for the last."""
    return [plan(folder, name, {**devices(count), "ITUNE_MARK_KILL": f"committed:{LEG * (leg + 1)}" if leg < 4 else ""})
            for leg, count in enumerate(CHAIN)]


@pytest.fixture(scope="module")
def whole(folder):
    assert run_plans(folder, "whole", [plan(folder, "whole", devices(8))]) == [0], (folder / "whole.log").read_text()
    return folder / "whole"


def rows_of_steps(path):
    """{step: hashes of its rows}; what a later leg reads again must be what an earlier one read."""
    found = {}
    for line in path.read_text().splitlines():
        step, rows = json.loads(line)
        assert found.setdefault(step, rows) == rows
    return found


def losses(workdir):
    records = read_metrics(workdir / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    return np.asarray([[record["loss"], record["grad_norm"]] for record in records])


def arrays(workdir):
    from orbax.checkpoint import v1 as ocp

    state = ocp.load(Store(workdir / "checkpoints").path(STEPS) / "arrays")
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def test_eight_four_two_one_eight_devices_twice(folder, whole):
    for name in ("once", "again"):
        codes = run_plans(folder, name, chain(folder, name))
        log = (folder / f"{name}.log").read_text()
        assert codes == [-9] * 4 + [0], log[-2000:]
        for there, here in (("fsdp=8", "fsdp=4"), ("fsdp=4", "fsdp=2"), ("fsdp=2", "one device"),
                            ("one device", "fsdp=8")):
            assert f"resumed on another mesh, {there} -> {here}" in log
    expected = rows_of_steps(folder / "whole.batches")
    assert sorted(expected) == list(range(STEPS))
    assert rows_of_steps(folder / "once.batches") == rows_of_steps(folder / "again.batches") == expected
    np.testing.assert_allclose(losses(folder / "once"), losses(whole), rtol=1e-6)
    assert losses(folder / "once").tolist() == losses(folder / "again").tolist()
    assert arrays(folder / "once") == arrays(folder / "again")  # the same path twice: bit by bit


def test_one_process_then_two_then_one(folder, whole):
    """SIGTERM to one of the two stops both at one step; every row of a batch is read by one of them, in order."""
    job_files = [folder / f"job-{index}.batches" for index in range(2)]
    jobs = [{**devices(2), **variables} for variables in job(2)]
    jobs[1]["ITUNE_MARK_KILL"] = "step:7:SIGTERM"
    codes = run_plans(folder, "hosts", [
        plan(folder, "hosts", {**devices(2), "ITUNE_MARK_KILL": f"committed:{LEG}"}),
        [plan(folder, "hosts", variables, file) for variables, file in zip(jobs, job_files)],
        plan(folder, "hosts", devices(2)),
    ])
    log = (folder / "hosts.log").read_text()
    assert codes == [-9, [143, 143], 0], log[-3000:]
    expected = rows_of_steps(folder / "whole.batches")
    halves = [rows_of_steps(file) for file in job_files]
    assert {4, 5, 6, 7} <= set(halves[0]) & set(halves[1])
    for step in set(halves[0]) & set(halves[1]):
        assert halves[0][step] + halves[1][step] == expected[step]
    assert rows_of_steps(folder / "hosts.batches") == expected
    np.testing.assert_allclose(losses(folder / "hosts"), losses(whole), rtol=1e-6)
