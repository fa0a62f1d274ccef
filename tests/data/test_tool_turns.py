"""Turns with calls and reasoning where a template repeats or moves their texts, or treats earlier turns otherwise."""

from __future__ import annotations

import numpy as np
import pytest
from test_trl_templates import CALL, TOOLS, conversation, hf, told, turns, use, user  # noqa: F401

from itune.data.render import render, render_many
from itune.data.templates import with_template
from itune.types import InputError

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
WITH_TOOLS = "{% if tools %}<|im_start|>system\nTOOLS {{ tools | tojson }}<|im_end|>\n{% endif %}" + CHATML
# as Mistral's: the id of a call is measured
MEASURED = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% for call in m.tool_calls or [] %}"
            "{% if call.id | length != 9 %}{{ raise_exception('nine characters') }}{% endif %}"
            "{{ call.function | tojson }} {{ call.id }}{% endfor %}"
            "{% if m.tool_call_id %}{{ m.tool_call_id }} {% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")  # fmt: skip
RESULT, ANSWER = {"role": "tool", "name": "add", "content": "Ask 23."}, told("It is 23.")


def learnt(hf, messages, tools=None) -> list[str]:  # noqa: F811
    example = render(conversation(messages, tools), hf)
    judge = hf.apply_chat_template(messages, tools=tools, return_dict=True)["input_ids"]
    assert example.token_ids.tolist() == list(judge)
    return turns(hf, np.asarray(example.token_ids), example.loss_weights > 0)


def test_a_result_that_repeats_the_name_of_its_call_is_not_learnt(hf):  # noqa: F811
    """GPT-OSS writes it into the tool's header; the turn ends as its training twin's does."""
    use(hf, "gptoss")
    call = '<|channel|>commentary json<|message|>{"a": 11, "b": 12}<|call|>'
    rounds = [user("Ask one."), told("", tool_calls=[CALL]), RESULT, told("", tool_calls=[CALL]), RESULT, ANSWER]
    assert learnt(hf, [*rounds[:3], ANSWER]) == [f" to=functions.add{call}", "It is 23.<|return|>"]
    assert learnt(hf, rounds) == [f" to=functions.add{call}"] * 2 + ["It is 23.<|return|>"]


@pytest.mark.parametrize(("name", "turn", "said"), [
    ("gptoss", told("", tool_calls=[CALL, {"function": {"name": "sub", "arguments": {}}}]), "leaves out tool call 1"),
    ("gemma4", told("Let me see.", tool_calls=[CALL]), "a text of another message inside of message 1"),
])
def test_what_is_left_out_or_moved_behind_the_result_is_refused(hf, name, turn, said):  # noqa: F811
    use(hf, name)
    with pytest.raises(InputError, match=said):
        render(conversation([user("Ask one."), turn, RESULT, ANSWER], None), hf)


def test_an_earlier_exchange_whose_reasoning_is_left_out(hf):  # noqa: F811
    use(hf, "qwen3")
    first = [user("Ask one."), told("", tool_calls=[CALL], reasoning_content="Add."), RESULT,
             told("It is 23.", reasoning_content="Done.")]  # fmt: skip
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 11, "b": 12}}\n</tool_call><|im_end|>'
    assert learnt(hf, first, TOOLS) == [f"<think>\nAdd.\n</think>\n\n{call}",
                                        "<think>\nDone.\n</think>\n\nIt is 23.<|im_end|>"]  # fmt: skip
    found = learnt(hf, [*first, user("Ask two."), told("Bye.", reasoning_content="Ok.")], TOOLS)
    assert found == [call, "It is 23.<|im_end|>", "<think>\nOk.\n</think>\n\nBye.<|im_end|>"]


def test_an_id_that_the_template_measures(make_hf):
    made = make_hf(added=("<|im_start|>", "<|im_end|>"), template=MEASURED, eos_token="<|im_end|>")
    messages = [user("q"), told("", tool_calls=[{**CALL, "id": "abcdefghi"}]),
                {**RESULT, "tool_call_id": "abcdefghi"}, ANSWER]  # fmt: skip
    assert learnt(made, messages) == [
        '{"name": "add", "arguments": {"a": 11, "b": 12}} abcdefghi<|im_end|>', "It is 23.<|im_end|>"]  # fmt: skip


def test_the_template_for_tools_is_taken_where_there_are_some(make_hf):
    made = make_hf(added=("<|im_start|>", "<|im_end|>"), eos_token="<|im_end|>")
    made.chat_template = {"default": CHATML, "tool_use": WITH_TOOLS}
    assert render_many([conversation([user("q"), ANSWER], TOOLS)], with_template(made))[0].notes == ()
    for tools in (TOOLS, None):
        assert learnt(made, [user("q"), ANSWER], tools) == ["It is 23.<|im_end|>"]
    made.chat_template = CHATML
    found = render_many([conversation([user("q"), ANSWER], TOOLS)], with_template(made))[0]
    assert found.example is not None and found.notes == ("tools that the template does not write",)
