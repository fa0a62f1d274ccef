"""Plain lines without a terminal, a bar with one; unknown numbers show as a dash."""

import pytest

from itune.progress import Progress, describe, format_seconds


@pytest.fixture(autouse=True)
def still_clock(monkeypatch):
    monkeypatch.setattr("itune.progress.time.monotonic", lambda: 100.0)


VALUES = {"loss": 1.23456, "learning_rate": 2e-5, "tokens_per_second": 12345.6, "mfu": 0.4123, "memory": 1.2e9}


def test_plain_line_has_no_colour_and_no_bar(capsys):
    progress = Progress(terminal=False)
    progress.begin(40)
    progress.show(20, VALUES)
    progress.log("[note] a line")
    progress.close()
    out = capsys.readouterr().out
    assert out.splitlines() == [
        "step 20/40  loss 1.2346  lr 2.00e-05  12,346 tok/s  mfu 41.2%  1.20 GB  left 0:00:00", "[note] a line",
    ]
    assert "\x1b" not in out


def test_unknown_numbers_show_as_a_dash():
    shown = describe({**VALUES, "mfu": None, "memory": None, "tokens_per_second": None})
    assert shown == ["loss 1.2346", "- tok/s", "mfu -", "- GB", "left -"]
    assert format_seconds(3661.4) == "1:01:01"


def test_bar_in_a_terminal(capsys):
    progress = Progress(terminal=True)
    progress.log("before the bar")
    progress.begin(4, done=1)
    progress.show(2, VALUES)
    progress.advance(3)
    progress.log("[note] a line")
    progress.close()
    out = capsys.readouterr().out
    assert "3/4" in out and "loss 1.2346" in out and "left 0:00:00" in out and "[note] a line" in out


def test_other_processes_are_quiet(capsys):
    progress = Progress(terminal=True, quiet=True)
    progress.begin(4)
    progress.show(2, VALUES)
    progress.log("a line")
    progress.close()
    assert capsys.readouterr().out == ""
