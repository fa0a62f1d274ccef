"""Rendering: ids equal those of transformers, weights cover the assistant's words and end of turn, nothing else."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sandbox import trl_templates
from tokenizers import AddedToken

from itune.data import masks
from itune.data.offsets import Encoded
from itune.data.render import render, render_many, render_prompt
from itune.data.templates import with_template
from itune.types import Address, Conversation, InputError, Message

KINDS = ["byte_level", "metaspace_first", "metaspace_always", "unigram"]
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "zephyr": "</s>"}
TEXTS = [
    ("How many foxes?", "12 foxes."),
    ("東京 😀 où?", "Привет, 日本 😀😀"),
    ("a\n\nb  c", "def f(x):\n    return x + 1", "next?", "yes\n- one\n- two"),
    ("x", "y"),
]


def ids_of(hf, messages, **options) -> list[int]:
    return list(hf.apply_chat_template(messages, return_dict=True, **options)["input_ids"])


def weighted(tokenizer, example) -> str:
    return tokenizer.decode(example.token_ids[example.loss_weights > 0])


@pytest.fixture(scope="module")
def tokenizers(make_hf):
    return {
        (kind, name): with_template(make_hf(kind, bos_token="<s>", eos_token="</s>", unk_token="<unk>"), name)
        for kind in KINDS for name in ENDS
    }  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_transformers_and_weights_decode_to_the_answers(tokenizers, chat, kind, name):
    tokenizer = tokenizers[kind, name]
    for texts in TEXTS:
        for system in ("", "You are a helpful assistant."):
            messages = chat(*texts, system=system)
            example = render(messages, tokenizer)
            assert example.token_ids.tolist() == ids_of(tokenizer.hf, messages)
            assert example.token_ids.dtype == np.int32 and example.loss_weights.dtype == np.float32
            assert set(example.loss_weights.tolist()) == {0.0, 1.0}
            if kind != "unigram":  # which loses line breaks and what it has no piece for
                assert weighted(tokenizer, example) == "".join(text + ENDS[name] for text in texts[1::2])
            assert render_prompt(messages, tokenizer).tolist() == ids_of(
                tokenizer.hf, messages[:-1], add_generation_prompt=True)  # fmt: skip


ANY = st.characters(exclude_categories=["Cs"], exclude_characters="\0")


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(st.text(ANY, min_size=1), min_size=2, max_size=5), name=st.sampled_from(sorted(ENDS)))
def test_any_text_is_rendered_as_transformers_does_and_proven(tokenizers, chat, texts, name):
    texts = [text if text.strip() else "word" for text in texts]
    tokenizer, messages = tokenizers["byte_level", name], chat(*texts)
    example = render(messages, tokenizer)
    assert example.token_ids.tolist() == ids_of(tokenizer.hf, messages)
    answers = [text.strip() if name == "llama3" else text for text in texts[1::2]]
    assert weighted(tokenizer, example) == "".join(answer + ENDS[name] for answer in answers)


TRL = trl_templates()
BAR = "\uff5c"  # in DeepSeek's tokens
PATTERNS = [
    r"<\|[^|<>\s'\"+{}]+\|>", f"<{BAR}[^<>{BAR}]+{BAR}>", r"<(?:start|end)_of_turn>", "</?think>", "</?tool_call>",
    r"<turn\|>", r"<\|turn>", r"\[gMASK\]", "<sop>",
]  # fmt: skip
CODE = "\n".join(re.sub(r"\{#.*?#\}", "", source, flags=re.DOTALL) for source in TRL.values())
TOKENS = sorted({*re.findall("|".join(PATTERNS), CODE), "<|user|>", "<|assistant|>", "<|system|>"})
REFUSED = {  # what cannot be proven, with the reason: content must be a list of parts, no end of the last turn
    "idefics3": "leaves out", "smolvlm": "leaves out", "llava_next": "has no attribute", "glm4moe": "learn to stop",
}  # fmt: skip


@pytest.fixture(scope="module")
def trl_hf(make_hf):
    special = [AddedToken(token, special=token[1] in "|" + BAR, normalized=False) for token in TOKENS]
    return make_hf(added=("<s>", "</s>", *special), bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("name", TRL)
def test_templates_of_real_models(trl_hf, chat, name):
    """ids equal transformers', weights lie within its generation mask, decode to the answers, end at added tokens."""
    trl_hf.chat_template = re.sub(r"strftime_now\([^)]*\)", "'26 Jul 2024'", TRL[name])
    messages = chat("Hi there. ", "Hello you.", "Thanks\n", "\nBye, now.")
    refused = next((text for key, text in REFUSED.items() if name.removesuffix("_training") == key), None)
    if refused and (name, refused) != ("glm4moe_training", "learn to stop"):
        with pytest.raises(InputError, match=refused):
            render(messages, trl_hf)
        return
    example = render(messages, trl_hf)
    training = "{% generation" in trl_hf.chat_template or "{%- generation" in trl_hf.chat_template
    judge = trl_hf.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=training)
    assert example.token_ids.tolist() == list(judge["input_ids"])
    if training:
        assert not (example.loss_weights > np.asarray(judge["assistant_masks"])).any()
    pieces = re.split(r"(<[^>]*>)", trl_hf.decode(example.token_ids[example.loss_weights > 0]))
    assert [piece.strip() for piece in pieces[::2] if piece.strip()] == ["Hello you.", "Bye, now."]
    assert pieces[-1] == ""
    assert all(token in trl_hf.get_added_vocab() for token in pieces[1::2])


