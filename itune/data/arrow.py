"""Rows of Parquet files, and the values of Arrow and TFDS as JSON types."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from itune.types import InputError


def read_parquet(file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row counted from 1, fields). Raises InputError for what is no Parquet, a name that two columns have, and a value
    that Python cannot hold.
    """
    import pyarrow.lib
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            features, names = _features(parquet.schema_arrow.metadata), parquet.schema_arrow.names
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise InputError(f"{file}: two columns are named {twice}; expected each name once")
            line = 0
            for batch in parquet.iter_batches(batch_size=1024):
                for fields in _rows(batch, file):
                    line += 1
                    yield line, plain_row(fields, features, packed=True)
    except (pyarrow.lib.ArrowException, OSError) as error:
        raise InputError(f"{file}: not a readable Parquet file: {str(error).splitlines()[0]}") from error


def _rows(batch: Any, file: str) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except Exception:  # a date beyond Python's, a time zone that is none, text that is not UTF-8: any kind of error
        for name, column in zip(batch.schema.names, batch.columns):
            try:
                column.to_pylist()
            except Exception as error:
                raise InputError(f"{file}: column {name}: a value cannot be read ({type(error).__name__}: {error}); "
                                 "mend the column or leave it out") from error
        raise


def _features(metadata: Mapping[bytes, bytes] | None) -> Any:
    """What the library datasets notes of the columns: which hold JSON as text, above all."""
    try:
        return json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return None


def plain_row(fields: Mapping[str, Any], features: Any = None, packed: bool = False) -> dict[str, Any]:
    """A row as JSON types: bytes are UTF-8 text, arrays are lists, and a number that JSON cannot hold is null.

    Arrow gives every struct all keys that any of them has: a null there is a key that this one does not have. features:
    what `datasets` calls the features of the row, where they are known; a value of its type Json is taken as it is, and
    is still text if `packed`.
    """
    return {str(name): _plain(value, (features or {}).get(name), packed) for name, value in fields.items()}


def _plain(value: Any, features: Any, packed: bool) -> Any:
    if isinstance(features, Mapping) and features.get("_type") == "Json":
        return _unpacked(value) if packed and isinstance(value, str | bytes) else value
    if isinstance(value, Mapping):
        parts = features if isinstance(features, Mapping) else {}
        found = {str(name): _plain(item, parts.get(name), packed) for name, item in value.items()}
        return {name: item for name, item in found.items() if item is not None}
    if isinstance(value, list | tuple):
        part = features.get("feature") if isinstance(features, Mapping) else features[0] if features else None
        return [_plain(item, part, packed) for item in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="surrogateescape")
    if hasattr(value, "tolist"):
        return _plain(value.tolist(), None, packed)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _unpacked(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
