"""Places of tokens that are counted from their sizes: the judge is `tokenizers`, which tells them when asked."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.pre_tokenizers import ByteLevel, Digits, Split, WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from itune.data.offsets import counted, kept_by
from itune.data.render import as_conversation, render_many
from itune.data.templates import with_template
from itune.data.tokenizer import Tokenizer

TEXTS = ["", "yes", "Grüße, où est 東京? 😀😀 👩‍👩‍👧 e\u0301\u0323 \u0958 \ufb01",
         "def f(x):\n    return x + 1\n\n\t \r\n", "a<|im_end|>b <tool> "]  # fmt: skip


def asked(tokenizer, texts):
    """Ids as the fast call gives them, and offsets as the other one tells them."""
    fast = tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)
    full = tokenizer.backend.encode_batch(texts, add_special_tokens=False)
    return [np.asarray(e.ids, np.int32) for e in fast], [np.asarray(e.offsets).reshape(-1, 2) for e in full]


@pytest.fixture(scope="module")
def by_normalizer(make_hf):
    made = {}
    for name, normalizer in (("all", None), ("NFC", normalizers.NFC()), ("none", normalizers.Lowercase())):
        hf = make_hf(added=("<tool>",), eos_token="</s>")
        hf.backend_tokenizer.normalizer = normalizer
        made[name] = with_template(hf, "chatml")
    return made


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text() | st.sampled_from(TEXTS), min_size=1, max_size=5))
@pytest.mark.parametrize("name", ["all", "NFC"])
def test_counted_places_are_those_that_the_tokenizer_tells(by_normalizer, name, texts):
    tokenizer = by_normalizer[name]
    texts = [text for text in texts if tokenizer.keeps_bytes(text)]
    ids, offsets = asked(tokenizer, texts)
    for text, own, places, theirs in zip(texts, ids, counted(texts, ids, tokenizer), offsets):
        assert places is not None, text
        assert len(own) == len(theirs)
        np.testing.assert_array_equal(np.stack(places, 1), theirs)


def test_tokens_are_the_bytes_of_normalised_texts_only(by_normalizer):
    composed, apart = "caf\u00e9", "cafe\u0301"
    for name, expected in (("all", [True, True]), ("NFC", [True, False]), ("none", [False, False])):
        assert [by_normalizer[name].keeps_bytes(text) for text in (composed, apart)] == expected


LOOSE = AddedToken("<pad>", special=True, lstrip=True)
APART = AddedToken("e\u0301", special=False, normalized=True)
CUTS = {
    "qwen": [Split(Regex(r"\p{N}|\s+"), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)],
    "digits": [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)],
    "space": [ByteLevel(add_prefix_space=True)],
    "removes": [Split(" ", "removed"), ByteLevel(add_prefix_space=False, use_regex=False)],
    "words": [WhitespaceSplit(), ByteLevel(add_prefix_space=False, use_regex=False)],
    "no bytes": [Digits()],
}


@pytest.mark.parametrize("cut", CUTS)
def test_what_adds_or_takes_bytes_is_known_by_the_pre_tokenizer(make_hf, cut):
    hf = make_hf()
    hf.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(CUTS[cut])
    assert Tokenizer(hf, None).keeps_bytes("yes") == (cut in ("qwen", "digits"))


def test_what_adds_or_takes_bytes_is_known_by_model_and_added_tokens(make_hf):
    for kind in ("metaspace_first", "metaspace_always", "unigram", "words"):
        assert not Tokenizer(make_hf(kind), None).keeps_bytes("yes")
    assert not Tokenizer(make_hf(added=(LOOSE,)), None).keeps_bytes("yes")
    hf = make_hf(added=(APART,))
    assert Tokenizer(hf, None).keeps_bytes("yes")
    hf.backend_tokenizer.normalizer = normalizers.NFC()  # the token is one byte longer than what it stands for
    assert not Tokenizer(hf, None).keeps_bytes("yes")
    for name, value in (("unk_token", "<unknown>"), ("continuing_subword_prefix", "##"), ("end_of_word_suffix", "</w>"),
                        ("byte_fallback", True)):  # fmt: skip
        backend = make_hf().backend_tokenizer
        setattr(backend.model, name, value)
        assert kept_by(backend, {}) == "none", name
    backend, end = make_hf().backend_tokenizer, AddedToken("<|endoftext|>")
    backend.model.unk_token = end.content
    assert kept_by(backend, {0: end}) == "all"


def test_sizes_that_do_not_add_up_are_no_places(make_hf):
    """A byte that the vocabulary lacks is lost: whole where the text does not have it."""
    state = json.loads(make_hf().backend_tokenizer.to_str())
    kept = {piece: number for piece, number in state["model"]["vocab"].items() if "~" not in piece}
    state["model"]["vocab"] = kept
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=Backend.from_str(json.dumps(state))), None)
    ids, _ = asked(tokenizer, texts := ["a b", "a~b", "\u00e9~", "\u00e9"])
    assert [places is None for places in counted(texts, ids, tokenizer)] == [False, True, True, False]


@pytest.mark.parametrize("kind", ["byte_level", "space and strip", "words"])
def test_masks_are_those_that_the_tokenizers_own_places_give(make_hf, chat, monkeypatch, kind):
    """A space put before each text and one taken by each header would add up: such tokenizers are asked."""
    strips = kind == "space and strip"
    added = [AddedToken(name, special=True, rstrip=strips) for name in ("<|user|>", "<|assistant|>")]
    template = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>{% endfor %}"
    hf = make_hf(added=(*added, "<|end|>"), template=template, eos_token="<|end|>")
    if kind != "byte_level":
        cuts = CUTS["space"] if strips else [WhitespaceSplit(), ByteLevel(add_prefix_space=True)]
        hf.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    tokenizer = with_template(hf)
    for answer in ("~", "the", "yes", " two\n", "\u6771"):
        counting, asking = both_ways(chat("hi", answer), tokenizer, monkeypatch)
        assert counting == asking, answer


@pytest.mark.parametrize("kind", ["all", "NFC"])
def test_examples_are_the_same_when_the_tokenizer_is_asked(by_normalizer, chat, monkeypatch, kind):
    tokenizer = by_normalizer[kind]
    texts = [f"{text} {odd}" for text in TEXTS[1:] for odd in ("", "<|im_end|>", "<tool>", " <pad> .", "\u0301")]
    for text in texts:
        counting, asking = both_ways(chat(text, text, "more?", text), tokenizer, monkeypatch)
        assert counting == asking, text


def both_ways(messages, tokenizer, monkeypatch):
    """What becomes of messages with places counted where they may be, and with the tokenizer asked."""
    counting = outcome_of(messages, tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "keeps_bytes", lambda *_: False)
        return counting, outcome_of(messages, tokenizer)


def outcome_of(messages, tokenizer):
    outcome = render_many([as_conversation(messages)], tokenizer)[0]
    if outcome.error is not None:
        return str(outcome.error)
    return outcome.example.token_ids.tolist(), outcome.example.loss_weights.tolist(), outcome.notes