def test_train_on_and_message_weights(tokenizers):
    tokenizer = tokenizers["byte_level", "chatml"]

    def trained(train_on="assistant", **weights):
        messages = [Message("system", "S"), Message("user", "U"), Message("assistant", "A"), Message("user", "V"),
                    Message("assistant", "B")]  # fmt: skip
        messages = tuple(Message(m.role, m.content, weights.get(m.content)) for m in messages)
        example = render(Conversation(messages), tokenizer, train_on=train_on)
        return {weight: tokenizer.decode(example.token_ids[example.loss_weights == weight]).replace("<|im_end|>", ".")
                for weight in set(example.loss_weights.tolist()) - {0.0}}  # fmt: skip

    assert trained() == {1.0: "A.B."}
    assert trained("last") == {1.0: "B."}
    assert trained("all") == {1.0: "S.U.A.V.B."}
    assert trained(A=0.25) == {0.25: "A.", 1.0: "B."}
    assert trained(A=0.0, V=2.0) == {2.0: "V.", 1.0: "B."}
    assert trained("last", A=1.0, B=0.5) == {0.5: "B."}
    with pytest.raises(InputError, match="no token carries weight"):
        trained(A=0.0, B=0.0)


def test_truncation_never_leaves_an_example_without_a_target(tokenizers, chat):
    tokenizer, messages = tokenizers["byte_level", "chatml"], chat("How many foxes?", "12 foxes.")
    whole = render(messages, tokenizer)
    first = int(np.flatnonzero(whole.loss_weights)[0])
    for length in (first + 1, len(whole.token_ids) - 1, len(whole.token_ids), len(whole.token_ids) + 1):
        cut = render(messages, tokenizer, max_length=length)
        assert np.array_equal(cut.token_ids, whole.token_ids[:length]) and cut.loss_weights[1:].any()
    with pytest.raises(InputError, match=f"no target is left within {first} tokens"):
        render(messages, tokenizer, max_length=first)


def test_a_token_that_overlaps_the_content_counts_as_content(make_hf, chat):
    """Ordinary text before the content may merge with its first letters."""
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}"
    for kind in ("byte_level", "metaspace_first"):
        hf = make_hf(kind, added=("</s>",), template=template, eos_token="</s>")
        example = render(chat("a", ":: b"), hf)
        assert example.token_ids.tolist() == ids_of(hf, chat("a", ":: b"))
        assert weighted(with_template(hf), example).endswith(":: b</s>")


def test_white_space_before_the_end_of_turn_is_learnt(make_hf, chat):
    template = ("{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
                "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}")  # fmt: skip
    tokenizer = with_template(make_hf(added=("</s>",), template=template, eos_token="</s>"))
    assert weighted(tokenizer, render(chat("q", "yes"), tokenizer)).strip() == "yes </s>"
    conversations = [Conversation(tuple(Message(**m) for m in chat(text, "yes"))) for text in ("q", "[/INST]")]
    plain, forged = render_many(conversations, tokenizer)
    assert plain.notes == () and forged.notes == ("text of a marker that the template writes as ordinary text",)


