"""A run outlives its standard output: the reader of a pipe, the disk of a log, a process without streams."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from tiny_run import command, environment

from itune.progress import Progress

LOGGED = {"loss": 1.0, "learning_rate": 1e-3}


def broken(kind):
    if kind == "full disk":
        return open("/dev/full", "w")
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


@pytest.mark.parametrize("bar", [False, True], ids=["lines", "bar"])
@pytest.mark.parametrize("kind", ["pipe without a reader", "full disk"])
def test_progress_goes_on_without_its_output(kind, bar, monkeypatch):
    with broken(kind) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        progress = Progress(terminal=bar)
        progress.log("before")
        progress.begin(2)
        progress.show(1, LOGGED)
        progress.log("between")
        progress.close()
        print("what is written after it goes nowhere", flush=True)


def test_progress_without_any_standard_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    progress = Progress()
    progress.log("a line")
    progress.begin(2)
    progress.show(1, LOGGED)
    progress.close()


def test_a_training_whose_reader_leaves_is_saved_and_ends_well(tiny_folder):
    """As `itune train ... | head -1`, in an encoding that lacks the letters of what it prints."""
    workdir = tiny_folder / "ünread"
    words = command(tiny_folder, workdir, "--config.train.max_steps=2", "--config.evaluators=()")
    with subprocess.Popen([sys.executable, "-m", "itune", *words], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env={**environment(tiny_folder), "PYTHONIOENCODING": "ascii"}) as run:
        assert run.stdout.readline()
        run.stdout.close()
        error = run.stderr.read()
    assert run.returncode == 0, error
    assert (workdir / "checkpoints" / "2").is_dir() and (workdir / "summary.json").is_file()
    assert len((workdir / "metrics.jsonl").read_text().splitlines()) == 2


def itune(*words, close="", **changes):
    """The command in a process of its own, through a shell that closes streams."""
    line = f'exec "$0" -m itune "$@" {close}'
    return subprocess.run(["sh", "-c", line, sys.executable, *words], capture_output=True, check=False,
                          env={**os.environ, **changes})


def test_a_command_without_standard_streams(tmp_path):
    assert itune("report", tmp_path / "absent", close=">&-").returncode == 2
    assert itune("report", tmp_path / "absent", close=">&- 2>&-").returncode == 2
    assert itune("data", "--help", close=">&-").returncode == 0


def test_a_letter_that_the_encoding_lacks_is_an_escape():
    done = itune("report", "\u00fc-absent", PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and b"\\xfc-absent: not a run directory" in done.stderr


@pytest.mark.parametrize("option", ["--workdir", "--out"])
def test_a_path_that_is_no_text_here_is_refused(option, tmp_path):
    rest = {"--workdir": ["--out", tmp_path / "out"], "--out": ["--workdir", tmp_path / "run"]}[option]
    done = itune("export", option, f"{tmp_path}/\u00fc", *rest, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 2 and not done.stdout
    assert option.encode() in done.stderr and b"LC_ALL=C.UTF-8" in done.stderr
    assert done.stderr.count(b"\n") == 1
