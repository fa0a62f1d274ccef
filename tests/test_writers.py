"""Metrics are one JSON object a line, cut back on resume; event files are what TensorBoard's own format says."""

from __future__ import annotations

import json
import struct
import sys

import pytest

from itune.types import InputError
from itune.writers import Writers, cut_back, dump, mend_metrics, read_metrics, write_atomically


def test_a_line_a_step_and_cut_back_on_resume(tmp_path):
    writers = Writers(tmp_path)
    for step in (10, 20, 30):
        writers.write(step, {"loss": 1 / step, "mfu": None})
    writers.close()
    whole = (tmp_path / "metrics.jsonl").read_text()
    writers = Writers(tmp_path, resumed_step=20)
    writers.write(30, {"loss": 1 / 30, "mfu": None})
    writers.close()
    assert (tmp_path / "metrics.jsonl").read_text() == whole
    assert read_metrics(tmp_path / "metrics.jsonl")[0] == {"step": 10, "loss": 0.1, "mfu": None}


def test_a_fresh_run_keeps_nothing_of_an_older_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    Writers(tmp_path).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_line_cut_short_by_a_crash_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert [record["step"] for record in read_metrics(path)] == [1]
    cut_back(tmp_path, 5)
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n'


@pytest.mark.parametrize("line", [b"garbage", b"\0\0\0", b'{"loss": 1.0}', b"\xff\xfe", b"[3]", b'{"step": "2"}'])
def test_a_run_that_goes_on_cuts_its_metrics_at_the_first_damaged_line(tmp_path, line):
    path, lines = tmp_path / "metrics.jsonl", []
    whole = b'{"step": 1, "loss": 2.0}\n' + line + b'\n{"step": 3, "loss": 1.0}\n'
    path.write_bytes(whole)
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: is no record of a step"):
        read_metrics(path)
    assert [record["step"] for record in mend_metrics(path, lines.append, write=False)] == [1]
    assert path.read_bytes() == whole
    mend_metrics(path, lines.append)
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n' and lines == [lines[0]] * 2
    assert f"{path}:2: is no record of a step; the file is cut there" in lines[0]
    assert mend_metrics(path, lines.append) == read_metrics(path) and len(lines) == 2


def test_evaluations_of_later_steps_are_removed(tmp_path):
    for name in ("0", "20", "30"):
        write_atomically(tmp_path / "eval" / name / "summary.json", "{}")
    cut_back(tmp_path, 20)
    assert sorted(p.name for p in (tmp_path / "eval").iterdir()) == ["0", "20"]


def test_numbers_that_json_cannot_hold_become_null():
    line = dump({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": 2}})
    assert line == '{"a": null, "b": [null, 1.5], "c": {"d": 2}}'


def read_events(path):
    """TFRecords through the reference's crc and the event messages of the same package."""
    pytest.importorskip("tensorboardX")
    from tensorboardX.crc32c import crc32c
    from tensorboardX.proto import event_pb2

    def masked(data):
        crc = crc32c(data)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    data, events = path.read_bytes(), []
    while data:
        head, body = data[:8], data[12 : 12 + struct.unpack("<Q", data[:8])[0]]
        assert data[8:12] == masked(head) and data[12 + len(body) : 16 + len(body)] == masked(body)
        events.append(event_pb2.Event.FromString(body))
        data = data[16 + len(body) :]
    return events


def test_event_file_reads_back_with_the_reference_messages(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # the reference would import it, for seconds
    writers = Writers(tmp_path, tensorboard=True, resumed_step=300)
    writers.write(70000, {"loss": 1.25, "mfu": None})
    writers.write_evaluation(70000, {"heldout_loss/loss": 2.5})
    writers.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    version, session, train, evaluation = read_events(path)
    assert version.file_version == "brain.Event:2" and version.wall_time > 1e9
    assert session.session_log.status == 1 and session.step == 301
    assert train.step == 70000
    assert [(v.tag, v.simple_value) for v in train.summary.value] == [("train/loss", 1.25)]
    assert [(v.tag, v.simple_value) for v in evaluation.summary.value] == [("eval/heldout_loss/loss", 2.5)]


def test_missing_tracker_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"log\.wandb needs the package wandb: pip install 'itune\[wandb\]'"):
        Writers(tmp_path, wandb="project")


def test_tracker_gets_the_same_numbers(tmp_path, monkeypatch):
    import types

    sent, started = [], []
    run = types.SimpleNamespace(log=lambda values, step: sent.append((step, values)), finish=lambda: None)
    module = types.SimpleNamespace(init=lambda **kwargs: started.append(kwargs) or run)
    monkeypatch.setitem(sys.modules, "wandb", module)
    for _ in range(2):
        writers = Writers(tmp_path, wandb="project", config={"seed": 1})
        writers.write(1, {"loss": 2.0, "mfu": None})
        writers.close()
    assert sent[0] == (1, {"train/loss": 2.0})
    assert started[0]["project"] == "project" and started[0]["id"] == started[1]["id"]
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 2.0, "mfu": None}
