"""Formats: four shapes of one exchange give one conversation; every fault names row and field."""

from __future__ import annotations

import pytest

from itune.data.formats import check_fields, convert, detect_format
from itune.data.sources import Row
from itune.types import Address, InputError

AT = Address("s", "f.jsonl", 7)
SHAPES = {
    "messages": {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    "alpaca": {"instruction": "Q", "input": "", "output": "A"},
    "prompt_completion": {"prompt": "Q", "completion": "A"},
}


def read(fields, name=None, **field_map):
    row = Row(AT, fields)
    return convert(row, name or detect_format([row], field_map), field_map)


@pytest.mark.parametrize("name", SHAPES)
def test_each_shape_is_detected_and_read(name):
    assert detect_format([Row(AT, SHAPES[name])]) == name
    conversation = read({**SHAPES[name], "task": "t", "score": 0.5, "nested": {"a": 1}})
    assert [(m.role, m.content) for m in conversation.messages] == [("user", "Q"), ("assistant", "A")]
    assert conversation.metadata == {"task": "t", "score": 0.5} and conversation.address == AT


@pytest.mark.parametrize("odd", [0, 2])
def test_the_first_row_of_another_format_is_named(odd):
    rows = [Row(Address("s", "f.jsonl", line), SHAPES["alpaca"]) for line in (1, 2, 3)]
    rows[odd] = Row(rows[odd].address, {"question": "Q", "answer": "A"})
    found = rf"^f\.jsonl:{odd + 1}: the row has the fields answer, question"
    with pytest.raises(InputError, match=rf"{found}, others of the first 3 rows those of alpaca; expected those"):
        detect_format(rows)
    with pytest.raises(InputError, match=rf"{found}; expected those"):
        detect_format([rows[odd]])


def test_variants():
    alpaca = read({"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief."})
    assert [(m.role, m.content) for m in alpaca.messages] == [
        ("system", "Be brief."), ("user", "Add.\n\n1 2"), ("assistant", "3")]  # fmt: skip
    lists = read({"prompt": SHAPES["messages"]["messages"][:1], "completion": SHAPES["messages"]["messages"][1:]})
    assert [m.role for m in lists.messages] == ["user", "assistant"]
    mapped = read({"question": "Q", "answer": "A"}, prompt="question", completion="answer")
    assert [m.content for m in mapped.messages] == ["Q", "A"] and mapped.metadata == {}
    texts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    parts = read({"messages": [{"role": "user", "content": texts},
                               {"role": "assistant", "content": "c", "weight": 0.5}]})  # fmt: skip
    assert parts.messages[0].content == "ab" and parts.messages[1].weight == 0.5


def test_an_answer_in_the_prompt_is_no_target():
    """As with TRL's completion_only_loss, unless the row gives it a weight."""
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "bad"},
             {"role": "assistant", "content": "good", "weight": 2}, {"role": "user", "content": "Again?"}]
    found = read({"prompt": turns, "completion": [{"role": "assistant", "content": "A"}]})
    assert [m.weight for m in found.messages] == [None, 0.0, 2.0, None, None]


@pytest.mark.parametrize("row", [
    {"messages": [{"role": "user", "content": "raw", "clean": "Q"}, {"role": "assistant", "content": "raw",
                                                                    "clean": "A"}]},
    {"conversations": [{"from": "human", "value": "Q", "role": "bot", "content": "raw"},
                       {"from": "gpt", "value": "A", "role": "bot", "content": "raw"}]},
])
def test_what_another_field_stands_for_is_not_rendered(row):
    """Templates read role and content: no field of the row's may take their place."""
    fields = {"content": "clean"} if "messages" in row else {}
    found = read(row, **fields)
    assert [m.content for m in found.messages] == ["Q", "A"]
    assert not any({"role", "content"} & set(m.extra) for m in found.messages)


def test_metadata_can_be_written():
    found = read({**SHAPES["messages"], "task": "a\ud800", "b\udfff": 1})
    assert found.metadata == {"task": "a\\ud800", "b\\udfff": 1}


