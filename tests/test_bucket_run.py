"""Runs whose workdir, data and model are in a bucket: killed inside uploads, on new machines, they end the same."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest
from s3_server import s3_server
from tiny_run import command, devices, make_inputs, run_plans

from itune.checkpoint import Store
from itune.checkpoint.view import open_view
from itune.cli import main
from itune.storage.bucket import Bucket
from itune.writers import read_metrics

STEPS = 8
TIMINGS = {"tokens_per_second", "mfu", "memory"}
SETTINGS = ("--config.train.batch_size=8", f"--config.train.max_steps={STEPS}", "--config.optimizer.learning_rate=1e-3",
            "--config.checkpoint.every=2", "--config.eval.every=4")


def arrays(folder):
    from orbax.checkpoint import v1 as ocp

    return jax.tree_util.tree_leaves_with_path(ocp.load(Store(folder / "checkpoints").path(STEPS) / "arrays"))


def assert_same_run(a, b, states=True):
    """Parameters, optimizer state, rng, evaluations bitwise; logs but for timings and memory."""
    for (path, x), (_, y) in zip(arrays(a), arrays(b), strict=True) if states else ():
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path
    logs = [[{k: v for k, v in record.items() if k not in TIMINGS} for record in read_metrics(folder / "metrics.jsonl")]
            for folder in (a, b)]
    assert logs[0] == logs[1] and [record["step"] for record in logs[0]] == list(range(1, STEPS + 1))
    files = [sorted(p.relative_to(folder) for p in (folder / "eval").rglob("*") if p.is_file()) for folder in (a, b)]
    assert files[0] == files[1] and len(files[0]) >= 6
    assert [name for name in files[0] if (a / name).read_bytes() != (b / name).read_bytes()] == []


def upload(bucket, folder):
    bucket.put({path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if path.is_file()})


def steps_that_look_complete(url):
    return sorted(int(name.split("/")[1]) for name in Bucket(url).list("checkpoints") if name.endswith("manifest.json"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


def words(inputs, workdir, bucket=""):
    """The command that trains in `workdir`, on the inputs here or on those in a bucket."""
    given = command(inputs, "WORKDIR", *SETTINGS)
    return [word.replace("WORKDIR", str(workdir)).replace(str(inputs), bucket) if bucket else
            word.replace("WORKDIR", str(workdir)) for word in given]


def test_cut_off_inside_an_upload_a_run_ends_the_same_on_another_machine(inputs, tmp_path, monkeypatch, capsys):
    """And `checkpoints` and `report` take its URL."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("ITUNE_STAGING", str(tmp_path / "one"))
    memory, before = fsspec.filesystem("memory"), jax.config.jax_compilation_cache_dir
    memory.store.clear()
    upload(Bucket("memory://b/in"), inputs)
    assert main(words(inputs, tmp_path / "whole", "memory://b/in")) == 0
    run, sent, pipe = words(inputs, "memory://b/run", "memory://b/in"), [], type(memory).pipe_file

    def failing(self, path, value, **more):
        sent.extend([path] if "/checkpoints/4/" in path else ())
        if len(sent) > 3:
            raise ConnectionError("the network is gone")
        pipe(self, path, value)

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "pipe_file", failing)
        assert main(run) == 1
    err = capsys.readouterr().err
    assert "checkpoint of step 4 is whole in" in err and "cannot be reached: ConnectionError: the network is gon" in err
    assert any("/checkpoints/4/" in name for name in memory.store)
    assert steps_that_look_complete("memory://b/run") == [2]
    monkeypatch.setenv("ITUNE_STAGING", str(tmp_path / "two"))
    assert main(run) == 0
    out = capsys.readouterr().out
    assert "fetching the run in memory://b/run" in out and f"resumed from the checkpoint of step 2 of {STEPS}" in out
    assert steps_that_look_complete("memory://b/run") == [6, 8]
    assert not any("/checkpoints/4/" in name for name in memory.store)
    assert_same_run(tmp_path / "whole", open_view("memory://b/run").folder)
    assert not (open_view("memory://b/run", "none").folder / "crash.json").exists()
    # the verbs that read it
    assert main(["checkpoints", "memory://b/run"]) == 0 and capsys.readouterr().out.count("verified") == 2
    assert main(["report", "memory://b/run", str(tmp_path / "whole")]) == 0
    assert memory.isfile("/b/run/report-whole.html")
    # they call what they write by its URL
    page = "memory://b/pages/one.html"
    assert main(["report", "memory://b/run", "--out", page, "--json", str(tmp_path / "j")]) == 0
    assert memory.isfile("/b/pages/one.html")
    assert capsys.readouterr().out.splitlines()[-2:] == [page, f"uploaded to {page}"]
    memory.store.clear()
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.soak
def test_the_other_verbs_take_a_url(inputs, tmp_path, monkeypatch, capsys):
    """`eval`, `export` and a run that starts from another; `checkpoints` and `report` stand above."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory, before = fsspec.filesystem("memory"), jax.config.jax_compilation_cache_dir
    memory.store.clear()
    upload(Bucket("memory://b/in"), inputs)
    assert main(words(inputs, "memory://b/run", "memory://b/in")) == 0
    monkeypatch.setenv("ITUNE_STAGING", str(tmp_path / "two"))  # finished is finished, on another machine as well
    assert main(words(inputs, "memory://b/run", "memory://b/in")) == 0
    assert "is finished with 8 steps" in capsys.readouterr().out
    config = "memory://b/run/config.json"
    assert main(["eval", "--config", config, "--workdir", "memory://b/run", "--step", "6"]) == 0
    assert json.loads(memory.cat_file("/b/run/eval/6/summary.json"))["heldout_loss"]["loss"] > 0
    assert main(["export", "--workdir", "memory://b/run", "--out", "memory://b/models/x"]) == 0
    names = {name.rsplit("/", 1)[-1] for name in memory.store if name.startswith("/b/models/x/")}
    said = capsys.readouterr().out
    assert "exported step 8 to memory://b/models/x" in said and "/views/" not in said and "/uploads/" not in said
    assert {"itune_proof.json", "model.safetensors", "tokenizer.json", "config.json"} <= names
    assert main(["eval", "--config", config, "--model", "memory://b/models/x", "--out", "memory://b/judged"]) == 0
    assert memory.isfile("/b/judged/summary.json")
    more = [*words(inputs, tmp_path / "more", "memory://b/in"), "--config.train.init_from=memory://b/run",
            "--config.evaluators=()"]
    assert main(more) == 0 and "start from the parameters of memory://b/run, step 8" in capsys.readouterr().out
    memory.store.clear()
    jax.config.update("jax_compilation_cache_dir", before)


KILLS = ("uploading:2", "before-manifest:4", "uploaded:4", "upload-begin:6")


@pytest.mark.soak  # one kill, of an upload alone: tests/storage/test_s3.py
def test_killed_inside_uploads_to_s3_on_machines_that_lose_their_disks(inputs, tmp_path):
    """SIGKILL at each mark of an upload, each time another staging folder: only whole checkpoints look whole."""
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.items():
            patch.setenv(name, value)
        upload(Bucket("s3://bucket/in"), inputs)
        plans = [{"arguments": words(inputs, tmp_path / "whole", "s3://bucket/in"), "log": str(tmp_path / "log"),
                  "environment": devices(1)}]
        plans += [{"arguments": words(inputs, "s3://bucket/run", "s3://bucket/in"), "log": str(tmp_path / "log"),
                   "environment": {**devices(1), "ITUNE_STAGING": str(tmp_path / f"machine-{index}"),
                                   "ITUNE_MARK_KILL": point}} for index, point in enumerate([*KILLS, ""])]
        codes = run_plans(tmp_path, "plans", plans)
        log = (tmp_path / "log").read_text()
        assert codes == [0, -9, -9, -9, -9, 0], log[-3000:]
        resumed = [line.split()[6] for line in log.splitlines() if line.startswith("resumed from")]
        assert resumed == ["2", "4", "4"], log[-3000:]  # the first two began anew and at 2
        assert steps_that_look_complete("s3://bucket/run") == [6, 8]
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        assert_same_run(tmp_path / "whole", open_view("s3://bucket/run").folder)


@pytest.mark.soak
def test_two_processes_of_one_machine_upload_once_and_two_machines_are_refused(inputs, tmp_path):
    from tiny_run import job

    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.items():
            patch.setenv(name, value)

        def plans(name, staging, kill=""):
            return [{"arguments": words(inputs, f"s3://bucket/{name}"), "log": str(tmp_path / f"{name}-{index}.log"),
                     "environment": {**devices(1), **process, "ITUNE_STAGING": str(tmp_path / staging.format(index)),
                                     "ITUNE_HEARTBEAT": "10", "ITUNE_MARK_KILL": "" if index else kill}}
                    for index, process in enumerate(job(2))]

        codes = run_plans(tmp_path, "plans", [
            plans("whole", "one"), plans("run", "one", "before-manifest:4"), plans("run", "two"),
            plans("apart", "three-{}"),
        ])
        logs = [(tmp_path / f"{name}-0.log").read_text() for name in ("whole", "run", "apart")]
        assert codes[0] == codes[2] == [0, 0] and codes[1][0] == -9 and codes[3] == [2, 2], (codes, logs)
        assert "resumed from the checkpoint of step 2" in logs[1]
        assert "the machines of this job have no staging folder in common" in logs[2]
        assert steps_that_look_complete("s3://bucket/run") == [6, 8]
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        # arrays of two processes are not read back by one; the evaluation at the last step stands for them
        assert_same_run(*(open_view(f"s3://bucket/{name}").folder for name in ("whole", "run")), states=False)
