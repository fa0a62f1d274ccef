"""The tokenizer as rendering needs it: transformers' own, its core, and a twin that knows no control token.

A control token is an added token, special or not, that is no piece of ordinary text: a text of a message must never
become one. Gemma's runs of newlines and its `<table>` are added tokens too, but pieces like any other (see `ordinary`).
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from itune.types import InputError

if TYPE_CHECKING:
    from itune.data.templates import ChatTemplate


class Tokenizer:
    """A transformers fast tokenizer with its chat template, and what rendering needs to know of both.

    hf: the transformers tokenizer; its chat template and eos are those in use, so `hf.save_pretrained` exports them.
    vocab_size: ids it may give, added ones included; this may exceed the model's embedding. added_tokens: what the chat
    template needed and the tokenizer lacked. end_of_turn_id: the added token that the template writes after an
    assistant's content, None where it writes none. all_added: id -> added token. added: those that are control tokens.
    backend: its `tokenizers` core, whose offsets are not trimmed and which adds nothing: the template writes all
    special tokens. `stops`: ids that the model's folder names as the end of an answer.
    """

    def __init__(
        self, hf: Any, template: ChatTemplate | None, added_tokens: tuple[str, ...] = (), stops: Sequence[int] = ()
    ):
        from itune.data.render import end_of_turn

        if not getattr(hf, "is_fast", False):
            raise InputError(f"tokenizer {hf.name_or_path}: {type(hf).__name__} has no tokenizer.json; "
                             "expected a fast tokenizer")
        self.hf, self.added_tokens, self.source, self.size = hf, added_tokens, hf.chat_template, len(hf)
        self.template = template
        self.backend = copy.deepcopy(hf.backend_tokenizer)
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.post_processor = None
        self.all_added: dict[int, Any] = dict(hf.added_tokens_decoder)
        self.vocab_size = max([len(hf), *(index + 1 for index in self.all_added)])  # they may leave ids out
        pieces = ordinary(self.backend, self.all_added, template.sources if template else "")
        self.added = {index: token for index, token in self.all_added.items() if index not in pieces}
        self.is_added_V = np.zeros(self.vocab_size, bool)
        self.is_added_V[list(self.added)] = True
        self.sizes_V = np.zeros(len(self.is_added_V), np.int32)  # bytes of each token, 0 until offsets.py asks
        self.structures: dict[str, Any] = {}  # what encode.py found out about the template
        self.end_of_turn_ids = end_of_turn(self) if self.template else ()
        self.end_of_turn_id = self.end_of_turn_ids[0] if self.end_of_turn_ids else None
        self._source_stops = (hf.eos_token_id, *stops)

    @property
    def eos_id(self) -> int | None:
        return self.hf.eos_token_id

    @property
    def pad_id(self) -> int:
        """What fills rows: never seen by the loss, which goes by segment ids."""
        return next((i for i in (self.hf.pad_token_id, self.hf.eos_token_id) if i is not None), 0)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a generated answer: the end of a turn, of text in training and in pretraining, and `stops`."""
        return tuple(sorted({i for i in (self.end_of_turn_id, self.eos_id, *self._source_stops) if i is not None}))

    @functools.cached_property
    def _keeps(self) -> str:
        from itune.data.offsets import kept_by

        return kept_by(self.backend, self.all_added)

    def keeps_bytes(self, text: str) -> bool:
        """Whether the tokens of a text are its UTF-8 bytes, cut in pieces (some may be missing), and nothing else."""
        return self._keeps == "all" or (self._keeps == "NFC" and unicodedata.is_normalized("NFC", text))

    @functools.cached_property
    def plain_backend(self) -> Any:
        """The same tokenizer without any control token: for text that must stay text."""
        return _plain_backend(self.backend, {token.content for token in self.added.values()})

    def encode_plain(self, text: str) -> list[int]:
        """Ids of text in which no control token is recognised."""
        return self.plain_backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = False) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of vocabulary, merges, added tokens, special tokens and chat template."""
        hasher = hashlib.sha256(self.backend.to_str().encode())
        hasher.update(json.dumps(self.hf.special_tokens_map, sort_keys=True, default=str).encode())
        hasher.update((self.template.sources if self.template else "").encode())
        return hasher.hexdigest()


def ordinary(backend: Any, added: Mapping[int, Any], template: str) -> set[int]:
    """Ids of added tokens that are pieces of ordinary text: not special, and white space or a piece of the model's own.

    sentencepiece calls the latter user-defined; of them one that the template writes is a control token all the same.
    """
    def is_ordinary(text: str) -> bool:
        return not text.replace("\u2581", " ").strip() or (
            backend.model.token_to_id(text) is not None and text not in template)

    return {index for index, token in added.items() if not token.special and is_ordinary(token.content)}


def _plain_backend(backend: Any, names: set[str]) -> Any:
    """A copy in which the added tokens `names` have contents that no text has, as tokens and as pieces of the model."""
    from tokenizers import Tokenizer as Backend

    state = json.loads(backend.to_str())
    model = state["model"]
    unknown, vocab = model.get("unk_token"), model["vocab"]
    hidden = {name: f"\ufdef{index}\ufdef" for index, name in enumerate(sorted(names)) if name != unknown}
    state["added_tokens"] = [{**token, "content": hidden.get(token["content"], token["content"])}
                             for token in state["added_tokens"] if token["content"] != unknown]
    state["post_processor"] = None
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
