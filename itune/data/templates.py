"""Chat templates and the tokenizer they belong to: shipped ones, files, and the tokenizer's own."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

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

SHIPPED = {"chatml": CHATML, "llama3": LLAMA3, "zephyr": ZEPHYR}
# Roles become markers in the zephyr template, so its tokens cannot be read off its text.
SHIPPED_TOKENS = {"zephyr": ("<|system|>", "<|user|>", "<|assistant|>")}
MARKER = re.compile(r"<\|[^|<>\s'\"+]+\|>")


class TemplateRefusal(Exception):
    """The template does not take these messages, and says why."""


class ChatTemplate:
    """A compiled chat template. `source` is Jinja as transformers stores it, `name` says where it came from."""

    def __init__(self, source: str, name: str, variables: dict[str, Any]):
        from itune.data.sandbox import Sandbox

        self.source, self.name, self.variables = source, name, variables
        self.frames: dict[Any, list[Any]] = {}  # what provenance.py found out about it
        self._sandbox = Sandbox()
        try:
            self._template = self._sandbox.compiled(source)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"chat template {name}:{error.lineno}: {error.message}; "
                             "expected a Jinja chat template") from error

    def render(self, messages: Sequence[dict[str, Any]], tools: Any = None, add_generation_prompt: bool = False) -> str:
        """The text of a conversation. Raises TemplateRefusal with the template's own words."""
        variables = {**self.variables, "messages": messages, "tools": tools, "documents": None,
                     "add_generation_prompt": add_generation_prompt}  # fmt: skip
        try:
            return self._sandbox.render(self._template, variables)
        except jinja2.TemplateError as error:
            raise TemplateRefusal(str(error)) from error
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
            raise TemplateRefusal(f"{type(error).__name__}: {error}") from error


class Tokenizer:
    """A transformers fast tokenizer with its chat template, and what rendering needs to know of both.

    hf: the transformers tokenizer; its chat template and eos are those in use, so `hf.save_pretrained` exports them.
    vocab_size: ids it may give, added ones included; this may exceed the model's embedding. added_tokens: what the chat
    template needed and the tokenizer lacked. end_of_turn_id: the added token that the template writes after an
    assistant's content, None where it writes none. added: id -> added token. backend: its `tokenizers` core, whose
    offsets are not trimmed and which adds nothing: the template writes all special tokens.
    """

    def __init__(self, hf: Any, template: tuple[str, str] | None, added_tokens: tuple[str, ...] = ()):
        from itune.data.render import end_of_turn

        if not getattr(hf, "is_fast", False):
            raise InputError(f"tokenizer {hf.name_or_path}: {type(hf).__name__} has no tokenizer.json; "
                             "expected a fast tokenizer")
        self.hf, self.added_tokens, self.source = hf, added_tokens, hf.chat_template
        self.vocab_size = len(hf)
        self.template = ChatTemplate(*template, dict(hf.special_tokens_map)) if template else None
        self.backend = copy.deepcopy(hf.backend_tokenizer)
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.post_processor = None
        self.added: dict[int, Any] = dict(hf.added_tokens_decoder)
        self.is_added_V = np.zeros(max([self.vocab_size, *(index + 1 for index in self.added)]), bool)
        self.is_added_V[list(self.added)] = True
        self.structures: dict[str, Any] = {}  # what encode.py found out about the template
        self.end_of_turn_id = end_of_turn(self) if self.template else None
        self._text_end_id = hf.eos_token_id

    @property
    def eos_id(self) -> int | None:
        return self.hf.eos_token_id

    @property
    def pad_id(self) -> int:
        """What fills rows: never seen by the loss, which goes by segment ids."""
        return next((i for i in (self.hf.pad_token_id, self.hf.eos_token_id) if i is not None), 0)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a generated answer: the end of a turn, and of text in training and in pretraining."""
        return tuple(sorted({i for i in (self.end_of_turn_id, self.eos_id, self._text_end_id) if i is not None}))

    @functools.cached_property
    def plain_backend(self) -> Any:
        """The same tokenizer without any added token: for text that must stay text."""
        return _plain_backend(self.backend)

    def encode_plain(self, text: str) -> list[int]:
        """Ids of text in which no added token is recognised."""
        return self.plain_backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = False) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of vocabulary, merges, added tokens, special tokens and chat template."""
        hasher = hashlib.sha256(self.backend.to_str().encode())
        hasher.update(json.dumps(self.hf.special_tokens_map, sort_keys=True, default=str).encode())
        hasher.update((self.template.source if self.template else "").encode())
        return hasher.hexdigest()


