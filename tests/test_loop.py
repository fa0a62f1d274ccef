"""The loop: trains, judges, saves; resumed equals uninterrupted, bitwise; every fault of the input has one message."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from load_script import load_script

from itune.checkpoint import Store
from itune.checkpoint.manifest import write_manifest
from itune.cli import main
from itune.config import Config, from_dict
from itune.feed import feed
from itune.loop import Result, train
from itune.saved_run import evaluate_saved, load_run
from itune.step import init_state
from itune.types import InputError, RunError
from itune.writers import read_metrics

pytestmark = [pytest.mark.filterwarnings("ignore:Sharding info not provided"), pytest.mark.usefixtures("own_cache")]
STEPS = 12
TIMINGS = {"tokens_per_second", "mfu", "memory"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model folder of two layers, 64 wide, and a file of 100 conversations."""
    folder = tmp_path_factory.mktemp("inputs")
    maker = load_script("scripts/make_random_model.py")
    maker.choose_shape = lambda *given: (64, 2)
    maker.make("llama", 1_000_000, folder / "model", vocab=320)
    draw = random.Random(0)
    with (folder / "rows.jsonl").open("w") as rows:
        for number in range(100):
            last = draw.randint(2, 9)
            answer = " ".join(map(str, range(last)))
            rows.write(json.dumps({"task": f"t{number % 10}", "messages": [
                {"role": "user", "content": f"Count to {last}, {number}"}, {"role": "assistant", "content": answer},
            ]}) + "\n")
    return folder


def settings(inputs, **changes) -> Config:
    tree = {
        "model": {"path": str(inputs / "model")},
        "data": {"train": str(inputs / "rows.jsonl"), "max_length": 96, "held_out_share": 0.1, "held_out_by": "task"},
        "train": {"batch_size": 8, "max_steps": STEPS},
        "optimizer": {"learning_rate": 4e-3, "warmup": 2},
        "checkpoint": {"every": 4, "keep": 3},
        "eval": {"every": 6, "batch_size": 8},
        "log": {"every": 1},
    }
    for dotted, value in changes.items():
        section, _, key = dotted.partition("__")
        if key:
            tree[section] = {**tree.get(section, {}), key: value}
        else:
            tree[section] = value
    return from_dict(tree)


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory) -> Result:
    """The run that nothing interrupts."""
    return train(settings(inputs), tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole.workdir, tmp_path / "copy"))


def arrays(workdir, step=STEPS):
    """Every array of a checkpoint as it was saved."""
    from orbax.checkpoint import v1 as ocp

    return jax.tree_util.tree_leaves_with_path(ocp.load(Store(workdir / "checkpoints").path(step) / "arrays"))


