"""SIGKILL at marked phases of a run: it goes on to bitwise the same end, and every restart gets further."""

from __future__ import annotations

import random
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny_run import command, devices, environment, make_inputs, run_plans

from itune.checkpoint import Store
from itune.writers import read_metrics

STEPS, EVERY, JUDGED = 200, 10, 50
TIMINGS = {"tokens_per_second", "mfu", "memory"}
# in the order in which one step meets them
PHASES = ("step", "logged", "save-begin", "arrays-written", "before-commit", "committed", "retained")
IN_SAVE = set(PHASES[2:])
TEN = ["step:3", "save-begin:10", "arrays-written:30", "before-commit:50", "evaluated:50", "committed:80",
       "retained:110", "logged:137", "before-commit:160", "save-begin:200"]


def fifty():
    """Fifty points in the order of a run; one is never planned where an earlier one made it impossible."""
    draw, points = random.Random(0), []
    for step in range(EVERY, STEPS + 1, EVERY):
        points += [(step, phase) for phase in ("save-begin", "arrays-written", "before-commit")]
        points.append((step, draw.choice(("committed", "retained"))))
        points += [(step - draw.randint(1, EVERY - 1), "step"), (step, draw.choice(("step", "logged")))]
    chosen = sorted(draw.sample(points, 50), key=lambda point: (point[0], PHASES.index(point[1])))
    return [f"{phase}:{step}" for step, phase in chosen]


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """Runs plans in one process of their own; the data and programs that they compute are kept between them."""
    folder = tmp_path_factory.mktemp("kills")
    make_inputs(folder)
    return lambda name, points: run_killed(folder, name, points)


def run_killed(folder, name, points):
    """(workdir, exit codes, marks of each run): one run for each point that kills it, and one that nothing kills."""
    arguments = command(
        folder, folder / name, "--config.train.batch_size=4", f"--config.train.max_steps={STEPS}",
        "--config.optimizer.learning_rate=1e-3", f"--config.checkpoint.every={EVERY}", f"--config.eval.every={JUDGED}",
    )
    plans = [
        {"arguments": arguments, "log": str(folder / f"{name}.log"),
         "environment": {**devices(2), "ITUNE_MARK": str(folder / f"{name}-{index}.marks"), "ITUNE_MARK_KILL": point}}
        for index, point in enumerate([*points, ""])
    ]
    codes = run_plans(folder, name, plans)
    files = [folder / f"{name}-{index}.marks" for index in range(len(plans))]
    # a run that was killed in its very last phase leaves nothing for the next one to do
    marks = [file.read_text().split("\n") if file.exists() else [] for file in files]
    return folder / name, codes, marks


def arrays(workdir):
    from orbax.checkpoint import v1 as ocp

    return jax.tree_util.tree_leaves_with_path(ocp.load(Store(workdir / "checkpoints").path(STEPS) / "arrays"))


def assert_same_run(a, b):
    for (path, x), (_, y) in zip(arrays(a), arrays(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path
    logs = [[{k: v for k, v in record.items() if k not in TIMINGS} for record in read_metrics(folder / "metrics.jsonl")]
            for folder in (a, b)]
    assert logs[0] == logs[1] and [record["step"] for record in logs[0]] == list(range(1, STEPS + 1))
    files = [sorted(p.relative_to(folder) for p in (folder / "eval").rglob("*") if p.is_file()) for folder in (a, b)]
    assert files[0] == files[1] and len(files[0]) == 3 * (STEPS // JUDGED) + 2  # the first has no base yet
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in files[0])


def check(campaign, points):
    whole, codes, _ = campaign("whole", [])
    assert codes == [0], whole.with_suffix(".log").read_text()[-2000:]
    killed, codes, marks = campaign(f"killed-{len(points)}", points)
    log = killed.with_suffix(".log").read_text()
    assert codes == [-9] * len(points) + [0], log[-2000:]
    committed = goes_on = 0
    for point, seen in zip(points, marks):
        assert point.replace(":", " ") in seen[-4:]  # killed there; another thread may have said one more thing
        goes_on += committed > 0  # there was something to go on from
        committed = max([committed, *(int(line.split()[1]) for line in seen if line.startswith("committed"))])
        phase, step = point.split(":")[0], int(point.split(":")[1])
        begun = (step if phase in IN_SAVE else step - 1) // EVERY * EVERY  # the newest save that had begun
        assert committed >= begun - EVERY, (point, committed)  # it had waited for the one before: at most one is lost
    starts = [int(line.split("step ")[1].split()[0]) for line in log.splitlines() if line.startswith("resumed from")]
    assert starts == sorted(starts) and len(starts) >= goes_on
    assert sorted(path.name for path in (killed / "checkpoints").iterdir()) == [str(STEPS - EVERY), str(STEPS)]
    assert_same_run(whole, killed)


def test_ten_kills_lose_nothing(campaign):
    assert sum(point.split(":")[0] in IN_SAVE for point in TEN) >= 5
    check(campaign, TEN)


def test_supervisor_restarts_from_the_last_checkpoint(tmp_path):
    """SIGKILL as soon as step 4 is committed: one line, one restart, the end is reached, exit code 0."""
    make_inputs(tmp_path)
    words = command(tmp_path, tmp_path / "run", "--config.train.batch_size=4", "--config.train.max_steps=6",
                    "--config.checkpoint.every=4", "--config.evaluators=()", "--restart-on-failure", "1")
    done = subprocess.run(
        [sys.executable, "-m", "itune", *words], capture_output=True, text=True, check=False,
        env={**environment(tmp_path), **devices(1), "ITUNE_MARK_KILL": "committed:4"})
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line for line in done.stderr.splitlines() if line.startswith("itune: ")]
    assert len(said) == 2 and "ended by SIGKILL; last finished step: " in said[0], said
    assert "restart 1 of at most 1 without a new step" in said[1]
    assert "resumed from the checkpoint of step 4 of 6" in done.stdout
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 7))


def test_second_signal_leaves_at_once_though_a_save_hangs(tmp_path):
    """The first SIGTERM at step 7; the save that it brings does not end, and a second comes. Step 4 is still there."""
    make_inputs(tmp_path)
    words = command(tmp_path, tmp_path / "run", "--config.train.batch_size=4", "--config.train.max_steps=40",
                    "--config.checkpoint.every=4", "--config.evaluators=()")
    hang = "sleep 1.2; kill -TERM $PPID; sleep 20"  # a second later: a launcher and a supervisor are one request
    plan = {"arguments": words, "log": str(tmp_path / "log"), "at": {"save-begin:8": hang},
            "environment": {**devices(1), "ITUNE_MARK_KILL": "step:7:SIGTERM"}}
    assert run_plans(tmp_path, "second", [plan]) == [1]
    assert "itune: second SIGTERM: leaving at once" in (tmp_path / "log").read_text()
    assert Store(tmp_path / "run" / "checkpoints").newest_good() == 4


@pytest.mark.soak
def test_fifty_kills_lose_nothing(campaign):
    points = fifty()
    assert len(set(points)) == 50 and sum(point.split(":")[0] in IN_SAVE for point in points) >= 15
    check(campaign, points)
