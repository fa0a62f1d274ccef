"""The data section end to end: filters, limits, over-long rows, benchmarks, sources by field, the record."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from itune.config import DataSection, from_dict
from itune.data.dataset import prepare
from itune.data.render import render
from itune.data.templates import with_template
from itune.types import InputError

TOPICS = ["river", "harvest", "engine", "violin", "glacier", "market", "lantern", "vaccine", "harbour", "poem"]
VERBS = ["Describe", "Compare", "Explain", "Sketch", "Summarise", "Question", "Defend", "Trace", "Imagine", "Rank"]


def qa(i: int, **more) -> dict:
    prompt = f"{VERBS[i % 10]} the {TOPICS[i // 10 % 10]} of {TOPICS[(3 * i + 1) % 10]} number {i} in plain words."
    return {"prompt": prompt, "completion": f"It is number {i}, the {TOPICS[i % 10]}.", **more}


@pytest.fixture(scope="module")
def tokenizer(make_hf):
    return with_template(make_hf(), "chatml")


@pytest.fixture
def run(tmp_path, tokenizer):
    def go(train, check=True, **keys):
        section = from_dict({"data": {"train": train, "max_length": 256, "cache_dir": str(tmp_path / "cache"), **keys}})
        return prepare(section.data, tokenizer, log=lambda _: None, check=check)

    return go


CAPITAL = {"prompt": "What is the capital of Norway?", "completion": "Oslo."}


def only_long(conversation):
    """A user's predicate: rows whose answer has more than one digit."""
    return True if len([c for c in conversation.messages[-1].content if c.isdigit()]) > 1 else "short number"


def test_filters_drop_what_they_are_told_to_and_keep_a_record(run, write_rows, tmp_path):
    rows = [qa(i) if i != 4 else CAPITAL for i in range(40)]
    rows += [rows[3], CAPITAL | {"completion": "Bergen."}, qa(50, completion="TODO")]
    rows += [qa(51, completion="Sure, the key is sk-proj-" + "aB3dE5fG7hJ9kL1mN3pQ" * 2)]
    path = write_rows(rows)
    kept = run(path)
    assert len(kept.train) == 44 and kept.report["dropped"] == {} and list(kept.rejects()) == []
    found = kept.report["quality"]["rows_found"]
    assert (found["exact_duplicate"], found["contradiction"], found["placeholder"], found["secret"]) == (1, 1, 1, 1)
    actions = {"exact_duplicate": "drop", "contradiction": "drop", "placeholder": "drop", "secret": "drop"}
    dropped = run(path, quality=actions)
    report = dropped.report
    assert report["dropped"] == {"exact duplicate": 1, "contradiction": 2, "placeholder": 1, "secret": 1}
    assert report["rows"] == 44 == report["kept"] + 5 and len(dropped.train) == 39 == report["examples"]
    assert dropped.fingerprint != kept.fingerprint
    left = {dropped.train.address(i).line for i in range(len(dropped.train))}
    assert left == set(range(1, 45)) - {5, 41, 42, 43, 44}
    dropped.write_record(tmp_path / "record", DataSection())
    rejects = [json.loads(line) for line in (tmp_path / "record" / "rejects.jsonl").read_text().splitlines()]
    assert [r["address"].rsplit(":", 1)[1] for r in rejects] == ["5", "41", "42", "43", "44"]
    assert all(r["reasons"] and r["messages"][0]["content"] for r in rejects)
    assert "sk-proj" not in json.dumps(rejects) and "other" in rejects[0]["reasons"][0]
    findings = [json.loads(line) for line in (tmp_path / "record" / "findings.jsonl").read_text().splitlines()]
    assert Counter(f["filter"] for f in findings)["placeholder"] == 1 and {f["row"] for f in findings} >= {"dropped"}
    assert json.loads((tmp_path / "record" / "report.json").read_text())["examples"] == 39


def test_a_majority_stays_and_a_predicate_decides(run, write_rows):
    rows = [qa(i) if i != 13 else CAPITAL for i in range(10, 30)]
    rows += [CAPITAL, CAPITAL | {"completion": "Bergen."}]
    majority = run(write_rows(rows), quality={"contradiction": "majority"})
    assert majority.report["dropped"] == {"contradiction": 1}
    assert {majority.train.address(i).line for i in range(len(majority.train))} == set(range(1, 22))
    path = write_rows([qa(i) for i in range(20)], "b.jsonl")
    chosen = run(path, predicate=f"{__name__}:only_long")
    assert chosen.report["dropped"] == {"predicate": 10}
    assert {r["reason"] for r in chosen.rejects()} == {"short number"}
    with pytest.raises(InputError, match=r"data\.predicate: .* has no function 'absent'"):
        run(path, predicate=f"{__name__}:absent")


