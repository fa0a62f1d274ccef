"""A remembered tokenizer: the facts of the read one, anything else by reading, and nothing stale."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from itune.data import remembered
from itune.data.remembered import Remembered, recall_tokenizer
from itune.data.templates import load_tokenizer
from itune.types import InputError

TEMPLATE = "{% for m in messages %}<|go|>{{ m['content'] }}<|stop|>{% endfor %}"
TALK = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Good day"}]


@pytest.fixture
def folder(make_hf, tmp_path):
    make_hf(template=TEMPLATE, added=("<|go|>", "<|stop|>"), eos_token="<|stop|>").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path / "model"


@pytest.fixture
def recall(folder, tmp_path, monkeypatch):
    """recall(template) -> (tokenizer, how often one was read until now)."""
    reads = []
    monkeypatch.setattr(remembered, "load_tokenizer", lambda *given: reads.append(given) or load_tokenizer(*given))
    return lambda template="": (recall_tokenizer(str(folder), template, cache_dir=str(tmp_path / "cache")), reads)


@pytest.mark.parametrize("template", ["", "chatml", "file"])
def test_is_what_is_read(recall, folder, tmp_path, template):
    if template == "file":
        template = str(tmp_path / "mine.jinja")
        (tmp_path / "mine.jinja").write_text(TEMPLATE.replace("go", "start"))
    recall(template)
    found, reads = recall(template)
    wanted = load_tokenizer(str(folder), template)
    assert isinstance(found, Remembered)
    for name in ("vocab_size", "added_tokens", "fingerprint"):
        assert getattr(found, name) == getattr(wanted, name), name
    assert found.template.render(TALK) == wanted.template.render(TALK)
    assert found.template.name == wanted.template.name
    assert len(reads) == 1, "a fact was not remembered"
    for name in ("eos_id", "pad_id", "stop_ids", "end_of_turn_ids", "added"):
        assert getattr(found, name) == getattr(wanted, name), name
    text = found.template.render(TALK)
    assert found.decode(found.encode_plain(text)) == wanted.decode(wanted.encode_plain(text))
    assert found.hf.get_vocab() == wanted.hf.get_vocab()
    assert len(reads) == 2, "it is read once"


def test_a_template_for_tools_is_remembered_too(recall, folder):
    hf = load_tokenizer(str(folder)).hf
    hf.chat_template = {"default": TEMPLATE, "tool_use": "{{ tools }}" + TEMPLATE}
    hf.save_pretrained(folder)
    recall()
    found, _ = recall()
    plain = found.template.render(TALK)
    assert isinstance(found, Remembered) and found.template.for_tools(None).render(TALK) == plain
    assert found.template.for_tools(["f"]).render(TALK, ["f"]) == "['f']" + plain


def test_is_read_again_when_a_file_or_the_template_changes(recall, folder, tmp_path):
    mine = tmp_path / "mine.jinja"
    mine.write_text(TEMPLATE)
    for template in ("", str(mine)):
        before = recall(template)[0].fingerprint
        assert recall(template)[0].fingerprint == before
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<|go|>"}))
    changed, reads = recall()
    assert len(reads) == 3 and changed.pad_id == changed.hf.convert_tokens_to_ids("<|go|>")
    mine.write_text(TEMPLATE + "\n")
    assert recall(str(mine))[0].template.source == TEMPLATE + "\n"


@pytest.mark.parametrize("damage", ["", "{}", "[1]", '{"vocab_size": "many"}', "\xff"])
def test_a_damaged_memory_is_replaced(recall, tmp_path, damage):
    recall()
    kept, = (tmp_path / "cache" / "tokenizers").glob("*.json")
    kept.write_text(damage, encoding="latin-1")
    assert not isinstance(recall()[0], Remembered)
    assert isinstance(recall()[0], Remembered)


def test_a_tokenizer_that_changed_meanwhile_is_refused(recall, folder):
    recall()
    found, _ = recall()
    state = json.loads((folder / "tokenizer.json").read_text())
    state["added_tokens"] = state["added_tokens"][:-1]
    (folder / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="changed since this run began"):
        found.encode_plain("x")


def test_one_without_template_and_one_that_cannot_be_kept(recall, folder, tmp_path):
    (tmp_path / "cache").write_text("not a folder")
    assert recall()[0].template is not None
    (tmp_path / "cache").unlink()
    for file in [*folder.glob("*.jinja")]:
        file.unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for _ in range(2):
        assert recall()[0].template is None
    assert not (tmp_path / "cache" / "tokenizers").exists()


def test_prepared_data_are_opened_without_what_prepares_them(folder, write_rows, tmp_path):
    rows = write_rows([{"messages": TALK}] * 3)
    program = f"""
import sys
from itune.config import from_dict
from itune.setup_run import prepare_data
data = {{"train": {rows!r}, "max_length": 64, "cache_dir": {str(tmp_path / "cache")!r}}}
data = prepare_data(from_dict({{"model": {{"path": {str(folder)!r}}}, "data": data}}), lambda text: None)
heavy = {{"transformers", "tokenizers", "jinja2", "itune.data.build"}} & set(sys.modules)
print(len(data.dataset.train), data.tokenizer.vocab_size, len(heavy))
"""
    first, second = (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(2)
    )
    assert first[:2] == second[:2]
    assert (first[2], second[2]) == ("4", "0")
