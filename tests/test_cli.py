"""The command line: help fits a screen and gives an example; bad input is one message with an address."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from load_script import load_script

from itune.cli import VERBS, main
from itune.saved_run import _items_folder

GOOD = {"messages": [{"role": "user", "content": "Say one."}, {"role": "assistant", "content": "one"}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random model folder of one million parameters, as the README makes one."""
    maker = load_script("scripts/make_random_model.py")
    folder = tmp_path_factory.mktemp("cli") / "model"
    maker.choose_shape = lambda *given: (32, 1)
    maker.make("qwen3", 1_000_000, folder, vocab=300)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def rows(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def train(model: Path, data: Path, workdir: Path, *arguments: str) -> int:
    return main(["train", "--config", "default", "--workdir", str(workdir), f"--config.model.path={model}",
                 f"--config.data.train={data}", "--config.data.max_length=64", "--config.evaluators=()",
                 "--config.data.held_out_share=0", *arguments])


def code_of(words: list[str]) -> int:
    """The exit code, whether a verb returns it or the parser leaves with it."""
    try:
        return main(words)
    except SystemExit as stop:
        return stop.code


def refused(capsys, code: int, expected_code: int, *patterns: str) -> None:
    error = capsys.readouterr().err
    assert code == expected_code, error
    assert error.startswith("itune: ") and "Traceback" not in error
    for pattern in patterns:
        assert re.search(pattern, error), error


DATA = ("show", "stats", "report", "split", "score")


@pytest.mark.parametrize("verb", [*[[verb] for verb in VERBS], *(["data", name] for name in DATA)])
def test_help_fits_a_screen_and_gives_an_example(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*verb, "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert "example:" in shown and f"itune {' '.join(verb)}" in shown
    assert len(shown.splitlines()) <= 40 and max(map(len, shown.splitlines())) <= 120


@pytest.mark.parametrize(("arguments", "said"), [
    ([], ""),
    (["tran"], "did you mean train?"),
    (["train", "--config", "sft"], "required: --workdir"),
    (["export", "--workdir", "x", "--out", "y", "--dtypes", "float32"], "'--dtypes'"),
    (["train", "--config", "sft", "--workdir", "x", "--config.train.epochs", "2"], "--config.train.epochs=2"),
    (["train", "--config", "sftt", "--workdir", "x"], "nearest: sft"),
    (["train", "--config", "sft", "--workdir", "x", "--config.trian.epochs=2"], "did you mean train.epochs?"),
    (["generate", "--model", "no/such", "--prompts", "none.txt"], "none.txt"),
    (["generate", "--model", "no/such", "--prompts", "none.txt", "--seed", "-1"], "seed must be from 0"),
    (["chat", "--model", "no/such", "--temperature", "nan"], "temperature must be"),
    (["eval", "--config", "default", "--model", "no/such", "--step", "7"], "--step 7: a model folder has no steps"),
    (["eval", "--config", "default", "--model", "no/such", "--lm-eval-path", "x"], "goes with --lm-eval"),
    (["report", "no/such/run"], "no/such/run"),
    (["export", "--workdir", "no/such/run", "--out", "y"], "no/such/run"),
])
def test_wrong_usage_has_exit_code_2(arguments, said, capsys):
    code = code_of(arguments)
    streams = capsys.readouterr()
    assert code == 2
    assert said in streams.err and "Traceback" not in streams.err


@pytest.mark.parametrize(("lines", "patterns"), [
    ([GOOD, '{"messages": [}'], ["bad.jsonl:2"]),
    ([GOOD, "[1, 2]"], ["bad.jsonl:2", "object"]),
    ([GOOD, {"messages": [{"role": "user", "content": "Hello?"}]}], ["bad.jsonl:2", "assistant"]),
    ([{"messages": [{"role": "asistant", "content": "x"}]}], ["bad.jsonl:1", "asistant", r"assistant"]),
    ([{"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "x"}]}],
     ["bad.jsonl:1", r"messages\[0\]\.content"]),
    ([{"question": "x", "reply": "y"}], ["bad.jsonl", "question"]),
])
def test_bad_rows_are_named_by_file_line_and_field(model, tmp_path, capsys, lines, patterns):
    code = train(model, rows(tmp_path / "bad.jsonl", *lines), tmp_path / "run")
    refused(capsys, code, 2, *patterns)


def test_a_letter_that_the_output_lacks_costs_no_result(tmp_path, monkeypatch):
    (tmp_path / "ü").mkdir()
    (tmp_path / "ü" / "config.json").write_text("{}")
    shown = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, encoding="ascii", write_through=True))
    assert main(["report", str(tmp_path / "ü")]) == 0
    assert shown.getvalue().strip().endswith(rb"\xfc/report.html")


def test_the_items_of_a_model_in_the_current_folder_have_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [str(_items_folder(None, None, model)) for model in (".", "a/b", "org/name/")] == [
        f"eval-{tmp_path.name}", "eval-b", "eval-name"]  # fmt: skip


def test_missing_data_file_names_the_nearest(model, tmp_path, capsys):
    rows(tmp_path / "train.jsonl", GOOD)
    refused(capsys, train(model, tmp_path / "trian.jsonl", tmp_path / "run"), 2, "trian.jsonl", "train.jsonl")


def test_template_missing_names_those_that_ship(model, tmp_path, capsys):
    bare = Path(shutil.copytree(model, tmp_path / "bare"))
    for name in ("chat_template.jinja", "chat_template.json"):
        (bare / name).unlink(missing_ok=True)
    config = json.loads((bare / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    code = train(bare, rows(tmp_path / "a.jsonl", GOOD), tmp_path / "run")
    refused(capsys, code, 2, "template", "chatml")


def test_unsupported_architecture_lists_the_supported(model, tmp_path, capsys):
    other = Path(shutil.copytree(model, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    code = train(other, rows(tmp_path / "a.jsonl", GOOD), tmp_path / "run")
    refused(capsys, code, 2, "mamba", "llama.*qwen3")


def test_index_that_names_a_missing_file(model, tmp_path, capsys):
    other = Path(shutil.copytree(model, tmp_path / "other"))
    (other / "model.safetensors").rename(other / "model-00001-of-00002.safetensors")
    names = {"model.embed_tokens.weight": "model-00001-of-00002.safetensors",
             "model.norm.weight": "model-00002-of-00002.safetensors"}
    (other / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    code = train(other, rows(tmp_path / "a.jsonl", GOOD), tmp_path / "run")
    refused(capsys, code, 2, "model-00002-of-00002.safetensors")


def test_workdir_of_another_config_shows_the_difference(model, tmp_path, capsys):
    data = rows(tmp_path / "a.jsonl", *[GOOD] * 16)
    assert train(model, data, tmp_path / "run", "--config.train.max_steps=1") == 0
    capsys.readouterr()
    code = train(model, data, tmp_path / "run", "--config.train.max_steps=1", "--config.seed=5")
    refused(capsys, code, 2, "seed")


@pytest.mark.parametrize(("verb", "kind"), [
    (["eval", "--config", "sft", "--workdir", "x"], "folder"), (["export", "--workdir", "x"], "folder"),
    (["data", "report", "--config", "sft"], "folder"), (["data", "split", "--config", "sft"], "folder"),
    (["data", "score", "--config", "sft", "--model", "x"], "folder"), (["report", "x"], "file"),
    (["generate", "--model", "x", "--prompts", "FILE"], "file"),
], ids=lambda words: words if isinstance(words, str) else "-".join(words[:2]).replace("---config", ""))
def test_a_place_that_cannot_be_written_is_said_before_the_work(verb, kind, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    verb = [str(file) if word == "FILE" else word for word in verb]
    other = {"folder": file, "file": tmp_path}[kind]
    refused(capsys, main([*verb, "--out", str(other)]), 2, f"--out .*: is a .*; expected a {kind} to write")
    for out in (file / "x", file / "x" / "y"):
        refused(capsys, main([*verb, "--out", str(out)]), 2, f"--out {out}: cannot be written in {file}; expected a pl")
    code = main([*verb, "--out", str(tmp_path / "new"), "--json", str(tmp_path)])
    refused(capsys, code, 2, "--json .*: is a folder; expected a file to write")
    if "--prompts" in verb:
        refused(capsys, main([*verb, "--out", str(file)]), 2, f"--out {file}: is the file of the prompts")
    for words in (["demo"], ["verify", "--config", "demo"]):
        refused(capsys, main([*words, "--workdir", str(file)]), 2, "--workdir .*: is a file; expected a folder")
    assert file.read_text() == "mine" and [*tmp_path.iterdir()] == [file]


@pytest.mark.parametrize(("words", "said"), [
    (["data", "show", "--config", "sft", "--limit", "-1"], "--limit: expected a whole number of at least 1, found"),
    (["data", "show", "--config", "sft", "--limit", "0"], "--limit: expected a whole number of at least 1, found '0'"),
    (["data", "show", "--config", "sft", "--index", "-1"], "--index: expected a whole number of at least 0, found"),
    (["data", "show", "--config", "sft", "--random", "-1"], "--random: expected a whole number of at least 0"),
    (["data", "score", "--config", "sft", "--model", "x", "--limit", "-1"], "--limit: expected a whole number of at l"),
    (["data", "score", "--config", "sft", "--model", "x", "--limit", "1.5"], "--limit: expected a whole number of at"),
    (["train", "--config", "sft", "--workdir", "x", "--restart-on-failure", "-1"], "--restart-on-failure: expected a"),
    (["export", "--workdir", "x", "--out", "y", "--step", "-1"], "--step: expected a whole number of at least 0"),
    (["chat", "--model", "x", "--max-new-tokens", "0"], "--max-new-tokens: expected a whole number of at least 1"),
    (["train", "--config", "sft", "--workdir", ""], "--workdir is empty; expected a path"),
])
def test_a_number_or_path_that_an_option_cannot_have_is_named(words, said, capsys):
    code = code_of(words)
    error = capsys.readouterr().err
    assert code == 2 and said in error and error.count("\n") == 1


def test_a_current_folder_that_is_gone_is_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    refused(capsys, main(["report", "run"]), 2, "the current folder was removed; go to another one")


def test_data_verbs_from_files_to_a_ranked_list(model, tmp_path, capsys):
    """report, split, score and show on one file; a model that was never tuned is named as such."""
    path = rows(tmp_path / "d.jsonl", *({"prompt": f"Say {word} {i}", "completion": f"{word} {i}", "task": word}
                                        for i, word in enumerate(["ash", "birch", "cedar", "dill"] * 6)))  # fmt: skip
    keys = ["--config", "default", f"--config.model.path={model}", f"--config.data.train={path}",
            "--config.data.max_length=64", "--config.data.overlap_cosine=1"]  # fmt: skip
    held = ["--config.data.held_out_by=task", "--config.data.held_out_share=0.3"]
    out, parts, scores = tmp_path / "out", tmp_path / "parts", tmp_path / "scores"
    assert main(["data", "report", *keys, *held, "--out", str(out), "--json", str(tmp_path / "r.json")]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["rows"] == 24 and (out / "report.html").is_file()
    assert main(["data", "report", *keys, "--config.data.limits.examples=99", "--out", str(out)]) == 1
    assert "data.limits.examples: 24, expected at least 99" in capsys.readouterr().err
    assert main(["data", "split", *keys, *held, "--out", str(parts)]) == 0
    kept = [len((parts / name).read_text().splitlines()) for name in ("train.jsonl", "eval.jsonl")]
    assert sum(kept) == 24 and min(kept) >= 6
    assert main(["data", "score", *keys, "--model", str(model), "--out", str(scores), "--limit", "2"]) == 0
    said = capsys.readouterr().out
    assert "is the model that tuning starts from, so that the order says no more than chance" in said
    items = [json.loads(line) for line in (scores / "data_scores.jsonl").read_text().splitlines()]
    assert len(items) == 24 and items[0]["suspicion"] >= items[-1]["suspicion"] and items[0]["address"] in said
    assert main(["data", "show", *keys, "--worst", str(scores / "data_scores.jsonl"), "--limit", "1"]) == 0
    assert f"--- {items[0]['address']}" in capsys.readouterr().out
    assert main(["data", "show", *keys, "--random", "5", "--limit", "2"]) == 0
    shown = re.findall(r"--- .*jsonl:(\d+)", capsys.readouterr().out)
    assert len(shown) == 2 and main(["data", "show", *keys, "--random", "5", "--limit", "2"]) == 0
    assert re.findall(r"--- .*jsonl:(\d+)", capsys.readouterr().out) == shown
    refused(capsys, main(["data", "show", *keys, "--worst", str(path)]), 2, r"d\.jsonl:1: no address and suspicion")
