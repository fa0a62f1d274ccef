"""`itune checkpoints`: step, size, verified or damaged, metrics."""

import json

import pytest

from itune.checkpoint.listing import list_checkpoints
from itune.checkpoint.manifest import write_manifest
from itune.cli import main


@pytest.fixture
def workdir(tmp_path):
    for step in (9, 10):
        folder = tmp_path / "checkpoints" / str(step)
        folder.mkdir(parents=True)
        (folder / "run.json").write_text("x" * 1000)
        write_manifest(folder, step=step)
    (tmp_path / "eval" / "10").mkdir(parents=True)
    (tmp_path / "eval" / "10" / "summary.json").write_text(json.dumps({"heldout_loss": {"loss": 1.5}}))
    (tmp_path / "checkpoints" / ".tmp-11").mkdir()
    return tmp_path


def test_rows_by_step_with_size_state_and_metrics(workdir, capsys):
    assert main(["checkpoints", str(workdir), "--json", str(workdir / "out.json")]) == 0
    assert json.loads((workdir / "out.json").read_text()) == [
        {"step": 9, "bytes": 1000, "damage": [], "metrics": {}},
        {"step": 10, "bytes": 1000, "damage": [], "metrics": {"heldout_loss/loss": 1.5}},
    ]
    words = capsys.readouterr().out.splitlines()[2].split()
    assert words == ["10", "0.0", "MB", "verified", "heldout_loss/loss", "1.5"]


def test_damage_is_named_and_the_exit_code_is_1(workdir, capsys):
    (workdir / "checkpoints" / "10" / "run.json").write_text("x" * 999 + "y")
    assert main(["checkpoints", str(workdir)]) == 1
    assert "damaged" in capsys.readouterr().out
    assert "run.json is damaged" in list_checkpoints(workdir)[1]["damage"][0]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"heldout_loss": 3}'])
def test_a_damaged_summary_is_named(workdir, capsys, text):
    (workdir / "eval" / "10" / "summary.json").write_text(text)
    assert main(["checkpoints", str(workdir)]) == 2
    error = capsys.readouterr().err
    assert f"{workdir}/eval/10/summary.json: is damaged; expected a" in error and error.count("\n") == 1


def test_folder_without_checkpoints_is_refused(tmp_path, capsys):
    assert main(["checkpoints", str(tmp_path)]) == 2
    assert "no checkpoints; expected a run directory" in capsys.readouterr().err
