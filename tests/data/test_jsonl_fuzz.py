"""Any bytes as JSONL: an answer or one InputError with file, line and field; what is accepted is not changed."""

from __future__ import annotations

import json
import os
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from itune.data.formats import FORMATS, convert, detect_format
from itune.data.sources import open_sources
from itune.types import InputError

ROLES = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "Assistant", "", "assistnat"])
TEXT = st.text(st.characters(blacklist_categories=()), max_size=12)
SCALAR = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT)
VALUE = st.recursive(SCALAR, lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)), max_leaves=6)
OFTEN = st.one_of(TEXT, TEXT, TEXT, VALUE)
MESSAGE = st.one_of(
    st.fixed_dictionaries({"role": st.one_of(ROLES, ROLES, VALUE), "content": OFTEN},
                          optional={"weight": VALUE, "tool_calls": VALUE, "name": VALUE}),
    st.fixed_dictionaries({"from": ROLES, "value": OFTEN}), VALUE)
ROW = st.one_of(
    st.fixed_dictionaries({"messages": st.one_of(st.lists(MESSAGE, max_size=4), VALUE)}, optional={"tools": VALUE}),
    st.fixed_dictionaries({"conversations": st.lists(MESSAGE, max_size=4)}, optional={"system": VALUE}),
    st.fixed_dictionaries({"instruction": OFTEN, "output": OFTEN}, optional={"input": VALUE, "system": VALUE}),
    st.fixed_dictionaries({"prompt": st.one_of(OFTEN, st.lists(MESSAGE, max_size=2)), "completion": OFTEN}),
    st.dictionaries(TEXT, VALUE, max_size=3), VALUE)
DAMAGE = st.sampled_from([b"", b"\xff", b"\x00", b"\xef\xbb\xbf", b"\r", b"{", b"}", b'"', b"\\ud800", b"NaN",
                          b"\xed\xa0\x80",
                          b"[" * 3000, b"9" * 5000, b",", b"\n"])

FIELDS = "messages|conversations|instruction|input|output|prompt|completion|system|tools"


@st.composite
def files(draw):
    """Rows as JSON Lines, sometimes with bytes cut out or put in anywhere."""
    rows = draw(st.lists(ROW, min_size=1, max_size=4))
    raw = b"\n".join(json.dumps(row, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass") for row in rows)
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, len(raw)))
        raw = raw[:start] + draw(DAMAGE) + raw[start + draw(st.integers(0, 3)):]
    return raw + draw(st.sampled_from([b"", b"\n", b"\r\n", b"\n\n"]))


def look_at(raw: bytes, path) -> None:
    """Read, detect, convert. Whatever is raised is an InputError that names file, line and what is expected."""
    path.write_bytes(raw)
    try:
        rows = list(open_sources(str(path))[0].rows())
    except InputError as error:
        assert re.match(rf"{re.escape(str(path))}:\d+: ", str(error)), error
        return
    lines = raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for row in rows:
        assert row.fields == json.loads(lines[row.address.line - 1])  # what the plain parser reads, unchanged
        for name in (*FORMATS, None):
            try:
                conversation = convert(row, name or detect_format([row]))
            except InputError as error:
                field = "" if name is None else rf"({FIELDS})[\w.\[\]]*: "  # None: no format fits, no field is to blame
                assert re.match(rf"{re.escape(str(path))}:{row.address.line}: {field}", str(error)), error
                continue
            check_unchanged(row.fields, conversation)


def check_unchanged(fields, conversation) -> None:
    """Every text of a conversation stands in its row, and every turn of the row is in the conversation."""
    texts = set(strings(fields))
    for message in conversation.messages:
        parts = [message.content] if message.content in texts else message.content.split("\n\n")
        assert message.content == "" or all(any(p in text for text in texts) for p in parts) or joined(fields, message)
    for key in ("messages", "conversations"):
        if isinstance(fields.get(key), list) and len(conversation.messages) >= len(fields[key]) > 0:
            assert len(conversation.messages) - len(fields[key]) <= 1  # a system turn of its own field


def joined(fields, message) -> bool:
    """Content given as parts of type text is their concatenation."""
    return message.content in "".join(strings(fields))


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def fuzz(count, path):
    @settings(max_examples=count, deadline=5000, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))
    @given(files())
    def run(raw):
        look_at(raw, path)

    run()


@pytest.mark.parametrize("row", [
    {"messages": [{"role": "user", "content": "", "tool_calls": 1}]},
    {"messages": [{"role": "assistant", "content": None,
                   "tool_calls": [{"function": {"name": "f", "arguments": "[" * 3000}}]}]},
])
def test_found_by_the_campaign(row, tmp_path):
    look_at(json.dumps(row).encode(), tmp_path / "rows.jsonl")


def test_two_thousand_files(tmp_path):
    fuzz(int(os.environ.get("ITUNE_FUZZ", 2000)), tmp_path / "rows.jsonl")


@pytest.mark.soak
def test_hundred_thousand_files(tmp_path):
    fuzz(100_000, tmp_path / "rows.jsonl")
