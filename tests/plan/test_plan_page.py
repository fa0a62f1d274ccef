"""docs/plan.md: the formula against the programs that were compiled for it and are kept in docs/plan.json."""

from __future__ import annotations

import json

import pytest
from load_script import load_script


@pytest.fixture(scope="module")
def page():
    return load_script("scripts/plan_table.py")


def test_the_formula_is_near_every_compiled_program(page, tmp_path):
    """Experts among them: all of a layer's are gathered at once."""
    page.write_models(tmp_path)
    rows = json.loads(page.STORE.read_text())
    ratios = {
        target: page.report_of(tmp_path, target, page.formula_report).need.total / row["memory"]["total"]
        for target, row in rows.items()
    }
    assert any("A3B" in target for target in ratios) and sum("LoRA" in target for target in ratios) == len(ratios) / 2
    assert not {target: round(ratio, 3) for target, ratio in ratios.items() if not 0.9 < ratio < 1.1}
