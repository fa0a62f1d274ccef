"""All filters behind one call: nothing goes by default, actions decide, rejects keep what went."""

import json
import sys
import types

import pytest

from itune.data import findings, quality
from itune.data.planting import KINDS, plant, plant_pairs
from itune.types import Address, Conversation, InputError, Message

SECRET = "ghp_" + "a1B2" * 9


def pair(prompt, answer, line=1, **metadata):
    messages = (Message("user", prompt), Message("assistant", answer))
    return Conversation(messages, Address("f", "f.jsonl", line), metadata)


ROWS = [
    pair("In which year did the bridge open?", "1932", 1),
    pair("in which year did the bridge open", "1932.", 2),
    pair("In which year did the bridge open?", "1935", 3),
    pair("Name a colour of the rainbow.", "TODO", 4),
    pair("Who keeps the key?", f"It is {SECRET}, write to jo@mill.org.", 5),
    pair("Name a river in Peru.", "The Amazon.", 6, note=f"by jo@mill.org {SECRET}"),
]


def test_nothing_is_dropped_by_default_and_everything_is_reported():
    report = quality.check(ROWS)
    assert report.dropped == () and report.kept == list(range(6))
    told = report.to_dict()
    assert told["rows_in"] == told["rows_kept"] == 6 and told["rows_dropped"] == 0
    assert told["found"] == {
        "contradiction": {"number": 1},
        "exact_duplicate": {"same text": 1},
        "personal": {"e-mail address": 1},
        "placeholder": {"the answer is 'TODO'": 1},
        "secret": {"GitHub token": 1},
    }
    assert all("address" in each for listed in told["examples"].values() for each in listed)
    json.dumps(told)


def test_actions_decide_what_goes():
    assert quality.check(ROWS, {"exact_duplicate": "drop"}).dropped == (1,)
    assert quality.check(ROWS, {"placeholder": "drop", "secret": "drop"}).dropped == (3, 4)
    assert quality.check(ROWS, {"contradiction": "drop"}).dropped == (0, 1, 2)
    assert quality.check(ROWS, {"contradiction": "majority"}).dropped == (2,)
    # the majority counts duplicates, though all but one of them go
    assert quality.check(ROWS, {"contradiction": "majority", "exact_duplicate": "drop"}).dropped == (1, 2)
    assert quality.check(ROWS, dict.fromkeys(quality.FILTERS, "off")).findings == ()


def test_rejects_keep_address_reasons_and_text_but_no_secret(tmp_path):
    report = quality.check(ROWS, {"secret": "drop", "exact_duplicate": "drop"})
    path = tmp_path / "data" / "rejects.jsonl"
    assert findings.write_rejects(path, ROWS, report.dropped, report.findings) == 2
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [each["address"] for each in written] == ["f.jsonl:2", "f.jsonl:5"]
    assert {reason["filter"] for reason in written[0]["reasons"]} >= {"exact_duplicate"}
    assert written[0]["reasons"][0]["other"] == "f.jsonl:1"
    assert written[1]["messages"][1]["content"] == "It is [GitHub token], write to [e-mail address]."
    assert SECRET not in path.read_text() and SECRET not in json.dumps(report.to_dict())
    assert list(path.parent.iterdir()) == [path]
    findings.write_rejects(path, ROWS, [5], [])
    assert SECRET not in path.read_text() and "jo@mill.org" not in path.read_text()


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ({"placeholders": "drop"}, "did you mean 'placeholder'"),
        ({"empty": "delete"}, "expected one of off, keep, drop$"),
        ({"empty": "majority"}, "expected one of off, keep, drop$"),
    ],
)
def test_unknown_filters_and_actions_are_refused(actions, message):
    with pytest.raises(InputError, match=message):
        quality.check(ROWS, actions)


@pytest.fixture
def module():
    name = "predicates_of_a_user"
    sys.modules[name] = made = types.ModuleType(name)
    made.short = lambda row: len(row.messages[-1].content) < 10
    made.why = lambda row: "speaks of keys" if "key" in row.messages[0].content else True
    made.broken = lambda row: 1 / 0
    made.silent = lambda row: None
    yield name
    del sys.modules[name]


def test_predicate_of_the_user(module):
    only = dict.fromkeys(quality.FILTERS, "off") | {"predicate": "drop"}
    assert quality.check(ROWS, only, predicate=f"{module}:short").dropped == (4, 5)
    told = quality.check(ROWS, only, predicate=f"{module}:why")
    assert told.dropped == (4,) and told.findings[0].reason == "speaks of keys"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_colon", "expected package.module:function"),
        ("no_such_module_here:f", "cannot import 'no_such_module_here'"),
        ("{}:shot", "has no function 'shot'; it has broken, short, silent, why"),
        ("{}:broken", "f.jsonl:1: data.predicate raised ZeroDivisionError"),
        ("{}:silent", "f.jsonl:1: data.predicate gave None; expected True, False or a reason"),
    ],
)
def test_bad_predicates_name_the_reason(module, name, message):
    with pytest.raises(InputError, match=message):
        quality.check(ROWS, predicate=name.format(module))


@pytest.mark.parametrize("name", ["os:getcwd", "math:sqrt"])
def test_a_predicate_without_source_is_refused(name):
    with pytest.raises(InputError, match=f"data.predicate: '{name}' has no source file; expected a Python function"):
        quality.predicate_digest(name)


def test_planting_is_repeatable_and_keeps_the_truth_outside(real_rows):
    base = real_rows["p3_sample"][:120] + real_rows["gsm8k_messages"][:60]
    for kind, (_, appends) in KINDS.items():
        one, again, other = (plant(base, kind, 0.05, seed) for seed in (1, 1, 2))
        assert one == again and one.conversations != other.conversations, kind
        assert len(one.truth) == len(set(one.truth)) == 9, kind
        assert len(one.conversations) == len(base) + 9 * appends
        untouched = [i for i in range(len(base)) if i not in one.truth]
        assert all(one.conversations[i] is base[i] for i in untouched)
        for row in one.truth:
            planted = one.conversations[row]
            assert planted.metadata.keys() == base[0].metadata.keys() or planted.address.source == "gsm8k_messages"
            assert planted.address.file in {each.address.file for each in base}
    with pytest.raises(InputError, match="unknown kind 'nonsense'; expected one of contradiction"):
        plant(base, "nonsense")
    rows, truth = plant_pairs(base, ["contradiction", "sibling"], 0.05, 1)
    assert len(rows) == len(base) + 18 and sorted([*truth["contradiction"], *truth["sibling"]]) == list(range(180, 198))


def test_odd_conversations_pass_through_every_filter():
    odd = [
        Conversation((), Address("f")),
        Conversation((Message("system", "Be kind."),), Address("f")),
        Conversation((Message("assistant", "Hello!"),), Address("f")),
        Conversation((Message("user", "\ud800 \x00 ﷽"), Message("assistant", "★★★★ 👍")), Address("f")),
        Conversation((Message("user", "x" * 20_000), Message("assistant", "(" * 20_000)), Address("f")),
        Conversation((Message("user", "?"), Message("assistant", "", extra={"tool_calls": [{}]})), Address("f")),
    ]
    report = quality.check(odd)
    assert {found.filter for found in report.findings} <= {"empty", "truncated"}
    assert quality.check([]).dropped == ()
