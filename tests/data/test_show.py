"""What `itune data show` and `itune data stats` print and return."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from itune.config import from_dict
from itune.data.show import show, stats
from itune.data.templates import with_template
from itune.types import InputError


@pytest.fixture
def config(make_hf, tmp_path, write_rows):
    with_template(make_hf(), "chatml").hf.save_pretrained(tmp_path / "model")
    one = [{"prompt": f"How many are {i}?", "completion": f"{i} foxes", "task": "count"} for i in range(6)]
    two = [{"prompt": "word " * 60, "completion": "late"}, {"prompt": "q", "completion": "word " * 60}]
    return from_dict({
        "model": {"path": str(tmp_path / "model")},
        "data": {"train": {"short": write_rows(one, "a.jsonl"), "long": write_rows(two, "b.jsonl")}, "max_length": 64,
                 "overlong": "truncate", "cache_dir": str(tmp_path / "cache")},
        "train": {"batch_size": 2},
    })  # fmt: skip


def printed(function, *arguments, terminal=False, **options):
    stream = io.StringIO()
    console = Console(file=stream, width=200, highlight=False, markup=False, force_terminal=terminal)
    return function(*arguments, console=console, **options), stream.getvalue()


def test_show_marks_weights_and_the_cut(config):
    entries, text = printed(show, config)
    assert len(entries) == 3 and "\x1b" not in text
    assert "How many are 0?<|im_end|>\n<|im_start|>assistant\n{+0 foxes<|im_end|>+}" in text
    assert "task=count" in text and "a.jsonl:1" in text and "weight 1: " in text and "; kept" in text
    assert [run["weight"] for run in entries[0]["runs"]] == [0.0, 1.0, 0.0]
    assert sum(len(run["token_ids"]) for run in entries[0]["runs"]) == entries[0]["tokens"]
    late, text = printed(show, config, source="long", limit=2)
    assert "left out: no target within data.max_length (64 tokens)" in text and "{-" in text
    assert late[0]["cut_at"] == 64 and "cut to data.max_length" in late[1]["fate"]
    coloured = printed(show, config, terminal=True)[1]
    assert "\x1b[1;32m0 foxes" in coloured and "{+" not in coloured


def test_show_finds_rows_by_number_and_source(config):
    entries, _ = printed(show, config, index=5)
    assert entries[0]["address"].endswith("a.jsonl:6")
    with pytest.raises(InputError, match="there is no row 8; expected one from 0 to 7"):
        printed(show, config, index=8)
    with pytest.raises(InputError, match="no source is called log; sources: short, long"):
        printed(show, config, source="log")
    with pytest.raises(InputError, match=r"model\.path is empty"):
        show(from_dict({"data": {"train": "x.jsonl"}}))


def test_stats_are_those_of_training(config):
    numbers, text = printed(stats, config)
    assert numbers["rows"] == 8 and numbers["examples"] == 7 and numbers["truncated"] == 1
    assert numbers["dropped"] == {"no target within data.max_length (64 tokens)": 1}
    assert numbers["supervised_share"] == numbers["supervised_tokens"] / numbers["tokens"]
    assert numbers["length_percentiles"]["100"] == 64
    assert numbers["steps_per_epoch"] == numbers["total_steps"] > 0
    for word in ("source short: 6 rows: 6 kept", "packed", f"steps: {numbers['steps_per_epoch']} an epoch", "p50"):
        assert word in text
