"""The template sandbox: what transformers renders it renders, what attacks time, memory or the machine it stops."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from itune.data.sandbox import SECONDS, TODAY, Sandbox
from itune.data.templates import SHIPPED, ChatTemplate, TemplateRefusal
from itune.types import InputError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def trl_templates() -> dict[str, str]:
    """Real models' templates that the trl package ships, by file name; empty where trl is not installed."""
    spec = importlib.util.find_spec("trl")
    folder = Path(spec.origin).parent / "chat_templates" if spec and spec.origin else Path("absent")
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.jinja"))}


TEMPLATES = SHIPPED | trl_templates()


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers_does(name, chat, monkeypatch):
    import transformers.utils.chat_template_utils as judge

    monkeypatch.setattr(judge, "datetime", type("Fixed", (), {"now": staticmethod(lambda: TODAY)}))
    judge._compile_jinja_template.cache_clear()
    source, template = TEMPLATES[name], ChatTemplate(TEMPLATES[name], name, dict(SPECIAL))
    for messages in (chat("Hi", "Hello"), chat("a ", " b\n", "c", "d", system="Be nice.")):
        for prompt in (False, True):
            try:
                expected = render_jinja_template(
                    [messages], chat_template=source, add_generation_prompt=prompt, **SPECIAL
                )
            except jinja2.TemplateError:
                with pytest.raises(TemplateRefusal):
                    template.render(messages, add_generation_prompt=prompt)
                continue
            assert template.render(messages, add_generation_prompt=prompt) == expected[0][0]


GROW = "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = BODY %}{% endfor %}{{ ns.x | length }}"
ATTACKS = {
    "long product": "{{ 'a' * 2000000000 }}",
    "long list": "{{ ([1] * 2000000000) | length }}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "doubling by ~": GROW.replace("BODY", "ns.x ~ ns.x"),
    "doubling by +": GROW.replace("BODY", "ns.x + ns.x"),
    "doubling by join": GROW.replace("BODY", "[ns.x, ns.x] | join"),
    "doubling by replace": GROW.replace("BODY", "ns.x.replace('a', 'aa')"),
    "doubling by method": GROW.replace("BODY", "''.join([ns.x, ns.x])"),
    "replace filter": "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "indent filter": "{{ ('\\n' * 1000000) | indent(1000000) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "padding": "{{ 'a'.ljust(1000000000) }}",
    "centering": "{{ 'a' | center(1000000000) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "format": "{{ '{:1000000000d}'.format(1) }}",
    "format nested": "{{ '{:{w}}'.format(1, w=1000000000) }}",
    "power": "{{ 9 ** 999999999 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "class walk": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "mutation": "{{ messages.append(1) }}",
    "attribute filter": "{{ '' | attr('__class__') }}",
    "own words": "{{ raise_exception('only two roles') }}",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_refused_within_the_limits(attack, chat):
    start = time.monotonic()
    try:
        text = ChatTemplate(ATTACKS[attack], attack, {}).render(chat("Hi", "Hello"))
    except TemplateRefusal:
        text = ""
    assert "uid=" not in text and "subclass" not in text and len(text) < 100
    assert time.monotonic() - start < SECONDS + 6  # the machine may be busy


def test_guards_cannot_be_renamed_away_and_syntax_errors_have_a_line():
    sandbox = Sandbox()
    names = sandbox.compiled("{% set tick = 1 %}{% set concat = 2 %}{{ 'a' ~ 'b' }}")
    assert sandbox.render(names, {}) == "ab"
    with pytest.raises(InputError, match=r"chat template mine:2: .*expected a Jinja chat template"):
        ChatTemplate("ok\n{% for %}", "mine", {})
