"""One page that needs nothing else, made from files only: what it shows, and that every number has its interval."""

import html
import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from itune import evaluators
from itune.cli import main
from itune.report import read_evaluations, report_numbers, write_report
from itune.report.charts import MOST, Series, chart, forest, thinned, ticks
from itune.report.tables import differences, evaluation_table
from itune.types import InputError
from itune.writers import write_atomically


def make_run(folder, better=30, rate=3e-3):
    lines = [json.dumps({"step": step, "loss": 3.0 / step, "grad_norm": 1.0, "learning_rate": rate / step,
                         "tokens_per_second": 900.0 + step}) for step in range(1, 11)]  # fmt: skip
    write_atomically(folder / "metrics.jsonl", "\n".join(lines) + "\n")
    config = {"seed": 3, "optimizer": {"learning_rate": rate}, "data": {"train": "<b>.jsonl", "mixture": {}}}
    write_atomically(folder / "config.json", json.dumps(config))
    write_atomically(folder / "data" / "report.json", json.dumps({"kept": 90, "held_out": {"novel_prompts": 40}}))
    write_atomically(folder / "export" / "itune_proof.json", json.dumps({"max_abs_logit_difference": 0.0}))
    for step, right in ((0, 10), (10, better)):
        items = [{"address": f"rows:{n}", "prompt": f"<i>question {n}</i>", "reference": "yes", "score": n < right,
                  "answer": f"answer {n} of step {step}", "category": "sea" if n % 2 else "sky",
                  "cluster": f"task {n // 4}"}
                 for n in range(40)]  # fmt: skip
        summary = {"n": 40, "score": right / 40, "low": 0.1, "high": 0.9,
                   "categories": {"sea": {"n": 20, "score": 0.5, "low": 0.2, "high": 0.8},
                                  "sky": {"n": 20, "score": 0.25, "low": 0.1, "high": 0.4}}}  # fmt: skip
        evaluators.write_results(folder / "eval" / str(step), "generation", summary, items)
        loss = {"loss": 4.0 - step / 5, "loss_low": 1.0, "loss_high": 5.0}
        evaluators.write_results(folder / "eval" / str(step), "heldout_loss", loss, [])
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "first")


def figures(page):
    found = [ElementTree.fromstring(text) for text in re.findall(r"<figure>.*?</figure>", page, re.DOTALL)]
    return {figure.find("svg/title").text: figure for figure in found}


def test_page_is_self_contained_and_shows_the_numbers(run):
    path = write_report(run)
    page = path.read_text()
    assert path == run / "report.html"
    assert not re.search(r"<script|<link|<img|src=|@import|url\(|https?://", page)
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    assert "&lt;b&gt;.jsonl" in page and "<b>.jsonl" not in page
    found = figures(page)
    assert list(found) == ["Loss", "Gradient norm", "Learning rate", "Speed", "generation: score"]
    line, held = found["Loss"].findall("svg/polyline")
    assert len(line.get("points").split()) == 10 and len(held.get("points").split()) == 2
    assert len(found["Loss"].findall("svg/circle")) == 2
    for section in ("curves", "base-against-tuned", "evaluations", "data", "proofs", "settings"):
        assert f'id="{section}"' in page and f'href="#{section}"' in page
    assert "max_abs_logit_difference" in page and "novel_prompts" in page


def test_wins_and_losses_stand_side_by_side(run):
    page = write_report(run).read_text()
    won = re.search(r"<summary>Won \(6 of 20\)</summary>(.*?)</details>", page, re.DOTALL)[1]
    assert won.count('<div class="pair">') == 6 and "Lost" not in page
    number = int(re.search(r"answer (\d+) of step 10", won)[1])
    assert 10 <= number < 30 and f"answer {number} of step 0" in won
    assert html.escape(f"<i>question {number}</i>") in won and "<i>question" not in won
    assert "Wrong both times (3 of 10)" in page and "Right both times (3 of 10)" in page


def test_no_percentage_stands_alone(run):
    """Every percentage is followed by its interval: in its cell, its tile, or it is one of the bounds."""
    page = write_report(run).read_text()
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page, re.DOTALL)
    assert sum("%" in text for text in cells) == 10
    assert [text for text in cells if "%" in text and "<small>" not in text] == []
    differences = [text for text in cells if "points" in text]
    assert len(differences) == 6 and sum("<small>" in text for text in differences) == 3  # the others: smallest shown
    assert len(figures(page)["generation: score"].findall("svg/line[@class='bar one']")) == 2


def test_two_runs_are_compared(run, tmp_path):
    other = make_run(tmp_path / "second", better=25, rate=1e-3)
    path = write_report(run, other)
    page = path.read_text()
    assert path == run / "report-second.html" and "first against second" in page
    assert len(figures(page)["Gradient norm"].findall("svg/polyline")) == 2
    assert "<th>optimizer.learning_rate</th><td>0.003</td><td>0.001</td>" in page
    assert "Lost (5)" in page
    numbers = report_numbers(run, other)
    assert numbers["paired"]["generation"]["losses"] == 5 and numbers["paired"]["generation"]["wins"] == 0
    assert numbers["config_difference"] == [("optimizer.learning_rate", "0.003", "0.001")]


