"""The built-in questions: every constraint, with an answer that keeps it, and rates of a model that keeps none."""

from itune.config import from_dict
from itune.decode import Generated
from itune.evaluators import generation, instructions
from itune.evaluators.constraints import CHECKS, find

KEPT = {  # an answer that keeps the constraint as the question words it
    "keywords:existence": "Early light falls through the window.", "keywords:frequency": "Small, small, small.",
    "keywords:forbidden_words": "A fine day.", "keywords:letter_frequency": "Dizzy.",
    "language:response_language": "Es ist ein Tag, an dem man nicht nach draußen geht.",
    "length_constraints:number_sentences": "One. Two. Three.",
    "length_constraints:number_paragraphs": "One.\n***\nTwo.",
    "length_constraints:number_words": "A few words.",
    "length_constraints:nth_paragraph_first_word": "First.\n\nLater it stopped.",
    "detectable_content:number_placeholders": "[name] lives in [place].",
    "detectable_content:postscript": "It.\nP.S. Bye.",
    "detectable_format:number_bullet_lists": "* a\n* b\n* c",
    "detectable_format:constrained_response": "My answer is yes.",
    "detectable_format:number_highlighted_sections": "*one* and *two*",
    "detectable_format:multiple_sections": "Section 1\na\nSection 2\nb", "detectable_format:json_format": '{"a": "b"}',
    "detectable_format:title": "<<Rain>>\nIt rains.", "combination:two_responses": "One.\n******\nTwo.",
    "combination:repeat_prompt": "Here is what I was asked. Rain.", "startend:end_checker": "Rain. That is all I know.",
    "startend:quotation": '"Rain."', "change_case:capital_word_frequency": "RAIN FALLS HERE.",
    "change_case:english_capital": "IT RAINS IN THE TOWN.", "change_case:english_lowercase": "it rains in the town.",
    "punctuation:no_comma": "Rain.",
}  # fmt: skip


def test_every_constraint_is_asked_and_can_be_kept():
    assert [name for name, _, _ in instructions.ASKED] == list(CHECKS) == list(KEPT)
    for name, arguments, _ in instructions.ASKED:
        assert find(name)(KEPT[name], **arguments), name


def run(model, params, monkeypatch, answers):
    import types

    spoken = types.SimpleNamespace(decode=lambda ids: answers[ids[0]], stop_ids=())
    monkeypatch.setattr(generation, "answer_all", lambda *given: [Generated([place], True) for place in range(100)])
    return instructions.Evaluator(from_dict({})).run(model, params, spoken, None)


def test_rates(model, params, monkeypatch):
    kept = [KEPT[name] for name in KEPT for _ in instructions.TOPICS]
    summary, items = run(model, params, monkeypatch, kept)
    assert summary["n"] == 100 and summary["score"] == summary["loose"] == 1.0 and 0.8 < summary["score_low"] < 1
    assert len(summary["categories"]) == 9 and len({item["prompt"] for item in items}) == 100
    introduced = ["Of course, gladly:\n" + text for text in kept]
    summary, _ = run(model, params, monkeypatch, introduced)
    assert summary["loose"] == 1.0 and summary["score"] < 0.8
    assert run(model, params, monkeypatch, [""] * 100)[0]["score"] == 0.0
