"""The dialogue and the prompts file, on a model that babbles bytes."""

import io
import json

import pytest

from itune import chat, decode
from itune.data.render import render_prompt
from itune.data.templates import load_tokenizer, with_template
from itune.export import export_pretrained
from itune.models import load_pretrained
from itune.types import InputError, Message


@pytest.fixture(scope="module")
def chat_folder(base_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("chat") / "model"
    tokenizer = load_tokenizer(str(base_folder), "chatml")
    model, params = load_pretrained(base_folder, vocab_size=tokenizer.vocab_size)
    export_pretrained(out, model, params, base_folder, tokenizer)
    return str(out)


@pytest.fixture(scope="module")
def speaker(chat_folder):
    return chat.load_speaker(chat_folder)


def test_every_stop_token_is_known(speaker):
    assert {speaker.tokenizer.end_of_turn_id, 256} <= set(speaker.tokenizer.stop_ids)


def test_pieces_make_the_whole_answer(speaker):
    messages = [Message("user", "Hi")]
    pieces = list(speaker.stream(messages, 24, 0.0, 0))
    prompt = render_prompt(messages, speaker.tokenizer)
    stops = speaker.tokenizer.stop_ids
    whole = decode.generate_ids(speaker.model, speaker.params, [prompt], max_new_tokens=24, stop_ids=stops)[0]
    assert "".join(pieces) == speaker.tokenizer.decode(whole.ids) and len(pieces) > 3


def test_a_dialogue_remembers(speaker, monkeypatch):
    asked = []

    def stream(self, messages, max_new_tokens, temperature, seed):
        asked.append([(m.role, m.content) for m in messages])
        yield from ("well", " then")

    monkeypatch.setattr(chat.Speaker, "stream", stream)
    dialogue = chat.Dialogue(speaker)
    assert list(dialogue.answer("one")) == ["well", " then"]
    list(dialogue.answer("two"))
    assert asked[1] == [("user", "one"), ("assistant", "well then"), ("user", "two")]
    assert "set" in next(dialogue.answer("/system Be brief."))
    list(dialogue.answer("three"))
    assert asked[2] == [("system", "Be brief."), ("user", "three")]
    next(dialogue.answer("/reset"))
    pieces = dialogue.answer("four")
    next(pieces)
    pieces.close()  # as Ctrl-C does
    list(dialogue.answer("five"))
    assert asked[4][1:] == [("user", "four"), ("assistant", "well"), ("user", "five")]


def test_an_unknown_command_is_no_prompt(speaker):
    dialogue = chat.Dialogue(speaker)
    assert "did you mean /reset?" in next(dialogue.answer("/rest"))
    assert dialogue.turns == []


def test_what_does_not_fit_is_said_and_forgotten(speaker):
    dialogue = chat.Dialogue(speaker, max_new_tokens=4)
    with pytest.raises(InputError, match="the model takes 1 to 127"):
        list(dialogue.answer("word " * 60))
    assert dialogue.turns == []


def test_the_loop_reads_until_quit(chat_folder, capsys):
    lines = iter(["", "Hi", "x" * 200, "/quit", "never"])
    chat.chat(chat_folder, max_new_tokens=8, read=lambda prompt: next(lines))
    shown = capsys.readouterr().out
    assert "/reset forgets" in shown and "takes 1 to 127" in shown
    assert next(lines) == "never"
    chat.chat(chat_folder, read=_end_of_input)


def _end_of_input(prompt):
    raise EOFError


def test_an_interrupted_answer_is_waited_for(speaker, monkeypatch):
    """The process would else die in XLA where it ends before the tokens in flight are there."""
    seen, waited = [], []

    def interrupted(state):
        seen.append(state)
        raise KeyboardInterrupt

    monkeypatch.setattr(decode, "read", interrupted)
    monkeypatch.setattr(decode.jax, "block_until_ready", waited.append)
    with pytest.raises(KeyboardInterrupt):
        list(speaker.stream([Message("user", "Hi")], 24, 0.0, 0))
    assert len(seen) == 1 and waited[0] is seen[0]


def test_a_model_without_a_template_cannot_chat(base_folder):
    with pytest.raises(InputError, match="no chat template"):
        chat.chat(str(base_folder))


def test_a_file_of_prompts_is_answered(chat_folder, tmp_path, capsys):
    (tmp_path / "q.txt").write_text("What is up?\n\nAnd down?\n")
    result = chat.generate_file(chat_folder, str(tmp_path / "q.txt"), max_new_tokens=8)
    assert [row["address"][-2:] for row in result["answers"]] == [":1", ":3"]
    assert "> And down?" in capsys.readouterr().out and result["tokens_per_second"] > 0
    rows = [{"prompt": "What is up?"}, {"messages": [{"role": "user", "content": "And down?"},
                                                     {"role": "assistant", "content": "left out"}]}]  # fmt: skip
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = chat.generate_file(
        chat_folder, str(tmp_path / "q.jsonl"), max_new_tokens=8, out=str(tmp_path / "a" / "answers.jsonl")
    )
    assert [row["answer"] for row in again["answers"]] == [row["answer"] for row in result["answers"]]
    written = [json.loads(line) for line in (tmp_path / "a" / "answers.jsonl").read_text().splitlines()]
    assert written == again["answers"] and written[1]["messages"][-1]["content"] == "And down?"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.txt", "\n \n", r"q.txt: holds no prompt"),
        ("q.txt", b"\xff", r"q.txt: byte 0 is not UTF-8"),
        ("q.jsonl", '{"prompt": "a"}\n{"question": "b"}\n', r"q.jsonl:2: neither messages nor a prompt .*question"),
        ("q.jsonl", '{"messages": [{"role": "usr", "content": "b"}]}', r"q.jsonl:1: messages\[0\].role: .*: user"),
        ("q.jsonl", '{"prompt": "a \\ud800"}', r"q.jsonl:1: prompt.*: found the lone surrogate U\+D800 at character 2"),
        ("q.txt", "a\n\0", r"q.txt:2.*: found a NUL character"),
        ("q.jsonl", '{"messages": [{"role": "assistant", "content": "b"}]}', r"q.jsonl:1: messages: nothing stands"),
        ("q.jsonl", "{", r"q.jsonl:1: "),
    ],
)
def test_a_bad_file_has_an_address(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        chat.read_prompts(str(tmp_path / name))


def test_a_text_file_is_cut_at_newlines_alone(tmp_path):
    (tmp_path / "q.txt").write_bytes("\ufeffone\u2028still one\x0c\x85and\r\ntwo\n".encode())
    found = chat.read_prompts(str(tmp_path / "q.txt"))
    assert [each.messages[0].content for each in found] == ["one\u2028still one\x0c\x85and", "two"]


@pytest.mark.parametrize(("name", "value"), [("max_new_tokens", 0), ("temperature", -1.0), ("seed", -1)])
def test_settings_are_checked_before_anything_is_read(name, value):
    with pytest.raises(InputError, match=f"{name} must be"):
        chat.generate_file("no model", "no file", **{name: value})
    if name != "seed":
        with pytest.raises(InputError, match=f"{name} must be"):
            chat.chat("no model", **{name: value})


def test_a_system_message_that_the_template_refuses_is_not_kept(speaker, tmp_path):
    source = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (tmp_path / "own.jinja").write_text(source + speaker.tokenizer.template.source)
    tokenizer = with_template(speaker.tokenizer.hf, str(tmp_path / "own.jinja"))
    dialogue = chat.Dialogue(chat.dataclasses.replace(speaker, tokenizer=tokenizer), max_new_tokens=4)
    said = next(dialogue.answer("/system Be brief."))
    assert said.startswith("(/system: ") and "no system" in said and "memory" not in said
    assert dialogue.system == [] and "".join(dialogue.answer("Hi"))


def test_a_line_that_is_not_utf8_is_not_asked(chat_folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n/quit\n"), encoding="utf-8"))
    chat.chat(chat_folder, max_new_tokens=8)
    assert "(this line is not UTF-8; nothing was asked)" in capsys.readouterr().out


def test_a_missing_file_and_a_long_prompt(chat_folder, tmp_path):
    with pytest.raises(InputError, match="no file"):
        chat.read_prompts(str(tmp_path / "none.txt"))
    (tmp_path / "q.txt").write_text("short\n" + "long " * 40)
    with pytest.raises(InputError, match=r"q.txt:2: \d+ tokens; the model takes fewer than 128"):
        chat.generate_file(chat_folder, str(tmp_path / "q.txt"))
