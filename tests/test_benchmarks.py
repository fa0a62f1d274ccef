"""The benchmark runner: rows load, failures are recorded and do not stop the others, one row replaces its own lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import machine, run, table
from benchmarks.row import Bound, Row, load, names


@pytest.mark.parametrize("name", names())
def test_every_row_loads_and_its_bounds_name_its_sides(name):
    row = load(name)
    assert row.title and row.sides and row.repeats >= 1
    assert row.repeats >= 5 or len(row.sides) == 1, "a comparison is repeated"
    for bound in row.bounds:
        assert (bound.at_least is None) != (bound.at_most is None)
        assert not bound.peer or bound.peer in row.sides
        assert bound.absolute or len(row.sides) > 1


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Runs rows `one` and `two` with sides that return what `answers` says, or raise it."""
    answers: dict[tuple[str, str], list] = {}
    made = Row("A row.", {"itune": print, "peer": print}, bounds=(Bound("speed", at_least=1.5, busy="cpu_speed"),),
               equal=(("loss", 1e-4),), repeats=3)  # fmt: skip

    def side(name, side, folder, environment, timeout):
        if side == "prepare":
            return {}
        found = answers[name, side].pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(run, "load", lambda name: made)
    monkeypatch.setattr(run, "names", lambda: ["one", "two"])
    monkeypatch.setattr(table, "names", lambda: ["one", "two"])
    monkeypatch.setattr(run, "side_of", side)
    monkeypatch.setattr(machine, "load", lambda: 0.1)
    monkeypatch.setattr(machine, "describe", lambda: {"cpu": "2 cores, EPYC, 25 GB", "jax": "0"})

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["run", *arguments, "--results", str(tmp_path / "results.json")])
        return run.main()

    return answers, call, tmp_path


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("RESULTS.md", "# Results", "ends in .json"),
        ("results.json", "# Results", "not JSON"),
        ("results.json", "[]", "found a JSON list"),
        ("none/results.json", None, "no folder"),
    ],
)
def test_results_that_cannot_be_written_are_refused_before_measuring(fake, monkeypatch, capsys, name, text, said):
    path = fake[2] / name
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr("sys.argv", ["run", "one", "--results", str(path)])
    with pytest.raises(SystemExit) as stopped:  # `answers` is empty: measuring would fail in another way
        run.main()
    assert stopped.value.code == 2 and said in capsys.readouterr().err
    assert text is None or path.read_text() == text


def measured(speed, loss=1.0):
    return {"speed": speed, "cpu_speed": speed / 2, "loss": loss, "digest": "x"}


def fill(answers, row, ours=(3.0, 4.0, 5.0), theirs=(1.0, 2.0, 3.0), **changes):
    answers[row, "itune"] = [measured(speed, **changes) for speed in ours]
    answers[row, "peer"] = [measured(speed) for speed in theirs]


def test_medians_ratios_and_the_page(fake):
    answers, call, folder = fake
    fill(answers, "one")
    fill(answers, "two", ours=(2.0, 2.0, 2.0))
    assert call() == 1  # the second row misses: 2 / 2 < 1.5
    results = json.loads((folder / "results.json").read_text())
    assert results["one"][0]["sides"]["itune"]["speed"] == [4.0, 3.0, 5.0]
    assert [bound["holds"] for name in results for bound in results[name][0]["bounds"]] == [True, False]
    page = (folder / "RESULTS.md").read_text()
    assert "| one | speed | peer | EPYC | 2 | >= 1.5 | yes |" in page
    assert "| two | speed | peer | EPYC | 1 | >= 1.5 | **no** |" in page
    assert "4 (3 to 5)" in page and "jax" in page and "python -m benchmarks.run one" in page


def test_a_failed_row_is_recorded_and_one_row_replaces_its_own_lines(fake):
    answers, call, folder = fake
    fill(answers, "one")
    answers["one", "peer"][1] = run.Failure("peer: exit code 1: no memory")
    fill(answers, "two")
    assert call() == 1
    page = (folder / "RESULTS.md").read_text()
    assert "failed: peer: exit code 1: no memory" in page and "| two | speed | peer | EPYC | 2 | >= 1.5 | yes |" in page
    before = json.loads((folder / "results.json").read_text())["two"]
    fill(answers, "one")
    assert call("one") == 0
    after = json.loads((folder / "results.json").read_text())
    assert after["two"] == before and after["one"][0]["failed"] is None
    assert "no memory" not in (folder / "RESULTS.md").read_text()


def test_another_processor_has_lines_of_its_own(fake, monkeypatch):
    answers, call, folder = fake
    fill(answers, "one", ours=(1.0, 1.0, 1.0))
    assert call("one") == 1
    monkeypatch.setattr(machine, "describe", lambda: {"cpu": "8 cores, Intel(R) Xeon(R) Processor, 9 GB", "jax": "0"})
    for _ in range(2):  # the second run replaces the first one
        fill(answers, "one")
        assert call("one") == 0
    table_lines = [line for line in (folder / "RESULTS.md").read_text().splitlines() if line.startswith("| one |")]
    assert table_lines == ["| one | speed | peer | EPYC | 0.5 | >= 1.5 | **no** |",
                           "| one | speed | peer | Intel Xeon | 2 | >= 1.5 | yes |"]  # fmt: skip


def test_what_must_be_equal_is_checked_before_anything_is_repeated(fake):
    answers, call, folder = fake
    fill(answers, "one", loss=1.001)
    assert call("one") == 1
    (result,) = json.loads((folder / "results.json").read_text())["one"]
    assert result["failed"] == "loss of itune and peer differ by 0.001; at most 0.0001 is equal"
    assert len(answers["one", "itune"]) == 2, "one round was run"


def test_a_busy_machine_is_refused_or_said(fake, monkeypatch, capsys):
    answers, call, folder = fake
    monkeypatch.setattr(machine, "load", lambda: 1.7)
    assert call("one") == 2
    assert "busy: load 1.70" in capsys.readouterr().out and not (folder / "results.json").exists()
    fill(answers, "one")
    assert call("one", "--anyway") == 0
    (result,) = json.loads((folder / "results.json").read_text())["one"]
    assert result["bounds"][0]["measure"] == "cpu_speed"
    assert "(busy machine)" in (folder / "RESULTS.md").read_text() and "BUSY" in (folder / "RESULTS.md").read_text()


def test_lists_and_hashes_are_compared():
    row = Row("x", {"a": print, "b": print}, equal=(("ids", 0.0),))
    run.check_equal(row, {"a": {"ids": ["k", "l"]}, "b": {"ids": ["k", "l"]}})
    for other in (["k", "m"], ["k"]):
        with pytest.raises(run.Failure, match="ids"):
            run.check_equal(row, {"a": {"ids": ["k", "l"]}, "b": {"ids": other}})


def test_results_page_is_what_the_results_give():
    """The committed RESULTS.md is the rendering of the committed results.json."""
    folder = Path(run.__file__).parent
    if (folder / "results.json").is_file():
        assert table.page(json.loads((folder / "results.json").read_text())) == (folder / "RESULTS.md").read_text()
    else:
        assert not (folder / "RESULTS.md").exists()