def load_tokenizer(path: str, chat_template: str = "", revision: str | None = None) -> Tokenizer:
    """The tokenizer of a folder or hub id, with its own chat template or the one that `chat_template` names.

    `chat_template` is a shipped name (chatml, llama3, zephyr) or a file; the tokens that it writes as `<|...|>` and the
    tokenizer lacks are added, and eos becomes its end-of-turn token, so that an exported model stops where it should.
    Raises InputError for a missing tokenizer, and for a missing template with the names available.
    """
    from transformers import AutoTokenizer

    try:
        hf = AutoTokenizer.from_pretrained(path, revision=revision or None, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for one finding: there is no usable tokenizer here
        detail = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise InputError(f"model.path: no tokenizer can be read from {path} ({detail}); "
                         "expected a folder or hub id with tokenizer.json") from error
    return with_template(hf, chat_template)


def with_template(hf: Any, chat_template: str = "", where: str = "data.chat_template") -> Tokenizer:
    """A transformers fast tokenizer as a Tokenizer; see `load_tokenizer`."""
    if not chat_template:
        own = hf.chat_template
        if isinstance(own, dict):
            own = own.get("default")
        return Tokenizer(hf, (own, "of the tokenizer") if own else None)
    source, needed = _template_source(chat_template, where)
    has = set(hf.get_added_vocab())
    missing = tuple(token for token in needed if token not in has)
    if missing:
        hf.add_tokens([_special(token) for token in missing])
    if "eos_token" in source and hf.eos_token is None:
        raise InputError(f"{where}: template {chat_template} writes eos_token, and the tokenizer has none; "
                         "expected a template that brings its own end of turn, such as chatml")
    hf.chat_template = source
    tokenizer = Tokenizer(hf, (source, chat_template), missing)
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
    import difflib

    if name in SHIPPED:
        source = SHIPPED[name]
        return source, SHIPPED_TOKENS.get(name) or tuple(dict.fromkeys(MARKER.findall(source)))
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


def _plain_backend(backend: Any) -> Any:
    """A copy without added tokens; those that the model's vocabulary holds too get a name that no text contains."""
    from tokenizers import Tokenizer as Backend

    state = json.loads(backend.to_str())
    names = {token["content"] for token in state["added_tokens"]}
    state["added_tokens"], state["post_processor"] = [], None
    model = state["model"]
    unknown = model.get("unk_token")
    hidden = {name: f"\ufdef{index}\ufdef" for index, name in enumerate(sorted(names)) if name != unknown}
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {hidden.get(piece, piece): index for piece, index in vocab.items()}
    else:
        model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in vocab]
    if "merges" in model:
        pairs = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
        model["merges"] = [list(pair) for pair in pairs if not {pair[0], pair[1], "".join(pair)} & names]
    _never_prepend(state.get("pre_tokenizer"))
    return Backend.from_str(json.dumps(state))


def _never_prepend(pre_tokenizer: Any) -> None:
    """Metaspace marks the first word of a text only; what is encoded apart follows other text."""
    if isinstance(pre_tokenizer, dict):
        for part in pre_tokenizer.get("pretokenizers", ()):
            _never_prepend(part)
        if pre_tokenizer.get("type") == "Metaspace" and pre_tokenizer.get("prepend_scheme") == "first":
            pre_tokenizer["prepend_scheme"] = "never"
