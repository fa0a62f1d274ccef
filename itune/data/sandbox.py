"""Chat templates are code of strangers: they run in jinja2's immutable sandbox, with limits on time and size.

The helpers are those that templates expect of transformers: raise_exception, strftime_now, tojson, loop controls, and
the `generation` tag.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import time
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes as nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 2.0  # one rendering
CHARACTERS = 50_000_000  # one string, and the whole output
ARGUMENT = 1_000_000  # a whole number handed to a text method or filter
_TEXTS, _JOINED, _SIZED = (str, bytes), (str, list, tuple), (str, bytes, list, tuple)
# Templates may print today's date. A run that changes at midnight could not be resumed, so they get one fixed day.
TODAY = datetime.datetime(2024, 7, 26)


class TemplateLimit(jinja2.TemplateError):
    """A template used more time or memory than it may."""


class Guard(jinja2.ext.Extension):
    """Counts: every turn of a loop or macro calls `tick`, every concatenation goes through `concat`."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's interface)
    deadline = float("inf")

    def parse(self, parser: Any) -> nodes.Node:
        """`{% generation %}` marks what the model writes; masks are proven otherwise, so only its body stays."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)

    def tick(self) -> bool:
        if time.monotonic() > self.deadline:
            raise TemplateLimit(f"the template ran longer than {SECONDS:g} s")
        return True

    def concat(self, *parts: Any) -> str:
        self.tick()
        texts = [str(part) for part in parts]
        check_size(sum(map(len, texts)))
        return "".join(texts)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment that templates are compiled in."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Guard, jinja2.ext.loopcontrols])
        self.guard: Guard = self.extensions[Guard.identifier]  # type: ignore[assignment]
        filters = {**self.filters, "tojson": _tojson}
        self.filters = {name: _limited(name, function, self.guard) for name, function in filters.items()}
        self.globals.update(raise_exception=_raise_exception, strftime_now=TODAY.strftime)

    def compiled(self, source: str) -> jinja2.Template:
        """`source` as a template with the guard's calls woven in. Raises jinja2.TemplateSyntaxError."""
        tree = self.parse(source)
        for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
            body: list[nodes.Node] = node.body  # type: ignore[attr-defined]
            body.insert(0, nodes.ExprStmt(_call("tick"), lineno=node.lineno))
            if isinstance(node, nodes.For) and node.test is not None:
                node.test = nodes.And(_call("tick"), node.test)
        _replace_concat(tree)
        tree.set_environment(self)
        return self.from_string(tree)

    def render(self, template: jinja2.Template, variables: dict[str, Any]) -> str:
        """The rendered text. Raises jinja2.TemplateError, of which TemplateLimit is one kind."""
        self.guard.deadline = time.monotonic() + SECONDS
        size, pieces = 0, []
        for piece in template.generate(variables):
            size += len(piece)
            check_size(size)
            pieces.append(piece)
        return "".join(pieces)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, _JOINED):
            check_size(len(left) + _size(right))
        elif operator == "*" and isinstance(right, int):
            check_size(_size(left) * right)
        elif operator == "*" and isinstance(left, int):
            check_size(_size(right) * left)
        elif operator == "**" and (not isinstance(right, int | float) or abs(right) > 64):
            raise TemplateLimit("the template raises a number to a power above 64")
        elif operator == "%" and isinstance(left, str) and re.search(r"\d{6}|\*", left):
            raise TemplateLimit("the template formats text with a width of six digits or of its choice")
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, _TEXTS):
            __self.guard.tick()
            _check_growth(__obj.__name__, (owner, *args), kwargs)
            if __obj.__name__ == "join" and args:
                args = (list(args[0]),)
                check_size(sum(map(_size, args[0])) + len(owner) * len(args[0]))
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None and re.search(r"\d{6}|\{[^}]*\{", str(value.__self__)):
            raise TemplateLimit("the template formats text with a width of six digits or of its choice")
        return wrapped

    def call_filter(self, *args: Any, **kwargs: Any) -> Any:
        self.guard.tick()
        return super().call_filter(*args, **kwargs)


def check_size(size: int) -> None:
    if size > CHARACTERS:
        raise TemplateLimit(f"the template makes a text of {size:,} characters; the limit is {CHARACTERS:,}")


def _size(value: Any) -> int:
    if isinstance(value, int):
        return value.bit_length()
    return len(value) if isinstance(value, _SIZED) else 0


def _check_growth(name: str, args: Any, kwargs: Any) -> None:
    """Refuse what a text method or filter of this name would blow up, before it does."""
    values = (*args, *kwargs.values())
    texts = [value for value in values if isinstance(value, str)]
    numbers = [abs(value) for value in values if isinstance(value, int)]
    if max(numbers, default=0) > ARGUMENT:
        raise TemplateLimit(f"the template asks for {max(numbers):,} characters; the limit is {ARGUMENT:,}")
    if name == "replace" and len(texts) > 2:
        check_size(len(texts[0]) + texts[0].count(texts[1]) * len(texts[2]))
    elif name in ("indent", "expandtabs", "tojson"):
        check_size(max(map(len, texts), default=0) * max(numbers, default=0))
    elif name == "format" and texts and re.search(r"\d{6}|\*", texts[0]):
        raise TemplateLimit("the template formats text with a width of six digits or of its choice")


def _limited(name: str, function: Any, guard: Guard) -> Any:
    @functools.wraps(function)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        guard.tick()
        _check_growth(name, args, kwargs)
        result = function(*args, **kwargs)
        check_size(_size(result) if isinstance(result, _JOINED) else 0)
        return result

    return filtered


def _call(method: str, *args: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.ExtensionAttribute(Guard.identifier, method), list(args), [], None, None)


def _replace_concat(node: nodes.Node) -> None:
    for name, value in node.iter_fields():
        items = value if isinstance(value, list) else [value]
        for index, item in enumerate(items):
            if isinstance(item, nodes.Node):
                _replace_concat(item)
            if isinstance(item, nodes.Concat):
                call = _call("concat", *item.nodes).set_lineno(item.lineno)
                if isinstance(value, list):
                    value[index] = call
                else:
                    setattr(node, name, call)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
            sort_keys: bool = False) -> str:  # fmt: skip
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

