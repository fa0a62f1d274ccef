"""Planted secrets: every verb, when it works and when it breaks, leaves none in what it prints or writes."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_run import make_inputs

from itune import cli
from itune.usage import build_parser

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")
TOKEN = "hf_" + "canary1" * 4  # a known form, wherever it stands
TRACKER = 'canary-"tracker"-\\value'  # known only by the name of its variable; JSON would write it in another way
VARIABLES = {"HF_TOKEN": TOKEN, "WANDB_API_KEY": TRACKER, "MY_SECRET": "canary-secret", "DB_PASSWORD": "canary-pässwd"}
CANARIES = {TOKEN, *VARIABLES.values(), *(json.dumps(value)[1:-1] for value in VARIABLES.values())}


def actions(parser):
    return next((a.choices for a in parser._actions if a.dest in ("verb", "action")), {})


def verbs():
    """Every verb, with its action where it has some: ("data", "show")."""
    found = []
    for verb, sub in actions(build_parser("0")).items():
        found += [(verb, action) for action in actions(sub)] or [(verb,)]
    return sorted(found)


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)


def assert_hidden(said, *folders):
    found = [f"output: {c}" for c in CANARIES if c in said.out + said.err]
    for folder in folders:
        for path in (p for p in Path(folder).rglob("*") if p.is_file()):
            raw = path.read_bytes()
            found += [f"{path}: {c}" for c in CANARIES if c.encode() in raw]
    assert not found, found


class Tracker:
    """Stands for wandb: keeps what it is told."""

    def __init__(self):
        self.told = []

    def init(self, **facts):
        self.told.append(facts)
        return SimpleNamespace(log=lambda *a, **k: self.told.append((a, k)), finish=lambda: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Inputs, the cache outside: a secret stands in one key of the config, where a user may well paste one."""
    made = tmp_path_factory.mktemp("canaries")
    make_inputs(made)
    (made / "prompts.txt").write_text("Say 3\n")
    return made


def words_of(folder, run, out):
    """Arguments of every verb that make it work. `demo` takes minutes: see the soak test below."""
    cache = f"--config.data.cache_dir={folder.parent}/cache-{TOKEN}?api_key={TOKEN}"
    data = [f"--config.model.path={folder / 'model'}", f"--config.data.train={folder / 'rows.jsonl'}",
            "--config.data.max_length=48", "--config.data.held_out_share=0.1", cache]
    recipe = ["--config", "default", *data]
    train = ["train", *recipe, "--workdir", str(run), "--config.train.batch_size=8", "--config.train.max_steps=2",
             "--config.log.wandb=project", "--config.eval.max_new_tokens=4"]
    return {
        ("train",): train,
        ("eval",): ["eval", "--config", str(run / "config.json"), cache, "--workdir", str(run)],
        ("export",): ["export", "--workdir", str(run), "--out", str(out / "model")],
        ("generate",): ["generate", "--model", str(folder / "model"), "--prompts", str(folder / "prompts.txt"),
                        "--max-new-tokens", "4", "--out", str(out / "answers.jsonl")],
        ("chat",): ["chat", "--model", str(folder / "model"), "--max-new-tokens", "4"],
        ("plan",): ["plan", *recipe, "--topology", "v5e:2x2", "--formula", "--config.train.max_steps=2"],
        ("verify",): ["verify", *recipe, "--workdir", str(out / "verify"), "--only", "remat"],
        ("checkpoints",): ["checkpoints", str(run)],
        ("report",): ["report", str(run)],
        ("data", "show"): ["data", "show", *recipe],
        ("data", "stats"): ["data", "stats", *recipe],
        ("data", "report"): ["data", "report", *recipe, "--out", str(out / "report")],
        ("data", "split"): ["data", "split", *recipe, "--out", str(out / "split")],
        ("data", "score"): ["data", "score", *recipe, "--workdir", str(run), "--out", str(out / "score")],
    }


def test_verbs_that_work_tell_no_secret(folder, tmp_path, monkeypatch, capfd):
    run, out = tmp_path / "run", tmp_path / "out"
    out.mkdir()
    tracker = Tracker()
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Say 3\n"))
    monkeypatch.setattr(sys, "argv", ["itune", *words_of(folder, run, out)[("train",)]])
    for verb, words in words_of(folder, run, out).items():
        assert cli.main(words) == 0, (verb, capfd.readouterr())
    assert "[hidden]" in json.loads((run / "config.json").read_text())["data"]["cache_dir"]
    assert "[hidden]" in str(tracker.told[0]["config"]) and not [c for c in CANARIES if c in repr(tracker.told)]
    assert (run / "report.html").is_file() and (out / "model" / "config.json").is_file()
    assert_hidden(capfd.readouterr(), run, out)


def test_every_verb_is_among_them(tmp_path):
    assert set(verbs()) - {("demo",)} <= set(words_of(tmp_path, tmp_path, tmp_path))


@pytest.mark.parametrize("verb", sorted({verb[0] for verb in verbs()}))
def test_verbs_that_break_tell_no_secret(verb, folder, tmp_path, monkeypatch, capfd):
    """A bug in any verb: its traceback is shown, for the report, with every secret hidden."""
    def broken(arguments):
        raise LookupError(f"request with {' '.join(VARIABLES.values())} and https://me:{TOKEN}@host/x failed")

    words = {**words_of(folder, tmp_path / "run", tmp_path), ("demo",): ["demo"]}
    monkeypatch.setitem(cli.VERBS, verb, broken)
    assert cli.main(next(w for name, w in words.items() if name[0] == verb)) == 1
    said = capfd.readouterr()
    assert "LookupError: request with [hidden]" in said.err and f"itune: {verb} failed" in said.err
    assert_hidden(said, tmp_path)


def test_a_run_that_crashes_tells_no_secret(folder, tmp_path, monkeypatch, capfd):
    def broken(*given, **more):
        raise ValueError(f"download with {TRACKER} and {TOKEN} failed")

    monkeypatch.setattr("itune.weights.init_state", broken)
    words = [word for word in words_of(folder, tmp_path / "run", tmp_path)[("train",)] if "wandb" not in word]
    assert cli.main(words) == 1
    said = capfd.readouterr()
    assert f"failed after step 0: ValueError: download with [hidden] and [hidden] failed (details: {tmp_path}/run/" in (
        said.err)
    crash = json.loads((tmp_path / "run" / "crash.json").read_text())
    assert crash["last_events"] and crash["environment"]["versions"]["jax"] and crash["devices"]
    assert_hidden(said, tmp_path)


@pytest.mark.soak
def test_demo_tells_no_secret(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "--workdir", str(tmp_path / "demo"), "--json", str(tmp_path / "demo.json")]) == 0
    assert_hidden(capfd.readouterr(), tmp_path)