def test_scores_of_other_settings_are_not_compared(run, tmp_path):
    """Neither base against tuned nor two runs: one line each says why, and no tile calls anything better."""
    other = make_run(tmp_path / "second")
    for folder, step, name in ((run, 0, "exact"), (run, 10, "<maths>"), (other, 10, "exact")):
        path = folder / "eval" / str(step) / "summary.json"
        summary = json.loads(path.read_text())
        summary["generation"]["score_by"] = name
        path.write_text(json.dumps(summary))
    for page in (write_report(run).read_text(), write_report(run, other).read_text()):
        assert page.count("Not compared: score is") == 1 and "&lt;maths&gt;" in page
        assert not re.search(r"\d points", page) and '<div class="pair">' not in page
    assert set(report_numbers(run)["runs"][0]["paired"]["generation"]) == {"n", "refused"}


def test_by_command(run, tmp_path, capsys):
    assert main(["report", str(run), "--out", str(tmp_path / "page.html"), "--json", str(tmp_path / "n.json")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    numbers = json.loads((tmp_path / "n.json").read_text())["runs"][0]
    assert numbers["paired"]["generation"]["difference"] == 0.5 and sorted(numbers["evaluations"]) == ["0", "10"]
    assert main(["report", str(tmp_path)]) == 2


def test_curve_falls_from_left_to_right():
    svg = ElementTree.fromstring(chart("x", [Series("", [(1, 2.0), (5, 1.0)])]))
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in svg.find("svg/polyline").get("points").split())
    assert x0 < x1 and y0 < y1  # y grows downward in an SVG


def test_a_long_curve_keeps_its_peaks():
    points = [(step, 9.0 if step == 7777 else 1.0) for step in range(20_000)]
    short = thinned(points)
    assert len(short) <= MOST + 2 and (7777, 9.0) in short and short == sorted(short)


def test_single_point_and_empty_run(run):
    assert "<circle" in chart("x", [Series("", [(1, 2.0)])]) and chart("x", [Series("", [])]) == ""
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n')
    assert "null" not in write_report(run).read_text().split("<nav>")[0]
    for file in run.glob("eval/*/*"):
        file.unlink()
    (run / "metrics.jsonl").write_text("")
    assert "No step was logged" in write_report(run).read_text()


def test_half_written_files_do_not_break_the_page(run):
    (run / "summary.json").write_text('{"seconds": ')
    (run / "data" / "report.json").write_text("[]")
    assert "Settings" in write_report(run).read_text()


@pytest.mark.parametrize(("file", "content", "said"), [
    ("metrics.jsonl", b'{"step": 1, "loss": 2}\ngarbage\n', r"metrics\.jsonl:2: is no record of a step"),
    ("metrics.jsonl", b'{"step": 1}\n\n\0\0\0\n{"step": 2}\n', r"metrics\.jsonl:3: "),
    ("metrics.jsonl", b'{"loss": 1}\n', r"metrics\.jsonl:1: "), ("metrics.jsonl", b"\xff\n", r"metrics\.jsonl:1: "),
    ("eval/10/summary.json", b"", r"eval/10/summary\.json: is damaged"), ("eval/10/summary.json", b"[]", "found list"),
    ("eval/10/generation.jsonl", b'{}\n{"sc', r"eval/10/generation\.jsonl:2: is no JSON"),
])
def test_damaged_numbers_are_named(run, file, content, said):
    (run / file).write_bytes(content)
    with pytest.raises(InputError, match=said):
        write_report(run)


@pytest.mark.parametrize("loss", [float("inf"), float("nan")], ids=str)
def test_a_loss_without_a_number_is_not_drawn(run, loss):
    for step, value in ((0, 4.0), (10, loss)):
        items = [{"address": f"held:{place}", "category": "sea", "cluster": f"t{place}", "loss": value, "weight": 1.0}
                 for place in range(4)]  # fmt: skip
        summary = {"loss": value, "loss_low": None, "loss_high": None}
        evaluators.write_results(run / "eval" / str(step), "heldout_loss", summary, items)
    page = write_report(run).read_text()
    assert len(figures(page)["Loss"].findall("svg/polyline")[1].get("points").split()) == 1
    assert "difference without an interval on 4 items" in page
    assert not re.search(r"(?:c?[xy][12]?|points)=\"[^\"]*(?:nan|inf)", page)
    assert forest(loss, None, None, 1.0, False).count("<circle") == 0


def test_two_folders_of_one_name_are_told_apart(tmp_path):
    one, two = make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run")
    path = write_report(one, two)
    assert path == one / "report-y-run.html" and "x/run against y/run" in path.read_text()


def test_interval_is_drawn_around_zero():
    assert 'cx="100.0"' in forest(0.0, -0.1, 0.1, 0.1, False)
    assert 'class="sure"' in forest(0.5, 0.4, 0.6, 0.6, True)
    ElementTree.fromstring(forest(0.5, None, None, 0.6, False))


def test_ticks_are_round_and_inside():
    assert ticks(0.0, 10.0) == [0, 2, 4, 6, 8, 10]
    assert ticks(1.93, 2.31) == [2.0, 2.1, 2.2, 2.3]
    assert ticks(1.0, 1.0) == [1.0]


def test_differences_name_what_one_side_lacks():
    assert differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}, "d": "x"}) == [
        ("b.c", "2", "3"), ("d", "\u2013", "x")]  # fmt: skip


def test_a_missing_evaluation_is_a_dash():
    assert "\u2013" in evaluation_table([("a", {"n": 3}), ("b", {})])


def test_evaluations_are_flat_and_ordered(run):
    step, found = read_evaluations(run)[1]
    assert step == 10 and found["heldout_loss/loss"] == 2.0 and found["generation/categories/sea/score"] == 0.5


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="not a run directory"):
        write_report(tmp_path)
