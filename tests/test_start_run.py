"""Runs that start from runs: of another dtype, vocabulary or step, moved, from another folder; what is told of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run

from itune.cli import main
from itune.config import load_config
from itune.run_source import check_source
from itune.saved_run import load_run


@pytest.fixture
def start(tiny_folder, tmp_path, monkeypatch, capsys):
    """start(name, *more): exit code and what it wrote; the run is in `name` of the current folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    before = jax.config.jax_compilation_cache_dir

    def run(name, *more, steps=2):
        words = tiny_run.command(tiny_folder, name, f"--config.train.max_steps={steps}", "--config.train.batch_size=8",
                                 "--config.evaluators=()", *more)  # fmt: skip
        return main(words), "".join(capsys.readouterr())

    yield run
    jax.config.update("jax_compilation_cache_dir", before)


LORA = ("--config.lora.rank=2", "--config.model.param_dtype=bfloat16")
FULL = ("--config.model.param_dtype=float32",)
FROZEN = ("--config.train.freeze=embed", "--config.model.param_dtype=bfloat16")


@pytest.mark.parametrize("first, second", [(FULL, LORA), (LORA, FULL), (FROZEN, FULL)], ids=["lora", "full", "frozen"])
def test_runs_of_another_dtype(start, first, second):
    assert start("a", *first)[0] == 0
    code, said = start("b", *second, "--config.train.init_from=a")
    assert code == 0, said
    dtype = "bfloat16" if second is LORA else "float32"
    found = load_run("b", step=None)
    assert found.config.model.param_dtype == dtype
    base = found.halves[1] if second is LORA else found.halves[0]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(base)} == {dtype}
    if second is LORA:  # the frozen base is what the first run ended with, rounded
        ended = load_run("a").params
        jax.tree.map(lambda ours, theirs: np.testing.assert_array_equal(
            np.asarray(ours, np.float32), np.asarray(theirs.astype(dtype), np.float32)), base, ended)  # fmt: skip


@pytest.mark.parametrize("first", [(), ("--config.lora.rank=2",)], ids=["full", "lora"])
def test_tokens_that_a_later_template_adds(start, tmp_path, first):
    each = "{%% for m in messages %%}{{ %s }}{%% endfor %%}"
    (tmp_path / "plain.jinja").write_text(each % "m['role'] + ': ' + m['content'] + eos_token")
    (tmp_path / "marks.jinja").write_text(each % "'<|turn|>' + m['content'] + '<|over|>'")
    assert start("a", "--config.data.chat_template=plain.jinja", *first)[0] == 0
    marks = "--config.data.chat_template=marks.jinja"
    code, said = start("b", marks, "--config.train.init_from=a")
    assert code == 0, said
    rows = [load_run(name).model.config.vocab_size for name in ("a", "b")]
    assert rows[1] > rows[0]
    code, said = start("c", "--config.data.chat_template=plain.jinja", "--config.train.init_from=b")
    assert code == 2 and f"b has {rows[1]} tokens, this run {rows[0]}; take its data.chat_template" in said


def test_another_model_of_the_same_shapes_is_refused(start, tiny_folder, tmp_path):
    assert start("a")[0] == 0
    model = shutil.copytree(tiny_folder / "model", tmp_path / "other")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.01}))
    code, said = start("b", f"--config.model.path={model}", "--config.train.init_from=a")
    assert code == 2 and "a tuned another model than model.path: norm_eps differ" in said


def test_a_run_that_went_on_still_has_the_step_that_others_began_with(start):
    assert start("a")[0] == 0
    assert start("b", "--config.lora.rank=2", "--config.train.init_from=a")[0] == 0
    assert start("a", steps=4)[0] == 0
    assert main(["export", "--workdir", "b", "--out", "out"]) == 0
    assert start("b", "--config.lora.rank=2", "--config.train.init_from=a", steps=3)[0] == 0
    shutil.rmtree("a/checkpoints/2")
    code, said = start("b", "--config.lora.rank=2", "--config.train.init_from=a", steps=4)
    assert code == 2 and "a: none of its steps (4) is the one that this run began with" in said


def test_what_a_run_began_with_may_move(start, tmp_path):
    assert start("a")[0] == 0
    assert start("full", "--config.train.init_from=a")[0] == 0
    assert start("adapted", "--config.lora.rank=2", "--config.train.init_from=a")[0] == 0
    (tmp_path / "a").rename("moved")
    for more in (("--config.train.init_from=moved",), ()):
        assert start("full", *more, steps=3 if more else 4)[0] == 0
    code, said = start("adapted", "--config.lora.rank=2", "--config.train.init_from=moved")  # it is finished
    assert code == 0 and "resumed with a change: train.init_from: 'a' there, 'moved' here" in said
    assert main(["export", "--workdir", "adapted", "--out", "out"]) == 0