THINK = """{%- for m in messages -%}{%- set c = m.content -%}{%- set r = m.reasoning_content or '' -%}
{%- if m.role == 'assistant' and '</think>' in c -%}
{%- set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
{%- set c = c.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
{{- '<|im_start|>' + m.role + '\n' -}}{%- if r -%}{{- '<think>\n' + r + '\n</think>\n\n' -}}{%- endif -%}{{- c -}}
{%- for call in m.tool_calls or [] -%}
{{- '<call>' + call.function.name + (call.function.arguments | tojson) -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""


@pytest.fixture(scope="module")
def thinker(make_hf):
    added = ("<|im_start|>", "<|im_end|>", *(AddedToken(t, special=False) for t in ("<think>", "</think>", "<call>")))
    return make_hf(added=added, template=THINK, eos_token="<|im_end|>")


def test_reasoning_in_content_or_beside_it_is_learnt_with_its_tags(thinker):
    inside = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}]
    beside = [inside[0], {"role": "assistant", "content": "yes", "reasoning_content": "hm"}]
    for messages in (inside, beside):
        example = render(messages, thinker)
        assert example.token_ids.tolist() == ids_of(thinker, messages)
        assert thinker.decode(example.token_ids[example.loss_weights > 0]) == "<think>\nhm\n</think>\n\nyes<|im_end|>"


def test_tool_calls_are_learnt_and_results_are_not(thinker):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": "<call>", "b": 2}}}
    messages = [{"role": "user", "content": "1+2"}, {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "<call>3"}, {"role": "assistant", "content": "3"}]  # fmt: skip
    example = render(messages, thinker)
    learnt = thinker.decode(example.token_ids[example.loss_weights > 0])
    assert learnt == '<call>add{"a": "<call>", "b": 2}<|im_end|>3<|im_end|>'
    ids = example.token_ids.tolist()
    assert ids.count(thinker.convert_tokens_to_ids("<call>")) == 1  # the template's; those in texts stay text


def test_refusals_say_why_and_where(make_hf, chat):
    def refused(template, messages=None, added=("</s>",)):
        hf = make_hf(added=added, template=template, eos_token="<|endoftext|>")
        given = Conversation(tuple(Message(**m) for m in messages or chat("q", "yes, no")), Address("s", "f.jsonl", 3))
        with pytest.raises(InputError, match=r"^f\.jsonl:3: chat template of the tokenizer: ") as caught:
            render(given, hf)
        return str(caught.value)

    loop = "{%% for m in messages %%}%s</s>{%% endfor %%}"
    assert "must alternate" in refused("{{ raise_exception('roles must alternate') }}")
    assert "learn to stop" in refused("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    assert "leaves out the content of message 1" in refused("{{ messages[0].content }}</s>")
    assert "more than once" in refused(loop % "{{ m.content }}</s>{{ m.content }}")
    assert "no proof" in refused(loop % "{{ m.content | upper }}{{ m.content | reverse }}")
    assert "no proof" in refused(loop % "{{ m.content[:3] }}")
    assert "empty assistant turn" in refused(loop % "{{ m.content }}", chat("q", " "))
    assert "longer than" in refused("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    for nothing in ("models/tiny", None):
        with pytest.raises(InputError, match=rf"^tokenizer: found {type(nothing).__name__}; expected a transf"):
            render(chat("q", "a"), nothing)
    with pytest.raises(InputError, match="no message stands before"):
        render_prompt(chat("q", "a")[1:], make_hf(template=loop % "{{ m.content }}"))


@pytest.mark.parametrize("kind", ["byte_level", "metaspace_always"])
@pytest.mark.parametrize("shift", [(-1, 0), (1, 0), (0, -1), (0, 1), (1, 1)])
def test_a_mask_that_is_off_by_one_is_caught(tokenizers, chat, monkeypatch, shift, kind):
    """By the characters that the tokens stand for; and, were those wrong too, by decoding the tokens."""
    messages, right = chat("How many foxes?", "12 foxes."), Encoded.tokens_of

    def wrong(self, start, end):
        first, last = right(self, start, end)
        return first + shift[0], last + shift[1]

    monkeypatch.setattr(Encoded, "tokens_of", wrong)
    with pytest.raises(InputError, match=r"expected '12 foxes\.<\|im_end\|>'"):
        render(messages, tokenizers[kind, "chatml"])
    text = tokenizers[kind, "chatml"].template.render(messages)
    monkeypatch.setattr(masks, "_check_edges", lambda *_: None)
    monkeypatch.setattr(Encoded, "characters_of", lambda self, *_: (text.index("12"), text.rindex("\n")))
    with pytest.raises(InputError, match="the weighted tokens decode to"):
        render(messages, tokenizers[kind, "chatml"])


def test_words_tokenizer_with_unknown_words(make_hf, chat):
    template = "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|> {% endfor %}"
    hf = make_hf("words", template=template, unk_token="<unk>", eos_token="<|end|>")
    messages = chat("How many zebras?", "The zebras jumps over 48")
    example = render(messages, hf)
    assert example.token_ids.tolist() == ids_of(hf, messages)
    assert hf.decode(example.token_ids[example.loss_weights > 0]) == "The <unk> jumps over 48 <|end|>"
