"""Templates and tokenizers: names, files, added tokens, end of turn, and text that stays text."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from itune.data.render import render
from itune.data.templates import SHIPPED, load_tokenizer, require_template, with_template
from itune.types import InputError


@pytest.mark.parametrize("name, end", [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("zephyr", "<|endoftext|>"),
                                       ("tulu", "<|endoftext|>")])
def test_a_shipped_template_brings_its_tokens_and_its_end(make_hf, name, end, tmp_path):
    hf = make_hf(bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    size = len(hf)
    tokenizer = with_template(hf, name)
    assert tokenizer.decode([tokenizer.end_of_turn_id]) == end == hf.eos_token
    assert tokenizer.vocab_size == size + len(tokenizer.added_tokens) == len(hf)
    assert set(tokenizer.stop_ids) == {tokenizer.end_of_turn_id, 0}
    hf.save_pretrained(tmp_path)  # what an export does
    again = load_tokenizer(str(tmp_path))
    assert again.template.source == tokenizer.template.source and again.eos_id == tokenizer.end_of_turn_id
    assert again.added_tokens == () and again.fingerprint == tokenizer.fingerprint
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert render(messages, again).token_ids.tolist() == hf.apply_chat_template(messages)["input_ids"]


def test_a_template_file_and_the_tokens_it_writes(make_hf, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{# no <|x|> #}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}<|stop|>{% endfor %}")
    tokenizer = with_template(make_hf(), str(path))
    assert tokenizer.added_tokens == ("<|stop|>",) and tokenizer.hf.eos_token == "<|stop|>"
    example = render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], tokenizer)
    assert tokenizer.decode(example.token_ids[example.loss_weights > 0]) == "b<|stop|>"


def test_what_is_missing_is_named_with_the_choices(make_hf, tmp_path):
    with pytest.raises(InputError, match=r"called chatlm \(nearest: chatml\).*chatml, llama3, tulu, zephyr"):
        with_template(make_hf(), "chatlm")
    with pytest.raises(InputError, match=r"no chat template; expected data\.chat_template to be one of chatml"):
        require_template(with_template(make_hf()))
    with pytest.raises(InputError, match="writes eos_token, and the tokenizer has none"):
        with_template(make_hf(), "zephyr")
    with pytest.raises(InputError, match=r"model\.path: no folder .*absent; expected a folder"):
        load_tokenizer(str(tmp_path / "absent"))
    (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot be read as UTF-8"):
        with_template(make_hf(), str(tmp_path / "binary.jinja"))


def test_fingerprint_follows_vocabulary_template_and_tokens(make_hf):
    base = with_template(make_hf(), "chatml").fingerprint
    assert with_template(make_hf(), "chatml").fingerprint == base
    changed = [
        with_template(make_hf(), "llama3"),
        with_template(make_hf(added=("<|x|>",)), "chatml"),
        with_template(make_hf(kind="unigram"), "chatml"),
        with_template(make_hf(bos_token="<s>"), "chatml"),
    ]
    assert len({base, *(tokenizer.fingerprint for tokenizer in changed)}) == 5


@pytest.mark.parametrize("kind", ["byte_level", "metaspace_first", "metaspace_always", "unigram", "words"])
def test_plain_text_never_becomes_an_added_token(make_hf, kind):
    """Also where the token stands in the model's own vocabulary, or is matched after normalisation."""
    loose = AddedToken("<tool>", special=False, normalized=True, lstrip=True, rstrip=True)
    tokenizer = with_template(make_hf(kind, added=("<|x|>", loose), unk_token="<unk>"))
    for token in tokenizer.added.values():
        for text in (token.content, f"a {token.content} b", token.content * 3, f"a{token.content}b"):
            made = set(tokenizer.encode_plain(text)) & set(tokenizer.added)
            assert made <= {tokenizer.hf.unk_token_id}, (text, made)
    if kind != "metaspace_first":  # which marks the first word of a text, and plain text follows other text
        assert tokenizer.encode_plain("How many foxes?") == tokenizer.backend.encode("How many foxes?").ids


def test_the_size_is_that_of_the_largest_id(make_hf, tmp_path):
    """Added tokens may leave ids out; rows of an embedding are counted by what they may be asked for."""
    hf = make_hf(added=("<|im_start|>", "<|im_end|>"), eos_token="<|im_end|>", template=SHIPPED["chatml"])
    hf.save_pretrained(tmp_path)
    state, size = json.loads((tmp_path / "tokenizer.json").read_text()), len(hf)
    for token in state["added_tokens"]:
        if token["content"] == "<|im_end|>":
            token["id"] = state["model"]["vocab"]["<|im_end|>"] = size + 100
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    assert load_tokenizer(str(tmp_path)).vocab_size == size + 101 > len(load_tokenizer(str(tmp_path)).hf)


@pytest.mark.parametrize("declared", ["PreTrainedTokenizerFast", "TokenizersBackend"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2", "mistral"])
def test_a_folder_gives_the_tokenizer_that_transformers_gives(make_hf, chat, tmp_path, family, declared):
    with_template(make_hf(eos_token="<|endoftext|>"), "chatml").hf.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    stated = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**stated, "tokenizer_class": declared}))
    judge, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))
    assert ours.hf.backend_tokenizer.to_str() == judge.backend_tokenizer.to_str()
    messages = chat("How many foxes?  ", "12\n\nfoxes")
    assert render(messages, ours).token_ids.tolist() == list(judge.apply_chat_template(messages)["input_ids"])


def test_reading_a_tokenizer_imports_neither_torch_nor_model_code(make_hf, tmp_path):
    with_template(make_hf(), "chatml").hf.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    stated = json.loads((tmp_path / "tokenizer_config.json").read_text())
    stated["tokenizer_class"] = "PreTrainedTokenizerFast"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(stated))
    code = (f"import sys; from itune.data.templates import load_tokenizer; load_tokenizer({str(tmp_path)!r}); "
            "sys.exit('torch' in sys.modules)")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
