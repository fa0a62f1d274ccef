"""Every constraint held and broken by hand; and against IFEval's own code as lm-evaluation-harness ships it."""

import random
import sys
import types

import pytest

from itune.evaluators import constraints
from itune.evaluators.constraints import CHECKS, find, loose, readings, results, score, sentences
from itune.types import InputError

CASES = [  # name, arguments, a text that holds it, a text that breaks it
    ("keywords:existence", {"keywords": ["sun", "moon"]}, "The Sun and the moon.", "The sun."),
    ("keywords:frequency", {"keyword": "red", "frequency": 2, "relation": "at least"}, "Red and red", "red"),
    ("keywords:frequency", {"keyword": "red", "frequency": 2, "relation": "less than"}, "red", "red red"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "concatenate", "A cat."),
    ("keywords:letter_frequency", {"letter": "e", "let_frequency": 3, "let_relation": "at least"}, "Eee", "ee"),
    ("language:response_language", {"language": "de"}, "Das ist nicht die Frage, und ich habe sie auch nicht gestellt.",
     "This is not the question that they had asked for."),
    ("language:response_language", {"language": "ru"}, "Это мой ответ.", "My answer."),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "One. Two!", "One."),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, "Ask Dr. Who.", "One. Two."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n***\ntwo", "one\n\ntwo"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "one two three", "one two"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "exactly"}, "one two three", "one two three four"),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
     "First.\n\nThen, more.", "First.\n\nMore then."),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] at [place]", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP.S. call me", "Bye."),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\nP.P.S call me", "Bye. P.S. no"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n* two", "* one\n* two\n- three"),
    ("detectable_format:constrained_response", {}, "My answer is no.", "No."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and **two**", "*one*"),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2}, "Section 1 a Section 2",
     "Section 1 a"),
    ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<My title>>\ntext", "<< >> text"),
    ("combination:two_responses", {}, "one\n******\ntwo", "one ****** one"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "Say it. It.", "It. Say it."),
    ("startend:end_checker", {"end_phrase": "That is all."}, 'Fine. That is all."', "That is all. Fine."),
    ("startend:quotation", {}, '"Yes."', '"Yes.'),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "THE BIG cat",
     "THE big cat"),
    ("change_case:english_capital", {}, "THIS IS IT.", "THIS is IT."),
    ("change_case:english_lowercase", {}, "this is it.", "This is it."),
    ("punctuation:no_comma", {}, "one and two", "one, two"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), CASES)
def test_held_and_broken(name, arguments, good, bad):
    assert find(name)(good, **arguments) and not find(name)(bad, **arguments)


def test_all_of_ifeval_is_there():
    assert len(CHECKS) == 25 == len({name for name, *_ in CASES})


def item(*constraints):
    names, arguments = zip(*constraints)
    return {"address": "rows:1", "metadata": {"instruction_id_list": list(names), "kwargs": list(arguments)}}


def test_a_keyword_that_is_no_regular_expression_stands_for_itself():
    assert find("keywords:existence")("I write C++.", keywords=["c++"])


def test_strict_and_loose():
    asked = item(("punctuation:no_comma", {}), ("startend:end_checker", {"end_phrase": "Done.", "unused": None}))
    introduced = "Sure, here it is:\nOne and two. Done."
    assert results(asked, introduced, loose=False) == {"punctuation:no_comma": False, "startend:end_checker": True}
    assert not score(asked, introduced) and loose(asked, introduced)
    assert not score(asked, "") and not loose(asked, "")
    assert len(readings("a\nb\nc")) == 8


def test_what_is_wrong_is_said():
    with pytest.raises(InputError, match=r"did you mean punctuation:no_comma"):
        find("punctuation:no_coma")
    with pytest.raises(InputError, match=r"rows:1: constraint keywords:existence: .*keywords"):
        score(item(("keywords:existence", {})), "text")
    with pytest.raises(InputError, match=r"no instruction_id_list in its metadata"):
        score({"address": "rows:1", "metadata": {}}, "text")
    with pytest.raises(InputError, match=r"relation 'more'; expected one of less than, at least"):
        find("length_constraints:number_words")("a", num_words=1, relation="more")


@pytest.mark.parametrize(
    ("text", "count"),
    [("One. Two! Three?", 3), ("Mr. Smith went home.", 1), ("It costs 3.50 now.", 1), ("No end", 1), ("", 0),
     ('He said "Stop!" Then he left.', 2), ("Wait... what?", 2), ("J. S. Bach wrote it. Yes.", 2)],
)  # fmt: skip
def test_sentences(text, count):
    assert sentences(text) == count


def test_equal_to_the_code_of_ifeval(monkeypatch):
    """On texts made of what the checks look for, but for the three that need downloads or langdetect there."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install -e '.[dev]'")
    import nltk

    stub = types.ModuleType("langdetect")
    stub.detect, stub.LangDetectException = (lambda text: "en"), ValueError
    monkeypatch.setitem(sys.modules, "langdetect", stub)
    monkeypatch.setitem(sys.modules, "immutabledict", types.SimpleNamespace(immutabledict=dict))
    monkeypatch.setattr(nltk, "download", lambda *given, **more: True)
    monkeypatch.setattr(nltk.data, "find", lambda *given, **more: "")
    from lm_eval.tasks.ifeval import instructions_registry

    skipped = {"language:response_language", "length_constraints:number_sentences",
               "change_case:capital_word_frequency", "change_case:english_capital", "change_case:english_lowercase"}
    pieces = ["word", "Red", "sun", ",", ".", "\n", "\n\n", "***", "******", "*high*", "**bold**", "- item", "* item",
              '"', "<<title>>", "[slot]", "P.S. yes", "P.P.S no", "Section 1", "section 2", "Section 2", "{}", "then",
              "Then", "My answer is yes.", "That is all.", "Say it.", "eee", "moon", "cat", "*\n- x", "<<>> <<>>",
              "suun", "c.t"]  # fmt: skip
    patterns = [("keywords:existence", {"keywords": ["su+n"]}, "suun", "sn"),
                ("keywords:frequency", {"keyword": "c.t", "frequency": 2, "relation": "at least"}, "cat c.t", "cat"),
                ("keywords:forbidden_words", {"forbidden_words": ["c.t"]}, "dog", "cat")]  # fmt: skip
    draw, checked, held = random.Random(0), 0, 0
    for name, arguments, good, bad in [*CASES, *patterns]:
        if name in skipped or arguments.get("relation") == "exactly":
            continue
        judge = instructions_registry.INSTRUCTION_DICT[name](name)
        judge.build_description(**arguments)
        texts = ["".join(draw.choice(pieces) + draw.choice([" ", "\n", ""]) for _ in range(draw.randint(1, 9)))
                 for _ in range(400)]
        for text in [good, bad, *texts]:
            wanted = bool(judge.check_following(text))
            assert bool(constraints.find(name)(text, **arguments)) is wanted, (name, text)
            checked, held = checked + 1, held + wanted
    assert checked > 8000 and 500 < held < checked - 500