def test_limits_stop_before_anything_is_trained(run, write_rows):
    path = write_rows([qa(i) for i in range(18)] + [qa(0), qa(1)])
    limits = {"duplicates": 0.05, "secrets": 0.0, "examples": 10, "supervised": 0.99}
    with pytest.raises(InputError) as caught:
        run(path, limits=limits)
    assert "beyond 2 of the limits" in str(caught.value)
    assert "data.limits.duplicates: 0.1, expected at most 0.05" in str(caught.value)
    assert "data.limits.supervised" in str(caught.value)
    assert len(run(path, limits=limits, check=False).train) == 20  # a report of them can still be made
    assert len(run(path, limits={"duplicates": 0.1, "examples": 20}).train) == 20
    with pytest.raises(InputError, match=r"data\.limits\.dropped: 0\.2"):
        run(write_rows([qa(i, completion="x " * 400 if i < 4 else "yes") for i in range(20)], "c.jsonl"),
            limits={"dropped": 0.1})  # fmt: skip


def test_reworded_held_out_prompts_leave_training_and_the_proof_says_so(run, write_rows, tmp_path):
    rows = [qa(i, task=f"t{i % 10}") for i in range(100)]
    held = [row for row in rows if row["task"] == "t3"]
    wrapped = [row | {"prompt": f"Please, could you help? {row['prompt']} Thank you!", "task": "x"} for row in held[:3]]
    path, items = write_rows([r for r in rows if r["task"] != "t3"] + wrapped), write_rows(held, "eval.jsonl")
    dataset = run(path, eval=items, overlap_cosine=0.9)
    assert dataset.report["dropped"].get("asks what a held-out item asks", 0) >= 3
    assert not {"x"} & {dataset.train.metadata(i).get("task") for i in range(len(dataset.train))}
    dataset.write_record(tmp_path / "record", DataSection())
    proof = json.loads((tmp_path / "record" / "heldout_proof.json").read_text())
    assert len(proof["items"]) == 10 == proof["novel_prompts"] and proof["train_rows"] == len(dataset.train)
    assert all(item["nearest"] and item["score"] < 0.9 and len(item["sha256"]) == 64 for item in proof["items"])
    other = run(path, eval=items, overlap_cosine=0.9, overlap_removes="held_out")
    assert len(other.train) == 93 and len(other.held_out) <= 7 == len(other.held_out) + sum(
        other.report["held_out"]["report"]["dropped"].values()) - 3  # fmt: skip
    with pytest.raises(InputError, match=r"data\.novel_min: \d different held-out prompts remain"):
        run(path, eval=items, overlap_cosine=0.9, overlap_removes="held_out", novel_min=8)


def test_benchmarks_are_not_trained_on(run, write_rows):
    rows = [qa(i) for i in range(60)]
    bench = [{"question": rows[7]["prompt"].upper(), "answer": "7"}, {"question": "Who sings at dawn?", "answer": "a"}]
    dataset = run(write_rows(rows), benchmarks={"dawn": write_rows(bench, "bench.jsonl")}, overlap_cosine=0.95)
    assert dataset.report["benchmarks"] == {"dawn": {"items": 2, "items_matched": 1, "rows_removed": 1}}
    assert dataset.report["dropped"] == {"asks what a benchmark asks (dawn)": 1} and len(dataset.train) == 59
    with pytest.raises(InputError, match=r"bench2\.jsonl:1: no field with a question \(fields: a\)"):
        run(write_rows(rows), benchmarks=write_rows([{"a": "b"}], "bench2.jsonl"))


def test_sources_by_field_carry_weights_and_categories(run, write_rows):
    rows = [qa(i, origin="books" if i % 2 else "web", voice=f"v{i % 4}") for i in range(20)]
    dataset = run(write_rows(rows), source_field="origin", source_weights={"books": 0.25}, group_field="voice",
                  categories={"web": "creative"})  # fmt: skip
    assert set(dataset.train.source_names) == {"books", "web"}
    for i in range(20):
        assert set(dataset.train[i].loss_weights.tolist()) == {0.0, 0.25 if i % 2 else 1.0}
    assert dataset.report["voices"]["coverage"]["effective"] == pytest.approx(4)
    assert dataset.report["warnings"] == []
    assert dataset.report["categories"]["by_source"]["web"] == {"creative": 10}
    with pytest.raises(InputError, match=r"no source is called book \(nearest: books\)"):
        run(write_rows(rows), source_field="origin", source_weights={"book": 2.0})
    with pytest.raises(InputError, match=r"rows\.jsonl:1: nothing: missing, and data\.source_field names it"):
        run(write_rows(rows), source_field="nothing")


