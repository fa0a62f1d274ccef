"""Row -> Conversation, for four shapes of rows. A new format is one function here and a line in FORMATS."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping
from typing import Any

from itune.data.sources import Row
from itune.types import Conversation, InputError, Message

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
                  "observation": "tool", "function": "tool"} | {role: role for role in ROLES}  # fmt: skip
_SCALARS = (str, int, float, bool)
_MOST_WEIGHT = 1e9  # sums of them stay finite in float32


def detect_format(rows: list[Row], fields: Mapping[str, str] | None = None) -> str:
    """The format that the fields of the first rows show. Raises InputError that lists the fields and the formats."""
    theirs = {ours: (fields or {}).get(ours, ours) for names in SIGNS.values() for ours in names}
    shown = {name: [all(theirs[sign] in row.fields for sign in signs) for row in rows] for name, signs in SIGNS.items()}
    for name, by_row in shown.items():
        if all(by_row):
            return name
    name = max(shown, key=lambda name: sum(shown[name]))  # what most rows show; the first that does not is the odd one
    odd = rows[shown[name].index(False)]
    others = f", others of the first {len(rows)} rows those of {name}" if any(shown[name]) else ""
    wanted = "; ".join(f"{name}: {', '.join(signs)}" for name, signs in SIGNS.items())
    raise InputError(f"{odd.address}: the row has the fields {', '.join(sorted(odd.fields))}{others}; expected those "
                     f"of one format ({wanted}), or set data.format and data.fields")


def check_fields(fields: Mapping[str, str]) -> None:
    """Raise InputError for a field map with a name that is none of ours, or that maps to something else than a name."""
    ours = sorted({"role", "content", "from", "value"}.union(*SIGNS.values(), *OPTIONAL.values()))
    for name, theirs in fields.items():
        if name not in ours:
            near = difflib.get_close_matches(name, ours, n=1, cutoff=0.5)
            hint = f" (nearest: {near[0]})" if near else ""
            raise InputError(f"data.fields: {name} is none of our fields{hint}; expected {', '.join(ours)}")
        if not isinstance(theirs, str):
            raise InputError(f"data.fields.{name}: found {_kind(theirs)}; expected the name of a field of the rows")


def convert(row: Row, name: str, fields: Mapping[str, str] | None = None) -> Conversation:
    """The conversation of one row. `fields` maps our field names to the row's.

    Metadata takes every other field that is a scalar, and `tools`. Raises InputError (address, field, finding,
    expectation) for a missing field, a wrong type, an unknown role or a row without an assistant turn.
    """
    fields = fields or {}
    messages = FORMATS[name](row, fields)
    where = f"{row.address}: {fields.get(SIGNS[name][0], SIGNS[name][0])}"
    if not messages:
        raise InputError(f"{where}: empty; expected at least one user and one assistant turn")
    if not any(message.role == "assistant" for message in messages):
        roles = ", ".join(message.role for message in messages)
        raise InputError(f"{where}: no assistant turn (roles found: {roles}); expected at least one")
    used = {fields.get(sign, sign) for sign in (*SIGNS[name], *OPTIONAL[name])}
    metadata: dict[str, Any] = {
        _writable(k): _writable(v) if isinstance(v, str) else v
        for k, v in row.fields.items() if k not in used and isinstance(v, _SCALARS)
    }  # fmt: skip
    tools = row.fields.get(fields.get("tools", "tools"))
    if isinstance(tools, str) and tools.strip().startswith("["):
        tools = _json_or(tools, tools)
    if tools:
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise InputError(f"{row.address}: tools: found {_kind(tools)}; expected a list of JSON schemas")
        _check_texts(tools, f"{row.address}: tools")
        metadata["tools"] = tools
    return Conversation(tuple(messages), row.address, metadata)


def messages_of(value: Any, where: str, role_key: str = "role", content_key: str = "content",
                roles: Mapping[str, str] | None = None) -> list[Message]:  # fmt: skip
    """Checked messages of a list of dicts; `where` is the address and field that errors begin with."""
    if not isinstance(value, list):
        raise InputError(f"{where}: found {_kind(value)}; expected a list of messages")
    known = roles or {role: role for role in ROLES}
    messages = []
    for index, item in enumerate(value):
        at = f"{where}[{index}]"
        if not isinstance(item, Mapping):
            raise InputError(f"{at}: found {_kind(item)}; expected an object with {role_key} and {content_key}")
        if role_key not in item:
            raise InputError(f"{at}.{role_key}: missing (keys found: {', '.join(item) or 'none'}); "
                             f"expected one of {', '.join(known)}")
        role = item[role_key]
        if not isinstance(role, str) or role not in known:
            near = difflib.get_close_matches(str(role).lower(), list(known), n=1, cutoff=0.4)
            hint = f" (nearest: {near[0]})" if near else ""
            raise InputError(f"{at}.{role_key}: unknown role {role!r}{hint}; expected one of {', '.join(known)}")
        taken = (role_key, content_key, "role", "content", "weight")  # a template reads what stands under these names
        extra = {k: v for k, v in item.items() if k not in taken and v is not None}
        if calls := extra.get("tool_calls"):
            if not isinstance(calls, list):
                raise InputError(f"{at}.tool_calls: found {_kind(calls)}; expected a list of calls")
            extra["tool_calls"] = [_parsed_call(call, f"{at}.tool_calls") for call in calls]
        for name, value in extra.items():
            _check_texts(value, f"{at}.{name}")
        content = _content(item.get(content_key), f"{at}.{content_key}", optional=bool(extra.get("tool_calls")))
        messages.append(Message(known[role], content, _weight(item.get("weight"), f"{at}.weight"), extra))
    return messages


def _messages(row: Row, fields: Mapping[str, str]) -> list[Message]:
    key = fields.get("messages", "messages")
    role_key, content_key = fields.get("role", "role"), fields.get("content", "content")
    roles = SHAREGPT_ROLES if "role" in fields else None
    return messages_of(_field(row, key), f"{row.address}: {key}", role_key, content_key, roles)


def _sharegpt(row: Row, fields: Mapping[str, str]) -> list[Message]:
    key = fields.get("conversations", "conversations")
    role_key, content_key = fields.get("from", "from"), fields.get("value", "value")
    messages = messages_of(_field(row, key), f"{row.address}: {key}", role_key, content_key, SHAREGPT_ROLES)
    return _with_system(row, row.fields.get(fields.get("system", "system")), messages)


def _alpaca(row: Row, fields: Mapping[str, str]) -> list[Message]:
    instruction, output = _text(row, fields, "instruction"), _text(row, fields, "output")
    context = _text(row, fields, "input", optional=True)
    prompt = f"{instruction}\n\n{context}" if context.strip() else instruction
    messages = [Message("user", prompt), Message("assistant", output)]
    return _with_system(row, row.fields.get(fields.get("system", "system")), messages)


def _prompt_completion(row: Row, fields: Mapping[str, str]) -> list[Message]:
    messages: list[Message] = []
    for ours, role in (("prompt", "user"), ("completion", "assistant")):
        key = fields.get(ours, ours)
        value = _field(row, key)
        if isinstance(value, list):
            for message in messages_of(value, f"{row.address}: {key}"):
                given = ours == "prompt" and message.role == "assistant" and message.weight is None
                messages.append(dataclasses.replace(message, weight=0.0) if given else message)  # given, so no target
        else:
            messages.append(Message(role, _content(value, f"{row.address}: {key}")))
    return _with_system(row, row.fields.get(fields.get("system", "system")), messages)


FORMATS: dict[str, Callable[[Row, Mapping[str, str]], list[Message]]] = {
    "messages": _messages, "sharegpt": _sharegpt, "alpaca": _alpaca, "prompt_completion": _prompt_completion,
}  # fmt: skip
SIGNS = {"messages": ("messages",), "sharegpt": ("conversations",), "alpaca": ("instruction", "output"),
         "prompt_completion": ("prompt", "completion")}  # fmt: skip
OPTIONAL = {"messages": ("tools",), "sharegpt": ("system", "tools"), "alpaca": ("input", "system", "tools"),
            "prompt_completion": ("system", "tools")}  # fmt: skip


def _with_system(row: Row, system: Any, messages: list[Message]) -> list[Message]:
    text = _content(system, f"{row.address}: system") if system is not None else ""
    return [Message("system", text), *messages] if text.strip() else messages


def _field(row: Row, key: str) -> Any:
    if key not in row.fields:
        near = difflib.get_close_matches(key, list(row.fields), n=1, cutoff=0.5)
        hint = f" (nearest: {near[0]})" if near else ""
        found = ", ".join(sorted(row.fields)) or "none"
        raise InputError(f"{row.address}: {key}: missing{hint}; fields found: {found}")
    return row.fields[key]


def _text(row: Row, fields: Mapping[str, str], ours: str, optional: bool = False) -> str:
    key = fields.get(ours, ours)
    if optional and row.fields.get(key) is None:
        return ""
    return _content(_field(row, key), f"{row.address}: {key}")


def _content(value: Any, where: str, optional: bool = False) -> str:
    if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
        kinds = {str(part.get("type")) for part in value} - {"text"}
        if kinds:
            raise InputError(f"{where}: found parts of type {', '.join(sorted(kinds))}; expected text only")
        value = "".join(_content(part.get("text"), f"{where}[{index}].text") for index, part in enumerate(value))
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where}: found {_kind(value)}; expected text")
    _check_texts(value, where)
    return value


def _check_texts(value: Any, where: str) -> None:
    """Raise InputError for a text, at any depth of a value, that no tokenizer can take."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            _check_texts(name, f"{where} (a key)")
            _check_texts(item, f"{where}.{name}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_texts(item, f"{where}[{index}]")
    elif isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(value[error.start])
            raise InputError(f"{where}: found the lone surrogate U+{code:04X} at character {error.start}; "
                             "expected text") from error
        if "\0" in value:
            raise InputError(f"{where}: found a NUL character at character {value.index(chr(0))}; expected text")


def _writable(text: str) -> str:
    """A text as UTF-8 can hold it: a lone surrogate becomes its escape."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _weight(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST_WEIGHT:
        raise InputError(f"{where}: found {value!r}; expected a number from 0 to {_MOST_WEIGHT:g}")
    return float(value)


def _parsed_call(call: Any, where: str) -> Any:
    """A tool call whose arguments, JSON in a string on the wire, are the object that chat templates expect."""
    if not isinstance(call, Mapping):
        raise InputError(f"{where}: found {_kind(call)}; expected objects with a function name and arguments")
    function = call.get("function")
    if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
        parsed = _json_or(function["arguments"], None)
        if isinstance(parsed, dict):
            return {**call, "function": {**function, "arguments": parsed}}
    return dict(call)


def _json_or(text: str, default: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # the latter: thousands of brackets
        return default


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a string",
             list: "a list", dict: "an object"}  # fmt: skip
    return names.get(type(value), type(value).__name__)
