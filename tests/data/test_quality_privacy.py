"""Secrets and personal data: what has the shape and the checksum, and what only looks like it."""

import gzip

import pytest

from itune.data.privacy import _RULES, find_private, redact, scan
from itune.types import Address, Conversation, Message


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("key AKIA" + "IOSFODNN7ABCDEFG", "AWS access key"),
        ("-----BEGIN OPENSSH " + "PRIVATE KEY-----", "private key"),
        ("token=hf_" + "aB" * 17, "Hugging Face token"),
        ("postgres://admin:" + "hunter2x@db.internal:5432/main", "password in a URL"),
        ("password" + " = 'Tr0ub4dor&3xy'", "assigned secret"),
        ("write to anna.k@posteo.de", "e-mail address"),
        ("SSN 536-22-8726", "social security number"),
        ("card 4111 1111 1111 1111", "payment card"),
        ("DE89 3704 0044 0532 0130 00", "account number"),
        ("call +44 20 7946 0958", "phone number"),
        ("call (415) 555-0132", "phone number"),
        ("from 8.8.4.4 again", "network address"),
    ],
)
def test_found_and_masked(text, kind):
    assert [match.kind for match in scan(text)] == [kind]
    masked = redact(text)
    assert f"[{kind}]" in masked and scan(masked) == []


@pytest.mark.parametrize(
    "text",
    [
        "password = your_password_here",
        "api_key: <insert key>",
        "card 4111 1111 1111 1112",  # the check digit is wrong
        "DE88 3704 0044 0532 0130 00",
        "mail me at name@example.com",
        "version 10.0.0.1 and 192.168.1.20",
        "SSN 000-12-3456",
        "2019-12-31, 3.14159, 1,000,000 and 12-34-56",
        "the token ring, a secret garden, key: F major",
        "https://host.org:8080/path",
        "call 911",
    ],
)
def test_not_found(text):
    assert scan(text) == []


TOKENS = [
    "ghp_" + "a1" * 18, "github_pat_" + "A_" * 22, "glpat-" + "x1" * 10, "xoxb-" + "12345-abcde", "AIza" + "Sy1_-" * 7,
    "npm_" + "Z9" * 18, "pypi-" + "Ag" * 25, "sk_live_" + "q1" * 8, "rk_test_" + "q1" * 8, "sk-ant-" + "k1" * 10,
    "sk-proj-" + "k1" * 10, "eyJ" + "hbGciOiJI." + "eyJzdWIiOi." + "SflKxwRJSM", "ASIA" + "IOSFODNN7ABCDEFG",
    "Pwd: " + "Tr0ub4dor&3xy", "-----BEGIN " + "PRIVATE KEY BLOCK-----", "hf_" + "aB" * 17,
    "postgres://admin:" + "hunter2x@db.internal:5432/main",
]  # fmt: skip


def test_every_rule_holds_what_is_looked_for_first(shared_data):
    """Nothing is lost by leaving out a pattern whose fixed part is absent: every match of every pattern holds it."""
    with gzip.open(shared_data / "p3_sample.jsonl.gz", "rt") as rows:
        texts = [row for row, _ in zip(rows, range(3000))]
    texts += [f"one {token} more" for token in TOKENS]
    kinds = []
    for text in texts:
        for _, kind, pattern, check, holds in _RULES:
            for each in filter(check, pattern.finditer(text)):
                assert any(part in each.group() for part in holds), (kind, each.group())
                kinds.append(kind)
    assert {rule[1] for rule in _RULES if rule[0] == "secret"} <= set(kinds) and len(kinds) >= len(TOKENS)


def test_findings_name_kind_and_number_but_not_the_text():
    messages = (Message("user", "I am jo@mill.org"), Message("assistant", "Hello jo@mill.org, 536-22-8726!"))
    found = find_private([Conversation(messages, Address("f", "f.jsonl", 3))])
    assert [(each.filter, each.reason, each.detail, each.address) for each in found] == [
        ("personal", "e-mail address", "2 found", "f.jsonl:3"),
        ("personal", "social security number", "1 found", "f.jsonl:3"),
    ]
    assert find_private([Conversation(messages, Address("f"))], ["secret"]) == []
    assert "mill" not in str(found)