def test_a_field_that_no_row_has_is_warned_of_each_time(write_rows, tmp_path, tokenizer):
    keys = {"train": write_rows([qa(i, voice=f"v{i % 4}") for i in range(8)]), "group_field": "voices",
            "rating_field": "q", "max_length": 256, "cache_dir": str(tmp_path / "cache")}  # fmt: skip
    for _ in range(2):  # made, and from the cache
        lines = []
        prepare(from_dict({"data": keys}).data, tokenizer, log=lines.append)
        said = [line for line in lines if line.startswith("warning")]
        assert "data.group_field: no training row has a field 'voices' (nearest: voice)" in said[0]
        assert "data.rating_field: no training row has a field 'q' (there are " in said[1] and len(said) == 2


def long_chat(turns: int, words: int = 20) -> dict:
    messages = [{"role": "system", "content": "Be brief."}]
    for i in range(turns):
        messages += [{"role": "user", "content": f"ask{i} " + "why " * words},
                     {"role": "assistant", "content": f"told{i} " + "so " * words}]  # fmt: skip
    return {"messages": messages}


def test_overlong_conversations_lose_whole_turns_or_become_several(run, write_rows, tokenizer):
    row = long_chat(6)
    path, whole = write_rows([long_chat(1), row]), len(render(row["messages"], tokenizer).token_ids)
    assert whole > 700
    dropped = run(path, overlong="drop")
    assert len(dropped.train) == 1 and dropped.report["dropped"] == {"longer than data.max_length (256 tokens)": 1}
    cut = run(path, overlong="truncate")
    messages = row["messages"]
    start = next(i for i in range(1, 13, 2)
                 if len(render([messages[0], *messages[i:]], tokenizer).token_ids) <= 256)  # fmt: skip
    expected = render([messages[0], *messages[start:]], tokenizer)
    assert start > 1 and np.array_equal(cut.train[1].token_ids, expected.token_ids)
    assert np.array_equal(cut.train[1].loss_weights, expected.loss_weights)
    source = cut.report["sources"]["rows"]
    assert source["truncated"] == 1 and source["truncated_tokens"] == whole - len(expected.token_ids)
    kept = run(path, overlong="keep_start").train[1]
    assert np.array_equal(kept.token_ids, render(messages, tokenizer).token_ids[:256]) and kept.loss_weights[1:].any()
    split = run(path, overlong="split")
    examples = [split.train[i] for i in range(len(split.train))]
    told = [tokenizer.decode(example.token_ids[example.loss_weights > 0]) for example in examples]
    assert [n for text in told[1:] for n in range(6) if f"told{n} " in text] == list(range(6))
    assert all(tokenizer.decode(split.train[i].token_ids).startswith("<|im_start|>system") for i in range(len(told)))
    assert split.train.lengths.max() <= 256 and split.report["sources"]["rows"]["split"] == 1
    assert split.report["lost_targets"] == 0 and split.report["kept"] == 2 and split.report["examples"] == len(told)
    last = run(path, overlong="split", train_on="last")
    assert len(last.train) == 2 and "told5" in tokenizer.decode(last.train[1].token_ids)


def test_no_policy_leaves_a_part_without_a_target(run, write_rows):
    def one(prompt: str, answer: str) -> dict:
        return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}

    prompt_too_long, answer_too_long = one("x " * 400, "yes"), one("x", "yes " * 400)
    middle = long_chat(3)
    middle["messages"][3]["content"] = "why " * 400
    for policy, examples, dropped in (("truncate", 2, 1), ("split", 3, 1), ("keep_start", 2, 1)):
        dataset = run(write_rows([prompt_too_long, answer_too_long, middle]), overlong=policy)
        assert len(dataset.train) == examples and sum(dataset.report["dropped"].values()) == dropped
        assert all(dataset.train[i].loss_weights[1:].any() for i in range(examples))
        assert dataset.report["lost_targets"] > 100
    with pytest.raises(InputError, match=r"data\.overlong"):
        run(write_rows([middle]), overlong="cut")
