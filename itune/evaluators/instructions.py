"""Does the model keep to a format that it is asked for? Own questions, every one with a constraint that is verified."""

from __future__ import annotations

from typing import Any

from itune.config import Config
from itune.evaluators import stats
from itune.evaluators.constraints import results
from itune.evaluators.generation import ask
from itune.evaluators.labels import broken_down
from itune.evaluators.paired import named

TOPICS = ("a rainy day", "how bread is baked", "a small harbour", "why we sleep")
ASKED: tuple[tuple[str, dict[str, Any], str], ...] = (  # (constraint, its arguments, the wish in words)
    ("keywords:existence", {"keywords": ["window", "early"]}, "Use the words window and early."),
    ("keywords:frequency", {"keyword": "small", "frequency": 3, "relation": "at least"},
     "Use the word small at least 3 times."),
    ("keywords:forbidden_words", {"forbidden_words": ["very", "good"]}, "Do not use the words very and good."),
    ("keywords:letter_frequency", {"letter": "z", "let_frequency": 2, "let_relation": "at least"},
     "The letter z should appear at least 2 times."),
    ("language:response_language", {"language": "de"}, "Answer in German only."),
    ("length_constraints:number_sentences", {"num_sentences": 4, "relation": "less than"},
     "Use less than 4 sentences."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2},
     "Write exactly 2 paragraphs, separated by three asterisks: ***"),
    ("length_constraints:number_words", {"num_words": 30, "relation": "less than"}, "Use less than 30 words."),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "later"},
     "Write 2 paragraphs with an empty line between them. The second one begins with the word later."),
    ("detectable_content:number_placeholders", {"num_placeholders": 2},
     "Leave at least 2 placeholders in square brackets, such as [name]."),
    ("detectable_content:postscript", {"postscript_marker": "P.S."},
     "At the end add a postscript that starts with P.S."),
    ("detectable_format:number_bullet_lists", {"num_bullets": 3},
     "Write exactly 3 bullet points, each on a line that starts with an asterisk and a space."),
    ("detectable_format:constrained_response", {},
     "Is it worth writing about? Answer with one of: My answer is yes. My answer is no. My answer is maybe."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2},
     "Highlight at least 2 parts with asterisks, *like this*."),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2},
     "Write 2 sections and begin each with Section and its number, such as Section 1."),
    ("detectable_format:json_format", {}, "Write everything as JSON."),
    ("detectable_format:title", {}, "Give it a title in double angular brackets, <<like this>>."),
    ("combination:two_responses", {}, "Write two different versions, separated by six asterisks: ******"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Here is what I was asked."},
     "Begin with this sentence, word for word: Here is what I was asked."),
    ("startend:end_checker", {"end_phrase": "That is all I know."}, "End with these words: That is all I know."),
    ("startend:quotation", {}, "Put the whole answer in double quotation marks."),
    ("change_case:capital_word_frequency", {"capital_frequency": 3, "capital_relation": "at least"},
     "Write at least 3 words in capital letters."),
    ("change_case:english_capital", {}, "Write in English and in capital letters only."),
    ("change_case:english_lowercase", {}, "Write in English and in small letters only."),
    ("punctuation:no_comma", {}, "Do not use any comma."),
)  # fmt: skip


class Evaluator:
    """Greedy answers to 100 questions: each of IFEval's 25 constraints on 4 topics. A constraint is a cluster."""

    needs_held_out = False

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, model: Any, params: Any, tokenizer: Any, dataset: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """(summary, items): the rates at which the constraint held, `score` strictly and `loose`, by its family too."""
        questions = [(wish, topic) for wish in ASKED for topic in TOPICS]
        texts = [f"Write a few lines about {topic}. {wish}" for (_, _, wish), topic in questions]
        asked = ask(model, params, tokenizer, texts, self.config, "instructions")
        items = []
        for ((name, arguments, wish), _), item in zip(questions, asked, strict=True):
            if item is None:
                continue
            metadata = {"instruction_id_list": [name], "kwargs": [arguments]}
            held = {kind: all(results({"metadata": metadata}, item["answer"], loose).values())
                    for kind, loose in (("score", False), ("loose", True))}  # fmt: skip
            items.append({**item, "category": name.partition(":")[0], "cluster": name, "reference": wish,
                          "metadata": metadata, **held})  # fmt: skip

        def summarise(places: list[int]) -> dict[str, Any]:
            chosen = [items[place] for place in places]
            clusters = [item["cluster"] for item in chosen]
            numbers: dict[str, Any] = {"n": len(chosen)}
            for kind in ("score", "loose"):
                numbers |= named(kind, stats.interval([item[kind] for item in chosen], clusters)) if chosen else {}
            return numbers

        whole = summarise(list(range(len(items))))
        whole["max_new_tokens"] = self.config.eval.max_new_tokens
        return {**whole, "too_long": len(asked) - len(items), **broken_down(items, summarise)}, items
