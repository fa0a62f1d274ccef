"""One page that needs nothing else, made from files only."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from itune.report import loss_curve, read_evaluations, ticks, write_report
from itune.types import InputError
from itune.writers import write_atomically


@pytest.fixture
def run(tmp_path):
    lines = [json.dumps({"step": step, "loss": 3.0 / step}) for step in range(1, 11)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "config.json").write_text(json.dumps({"seed": 3, "data": {"train": "<b>.jsonl", "mixture": {}}}))
    for step, loss in ((0, 4.0), (10, 2.0)):
        summary = {"heldout_loss": {"loss": loss, "by_category": {"math": loss + 1}}}
        write_atomically(tmp_path / "eval" / str(step) / "summary.json", json.dumps(summary))
    return tmp_path


def test_page_is_self_contained_and_shows_the_numbers(run):
    path = write_report(run)
    page = path.read_text()
    assert path == run / "report.html"
    assert not re.search(r"<script|<link|src=|https?://", page)
    assert "heldout_loss/by_category/math" in page and "&lt;b&gt;.jsonl" in page and "<b>.jsonl" not in page
    svg = ElementTree.fromstring(re.search(r"<svg.*?</svg>", page, re.DOTALL)[0])
    line = next(element for element in svg if element.get("class") == "train")
    assert len(line.get("points").split()) == 10
    assert len([element for element in svg if element.get("class") == "held"]) == 2


def test_curve_falls_from_left_to_right():
    svg = ElementTree.fromstring(re.search(r"<svg.*?</svg>", loss_curve([(1, 2.0), (5, 1.0)], []), re.DOTALL)[0])
    line = next(element for element in svg if element.get("class") == "train")
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in line.get("points").split())
    assert x0 < x1 and y0 < y1  # y grows downward in an SVG


def test_single_point_and_empty_run(run):
    assert "<polyline" in loss_curve([(1, 2.0)], [])
    (run / "metrics.jsonl").write_text("")
    assert "No step was logged" in write_report(run).read_text()


def test_ticks_are_round_and_inside():
    assert ticks(0.0, 10.0) == [0, 2, 4, 6, 8, 10]
    assert ticks(1.93, 2.31) == [2.0, 2.1, 2.2, 2.3]
    assert ticks(1.0, 1.0) == [1.0]


def test_evaluations_are_flat_and_ordered(run):
    assert read_evaluations(run)[1] == (10, {"heldout_loss/loss": 2.0, "heldout_loss/by_category/math": 3.0})


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="not a run directory"):
        write_report(tmp_path)