def test_tool_calls_stay_with_their_message():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    found = read({"messages": [
        {"role": "user", "content": "1+1"}, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "1"}, {"role": "assistant", "content": "2", "name": None},
    ], "tools": [{"type": "function", "function": {"name": "add"}}]})  # fmt: skip
    assert found.messages[1].content == ""
    assert found.messages[1].extra["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert found.messages[2].extra == {"tool_call_id": "1"} and found.messages[3].extra == {}
    assert found.metadata["tools"][0]["function"]["name"] == "add"


def user(**change):
    return {"messages": [{"role": "user", "content": "Q", **change}, {"role": "assistant", "content": "A"}]}


FAULTS = {
    "unknown role": (user(role="asistant"), r"messages\[0\]\.role: unknown role 'asistant' \(nearest: assistant\)"),
    "role of wrong type": (user(role=3), r"messages\[0\]\.role: unknown role 3"),
    "null content": (user(content=None), r"messages\[0\]\.content: found null; expected text"),
    "int content": (user(content=3), r"messages\[0\]\.content: found a number"),
    "image part": (user(content=[{"type": "image_url"}]), r"messages\[0\]\.content: found parts of type image_url"),
    "negative weight": (user(weight=-1), r"messages\[0\]\.weight: found -1"),
    "lone surrogate": (user(content="a\ud800"), r"messages\[0\]\.content: found the lone surrogate U\+D800"),
    "huge weight": (user(weight=1e39), r"messages\[0\]\.weight: found 1e\+39; expected a number from 0 to 1e\+09"),
    "surrogate in reasoning": (user(reasoning_content="\udfff"), r"messages\[0\]\.reasoning_content: found the lone "),
    "surrogate in a call": (user(tool_calls=[{"function": {"name": "f", "arguments": {"a": ["\ud800"]}}}]),
                            r"messages\[0\]\.tool_calls\[0\]\.function\.arguments\.a\[0\]: found the lone surrogate"),
    "NUL in tools": ({**SHAPES["messages"], "tools": [{"name": "f\0"}]}, r"tools\[0\]\.name: found a NUL"),
    "NUL": (user(content="a\0"), r"messages\[0\]\.content: found a NUL character at character 1"),
    "no role": ({"messages": [{"content": "x"}]}, r"messages\[0\]\.role: missing"),
    "message is text": ({"messages": ["x"]}, r"messages\[0\]: found a string"),
    "messages is text": ({"messages": "x"}, r"messages: found a string; expected a list"),
    "no messages": ({"messages": []}, r"messages: empty; expected at least one user and one assistant turn"),
    "no assistant": ({"messages": [{"role": "user", "content": "x"}]},
                     r"messages: no assistant turn \(roles found: user\)"),
    "null completion": ({"prompt": "x", "completion": None}, r"completion: found null"),
    "tools of wrong type": ({**SHAPES["messages"], "tools": "hammer"}, r"tools: found a string"),
    "call of wrong type": ({"messages": [{"role": "assistant", "content": "", "tool_calls": ["f"]}]},
                           r"messages\[0\]\.tool_calls: found a string"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_row_field_and_expectation(fault):
    fields, message = FAULTS[fault]
    with pytest.raises(InputError, match=r"^f\.jsonl:7: " + message):
        read(fields)


def test_a_field_map_is_checked():
    check_fields({"prompt": "question", "from": "speaker"})
    with pytest.raises(InputError, match=r"data\.fields: promt is none of our fields \(nearest: prompt\)"):
        check_fields({"promt": "question"})
    with pytest.raises(InputError, match=r"data\.fields\.prompt: found a list"):
        check_fields({"prompt": ["a", "b"]})


def test_undetected_and_missing_fields():
    with pytest.raises(InputError, match=r"f\.jsonl:7: the row has the fields answer, question; expected those of one"):
        read({"question": "Q", "answer": "A"})
    with pytest.raises(InputError, match=r"f\.jsonl:7: completion: missing \(nearest: completions\)"):
        read({"prompt": "Q", "completions": "A"}, name="prompt_completion")
