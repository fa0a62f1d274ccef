"""Chat templates and the tokenizer they belong to: shipped ones, files, and the tokenizer's own."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from itune.data.stops import source_stop_ids
from itune.data.tokenizer import Tokenizer
from itune.storage.fetch import model_folder
from itune.types import InputError

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

ZEPHYR = """\
{%- for message in messages %}
{{- '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>\\n' }}
{%- endif %}"""

# Tulu 3 (Lambert et al. 2024): its markers are ordinary text, and only the tokenizer's eos ends a turn.
TULU = """\
{%- for message in messages %}
{{- '<|' + message['role'] + '|>\\n' + message['content'] }}
{%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}
{%- if not loop.last or message['role'] != 'assistant' %}{{ '\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>\\n' }}
{%- endif %}"""

SHIPPED = {"chatml": CHATML, "llama3": LLAMA3, "tulu": TULU, "zephyr": ZEPHYR}
# Roles become markers in these templates, so the tokens they need cannot be read off their text.
SHIPPED_TOKENS = {"tulu": (), "zephyr": ("<|system|>", "<|user|>", "<|assistant|>")}
# Model types for which transformers believes a folder that declares a generic fast tokenizer.
PLAIN_TYPES = ("llama", "qwen3")
MARKER = re.compile(r"<\|[^|<>\s'\"+]+\|>")


class TemplateRefusal(Exception):
    """The template does not take these messages, and says why."""


class ChatTemplate:
    """A compiled chat template. `source` is Jinja as transformers stores it, `name` says where it came from.

    with_tools: another source, which takes its place for conversations with tools (transformers' `tool_use`).
    """

    def __init__(self, source: str, name: str, variables: dict[str, Any], with_tools: str = ""):
        from jinja2 import TemplateSyntaxError

        from itune.data.sandbox import Sandbox

        self.source, self.name, self.variables, self.with_tools = source, name, variables, with_tools
        self.frames: dict[Any, list[Any]] = {}  # what provenance.py found out about it
        self._with_tools = ChatTemplate(with_tools, f"{name} (tool_use)", variables) if with_tools else self
        self.sources = source + with_tools
        self._sandbox = Sandbox()
        try:
            self._template = self._sandbox.compiled(source)
        except TemplateSyntaxError as error:
            raise InputError(f"chat template {name}:{error.lineno}: {error.message}; "
                             "expected a Jinja chat template") from error

    def for_tools(self, tools: Any) -> ChatTemplate:
        """The template of a conversation with these tools."""
        return self._with_tools if tools else self

    def render(self, messages: Sequence[dict[str, Any]], tools: Any = None, add_generation_prompt: bool = False) -> str:
        """The text of a conversation. Raises TemplateRefusal with the template's own words."""
        from jinja2 import TemplateError

        variables = {**self.variables, "messages": messages, "tools": tools, "documents": None,
                     "add_generation_prompt": add_generation_prompt}  # fmt: skip
        try:
            return self._sandbox.render(self._template, variables)
        except TemplateError as error:
            raise TemplateRefusal(str(error)) from error
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
            raise TemplateRefusal(f"{type(error).__name__}: {error}") from error


def load_tokenizer(path: str, chat_template: str = "", revision: str | None = None) -> Tokenizer:
    """The tokenizer of a folder (here or in a bucket) or hub id.

    With its own chat template or the one that `chat_template` names: a shipped one (chatml, llama3, tulu, zephyr) or a
    file. The tokens that it writes as `<|...|>` and the tokenizer lacks are added, and eos becomes its end-of-turn
    token, so that an exported model stops where it should.
    Raises InputError for a missing tokenizer, and for a missing template with the names available.
    """
    path = str(model_folder(path, revision, weights=False))
    try:
        hf = _tokenizer_class(path).from_pretrained(path, revision=revision or None, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for one finding: there is no usable tokenizer here
        detail = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise InputError(f"model.path: no tokenizer can be read from {path} ({detail}); "
                         "expected a folder or hub id with tokenizer.json") from error
    return with_template(hf, chat_template, revision=revision)


def _tokenizer_class(path: str) -> Any:
    """AutoTokenizer; where a folder's files leave it no choice, the class it would take, whose import is far faster.

    (AutoTokenizer imports the code of models, and torch with it where that is installed.)
    """
    import transformers

    try:
        declared = json.loads((Path(path) / "tokenizer_config.json").read_text(encoding="utf-8"))
        model_type = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))["model_type"]
        plain = declared["tokenizer_class"] in ("PreTrainedTokenizerFast", "TokenizersBackend")
    except (OSError, ValueError, KeyError, TypeError):
        return transformers.AutoTokenizer
    plain = plain and "auto_map" not in declared and (Path(path) / "tokenizer.json").is_file()
    return transformers.PreTrainedTokenizerFast if plain and model_type in PLAIN_TYPES else transformers.AutoTokenizer


