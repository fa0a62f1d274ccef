import sys
import types

import pytest

from itune.evaluators import scoring
from itune.types import InputError


@pytest.mark.parametrize(
    ("answer", "exact", "normalized"),
    [
        ("Paris", True, True),
        (" Paris\n", True, True),
        ("paris.", False, True),
        ("P aris", False, False),
        ("", False, False),
    ],
)
def test_matches(answer, exact, normalized):
    item = {"reference": "Paris"}
    assert scoring.exact(item, answer) is exact
    assert scoring.normalized(item, answer) is normalized


def test_articles_count_and_spaces_run_together():
    assert scoring.normalized({"reference": "the  cat, sat"}, "The cat sat")
    assert not scoring.normalized({"reference": "the cat"}, "cat")


@pytest.fixture
def user_module(monkeypatch):
    module = types.ModuleType("users_checks")
    module.ends_in_z = lambda item, answer: answer.endswith("z")
    module.one_argument = lambda item: True
    monkeypatch.setitem(sys.modules, "users_checks", module)


def test_checker_by_dotted_name(user_module):
    assert scoring.find_checker("exact") is scoring.exact
    assert scoring.find_checker("users_checks:ends_in_z")({}, "quiz")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exakt", "'exakt' is neither exact nor normalized"),
        ("no_such_module_x:f", "cannot import 'no_such_module_x'"),
        ("users_checks:starts", "no function 'starts'; it has ends_in_z, one_argument"),
        ("users_checks:one_argument", r"must take \(item, answer\)"),
    ],
)
def test_bad_checker_names_say_what_is_wrong(user_module, name, message):
    with pytest.raises(InputError, match=message):
        scoring.find_checker(name)
