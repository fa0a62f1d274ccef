import dataclasses
import json
import sys
import types

import pytest

from itune import decode
from itune.config import from_dict
from itune.evaluators import stats
from itune.evaluators.generation import Evaluator, repetition
from itune.types import Conversation, InputError, Message, RunError

OPTIONS = {"batch_size": 4, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def answered(model, params, tokenizer, dataset):
    """The same items; what the model answers is made the reference of every second one."""
    answers = decode.generate(model, params, tokenizer, dataset.held_out_conversations, max_new_tokens=6, batch_size=4)
    changed = []
    for number, (conversation, answer) in enumerate(zip(dataset.held_out_conversations, answers, strict=True)):
        reference = answer if number % 2 == 0 else answer + " more"
        messages = (*conversation.messages[:-1], Message("assistant", reference))
        changed.append(dataclasses.replace(conversation, messages=messages))
    return types.SimpleNamespace(held_out_conversations=changed), answers


def run(model, params, tokenizer, dataset, **settings):
    held_out_by = settings.pop("held_out_by", "")
    config = from_dict({"data": {"held_out_by": held_out_by}, "eval": {**OPTIONS, **settings}})
    return Evaluator(config).run(model, params, tokenizer, dataset)


def test_scores_and_intervals(model, params, tokenizer, answered):
    dataset, answers = answered
    summary, items = run(model, params, tokenizer, dataset, held_out_by="task")
    assert [item["answer"] for item in items] == answers
    assert [item["score"] for item in items] == [number % 2 == 0 for number in range(11)]
    assert (summary["n"], summary["correct"], summary["score"]) == (11, 6, 6 / 11)
    assert (summary["low"], summary["high"]) == stats.wilson(6, 11)
    assert summary["clusters"] == 4 and summary["cluster_low"] <= 6 / 11 <= summary["cluster_high"]
    sea = [item for item in items if item["category"] == "sea"]
    assert summary["categories"]["sea"]["n"] == len(sea) == 4
    assert summary["categories"]["sea"]["correct"] == sum(item["score"] for item in sea)
    json.dumps(items)


def test_an_item_shows_what_was_asked(model, params, tokenizer, answered):
    dataset, _ = answered
    item = run(model, params, tokenizer, dataset)[1][3]
    asked, expected = dataset.held_out_conversations[3].messages
    assert item["prompt"] == asked.content and item["reference"] == expected.content
    assert item["messages"] == [{"role": "user", "content": asked.content}]
    assert item["address"] == "held.jsonl:4" and item["metadata"]["task"] == "task 3"
    assert item["tokens"] <= 6 and isinstance(item["stopped"], bool) and item["cluster"] == "item 3"


def test_the_users_checker_decides(model, params, tokenizer, answered, monkeypatch):
    module = types.ModuleType("users_checker")
    module.long = lambda item, answer: len(item["prompt"].split()) > 2
    module.broken = lambda item, answer: item["no such key"]
    monkeypatch.setitem(sys.modules, "users_checker", module)
    summary, items = run(model, params, tokenizer, answered[0], score="users_checker:long")
    assert [item["score"] for item in items] == [len(item["prompt"].split()) > 2 for item in items]
    assert summary["exact"] == 6 / 11 and summary["score_by"] == "users_checker:long"
    with pytest.raises(RunError, match=r"users_checker:broken failed on held.jsonl:1 with KeyError: 'no such key'"):
        run(model, params, tokenizer, answered[0], score="users_checker:broken")
    with pytest.raises(InputError, match="cannot import"):
        run(model, params, tokenizer, answered[0], score="users_chekcer:long")


def test_a_limit_takes_the_same_items_each_time(model, params, tokenizer, answered):
    first, again = (run(model, params, tokenizer, answered[0], limit=4)[1] for _ in range(2))
    assert len(first) == 4 and first == again
    assert [item["address"] for item in first] != [f"held.jsonl:{i}" for i in range(1, 5)]


def test_prompts_beyond_the_context_are_counted(model, params, tokenizer, answered):
    long = Conversation((Message("user", "sun " * 80), Message("assistant", "moon")))
    dataset = types.SimpleNamespace(held_out_conversations=[*answered[0].held_out_conversations, long])
    summary, items = run(model, params, tokenizer, dataset)
    assert summary["too_long"] == 1 and summary["n"] == len(items) == 11


def test_what_is_shown_is_what_was_asked_and_without_an_answer_nothing_is(model, params, tokenizer, answered):
    user, answer, then = Message("user", "sun"), Message("assistant", "moon"), Message("assistant", "stars")
    rows = [Conversation(messages) for messages in ((user, answer, then), (user, answer, user), (answer,))]
    dataset = types.SimpleNamespace(held_out_conversations=rows)
    summary, [item] = run(model, params, tokenizer, dataset)
    assert (summary["n"], summary["no_answer"]) == (1, 2)
    assert item["messages"] == [{"role": "user", "content": "sun"}] and item["reference"] == "stars"
    assert item["answer"] == decode.generate(model, params, tokenizer, [item["messages"]], 6)[0]


def test_measures_baselines_and_parts(model, params, tokenizer, answered):
    dataset, _ = answered
    voices = [dataclasses.replace(c, metadata={**c.metadata, "voice": f"v{n % 2}"}) for n, c in
              enumerate(dataset.held_out_conversations)]  # fmt: skip
    other = dataclasses.replace(voices[0], address=dataclasses.replace(voices[0].address, source="second"))
    dataset = types.SimpleNamespace(held_out_conversations=[*voices, other])
    summary, items = run(model, params, tokenizer, dataset, groups=["voice"])
    assert summary["sources"]["held"]["n"] == 11 and summary["sources"]["second"]["n"] == 1
    assert summary["groups"]["voice"]["v0"]["n"] + summary["groups"]["voice"]["v1"]["n"] == 12
    assert (summary["exact_low"], summary["exact_high"]) == stats.wilson(7, 12)
    assert items[0]["rouge_l"] == 1.0 and summary["rouge_l_low"] <= summary["rouge_l"] <= summary["rouge_l_high"]
    copied = sum(item["prompt"] == item["reference"] for item in items)
    assert summary["baselines"]["copy"] == {"n": 12, "score": copied / 12, "low": stats.wilson(copied, 12)[0],
                                            "high": stats.wilson(copied, 12)[1]}  # fmt: skip
    sky, sea = ([item["reference"] for item in items if item["category"] == name] for name in ("sky", "sea"))
    most = max(map(sky.count, sky)) + max(map(sea.count, sea))
    assert summary["baselines"]["majority"]["score"] == most / 12


def test_a_score_may_be_a_share(model, params, tokenizer, answered):
    summary, items = run(model, params, tokenizer, answered[0], score="rouge_l")
    assert [item["score"] for item in items] == [item["rouge_l"] for item in items]
    assert summary["low"] < summary["score"] < summary["high"]


def test_repetition():
    assert repetition([1, 2, 3, 4, 5, 6]) == 0 and repetition([1, 2]) == 0
    assert repetition([7] * 13) == 0.9 and repetition([1, 2] * 6) == 7 / 9
