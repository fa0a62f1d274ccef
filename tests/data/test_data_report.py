"""`itune data report` and `split`: the page stands alone, counts add up, the files share nothing, the proof says so."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from itune.config import from_dict
from itune.data import report as verbs
from itune.data.dataset import prepare
from itune.data.page import bars, page, table
from itune.data.templates import load_tokenizer, with_template
from itune.types import InputError, RunError

THINGS = ["anchor", "barley", "copper", "dynamo", "estuary", "falcon", "granite", "hammock", "isotope", "juniper"]


def row(i: int, **more) -> dict:
    asked = f"Which {THINGS[i % 10]} stands beside the {THINGS[i // 10 % 10]} of house {i * 37 % 101}?"
    return {"prompt": asked, "completion": f"The {THINGS[(i + 3) % 10]} of house {i}.", "task": f"t{i % 10}", **more}


@pytest.fixture
def config(make_hf, tmp_path, write_rows):
    with_template(make_hf(), "chatml").hf.save_pretrained(tmp_path / "model")
    rows = [row(i, voice=f"v{i % 3}") for i in range(80)]
    rows += [rows[0], row(81, completion="TODO <script>alert(1)</script>"), row(84, completion="x " * 400)]
    rows += [row(85, completion="Write to jane.roe@mail-post.org for it.")]  # of tasks that the seed does not hold out

    def make(**data):
        section = {"train": write_rows(rows), "max_length": 128, "cache_dir": str(tmp_path / "cache"),
                   "held_out_by": "task", "held_out_share": 0.2, "overlap_cosine": 0.95, "group_field": "voice"}
        return from_dict({"model": {"path": str(tmp_path / "model")}, "train": {"batch_size": 4},
                          "data": section | data})  # fmt: skip

    return make


class Tags(HTMLParser):
    """Open elements must close in order; what would load something is noted."""

    VOID = ("meta", "line", "br")

    def __init__(self):
        super().__init__()
        self.open, self.loads = [], []

    def handle_starttag(self, tag, attrs):
        self.loads += [value for name, value in attrs if name in ("src", "href", "data", "action")]
        self.loads += [tag] if tag in ("script", "link", "iframe", "img") else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("html", "body"):
            return
        assert self.open and self.open.pop() == tag, tag


def test_the_page_stands_alone_and_tells_everything(config, tmp_path):
    said = []
    found = verbs.report(config(), str(tmp_path / "out"), log=said.append)
    text = (tmp_path / "out" / "report.html").read_text()
    tags = Tags()
    tags.feed(text)
    assert tags.loads == [] and not re.search(r"https?://|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text and "<script>alert" not in text
    for word in ("Rows in and out", "Tokens an example", "placeholder", "e-mail address", "longer than data.max_length",
                 "An epoch by category", "Nearest training row", "effective number", "English"):  # fmt: skip
        assert word in text, word
    assert found == json.loads((tmp_path / "out" / "report.json").read_text())
    counts = found["sources"]["rows"]
    dropped = sum(value for name, value in counts.items() if name.startswith("dropped: "))
    assert counts["rows"] == 84 == counts["kept"] + counts["held out"] + dropped and dropped == 1 + (
        found["held_out"]["training_rows_removed"])  # fmt: skip
    assert found["mixture"]["by_source"]["draws"] == found["examples"] == sum(found["lengths"]["tokens"]["counts"])
    assert found["quality"]["rows_found"]["placeholder"] == 1 == found["quality"]["rows_found"]["personal"]
    for name in ("rejects.jsonl", "findings.jsonl", "heldout_proof.json"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    assert any("held out" in line for line in said)


def test_the_printed_counts_add_up(config, write_rows, tmp_path):
    """Rows are trained on, held out, or left out for a reason; so are those held out, which may be too long too."""
    rows = [row(i, voice="x") for i in range(40)] + [row(i, completion="x " * 400) for i in range(40, 50)]
    chosen, said = config(held_out_by="", held_out_share=0.5), []
    write_rows(rows)  # in place of those of the config
    verbs.report(chosen, str(tmp_path / "out"), said.append)
    whole = re.match(
        r"data: (\d+) rows -> (\d+) examples, .* left out: (\d+) longer than data.max_length \(128 tokens\)"
        r"(?:, (\d+) [^;]*)?; held out: (\d+) rows -> (\d+) items, left out: (\d+) longer than",
        said[0],
    )
    assert whole, said[0]
    read, trained, long, other, held, items, held_long = (int(each or 0) for each in whole.groups())
    assert read == 50 == trained + long + other + held
    assert held == items + held_long and min(long, held_long) > 0 and long + held_long == 10
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"Held out and not judged by: {held_long} longer than data.max_length (128 tokens)." in page


def test_a_limit_that_is_exceeded_is_on_the_page_and_in_the_exit(config, tmp_path):
    with pytest.raises(RunError, match=r"beyond 1 of the limits: data\.limits\.personal"):
        verbs.report(config(limits={"personal": 0.0}), str(tmp_path / "out"), log=lambda _: None)
    text = (tmp_path / "out" / "report.html").read_text()
    assert "data.limits.personal" in text and 'class="fault">exceeded' in text
    with pytest.raises(InputError, match=r"data\.limits\.personal"):
        made = config(limits={"personal": 0.0})
        prepare(made.data, load_tokenizer(made.model.path), log=lambda _: None)


def test_split_writes_files_that_share_nothing(config, tmp_path):
    made = config(quality={"exact_duplicate": "drop", "placeholder": "drop"})
    found = verbs.split(made, str(tmp_path / "parts"), log=lambda _: None)
    train, held = ([json.loads(line) for line in (tmp_path / "parts" / name).read_text().splitlines()]
                   for name in ("train.jsonl", "eval.jsonl"))  # fmt: skip
    assert (len(train), len(held)) == (found["train"], found["eval"])
    assert len(train) + len(held) + sum(found["dropped"].values()) == 84
    assert not {r["task"] for r in train} & {r["task"] for r in held}
    assert all(r["source"] == "rows" and re.search(r"rows\.jsonl:\d+$", r["address"]) for r in train + held)
    proof = json.loads((tmp_path / "parts" / "heldout_proof.json").read_text())
    assert len(proof["items"]) == len(held) and proof["train_rows"] == len(train)
    rejects = [json.loads(line) for line in (tmp_path / "parts" / "rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == sum(found["dropped"].values())
    # the files are what a run reads: nothing more is removed, and the proof is the same
    again = config(train=str(tmp_path / "parts" / "train.jsonl"), eval=str(tmp_path / "parts" / "eval.jsonl"),
                   held_out_share=0.0, max_length=2048, source_field="source")  # fmt: skip
    dataset = prepare(again.data, load_tokenizer(again.model.path), log=lambda _: None)
    assert len(dataset.train) == len(train) and dataset.report["held_out"]["training_rows_removed"] == 0
    scores = [item["score"] for item in json.loads((dataset.folder / "heldout_proof.json").read_text())["items"]]
    assert scores == [item["score"] for item in proof["items"]] and dataset.train.source_names == ("rows",)


def test_split_fails_closed_and_says_what_is_missing(config, tmp_path):
    with pytest.raises(InputError, match=r"data\.novel_min: \d+ different held-out prompts remain"):
        verbs.split(config(novel_min=500), str(tmp_path / "parts"), log=lambda _: None)
    assert not (tmp_path / "parts").exists()
    with pytest.raises(InputError, match="nothing says what to hold out"):
        verbs.split(config(held_out_share=0.0), str(tmp_path / "parts"))


def test_split_never_replaces_what_is_not_its_own(config, tmp_path):
    parts = tmp_path / "parts"
    parts.mkdir()
    for name in ("train", "eval"):  # written by somebody else
        (parts / f"{name}.jsonl").write_text("mine\n")
        with pytest.raises(InputError, match=rf"parts/{name}\.jsonl: is there, and no part of an earlier split"):
            verbs.split(config(), str(parts))
        assert (parts / f"{name}.jsonl").read_text() == "mine\n" and [*parts.iterdir()] == [parts / f"{name}.jsonl"]
        (parts / f"{name}.jsonl").unlink()
    for _ in range(2):  # its own are replaced
        verbs.split(config(), str(parts), log=lambda _: None)
    before = (parts / "train.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"parts/train\.jsonl: is read as data; choose another folder for --out"):
        verbs.split(config(train=str(parts / "*.jsonl"), eval=str(parts / "eval.jsonl")), str(parts))
    assert (parts / "train.jsonl").read_bytes() == before


def test_tables_and_bars_hold_any_text():
    assert "&lt;b&gt;" in table(["<b>"], [["<i>", 3, 0.25, None]]) and table(["a"], []) == ""
    tags = Tags()
    tags.feed(bars("<t>", ["1", "2"], [[0, 0]]) + bars("u", ["1", "2"], [[3, 1], [2, 2]]))
    assert tags.open == []


def test_a_page_of_nothing_held_out_and_nothing_found(make_hf, write_rows, tmp_path):
    tokenizer = with_template(make_hf(), "chatml")
    section = from_dict({"data": {"train": write_rows([row(1)]), "cache_dir": str(tmp_path)}}).data
    dataset = prepare(section, tokenizer, log=lambda _: None)
    assert "Nothing is held out" in page(dataset.report, [], {})
