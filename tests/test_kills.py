"""SIGKILL at marked phases of a run: it goes on to bitwise the same end, and every restart gets further."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

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
    spec = importlib.util.spec_from_file_location(
        "maker", Path(__file__).parents[1] / "scripts" / "make_random_model.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    maker.choose_shape = lambda *given: (32, 1)
    maker.make("llama", 1_000_000, folder / "model", vocab=320)
    with (folder / "rows.jsonl").open("w") as rows:
        for number in range(120):
            messages = [{"role": "user", "content": f"Say {number}"}, {"role": "assistant", "content": str(number)}]
            rows.write(json.dumps({"messages": messages}) + "\n")
    return lambda name, points: run_plans(folder, name, points)


def run_plans(folder, name, points):
    """(workdir, exit codes, marks of each run): one run for each point that kills it, and one that nothing kills."""
    arguments = [
        "train", "--config", "default", "--workdir", str(folder / name), f"--config.model.path={folder / 'model'}",
        f"--config.data.train={folder / 'rows.jsonl'}", "--config.data.max_length=48",
        "--config.data.held_out_share=0.1", "--config.train.batch_size=4", f"--config.train.max_steps={STEPS}",
        "--config.optimizer.learning_rate=1e-3", f"--config.checkpoint.every={EVERY}", f"--config.eval.every={JUDGED}",
        "--config.log.every=1", "--config.log.tensorboard=False",
    ]
    plans = [
        {"arguments": arguments, "log": str(folder / f"{name}.log"),
         "environment": {"ITUNE_MARK": str(folder / f"{name}-{index}.marks"), "ITUNE_MARK_KILL": point}}
        for index, point in enumerate([*points, ""])
    ]
    (folder / f"{name}.json").write_text(json.dumps(plans))
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run([sys.executable, Path(__file__).with_name("killed_runs.py"), folder / f"{name}.json"],
                          env=environment, capture_output=True, text=True, check=True)
    marks = [(folder / f"{name}-{index}.marks").read_text().split("\n") for index in range(len(plans))]
    return folder / name, json.loads(done.stdout), marks


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
    assert files[0] == files[1] and len(files[0]) == 2 * (STEPS // JUDGED + 1)
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in files[0])


def check(campaign, points):
    whole, codes, _ = campaign("whole", [])
    assert codes == [0], whole.with_suffix(".log").read_text()[-2000:]
    killed, codes, marks = campaign("killed", points)
    log = killed.with_suffix(".log").read_text()
    assert codes == [-9] * len(points) + [0], log[-2000:]
    committed = 0
    for point, seen in zip(points, marks):
        assert point.replace(":", " ") in seen[-4:]  # killed there; another thread may have said one more thing
        committed = max([committed, *(int(line.split()[1]) for line in seen if line.startswith("committed"))])
        step = int(point.split(":")[1])
        assert committed >= step // EVERY * EVERY - EVERY, (point, committed)  # at most one save was lost with it
    starts = [int(line.split("step ")[1].split()[0]) for line in log.splitlines() if line.startswith("resumed from")]
    assert starts == sorted(starts) and len(starts) >= len(points) - 2
    assert sorted(path.name for path in (killed / "checkpoints").iterdir()) == [str(STEPS - EVERY), str(STEPS)]
    assert_same_run(whole, killed)


def test_ten_kills_lose_nothing(campaign):
    assert sum(point.split(":")[0] in IN_SAVE for point in TEN) >= 5
    check(campaign, TEN)


@pytest.mark.soak
def test_fifty_kills_lose_nothing(campaign):
    points = fifty()
    assert len(set(points)) == 50 and sum(point.split(":")[0] in IN_SAVE for point in points) >= 15
    check(campaign, points)
