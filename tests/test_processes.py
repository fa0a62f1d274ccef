"""One job over one, two and four processes on loopback: the same devices, the same numbers (contract 3).

Trains, is killed between two saves, goes on, is judged and exported; what each number of processes gives is compared
with one process that was never killed. Smaller, in the default run: `test_resume_meshes.py` goes from one to two and
back; `test_decode.py`, `test_feed.py` and `runtime/test_distributed.py` ask for what several processes need.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_run import command, devices, job, make_inputs, run_plans

from itune.export import export_run
from itune.writers import read_metrics

STEPS, EVERY = 20, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("processes")
    make_inputs(made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # far more is compiled here than computed
        yield made


def start(folder, name, arguments, processes, total=4, **variables):
    """A plan of `killed_runs.py`: these words to each of the processes, which share `total` devices."""
    own = [{}] if processes == 1 else job(processes)
    return [{"arguments": arguments, "log": str(folder / f"{name}-{index}.log"),
             "environment": {**devices(total // processes), **one, **variables}} for index, one in enumerate(own)]


def train(folder, name, *more, steps=STEPS):
    return command(
        folder, folder / name, "--config.train.batch_size=8", f"--config.train.max_steps={steps}",
        "--config.optimizer.learning_rate=1e-4", f"--config.checkpoint.every={EVERY}", "--config.eval.max_new_tokens=8",
        "--config.eval.batch_size=8", "--config.evaluators=('heldout_loss', 'generation')", *more)  # fmt: skip


def export(folder, name, out):
    return ["export", "--workdir", str(folder / name), "--out", str(folder / out)]


def log_of(folder, name):
    return "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob(f"{name}-*.log")))


def killed_and_resumed(folder, processes):
    """Every process is killed as the third save begins, when the second is committed; then it goes on, and exports."""
    name = f"of-{processes}"
    codes = run_plans(folder, name, [
        start(folder, name, train(folder, name), processes, ITUNE_MARK_KILL=f"save-begin:{3 * EVERY}"),
        start(folder, name, train(folder, name), processes),
        start(folder, name, export(folder, name, f"{name}-alone"), 1),
        *([start(folder, name, export(folder, name, f"{name}-together"), processes)] if processes > 1 else []),
    ])
    assert codes == [[-9] * processes, [0] * processes, [0], [0] * processes][: len(codes)], log_of(folder, name)
    return folder / name


@pytest.fixture(scope="module")
def whole(folder):
    """One process, never killed."""
    codes = run_plans(folder, "whole", [
        start(folder, "whole", train(folder, "whole"), 1),
        start(folder, "whole", export(folder, "whole", "whole-out"), 1),
    ])
    assert codes == [[0], [0]], log_of(folder, "whole")
    return folder / "whole"


def numbers(workdir, steps):
    """(loss, gradient norm) of every step, each once and in order."""
    records = read_metrics(workdir / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    return np.asarray([[record["loss"], record["grad_norm"]] for record in records])


def judged(workdir, step):
    """(held-out loss of every item, answers)."""
    found = workdir / "eval" / str(step)
    items, answers = ([json.loads(line) for line in (found / f"{name}.jsonl").read_text().splitlines()]
                      for name in ("heldout_loss", "generation"))  # fmt: skip
    assert items and answers
    return [item["loss"] for item in items], [item["answer"] for item in answers]


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_same_run(found, expected, steps=STEPS):
    np.testing.assert_allclose(numbers(found, steps), numbers(expected, steps), rtol=1e-6)
    for step in (0, steps):
        (losses, answers), (losses_expected, answers_expected) = judged(found, step), judged(expected, step)
        np.testing.assert_allclose(losses, losses_expected, rtol=1e-6)
        assert answers == answers_expected
    kept = sorted(range(EVERY, steps + 1, EVERY))[-2:]
    assert sorted(int(path.name) for path in (found / "checkpoints").iterdir()) == kept


def assert_same_export(found, expected, bound=1e-5):
    these, those = tensors(found), tensors(expected)
    assert these.keys() == those.keys() and these
    for name, tensor in those.items():
        assert tensor.dtype == these[name].dtype == np.float32
        assert np.linalg.norm(these[name] - tensor) <= bound * np.linalg.norm(tensor), name


def assert_one_speaks(folder, name, processes):
    others = [line for index in range(1, processes)
              for line in (folder / f"{name}-{index}.log").read_text().splitlines()]  # fmt: skip
    assert not [line for line in others if not line.startswith("[Gloo]")]


@pytest.mark.soak
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_killed_resumed_judged_and_exported_as_one_process_that_was_not(folder, whole, processes):
    workdir = killed_and_resumed(folder, processes)
    assert_same_run(workdir, whole)
    assert_same_export(folder / f"of-{processes}-alone", folder / "whole-out")
    if processes > 1:
        assert_same_export(folder / f"of-{processes}-together", folder / f"of-{processes}-alone", bound=0)
        assert_one_speaks(folder, f"of-{processes}", processes)


@pytest.mark.soak
def test_two_processes_that_share_every_matrix_train_judge_and_export_as_one(folder):
    """The tensor axis crosses processes: both hold the same rows. One save, no kill: the campaign has them."""
    quick = ("--config.eval.max_new_tokens=3", "--config.eval.batch_size=16")
    sharing, steps = ("--config.mesh.fsdp=1", "--config.mesh.tensor=2", *quick), EVERY
    traced = "--config.profile.steps=3:4"
    codes = run_plans(folder, "sharing", [
        start(folder, "sharing-1", train(folder, "sharing-1", *sharing, steps=steps), 1, 2),
        start(folder, "sharing-2", train(folder, "sharing-2", *sharing, traced, steps=steps), 2, 2),
        start(folder, "sharing-2", export(folder, "sharing-2", "sharing-2-out"), 2, 2),
    ])
    assert codes == [[0], [0, 0], [0, 0]], log_of(folder, "sharing-2")
    assert_same_run(folder / "sharing-2", folder / "sharing-1", steps)
    export_run(folder / "sharing-1", folder / "sharing-1-out")
    assert_same_export(folder / "sharing-2-out", folder / "sharing-1-out")
    assert_one_speaks(folder, "sharing-2", 2)
    profile = folder / "sharing-2" / "profile"
    session = profile / "plugins" / "profile" / "steps-3-4"
    assert sorted(path.name for path in session.glob("*.pb")) == ["process-0.xplane.pb", "process-1.xplane.pb"]
    for name in ("summary.json", "summary-1.json"):
        assert json.loads((profile / name).read_text())["communication"] > 0


CROSSING = [
    (2, 2, {"context": 2}),
    (2, 4, {"dcn_fsdp": 2, "data": 2}),  # the rows of a process do not lie side by side
    (4, 4, {"fsdp": 2, "tensor": 2}),
    (2, 4, {"tensor": 4}),
    (4, 4, {"fsdp": 2, "context": 2}),
]


@pytest.mark.soak
@pytest.mark.parametrize(("processes", "total", "mesh"), CROSSING)
def test_a_mesh_axis_that_crosses_processes(folder, processes, total, mesh):
    """Processes that hold the same rows, or parts of them, read what they need."""
    name = f"{processes}x" + "-".join(f"{axis}{size}" for axis, size in mesh.items())
    shape = [f"--config.mesh.{axis}={size}" for axis, size in {"fsdp": 1, **mesh}.items()]
    plans = [start(folder, f"{name}-{count}", train(folder, f"{name}-{count}", *shape), count, total)
             for count in (1, processes)]  # fmt: skip
    assert run_plans(folder, name, plans) == [[0], [0] * processes], log_of(folder, name)
    assert_same_run(folder / f"{name}-{processes}", folder / f"{name}-1")
