"""Real models' chat templates, as trl ships them: masks against its training twins, and no text becomes a token."""

from __future__ import annotations

import re

import numpy as np
import pytest
from test_sandbox import trl_templates
from tokenizers import AddedToken

from itune.data.render import render, render_many
from itune.data.templates import with_template
from itune.types import Conversation, InputError, Message

ALL = trl_templates()
STOCK = [name for name in ALL if not name.endswith("_training")]
TWINS = [name for name in STOCK if f"{name}_training" in ALL]
BAR = "\uff5c"  # in DeepSeek's tokens
PATTERNS = [r"<\|[^|<>\s'\"+{}]+\|>", f"<{BAR}[^<>{BAR}]+{BAR}>", r"<(?:start|end)_of_turn>", "</?think>",
            "</?tool_call>", r"<\w+\|>", r"<\|\w+>", r"\[gMASK\]", "<sop>"]  # fmt: skip
CODE = "\n".join(re.sub(r"\{#.*?#\}", "", source, flags=re.DOTALL) for source in ALL.values())
TOKENS = sorted({*re.findall("|".join(PATTERNS), CODE), "<|user|>", "<|assistant|>", "<|system|>"})


@pytest.fixture(scope="module")
def hf(make_hf):
    special = [AddedToken(token, special=token[1] in "|" + BAR, normalized=False) for token in TOKENS]
    return make_hf(added=("<s>", "</s>", *special), bos_token="<s>", eos_token="</s>")


def use(hf, name: str) -> str:
    """Give the tokenizer a template of trl's, its date fixed; returns the template."""
    hf.chat_template = re.sub(r"strftime_now\([^)]*\)", "'26 Jul 2024'", ALL[name])
    return hf.chat_template


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def told(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 11, "b": 12}}}
NUMBERS = {"a": {"type": "integer"}, "b": {"type": "integer"}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds numbers.", "parameters": {
    "type": "object", "properties": NUMBERS, "required": ["a", "b"]}}}]  # fmt: skip
SEVERAL = [user("Ask one."), told("Hello you."), user("Ask two."), told("Bye now.")]
CASES: dict[str, tuple[list[dict], list | None]] = {
    "one": (SEVERAL[:2], None),
    "several": (SEVERAL, None),
    "system": ([{"role": "system", "content": "Ask of system."}, *SEVERAL], None),
    "empty system": ([{"role": "system", "content": ""}, *SEVERAL[:2]], None),
    "tools": ([user("Ask one."), told("", tool_calls=[CALL]), {"role": "tool", "name": "add", "content": "Ask 23."},
               told("It is 23.")], TOOLS),
    "reasoning": ([user("Ask one."), told("It is 3.", reasoning_content="One and two.")], None),
    "reasoning before": ([user("Ask one."), told("It is 3.", reasoning_content="One and two."), user("Ask two."),
                          told("Yes.", reasoning_content="I am.")], None),
}  # fmt: skip
NO_CALLS = {"tools": "leaves out tool call 0"}
ALTERNATE = {"tools": "must alternate"}
PARTS = {"one": "content of message|no attribute", "several": "content of message|no attribute",
         "system": "content of message|no attribute|no element", "empty system": "no element|no attribute",
         "tools": "no element", "reasoning": "content of message|no attribute",
         "reasoning before": "content of message|no attribute"}  # fmt: skip
REFUSED = {  # template -> case -> the reason that is given
    "cohere": ALTERNATE, "cohere2": ALTERNATE, "gemma3": ALTERNATE, "gemma": {
        **ALTERNATE, "system": "System role not supported", "empty system": "System role not supported"},
    "deepseek_r1_distill": NO_CALLS, "lfm2": NO_CALLS, "llama3": NO_CALLS, "phi3": NO_CALLS, "phi3_5": NO_CALLS,
    "qwen2_5_vl": NO_CALLS, "deepseekv3": {"tools": "concatenate str"},
    "glm4moe": dict.fromkeys(CASES, "learn to stop|no end-of-turn token"),
    "gptoss": {"tools": "no proof"},
    # their contents are lists of parts, text and images
    "idefics3": PARTS, "smolvlm": PARTS, "llava_next": PARTS,
}  # fmt: skip
LINE, HEADER = "the line break after the end of turn", "the header, which the generation prompt writes"
THOUGHT = "a reasoning block that is empty, or kept where the stock template drops it, or its opening"
BLOCK = r"(?:<think>\n?(?:One and two\.)?\n*(?:</think>)?\n*)?"
DIFFERENCES = {  # template -> what its twin marks more, before and after each turn (a pattern), and why we do not
    "deepseek_r1_distill": (f"<{BAR}Assistant{BAR}>", "", HEADER),
    "deepseekv3": (f"<{BAR}Assistant{BAR}>", "", HEADER),
    "gptoss": (r"<\|start\|>assistant(?:<\|channel\|>final<\|message\|>)?", "", HEADER),
    "muse_glimmer": (r"<\|start\|>assistant(?: to=user<\|message\|>)?", "", HEADER),
    "diffusion_gemma": ("", "\n?", LINE + ", where one follows"),
    **dict.fromkeys(("gemma", "gemma3", "lfm2", "lfm2_v2", "qwen2_5_vl", "qwen3_instruct_2507",
                     "qwen3_vl"), ("", "\n", LINE)),
    "phi3": ("", "\n(?:</s>)?", LINE + ", and the end of text after the last"),
    "phi3_5": ("", "\n(?:</s>)?", LINE + ", and the end of text after the last"),
    "qwen2_5": ("\n", "\n", LINE + ", and the one that ends the header"),
    **dict.fromkeys(("nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "qwen3",
                     "qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8"), (BLOCK, "\n", f"{LINE}; {THOUGHT}")),
}  # fmt: skip