def with_template(
    hf: Any, chat_template: str = "", where: str = "data.chat_template", revision: str | None = None
) -> Tokenizer:
    """A transformers fast tokenizer as a Tokenizer; see `load_tokenizer`. `revision`: where it was loaded from."""
    stops = source_stop_ids(hf.name_or_path, revision)
    if not chat_template:
        named = hf.chat_template if isinstance(hf.chat_template, dict) else {"default": hf.chat_template}
        own, tools = named.get("default"), named.get("tool_use") or ""
        template = ChatTemplate(own, "of the tokenizer", dict(hf.special_tokens_map), tools) if own else None
        return Tokenizer(hf, template, stops=stops)
    source, needed = _template_source(chat_template, where)
    has = set(hf.get_added_vocab())
    missing = tuple(token for token in needed if token not in has)
    if missing:
        hf.add_tokens([_special(token) for token in missing])
    if "eos_token" in source and hf.eos_token is None:
        raise InputError(f"{where}: template {chat_template} writes eos_token, and the tokenizer has none; "
                         "expected a template that brings its own end of turn, such as chatml")
    hf.chat_template = source
    tokenizer = Tokenizer(hf, ChatTemplate(source, chat_template, dict(hf.special_tokens_map)), missing, stops)
    end = tokenizer.end_of_turn_id
    if end is not None and end != hf.eos_token_id:
        hf.eos_token = tokenizer.added[end].content
        tokenizer.template = ChatTemplate(source, chat_template, dict(hf.special_tokens_map))
    return tokenizer


def require_template(tokenizer: Tokenizer) -> ChatTemplate:
    """The tokenizer's template. Raises InputError with the names available where there is none."""
    if tokenizer.template is None:
        raise InputError(f"tokenizer {tokenizer.hf.name_or_path or 'given'} has no chat template; expected "
                         f"data.chat_template to be one of {', '.join(sorted(SHIPPED))}, or a file with one")
    return tokenizer.template


def _template_source(name: str, where: str) -> tuple[str, tuple[str, ...]]:
    """(Jinja text, tokens it needs) of a shipped name or a file."""
    if name in SHIPPED:
        source = SHIPPED[name]
        return source, SHIPPED_TOKENS.get(name, tuple(dict.fromkeys(MARKER.findall(source))))
    path = Path(name).expanduser()
    if not path.is_file():
        near = difflib.get_close_matches(name, SHIPPED, n=1, cutoff=0.4)
        hint = f" (nearest: {near[0]})" if near else ""
        raise InputError(f"{where}: no template is called {name}{hint} and no such file exists; "
                         f"names available: {', '.join(sorted(SHIPPED))}")
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: {name} cannot be read as UTF-8 text: {error}") from error
    code = re.sub(r"\{#.*?#\}", "", source, flags=re.DOTALL)
    return source, tuple(dict.fromkeys(MARKER.findall(code)))


def _special(token: str) -> Any:
    from tokenizers import AddedToken

    return AddedToken(token, special=True, normalized=False)