def test_a_run_is_read_from_another_folder(start, tiny_folder, tmp_path, monkeypatch):
    shutil.copytree(tiny_folder / "model", tmp_path / "model")
    relative = ("--config.model.path=model", "--config.train.batch_size=8")
    assert start("a", *relative)[0] == 0
    assert start("b", *relative, "--config.lora.rank=2", "--config.train.init_from=a")[0] == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["export", "--workdir", "../b", "--out", "out"]) == 0


def test_the_start_is_looked_for_before_the_data(start, tiny_folder, tmp_path):
    for wrong, hint in (("nowhere", "it must be a run directory"), (tiny_folder / "model", "goes into model.path")):
        code, said = start("b", f"--config.train.init_from={wrong}")
        assert code == 2 and f"train.init_from: {wrong} has no checkpoint" in said and hint in said
        assert "data:" not in said


def test_held_out_items_that_the_start_was_trained_on_are_told(start):
    assert start("a")[0] == 0
    _, said = start("same", "--config.train.init_from=a")
    assert "warning" not in said
    _, said = start("more", "--config.train.init_from=a", "--config.data.held_out_share=0.4")
    held = [len(json.loads(Path(name, "data/heldout_proof.json").read_text())["items"]) for name in ("a", "more")]
    assert f"warning: {held[1] - held[0]} of the {held[1]} held-out items are of sources that a trained on" in said


def test_an_evaluation_on_what_a_run_was_trained_on_is_told(start, capsys):
    assert start("a")[0] == 0
    words = ["eval", "--config", "a/config.json", "--workdir", "a", "--config.evaluators=('heldout_loss',)"]
    for share, warned in (("0.1", False), ("0.4", True)):
        assert main([*words, f"--config.data.held_out_share={share}", "--out", f"out{share}"]) == 0
        assert ("held-out items are of sources that a trained on" in capsys.readouterr().out) == warned


def test_a_run_of_many_devices_is_judged_on_one(start, capsys):
    assert start("a", "--config.mesh.fsdp=4", "--config.mesh.tensor=2")[0] == 0
    words = ["eval", "--config", "a/config.json", "--workdir", "a", "--config.evaluators=('heldout_loss',)"]
    assert main([*words, "--config.mesh.fsdp=64"]) == 0
    assert "heldout_loss/loss" in capsys.readouterr().out


def test_a_folder_of_another_kind_is_named(start, tiny_folder, capsys):
    assert start("a", "--config.lora.rank=2")[0] == 0
    assert main(["export", "--workdir", "a", "--out", "adapter", "--adapter"]) == 0
    assert main(["export", "--workdir", "a", "--out", "merged"]) == 0
    capsys.readouterr()
    for words, message in (
        (["export", "--workdir", "merged", "--out", "x"], "merged: not a run directory but a model folder"),
        (["eval", "--config", "a/config.json", "--model", "a"], "--model a: is a run directory; give it as --workdir"),
        (["chat", "--model", "adapter"], "adapter: is an adapter of peft, not a model: start from it with lora."),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err, words


def test_the_home_folder_in_an_option(start, tmp_path, monkeypatch, tiny_folder):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shutil.copytree(tiny_folder / "model", tmp_path / "home" / "model")
    code, said = start("unused", "--config.model.path=~/model", "--workdir=~/run")
    assert code == 0, said
    assert (tmp_path / "home" / "run" / "config.json").is_file() and not (tmp_path / "~").exists()


def test_another_model_of_the_same_shapes_where_the_run_began(start, tiny_folder, tmp_path, capsys):
    """Checkpoints hold weights alone; an export takes the rest from `model.path`, where another may lie."""
    model = tmp_path / "model"
    shutil.copytree(tiny_folder / "model", model)
    assert start("a", "--config.model.path=model")[0] == 0
    config, written = model / "config.json", (model / "config.json").read_text()

    def export(out):
        return main(["export", "--workdir", "a", "--out", out]), "".join(capsys.readouterr())

    config.write_text(json.dumps(json.loads(written) | {"rms_norm_eps": 0.01, "rope_parameters": {"rope_theta": 77.0}}))
    refused = "its config.json is not that of the model which this run began with (rms_norm_eps, rope_parameters diff"
    code, said = export("out")
    assert code == 2 and refused in said and not (tmp_path / "out").exists()
    code, said = start("a", "--config.model.path=model", steps=3)
    assert code == 2 and refused in said
    code, said = start("b", "--config.model.path=model", "--config.train.init_from=a")
    assert code == 2 and refused in said
    config.write_text(json.dumps(json.loads(written) | {"transformers_version": "9", "dtype": "bfloat16"}))
    (model / "generation_config.json").write_text('{"temperature": 0.1}')
    code, said = export("out")
    assert code == 0 and "warning: model: generation_config.json changed since this run began; what is there" in said
    check_source(load_config("default", {"model.path": str(model)}).model, None, {"step": 3}, pytest.fail)  # as of old
