"""Small tokenizers, trained here: byte-level BPE, sentencepiece-like Unigram and BPE, words."""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog. How many foxes does it take? It takes 12 foxes and 7 dogs.",
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. The answer is 72.",
    "user system assistant tool developer: You are a helpful assistant.\n\nWhat is the capital of France? Paris is.",
    "Grüße aus München, où est la gare? 東京は日本の首都です。 Привет, мир! 😀 def f(x):\n    return x + 1\n",
    "Formulate an answer to this elaborate question. Yes, they do; no, they don't. I'd say it's so, we've been there.",
]


@functools.cache
def _byte_level() -> str:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<|endoftext|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    backend.train_from_iterator(CORPUS, trainer)
    return backend.to_str()


@functools.cache
def _metaspace(scheme: str) -> str:
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = ["▁" + line for text in CORPUS for line in text.splitlines()]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    backend.train_from_iterator(pieces, trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(state)


@functools.cache
def _unigram() -> str:
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>",
                                      show_progress=False)  # fmt: skip
    backend.train_from_iterator(CORPUS, trainer)
    return backend.to_str()


@functools.cache
def _words() -> str:
    backend = Backend(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["<unk>", "<|end|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend.to_str()


KINDS = {
    "byte_level": _byte_level,
    "metaspace_first": lambda: _metaspace("first"),
    "metaspace_always": lambda: _metaspace("always"),
    "unigram": _unigram,
    "words": _words,
}


@pytest.fixture(scope="session")
def make_hf():
    """A fresh transformers tokenizer of a kind, with special tokens and a chat template as asked."""

    def make(kind: str = "byte_level", added: tuple = (), template: str | None = None, **special: str):
        hf = PreTrainedTokenizerFast(tokenizer_object=Backend.from_str(KINDS[kind]()), **special)
        for token in added:
            plain = isinstance(token, str)
            hf.add_tokens([AddedToken(token, special=True, normalized=False) if plain else token])
        hf.chat_template = template
        return hf

    return make


@pytest.fixture
def write_rows(tmp_path: Path):
    """Write rows as JSON Lines (gzip by suffix) and return the path as text."""

    def write(rows: list, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return str(path)

    return write


@pytest.fixture(scope="session")
def chat():
    """Messages of texts, roles alternating from the user's."""

    def make(*texts: str, system: str = "") -> list[dict[str, str]]:
        first = [{"role": "system", "content": system}] if system else []
        return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]

    return make


@pytest.fixture(scope="session")
def real_rows(shared_data) -> dict[str, list]:
    """The real rows by file: p3_sample, gsm8k_messages, seed_tasks. Rows without an answer are left out."""
    from itune.data.formats import convert, detect_format
    from itune.data.sources import open_sources
    from itune.types import Address, Conversation, Message

    found: dict[str, list] = {}
    for name in ("p3_sample", "gsm8k_messages"):
        rows = list(open_sources(str(shared_data / f"{name}.jsonl.gz"))[0].rows())
        found[name] = [convert(row, detect_format(rows[:8])) for row in rows]
    found["seed_tasks"] = []
    for number, line in enumerate((shared_data / "seed_tasks.jsonl").read_text().splitlines(), start=1):
        task = json.loads(line)
        for each in task["instances"]:
            prompt = f"{task['instruction']}\n{each['input']}".strip()
            messages = (Message("user", prompt), Message("assistant", each["output"]))
            address = Address("seed_tasks", "seed_tasks.jsonl", number)
            found["seed_tasks"].append(Conversation(messages, address, {"task": task["name"]}))
    return {name: [row for row in rows if row.messages[-1].content.strip()] for name, rows in found.items()}
