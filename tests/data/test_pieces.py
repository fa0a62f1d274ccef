"""Added tokens that are pieces of ordinary text, as Gemma's runs of newlines: ids equal transformers', masks proven."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from itune.data.render import render, render_prompt
from itune.data.templates import with_template

TEMPLATE = ("{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
            "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n"
            "{% endif %}")
PIECES = ("\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "<table>", "</table>", "<call>")
TEXTS = ("def f(x):\n    return x\n\n\nDone.", "<table>\n\n  <b>1</b></table>", "a\nb", "   a", "x  y")


@pytest.fixture(scope="module")
def gemma(make_hf):
    """As transformers converts it from sentencepiece: user-defined pieces are added tokens that are not special."""
    state = json.loads(make_hf("metaspace_always").backend_tokenizer.to_str())
    state["pre_tokenizer"] = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
                              "invert": False}
    state["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    vocab = state["model"]["vocab"]
    for piece in PIECES:
        vocab.setdefault(piece, len(vocab))
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        state["added_tokens"].append({"id": vocab[piece], "content": piece, **flags})
    state["added_tokens"].sort(key=lambda token: token["id"])
    hf = PreTrainedTokenizerFast(tokenizer_object=Backend.from_str(json.dumps(state)), bos_token="<s>",
                                 eos_token="</s>", unk_token="<unk>")
    hf.add_tokens([AddedToken(name, special=True, normalized=False) for name in ("<start_of_turn>", "<end_of_turn>")])
    hf.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    hf.chat_template = TEMPLATE
    return hf


def test_ids_are_those_of_transformers(gemma, chat):
    tokenizer = with_template(gemma)
    assert tokenizer.end_of_turn_ids == (gemma.convert_tokens_to_ids("<end_of_turn>"),)
    for text in TEXTS:
        for messages in (chat("Say it.", text), chat(text, "Yes."), chat(text, text, "And?", text)):
            example = render(messages, tokenizer)
            assert example.token_ids.tolist() == list(gemma.apply_chat_template(messages)["input_ids"])
            learnt = tokenizer.decode(example.token_ids[example.loss_weights > 0])
            answers = [m["content"].strip() for m in messages if m["role"] == "assistant"]
            assert learnt.split("<end_of_turn>") == [*answers, ""]
            prompt = gemma.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
            assert render_prompt(messages[:1], tokenizer).tolist() == list(prompt)
        assert tokenizer.encode_plain(text) == gemma(text, add_special_tokens=False)["input_ids"]


def test_beside_the_text_of_a_control_token_too(gemma, chat):
    """It is encoded apart then; the pieces between stay whole. What the template writes is no ordinary piece."""
    tokenizer, counts = with_template(gemma), {}
    for forged in ("", "<end_of_turn>", "</s>", "<think>"):
        example = render(chat("Say it.", f"a\n\n<table>{forged}"), tokenizer)
        ids = example.token_ids.tolist()
        counts[forged] = [ids.count(gemma.convert_tokens_to_ids(token)) for token in
                          ("<end_of_turn>", "<start_of_turn>", "</s>", "<think>", "\n\n", "<table>")]
    assert len({tuple(each) for each in counts.values()}) == 1 and counts[""] == [2, 2, 0, 0, 1, 1], counts
    gemma.chat_template = TEMPLATE.replace("{{ m.content", "{% if m.role == 'user' %}<call>{% endif %}{{ m.content")
    try:
        tokenizer = with_template(gemma)
        example = render(chat("<call>", "b <call>"), tokenizer)
        assert example.token_ids.tolist().count(gemma.convert_tokens_to_ids("<call>")) == 1
    finally:
        gemma.chat_template = TEMPLATE
