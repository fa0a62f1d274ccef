"""The script that plants defects: the truth names the rows that changed, each once, and nothing in a row tells."""

from __future__ import annotations

import json

import pytest
from load_script import load_script


@pytest.fixture(scope="module")
def script():
    return load_script("scripts/plant_defects.py")


def test_rows_and_truth_agree(script, tmp_path, monkeypatch, capsys):
    source = tmp_path / "real.jsonl"
    rows = [{"prompt": f"Tell me in a few words what stands in room {i} of the old house by the river, please.",
             "completion": f"In room {i} stands a chair that somebody left there."} for i in range(60)]  # fmt: skip
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "planted.jsonl"
    kinds = "empty,placeholder,exact_duplicate,contradiction,refusal"
    given = ["--data", str(source), "--out", str(out), "--rate", "0.1", "--kinds", kinds]
    monkeypatch.setattr("sys.argv", ["plant", *given])
    script.main()
    made = [json.loads(line) for line in out.read_text().splitlines()]
    truth = [json.loads(line) for line in (tmp_path / "planted.truth.jsonl").read_text().splitlines()]
    lines = [each["line"] for each in truth]
    assert len(truth) == 30 == len(set(lines)) and {each["kind"] for each in truth} == set(kinds.split(","))
    assert len(made) == 60 + sum(each["kind"] in ("exact_duplicate", "contradiction") for each in truth)
    for number, row in enumerate(made, start=1):
        assert set(row) == {"messages", "source", "task"}
        as_it_was = number <= 60 and row["messages"][1]["content"] == rows[number - 1]["completion"]
        assert as_it_was == (number not in lines)
    assert f"{len(made)} rows in " in capsys.readouterr().out