def conversation(messages: list[dict], tools: list | None) -> Conversation:
    made = [Message(m["role"], m["content"], None, {k: v for k, v in m.items() if k not in ("role", "content")})
            for m in messages]  # fmt: skip
    return Conversation(tuple(made), metadata={"tools": tools} if tools else {})


def turns(hf, ids, marked) -> list[str]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(marked).astype(np.int8), [0]])))
    return [hf.decode(ids[first:last]) for first, last in zip(edges[::2], edges[1::2])]


def rendered(hf, name: str, case: str):
    """The example, or None where it is refused for the reason that is listed."""
    use(hf, name)
    reason = REFUSED.get(name, {}).get(case)
    if reason is None:
        return render(conversation(*CASES[case]), hf)
    with pytest.raises(InputError, match=reason):
        render(conversation(*CASES[case]), hf)
    return None


@pytest.mark.parametrize("name", STOCK)
def test_ids_are_transformers_and_only_the_assistant_is_learnt(hf, name):
    for case, (messages, tools) in CASES.items():
        example = rendered(hf, name, case)
        if example is None:
            continue
        judge = hf.apply_chat_template(messages, tools=tools, return_dict=True)["input_ids"]
        assert example.token_ids.tolist() == list(judge), case
        learnt = turns(hf, example.token_ids, example.loss_weights > 0)
        answers = [m["content"] or "add" for m in messages if m["role"] == "assistant"]
        assert len(learnt) == len(answers), case
        for text, answer in zip(learnt, answers):
            assert answer in text and "Ask" not in text and "Adds" not in text, case
            assert re.search(r"(?:<[^>]*>|</s>)$", text), case  # it ends in an added token


@pytest.mark.parametrize("name", TWINS)
def test_masks_equal_the_training_twins_but_for_listed_differences(hf, name):
    before, after, _ = DIFFERENCES.get(name, ("", "", ""))
    seen = set()
    for case, (messages, tools) in CASES.items():
        example = rendered(hf, name, case)
        if example is None:
            continue
        use(hf, f"{name}_training")
        judge = hf.apply_chat_template(messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
        ours = turns(hf, example.token_ids, example.loss_weights > 0)
        theirs = turns(hf, judge["input_ids"], judge["assistant_masks"])
        assert len(ours) == len(theirs), case
        for mine, twin in zip(ours, theirs):
            assert re.fullmatch(f"{before}{re.escape(mine)}{after}", twin), (case, mine, twin)
            seen.add(mine == twin)
    if name in DIFFERENCES:
        assert False in seen or not seen, f"{name} does not differ any more: take it from the list"


@pytest.mark.parametrize("name", [*STOCK, *(pytest.param(f"{name}_training", marks=pytest.mark.soak)
                                            for name in TWINS)])  # fmt: skip
def test_no_added_token_comes_from_text(hf, name):
    """Every added token as text of the user, the system and a tool: added tokens stay those of the template."""
    use(hf, name)
    tokenizer = with_template(hf)
    checked = 0
    for role, place in (("user", 0), ("system", 0), ("tool", 2)):
        base, tools = CASES["tools" if role == "tool" else "system" if role == "system" else "one"]
        clean = render_many([conversation(base, tools)], tokenizer)[0].example
        if clean is None:
            continue  # refused, as the tests above list
        expected = tokenizer.is_added_V[clean.token_ids].sum()
        forged = [[{**m, "content": f"{m['content']} {token}"} if i == place else m for i, m in enumerate(base)]
                  for token in (*TOKENS, "<s>", "</s>")]  # fmt: skip
        for messages, outcome in zip(forged, render_many([conversation(m, tools) for m in forged], tokenizer)):
            if outcome.error is None:
                checked += 1
                assert tokenizer.is_added_V[outcome.example.token_ids].sum() == expected, messages[place]
                assert "text of an added token, kept as text" in outcome.notes
    assert checked > len(TOKENS) or name.startswith(("idefics3", "smolvlm", "llava_next", "glm4moe"))
