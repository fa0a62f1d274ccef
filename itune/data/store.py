"""Rendered examples in memory-mapped files: written once, read by every process.

A folder holds tokens (int32), loss weights (float32), offsets (int64) into both, addresses and metadata (JSON lines).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from itune.types import Address, Conversation, Example, Message

_ENCODER = json.JSONEncoder(ensure_ascii=False)  # json.dumps makes one for every line


class ExampleStore:
    """A sequence of Examples. `lengths` int32 [n]; `sources` int32 [n] indexes `source_names`.

    `supervised` int32 [n]: tokens that carry weight; the first token never counts. `categories` int8 [n] indexes
    `categories.CATEGORIES`; -1 where none was decided.
    """

    def __init__(self, tokens: np.ndarray, weights: np.ndarray, offsets: np.ndarray, sources: np.ndarray,
                 source_names: Sequence[str], files: Sequence[str], places: np.ndarray, metadata: Any,
                 supervised: np.ndarray, fingerprint: str, categories: np.ndarray | None = None):  # fmt: skip
        self.tokens, self.weights, self.offsets = tokens, weights, offsets
        self.sources, self.source_names = sources, tuple(source_names)
        self._files, self._places_N2, self._metadata = tuple(files), places, metadata
        self.lengths = np.diff(offsets).astype(np.int32)
        self.supervised, self.fingerprint = supervised, fingerprint
        self.categories = np.full(len(self.lengths), -1, np.int8) if categories is None else categories

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index %= len(self)
        start, end = self.offsets[index], self.offsets[index + 1]
        tokens, weights = np.asarray(self.tokens[start:end]), np.asarray(self.weights[start:end])
        return Example(tokens, weights, self.address(index), self.metadata(index))

    def address(self, index: int) -> Address:
        file, line = self._places_N2[index]
        return Address(self.source_names[self.sources[index]], self._files[file], int(line))

    def metadata(self, index: int) -> dict[str, Any]:
        return self._metadata[index]


class Writer:
    """Appends examples to a folder, in the order given; memory does not grow with them."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._tokens = open(folder / "tokens.int32", "wb")  # noqa: SIM115 (closed by close())
        self._weights = open(folder / "weights.float32", "wb")  # noqa: SIM115
        self._metadata = open(folder / "metadata.jsonl", "wb")  # noqa: SIM115
        self._hashers = hashlib.sha256(), hashlib.sha256()
        self._lengths: list[int] = []
        self._metadata_lengths: list[int] = []
        self._sources: list[int] = []
        self._places: list[tuple[int, int]] = []
        self._supervised: list[int] = []
        self._categories: list[int] = []
        self._source_names: dict[str, int] = {}
        self._files: dict[str, int] = {}

    def add(self, example: Example, category: int = -1) -> None:
        tokens = np.ascontiguousarray(example.token_ids, np.int32).tobytes()
        weights = np.ascontiguousarray(example.loss_weights, np.float32).tobytes()
        line = _ENCODER.encode(dict(example.metadata)).encode("utf-8", "surrogatepass") + b"\n"
        self._tokens.write(tokens)
        self._weights.write(weights)
        self._metadata.write(line)
        self._hashers[0].update(tokens)
        self._hashers[1].update(weights)
        address = example.address
        self._supervised.append(supervised(example))
        self._categories.append(category)
        self._lengths.append(len(example.token_ids))
        self._metadata_lengths.append(len(line))
        self._sources.append(self._source_names.setdefault(address.source, len(self._source_names)))
        self._places.append((self._files.setdefault(address.file, len(self._files)), address.line))

    def close(self) -> str:
        """Finish the files; returns the digest of tokens, weights and lengths."""
        for stream in (self._tokens, self._weights, self._metadata):
            stream.close()
        lengths = np.asarray(self._lengths, np.int64)
        digest = _digest(self._hashers[0].digest(), self._hashers[1].digest(), lengths)
        arrays = {
            "offsets": np.r_[0, np.cumsum(lengths)].astype(np.int64),
            "metadata_offsets": np.r_[0, np.cumsum(np.asarray(self._metadata_lengths, np.int64))].astype(np.int64),
            "sources": np.asarray(self._sources, np.int32),
            "places": np.asarray(self._places, np.int64).reshape(-1, 2),
            "supervised": np.asarray(self._supervised, np.int32),
            "categories": np.asarray(self._categories, np.int8),
        }
        for name, array in arrays.items():
            np.save(self._folder / f"{name}.npy", array)
        names = {"source_names": list(self._source_names), "files": list(self._files), "digest": digest}
        (self._folder / "names.json").write_text(json.dumps(names))
        return digest


