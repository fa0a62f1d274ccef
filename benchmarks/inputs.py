"""Inputs that both sides of a row read: a Llama with random weights, a tokenizer, real conversations."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

SIZES = {  # width, MLP width, layers, heads, vocabulary; tied embeddings
    "40m": (512, 1408, 8, 8, 32_000),
    "15m": (384, 1152, 6, 6, 8192),
    "2m": (128, 384, 2, 4, 8192),
    "32 experts": (384, 384, 6, 6, 8192),
}
EXPERTS = {"32 experts": (32, 4, 192)}  # how many a layer, how many a token chooses, their width
MARKERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>")


def rows(limit: int = 0, gsm8k_only: bool = False) -> Iterator[dict[str, Any]]:
    """Prompt and completion rows of P3 and GSM8K in turn, as conversations; both sides read the same fields."""
    data = Path(os.environ["ITUNE_BENCH_DATA"])
    streams = [_gsm8k(data)] if gsm8k_only else [_p3(data), _gsm8k(data)]
    count = 0
    while streams:
        for stream in list(streams):
            row = next(stream, None)
            if row is None:
                streams.remove(stream)
            elif limit and count >= limit:
                return
            else:
                count += 1
                yield row


def _pair(prompt: str, completion: str) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": prompt.strip()}],
            "completion": [{"role": "assistant", "content": completion.strip()}]}  # fmt: skip


def _p3(data: Path) -> Iterator[dict[str, Any]]:
    for row in _lines(data / "p3_sample.jsonl.gz"):
        prompt, completion = (row.get(name) or "" for name in ("prompt", "completion"))
        if prompt.strip() and completion.strip():
            yield _pair(prompt, completion)


def _gsm8k(data: Path) -> Iterator[dict[str, Any]]:
    for row in _lines(data / "gsm8k_messages.jsonl.gz"):
        user, assistant = (message["content"] for message in row["messages"][-2:])
        yield _pair(user, assistant)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def write_rows(path: Path, found: Iterator[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for row in found:
            stream.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def make_tokenizer(folder: Path, vocab: int) -> None:
    """A byte-level BPE trained on the rows, with Llama 3's markers and chat template."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from itune.data.templates import LLAMA3

    backend = Tokenizer(models.BPE())
    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(split), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(marker, special=True, normalized=False) for marker in MARKERS],
    )  # fmt: skip
    texts = (m["content"] for row in rows(4000) for m in row["prompt"] + row["completion"])
    backend.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=MARKERS[0], eos_token=MARKERS[3], pad_token=MARKERS[4], chat_template=LLAMA3
    ).save_pretrained(folder)


def make_model(folder: Path, size: str, layers: int = 0) -> None:
    """A Llama folder with random float32 weights of the usual scale; with experts a Qwen3-MoE folder."""
    import jax

    from itune.models import LayerKind, Model, ModelConfig, save_pretrained
    from itune.models.architecture import Experts

    width, mlp, depth, heads, vocab = SIZES[size]
    depth, experts = layers or depth, EXPERTS.get(size)
    kind = LayerKind(experts=Experts(*experts) if experts else None)
    config = ModelConfig(vocab, width, depth, heads, heads, width // heads, mlp, (kind,) * depth,
                         max_length=2048, tie_embeddings=True, qk_norm=bool(experts))  # fmt: skip
    model = Model(config, "qwen3_moe" if experts else "llama")
    save_pretrained(folder, model, model.init(jax.random.key(0)))


def random_ids(rows: int, length: int, vocab: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(5, vocab, (rows, length)).astype(np.int32)