def assert_same_run(a, b):
    """Same parameters, optimizer state and rng; same logs and evaluations but for timings and memory."""
    for (path, x), (_, y) in zip(arrays(a), arrays(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path
    logs = [[{k: v for k, v in record.items() if k not in TIMINGS} for record in read_metrics(folder / "metrics.jsonl")]
            for folder in (a, b)]
    assert logs[0] == logs[1]
    assert [record["step"] for record in logs[0]] == list(range(1, STEPS + 1))
    for step in (0, 6, 12):
        for name in ("summary.json", "heldout_loss.jsonl"):
            assert (a / "eval" / str(step) / name).read_bytes() == (b / "eval" / str(step) / name).read_bytes()


def stop_at(step, number=signal.SIGTERM):
    def on_step(done, metrics):
        if done == step:
            os.kill(os.getpid(), number)

    return on_step


def test_run_learns_and_leaves_a_complete_directory(whole):
    summary = whole.summary
    assert (whole.step, whole.total_steps, whole.preempted) == (STEPS, STEPS, False)
    assert summary["after"]["heldout_loss"]["loss"] < summary["before"]["heldout_loss"]["loss"] - 1
    assert whole.metrics["loss"] < read_metrics(whole.workdir / "metrics.jsonl")[0]["loss"] - 1
    keys = {"step", "loss", "grad_norm", "learning_rate", "supervised_tokens", "tokens_per_second", "mfu", "memory"}
    assert keys <= set(read_metrics(whole.workdir / "metrics.jsonl")[0])
    assert whole.metrics["mfu"] is None and whole.metrics["memory"] > 1e8 and whole.metrics["tokens_per_second"] > 0
    assert json.loads((whole.workdir / "config.json").read_text())["train"]["max_steps"] == STEPS
    environment = json.loads((whole.workdir / "environment.json").read_text())
    assert environment["devices"] == 8 and environment["versions"]["jax"] == jax.__version__
    assert json.loads((whole.workdir / "data" / "report.json").read_text())["kept"] == 70
    assert "<svg" in (whole.workdir / "report.html").read_text()
    assert list((whole.workdir / "tensorboard").iterdir())
    assert Store(whole.workdir / "checkpoints").steps() == [4, 8, 12]
    seconds = summary["seconds"]
    assert 0 < seconds["compile"] < seconds["first_step"] < seconds["total"]
    assert seconds["first_step_of_process"] > seconds["first_step"]


def test_preempted_and_resumed_equals_uninterrupted(inputs, whole, tmp_path, capsys):
    stopped = train(settings(inputs), tmp_path / "run", on_step=stop_at(5))
    assert stopped.preempted and 5 <= stopped.step <= 7
    assert "stopped by SIGTERM" in capsys.readouterr().out
    assert Store(tmp_path / "run" / "checkpoints").latest() == stopped.step
    resumed = train(settings(inputs), tmp_path / "run")
    assert f"resumed from the checkpoint of step {stopped.step} of {STEPS}" in capsys.readouterr().out
    assert not resumed.preempted
    assert_same_run(whole.workdir, resumed.workdir)
    assert resumed.metrics["loss"] == whole.metrics["loss"]


def test_damaged_checkpoint_is_passed_over_and_the_end_is_the_same(inputs, whole, copy, capsys):
    files = [path for path in (copy / "checkpoints" / "12").rglob("*") if path.is_file()]
    victim = max(files, key=lambda path: path.stat().st_size)
    damaged = bytearray(victim.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    victim.write_bytes(damaged)
    train(settings(inputs), copy)
    out = capsys.readouterr().out
    assert f"checkpoint of step 12 is damaged and is passed over: {victim} is damaged" in out
    assert "resumed from the checkpoint of step 8 of 12" in out
    assert (copy / "checkpoints" / "damaged-12").is_dir()
    assert_same_run(whole.workdir, copy)


def test_failure_leaves_a_record_and_the_run_goes_on(inputs, whole, tmp_path):
    def fail(step, metrics):
        if step == 10:
            raise ValueError("planted hf_aaaaaaaaaaaaaaaaaaaa")

    with pytest.raises(RunError, match=r"failed after step 11: ValueError: planted .*details: .*crash\.json"):
        train(settings(inputs), tmp_path / "run", on_step=fail)
    crash = json.loads((tmp_path / "run" / "crash.json").read_text())
    assert crash["step"] == 11 and crash["last_checkpoint"] == 8 and "planted [hidden]" in crash["error"]
    assert crash["config"]["train"]["max_steps"] == STEPS and crash["environment"]["versions"]["jax"]
    assert len(crash["devices"]) == 8 and crash["process"] == 0
    assert list(crash["examples"]) == ["11", "12"] and re.search(r"rows\.jsonl:\d+$", crash["examples"]["12"][0])
    events = [json.loads(line) for line in (tmp_path / "run" / "logs" / "process-0.jsonl").read_text().splitlines()]
    assert all({"time", "process", "step", "event"} <= set(event) for event in events)
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, 10))
    assert events[0]["event"] == "start" and events[-1]["event"] == "failed" and events[-1]["step"] == 11
    assert crash["last_events"] == events[-50:]
    train(settings(inputs), tmp_path / "run")
    assert not (tmp_path / "run" / "crash.json").exists()
    assert_same_run(whole.workdir, tmp_path / "run")


def test_clock_set_back_a_day_in_mid_run_changes_nothing(inputs, whole, tmp_path, monkeypatch):
    """Nor does a umask that lets nobody else read; and while it runs it listens nowhere."""
    now, sockets = time.time, []

    def on_step(step, metrics):
        if step == 5:
            monkeypatch.setattr(time, "time", lambda: now() - 86400)
            sockets.append(subprocess.run(["ss", "-ltnp"], capture_output=True, text=True, check=True).stdout)

    before = os.umask(0o077)
    try:
        train(settings(inputs), tmp_path / "run", on_step=on_step)
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
        train(settings(inputs), tmp_path / "run")
    finally:
        os.umask(before)
    assert_same_run(whole.workdir, tmp_path / "run")
    assert f"pid={os.getpid()}," not in sockets[0]
    files = [path for path in [tmp_path / "run", *(tmp_path / "run").rglob("*")] if path.stat().st_mode & 0o077]
    assert not files


def test_saves_by_time(inputs, tmp_path, monkeypatch):
    """A minute passes during step 5, by a clock of ours: one save soon after, none before."""
    clock = [0.0]
    monkeypatch.setattr("itune.loop.time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr("itune.progress.time", SimpleNamespace(monotonic=time.monotonic))

    def on_step(step, metrics):
        clock[0] += 61 if step == 5 else 0

    config = settings(inputs, checkpoint={"every": 0, "minutes": 1.0, "keep": 9}, evaluators=())
    train(config, tmp_path / "run", on_step=on_step)
    first, last = Store(tmp_path / "run" / "checkpoints").steps()
    assert 5 <= first <= 7 and last == STEPS


def test_spike_window_survives_a_resume(inputs, tmp_path, capsys):
    """So low a bound that some steps of this run are spikes: the run that was stopped in mid-window skips the same."""
    config = settings(inputs, train__skip_spikes=0.8, train__spike_window=4, train__max_steps=STEPS, eval__every=0,
                      train__batch_size=8, optimizer__learning_rate=1e-5)
    whole = train(config, tmp_path / "whole")
    skipped = [record["skipped"] for record in read_metrics(tmp_path / "whole" / "metrics.jsonl")]
    assert 1 <= skipped[-1] <= 8 and skipped[6] < skipped[-1]  # some after the resume
    assert "a spike (train.skip_spikes); the update was skipped. Its batch holds" in capsys.readouterr().out
    assert train(config, tmp_path / "run", on_step=stop_at(5)).preempted
    resumed = train(config, tmp_path / "run")
    for (path, x), (_, y) in zip(arrays(whole.workdir), arrays(resumed.workdir), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path
    assert [record["skipped"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == skipped
    with pytest.raises(InputError, match=r"train\.skip_spikes: 0\.8 there, 0\.0 here"):
        train(settings(inputs), tmp_path / "run")


def test_resume_on_another_mesh_is_allowed_and_close(inputs, whole, copy, capsys):
    for name in ("12", "8"):
        shutil.rmtree(copy / "checkpoints" / name)
    train(settings(inputs, mesh={"data": 2, "fsdp": 2, "tensor": 2}), copy)
    out = capsys.readouterr().out
    assert "resumed with a change: mesh.tensor: 1 there, 2 here (results change by rounding)" in out
    assert "resumed on another mesh, fsdp=8 -> data=2 x fsdp=2 x tensor=2" in out
    losses = [[record["loss"] for record in read_metrics(folder / "metrics.jsonl")] for folder in (whole.workdir, copy)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_checkpoints_that_a_killed_run_left_over_go_with_the_next_start(inputs, copy):
    """Killed between the commit and the retention of its last checkpoint, the run was finished: one too many stayed."""
    kept = copy / "checkpoints"
    write_manifest(Path(shutil.copytree(kept / "4", kept / "3")), step=3)
    assert train(settings(inputs), copy).step == STEPS
    assert sorted(int(path.name) for path in kept.iterdir()) == [4, 8, 12]


def test_finished_run_stays_and_can_be_extended(inputs, whole, copy, capsys):
    before = (copy / "metrics.jsonl").read_text()
    again = train(settings(inputs), copy)
    assert "is finished with 12 steps; to go on, raise train.epochs or train.max_steps" in capsys.readouterr().out
    assert again.summary == whole.summary
    assert again.step == STEPS and (copy / "metrics.jsonl").read_text() == before and again.metrics["loss"]
    for name, text in (("summary.json", None), ("summary.json", '{"step'), ("report.html", None),
                       ("summary.json", json.dumps({**whole.summary, "step": 4, "preempted": True}))):  # fmt: skip
        (copy / name).write_text(text) if text else (copy / name).unlink()  # killed after its last checkpoint
        train(settings(inputs), copy)
        written = json.loads((copy / "summary.json").read_text())
        assert written["step"] == STEPS and not written["preempted"] and (copy / "report.html").is_file()
        assert (written["after"], written["metrics"]) == (whole.summary["after"], whole.summary["metrics"])
    longer = train(settings(inputs, train__max_steps=14), copy)
    assert "extended from 12 to 14 steps" in capsys.readouterr().out
    assert longer.step == 14
    assert [record["step"] for record in read_metrics(copy / "metrics.jsonl")] == list(range(1, 15))


def test_another_config_or_other_data_is_refused_field_by_field(inputs, copy, tmp_path):
    with pytest.raises(InputError, match=r"workdir of a different config:\n  optimizer\.learning_rate: 0\.004 there"):
        train(settings(inputs, optimizer__learning_rate=0.01), copy)
    with pytest.raises(InputError, match=r"train\.max_steps: 12 there, 6 here \(may only grow\)"):
        train(settings(inputs, train__max_steps=6), copy)
    rows = (inputs / "rows.jsonl").read_text()
    (tmp_path / "moved.jsonl").write_text(rows)
    moved = {"train": str(tmp_path / "moved.jsonl"), "max_length": 96, "held_out_share": 0.1, "held_out_by": "task"}
    assert train(settings(inputs, data=moved), copy).step == STEPS  # the same content elsewhere
    (tmp_path / "moved.jsonl").write_text(rows.replace("Count to 2,", "Count up to 2,"))
    with pytest.raises(InputError, match=r"data\.train: .*rows\.jsonl' there, .*moved\.jsonl' here"):
        train(settings(inputs, data=moved), copy)


def test_start_from_the_parameters_of_another_run(inputs, whole, tmp_path):
    result = train(settings(inputs, train__init_from=str(whole.workdir)), tmp_path / "run", on_step=stop_at(1))
    before, after = result.summary["before"]["heldout_loss"], whole.summary["after"]["heldout_loss"]
    assert before == after
    with pytest.raises(InputError, match=r"train\.init_from: .*nowhere has no checkpoint"):
        train(settings(inputs, train__init_from=str(tmp_path / "nowhere")), tmp_path / "other")


def test_loss_that_is_not_finite_ends_the_run_and_is_never_saved(inputs, tmp_path, monkeypatch):
    def poisoned(*given, **more):
        state = init_state(*given, **more)
        return state.replace(trainable=jax.tree.map(lambda x: x * np.nan, state.trainable))

    monkeypatch.setattr("itune.weights.init_state", poisoned)
    message = r"step 1: loss nan, .* not finite; .*skipped \(1 in a row\)\. Its batch holds \d+ examples: .*jsonl:\d+"
    with pytest.raises(RunError, match=message + ".*; there is no checkpoint"):
        train(settings(inputs, evaluators=(), train__max_skipped=1), tmp_path / "run")
    with pytest.raises(RunError, match="step 1: parameters or optimizer state are not finite; they are not saved"):
        train(settings(inputs, evaluators=(), checkpoint__every=1), tmp_path / "run")
    store = Store(tmp_path / "run" / "checkpoints")
    assert store.steps() == []


def poison(monkeypatch, *steps):
    """The batches of these steps (counted from 1) get one endless weight, in one row: on one shard of 8."""
    def poisoned(batches, mesh, **rows):
        def told():
            for step, batch in batches:
                if step + 1 in steps:
                    weights_BL = batch.loss_weights_BL.copy()
                    weights_BL[3, np.flatnonzero(weights_BL[3])[:1]] = np.inf
                    batch = batch._replace(loss_weights_BL=weights_BL)
                yield step, batch

        return feed(told(), mesh, **rows)

    monkeypatch.setattr("itune.loop.feed", poisoned)


def test_three_bad_updates_in_a_row_end_the_run_with_the_last_checkpoint_kept(inputs, whole, tmp_path, monkeypatch):
    """One or two are skipped and counted, and the run goes on; the examples of each are named."""
    poison(monkeypatch, 2, 3, 6, 7, 8)
    message = r"step 8: loss nan, .*\(3 in a row\)\. Its batch holds .*jsonl:\d+.*; the checkpoint of step 4 is kept"
    with pytest.raises(RunError, match=message):
        train(settings(inputs, evaluators=(), checkpoint={"every": 4, "keep": 3}), tmp_path / "run")
    skipped = [record["skipped"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert skipped == [0, 1, 2, 2, 2, 3, 4]
    events = [json.loads(line) for line in (tmp_path / "run" / "logs" / "process-0.jsonl").read_text().splitlines()]
    told = [event["text"] for event in events if "not finite" in event.get("text", "") and event["event"] == "log"]
    assert [text.split(":")[0] for text in told] == ["step 2", "step 3", "step 6", "step 7"]
    poison(monkeypatch)
    assert train(settings(inputs, evaluators=()), tmp_path / "run").summary["metrics"]["skipped"] == 2  # from step 4 on


def test_saved_run_is_judged_and_loaded_again(inputs, whole, tmp_path, capsys):
    results = evaluate_saved(settings(inputs), workdir=str(whole.workdir), out=str(tmp_path / "out"))
    assert results["heldout_loss"] == whole.summary["after"]["heldout_loss"]
    assert "heldout_loss/loss" in capsys.readouterr().out and (tmp_path / "out" / "heldout_loss.jsonl").is_file()
    base = evaluate_saved(settings(inputs), model_folder=str(inputs / "model"), out=str(tmp_path / "base"))
    assert base["heldout_loss"]["loss"] == pytest.approx(whole.summary["before"]["heldout_loss"]["loss"], rel=1e-6)
    assert load_run(whole.workdir, step=4).step == 4
    with pytest.raises(InputError, match="no checkpoint of step 5; steps here: 4, 8, 12"):
        load_run(whole.workdir, step=5)


def test_preempted_command_leaves_with_143(whole, tmp_path, monkeypatch):
    import itune.loop

    def train_and_stop(config, workdir):
        return train(config, workdir, on_step=stop_at(1, signal.SIGINT))

    monkeypatch.setattr(itune.loop, "train", train_and_stop)
    assert main(["train", "--config", str(whole.workdir / "config.json"), "--workdir", str(tmp_path / "run")]) == 143
    assert 1 <= Store(tmp_path / "run" / "checkpoints").latest() <= 3


def test_early_stop_is_told_and_kept(inputs, whole, tmp_path, capsys):
    """A run that no longer improves ends with all saved; the same command finds it finished, more patience goes on."""
    stopping = {"eval__every": 2, "eval__batch_size": 8, "eval__patience": 1, "eval__min_delta": 100.0}
    result = train(settings(inputs, **stopping), tmp_path / "run")
    assert (result.step, result.total_steps, result.preempted) == (2, STEPS, False)
    assert result.summary["stopped_early"].startswith("heldout_loss/loss has not improved for 1 evaluations")
    assert "finished early, at step 2 of 12" in capsys.readouterr().out
    assert Store(tmp_path / "run" / "checkpoints").latest() == 2
    again = train(settings(inputs, **stopping), tmp_path / "run")
    assert (again.step, again.preempted) == (2, False)
    assert "is finished with 2 steps; to go on, change it: heldout_loss/loss has not" in capsys.readouterr().out
    further = train(settings(inputs), tmp_path / "run")
    assert further.step == STEPS and further.summary["stopped_early"] == ""
    assert_same_run(further.workdir, whole.workdir)