class _Lines(Sequence):
    """JSON objects of a memory-mapped JSON Lines file."""

    def __init__(self, raw: np.ndarray, offsets: np.ndarray):
        self._raw, self._offsets = raw, offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        start, end = self._offsets[index], self._offsets[index + 1]
        return json.loads(self._raw[start:end].tobytes().decode("utf-8", "surrogatepass"))


def read_store(folder: Path) -> ExampleStore:
    """The store in a folder, memory-mapped. Raises ValueError where a file differs from what was written."""
    arrays = {path.stem: np.load(path, mmap_mode="r", allow_pickle=False) for path in folder.glob("*.npy")}
    names = json.loads((folder / "names.json").read_text())
    offsets = arrays["offsets"]
    tokens = _mapped(folder / "tokens.int32", np.dtype(np.int32), int(offsets[-1]))
    weights = _mapped(folder / "weights.float32", np.dtype(np.float32), int(offsets[-1]))
    # through a file, not through the mapping: pages that nobody trains on yet would count as this process's memory
    found = _file_sha256(folder / "tokens.int32"), _file_sha256(folder / "weights.float32")
    if _digest(found[0], found[1], np.diff(offsets)) != names["digest"]:
        raise ValueError(f"{folder} holds other bytes than were written")
    raw = _mapped(folder / "metadata.jsonl", np.dtype(np.uint8), int(arrays["metadata_offsets"][-1]))
    metadata = _Lines(raw, arrays["metadata_offsets"])
    return ExampleStore(tokens, weights, offsets, arrays["sources"], names["source_names"], names["files"],
                        arrays["places"], metadata, arrays["supervised"], names["digest"],
                        arrays["categories"])  # fmt: skip


def memory_store(examples: Iterable[Example]) -> ExampleStore:
    """A store of examples that are in memory already."""
    examples = list(examples)
    source_names: dict[str, int] = {}
    files: dict[str, int] = {}
    sources = np.asarray([source_names.setdefault(e.address.source, len(source_names)) for e in examples], np.int32)
    places = [(files.setdefault(e.address.file, len(files)), e.address.line) for e in examples]
    lengths = np.asarray([len(e.token_ids) for e in examples], np.int64)
    tokens = np.concatenate([np.zeros(0, np.int32), *(e.token_ids for e in examples)]).astype(np.int32)
    weights = np.concatenate([np.zeros(0, np.float32), *(e.loss_weights for e in examples)]).astype(np.float32)
    digest = _digest(_sha256(tokens), _sha256(weights), lengths)
    offsets = np.r_[0, np.cumsum(lengths)].astype(np.int64)
    return ExampleStore(tokens, weights, offsets, sources, list(source_names), list(files),
                        np.asarray(places, np.int64).reshape(-1, 2), [dict(e.metadata) for e in examples],
                        np.asarray([supervised(e) for e in examples], np.int32), digest)  # fmt: skip


def supervised(example: Example) -> int:
    """Tokens of an example that carry weight; its first token is never a target."""
    return int(np.count_nonzero(example.loss_weights[1:]))


def conversation_to_json(conversation: Conversation) -> dict[str, Any]:
    """A conversation as JSON types; `conversation_from_json` reads it."""
    messages = [dataclasses.asdict(message) for message in conversation.messages]
    address = dataclasses.asdict(conversation.address)
    return {"messages": messages, "address": address, "metadata": dict(conversation.metadata)}


def conversation_from_json(stored: Mapping[str, Any]) -> Conversation:
    messages = tuple(Message(**message) for message in stored["messages"])
    return Conversation(messages, Address(**stored["address"]), stored["metadata"])


def hash_of(value: Any) -> str:
    """Hash of JSON types, whatever the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _file_sha256(path: Path) -> bytes:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _sha256(array: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array).data).digest()


def _digest(tokens: bytes, weights: bytes, lengths: np.ndarray) -> str:
    return hashlib.sha256(tokens + weights + np.asarray(lengths, np.int64).tobytes()).hexdigest()


def _mapped(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    size = path.stat().st_size
    if size != count * dtype.itemsize:
        raise ValueError(f"{path} has {size} bytes; expected {count * dtype.itemsize}")
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,)) if count else np.zeros(0, dtype)
