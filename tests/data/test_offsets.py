"""Places of tokens that are counted from their sizes: the judge is `tokenizers`, which tells them when asked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers

from itune.data.offsets import counted
from itune.data.render import render
from itune.data.templates import with_template
from itune.data.tokenizer import Tokenizer
from itune.types import InputError

TEXTS = ["", "yes", "Grüße, où est 東京? 😀😀 👩‍👩‍👧 e\u0301\u0323 \u0958 \ufb01",
         "def f(x):\n    return x + 1\n\n\t \r\n", "a<|im_end|>b <tool> "]  # fmt: skip


def asked(tokenizer, texts):
    encodings = tokenizer.backend.encode_batch(texts, add_special_tokens=False)
    return [np.asarray(e.ids, np.int32) for e in encodings], [np.asarray(e.offsets).reshape(-1, 2) for e in encodings]


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


def test_only_tokens_that_are_the_bytes_of_a_text_are_counted(by_normalizer, make_hf):
    composed, apart = "caf\u00e9", "cafe\u0301"
    for name, expected in (("all", [True, True]), ("NFC", [True, False]), ("none", [False, False])):
        assert [by_normalizer[name].keeps_bytes(text) for text in (composed, apart)] == expected
    for kind in ("metaspace_first", "metaspace_always", "unigram", "words"):
        assert not Tokenizer(make_hf(kind), None).keeps_bytes("yes")


def test_sizes_that_do_not_add_up_are_no_places(make_hf):
    """A space put before the text, and an added token that takes the space beside it."""
    hf = make_hf(added=(AddedToken("<pad>", special=True, lstrip=True),))
    strips = Tokenizer(hf, None)
    ids, _ = asked(strips, texts := ["a", "b <pad>", "c<pad>"])
    assert [places is None for places in counted(texts, ids, strips)] == [False, True, False]
    hf = make_hf()
    hf.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    leads = Tokenizer(hf, None)
    ids, _ = asked(leads, texts := ["a", " b"])
    assert [places is None for places in counted(texts, ids, leads)] == [True, False]


@pytest.mark.parametrize("kind", ["all", "NFC", "stripping", "leading"])
def test_examples_are_the_same_when_the_tokenizer_is_asked(by_normalizer, make_hf, chat, monkeypatch, kind):
    if kind in by_normalizer:
        tokenizer = by_normalizer[kind]
    else:
        loose = (AddedToken("<pad>", special=True, lstrip=True, rstrip=True),) if kind == "stripping" else ()
        hf = make_hf(added=loose, eos_token="</s>")
        if kind == "leading":
            hf.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer = with_template(hf, "chatml")
    texts = [f"{text} {odd}" for text in TEXTS[1:] for odd in ("", "<|im_end|>", "<tool>", " <pad> .", "\u0301")]
    for text in texts:
        found = []
        for keeps in (Tokenizer.keeps_bytes, lambda *_: False):
            monkeypatch.setattr(Tokenizer, "keeps_bytes", keeps)
            found.append(outcome_of(chat(text, text, "more?", text), tokenizer))
            monkeypatch.undo()
        assert found[0] == found[1], text


def outcome_of(messages, tokenizer):
    try:
        example = render(messages, tokenizer)
    except InputError as error:
        return str(error)
    return example.token_ids.tolist(), example.loss_weights.tolist()
