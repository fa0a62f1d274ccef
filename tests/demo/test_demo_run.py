"""The demo as a user runs it, in a process of its own: one full run, its gates and memory, the folder it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from itune.config import load_config
from itune.demo import run as demo
from itune.demo import tasks
from itune.runtime.lock import RunLock
from itune.types import InputError, RunError

ROOT = Path(__file__).parents[2]


def itune(*arguments, cwd, **variables):
    """The command line in a new process with one device; (exit code, output)."""
    return python("-m", "itune", *arguments, cwd=cwd, **variables)


def python(*arguments, cwd, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **variables}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One demo from an empty home: (output, demo.json and its peak memory in KB, folder)."""
    at = tmp_path_factory.mktemp("demo")
    home = {"HOME": str(at / "home"), "XDG_CACHE_HOME": str(at / "cache")}
    # a small process that runs the demo and tells its peak: other tests of this process have children too
    watch = (
        "import resource, subprocess, sys; code = subprocess.call([sys.executable, '-m', 'itune', *sys.argv[1:]]); "
        "open('peak.txt', 'w').write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)); sys.exit(code)"
    )
    code, output = python("-c", watch, "demo", "--json", at / "copy.json", cwd=at, **home)
    assert code == 0, output
    numbers = json.loads((at / "runs" / "demo" / "demo.json").read_text())
    assert numbers == json.loads((at / "copy.json").read_text())
    return output, {**numbers, "peak": int((at / "peak.txt").read_text())}, at


def test_gates(finished):
    _, numbers, _ = finished
    assert numbers["novel"] >= 550
    assert numbers["base"] <= 0.05
    assert numbers["tuned"] >= 0.70
    assert numbers["low"] > 0.5
    assert numbers["difference"] == pytest.approx(numbers["tuned"] - numbers["base"])
    assert numbers["low"] <= numbers["difference"] <= numbers["high"]
    assert set(numbers["kinds"]) == {"analytical", "creative", "factual"}
    assert all(row["tuned"] > 0.4 for row in numbers["kinds"].values())


def test_memory_is_what_is_promised(finished):
    _, numbers, _ = finished
    assert numbers["peak"] < 2.5e6


def test_output_shows_what_was_won(finished):
    output, numbers, _ = finished
    table = ("analytical", "factual", "creative", "base", "tuned", "difference", "95 % interval")
    for part in (*table, f"{numbers['tuned']:.1%}", "itune chat --model", "--config.data.train=", "loaded again"):
        assert part in output
    assert output.count("asked  ") == output.count("\ntuned  ") == 5
    assert "\x1b" not in output  # no terminal, no colours


def test_export_is_proven_and_answers_in_transformers(finished):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    _, numbers, at = finished
    assert numbers["max_abs_logit_difference"] <= 1e-5
    folder = at / numbers["export"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    items = demo.read_items(at / "runs" / "demo" / "eval" / str(numbers["steps"]) / "generation.jsonl")
    agree = 0
    for item in items[::60]:
        prompt = tokenizer.apply_chat_template(
            item["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            ids = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        agree += tokenizer.decode(ids, skip_special_tokens=True) == item["answer"]
    assert agree >= len(items[::60]) - 1  # a near tie may fall the other way


def test_report_and_config_stand(finished):
    _, numbers, at = finished
    folder = at / "runs" / "demo"
    assert load_config(folder / "config.json").data.novel_min == demo.NOVEL_MIN
    proof = json.loads((folder / "data" / "report.json").read_text())["held_out"]
    assert proof["prompts"] == numbers["novel"]
    assert (folder / "report.html").stat().st_size > 1000


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("do not lose this")
    (tmp_path / "demo").mkdir()
    with pytest.raises(InputError, match=r"no earlier demo \(it has demo, thesis.tex\)"):
        demo.prepare_folder(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "do not lose this"


def test_an_earlier_demo_is_replaced(tmp_path, capsys):
    folder = tmp_path / "demo"
    demo.prepare_folder(folder)
    (folder / "demo.json").write_text("{}")
    (folder / "export").mkdir()
    (folder / "my notes.txt").write_text("mine")
    assert capsys.readouterr().out == ""
    demo.prepare_folder(folder)
    assert "replaced" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["demo", "my notes.txt", "run.lock"]
    assert len(demo.read_items(folder / "demo" / "held_out.jsonl")) == len(tasks.held_out_rows())


def test_an_unfinished_demo_goes_on_unless_anything_changed(tmp_path, capsys):
    demo.prepare_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(demo.make_config(tmp_path).to_dict()))
    demo.prepare_folder(tmp_path)
    assert "goes on" in capsys.readouterr().out
    assert (tmp_path / "config.json").is_file()
    with open(tmp_path / "demo" / "train.jsonl", "a") as file:
        file.write("{}\n")
    demo.prepare_folder(tmp_path)
    assert "replaced" in capsys.readouterr().out
    assert not (tmp_path / "config.json").exists()


def test_a_demo_that_is_running_is_not_replaced(tmp_path):
    demo.prepare_folder(tmp_path)
    with RunLock(tmp_path), pytest.raises(RunError, match="in use by another run"):
        demo.prepare_folder(tmp_path)
    assert (tmp_path / "demo" / "train.jsonl").is_file()


def test_only_the_same_questions_are_compared():
    item = {"prompt": "a", "score": True, "cluster": "t", "category": "k"}
    with pytest.raises(ValueError, match="different questions"):
        demo.compare([item], [{**item, "prompt": "b"}])


def test_difference_and_interval_are_by_task():
    before = [{"prompt": str(n), "score": False, "cluster": str(n // 10), "category": "k"} for n in range(40)]
    after = [{**item, "score": int(item["prompt"]) < 20} for item in before]  # all of two tasks, none of the others
    row = demo.compare(before, after)
    assert (row["base"], row["tuned"], row["difference"], row["items"], row["tasks"]) == (0.0, 0.5, 0.5, 40, 4)
    assert row["low"] == 0.0 and row["high"] == 1.0  # by item it would be 0.35 to 0.65
    assert row["kinds"]["k"] == {name: value for name, value in row.items() if name != "kinds"}


@pytest.mark.soak
def test_control_with_shuffled_responses_learns_nothing(tmp_path):
    """The same run on the same answers, each given to another question: right answers come from the pairing."""
    import numpy as np

    folder = tmp_path / "control"
    demo.prepare_folder(folder)
    file = folder / "demo" / "train.jsonl"
    rows = demo.read_items(file)
    for row, other in zip(rows, np.random.default_rng(0).permutation(len(rows)), strict=True):
        row["messages"] = [row["messages"][0], rows[other]["messages"][-1]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = demo.make_config(folder)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    code, output = itune("train", "--config", tmp_path / "config.json", "--workdir", tmp_path / "run", cwd=tmp_path)
    assert code == 0, output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["after"]["generation"]["score"] <= 0.05
