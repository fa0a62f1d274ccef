"""Strict JSON reading: every fault has a file, a line and what was expected. Plain, gzip and zstandard files."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any

from itune.types import InputError

BOM = b"\xef\xbb\xbf"


def read_jsonl(file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line counted from 1, object) of a JSON Lines file; blank lines are skipped, a BOM and CRLF are tolerated.

    Raises InputError as `file:line: finding; expectation` for invalid UTF-8 (with the byte offset in the file),
    malformed JSON, NaN and Infinity, a key that stands twice, a row that is not an object, a damaged or cut archive.
    """
    offset = 0
    for line, raw in enumerate(_lines(file), start=1):
        skip = len(BOM) if line == 1 and raw.startswith(BOM) else 0
        body = raw[skip:].strip()
        if body:
            where = f"{file}:{line}"
            value = _parse(_decode(raw[skip:], where, offset + skip).strip(), where)
            if not isinstance(value, dict):
                raise InputError(f"{where}: found {_kind(value)}; expected a JSON object with the fields of one row")
            yield line, value
        offset += len(raw)


def read_json_array(file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(item counted from 1, object) of a JSON array of objects, or of JSON Lines that end in `.json`."""
    with _open(file) as stream:
        head = _guarded(stream.read, file, 64).removeprefix(BOM).lstrip()
    if not head.startswith(b"["):
        yield from read_jsonl(file)
        return
    with _open(file) as stream:
        raw = _guarded(stream.read, file)
    skip = len(BOM) if raw.startswith(BOM) else 0
    rows = _parse(_decode(raw[skip:], file, skip), file)
    for item, value in enumerate(rows, start=1):
        if not isinstance(value, dict):
            raise InputError(f"{file}:{item}: found {_kind(value)}; expected a JSON object with the fields of one row")
        yield item, value


def _open(file: str) -> Any:
    if file.endswith(".gz"):
        return gzip.open(file, "rb")
    if file.endswith(".zst"):
        import zstandard

        return zstandard.open(file, "rb")
    return open(file, "rb")


def _lines(file: str) -> Iterator[bytes]:
    line = 0
    try:
        with _open(file) as stream:
            rest = b""
            while chunk := _guarded(stream.read, f"{file}:{line + 1}", 1 << 20):
                *whole, rest = (rest + chunk).split(b"\n")
                for raw in whole:
                    line += 1
                    yield raw + b"\n"
            if rest:
                yield rest
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error}") from error


def _guarded(read: Any, where: str, *arguments: int) -> bytes:
    """`read`, with a damaged archive as an InputError."""
    try:
        return read(*arguments)
    except Exception as error:
        if not isinstance(error, EOFError | zlib.error | gzip.BadGzipFile) and type(error).__name__ != "ZstdError":
            raise
        raise InputError(f"{where}: the archive is damaged or cut short ({error}); expected a complete file") from error


def _decode(raw: bytes, where: str, offset: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: byte 0x{raw[error.start]:02x} at offset {offset + error.start} is not UTF-8 "
                         f"({error.reason}); expected UTF-8 text") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except json.JSONDecodeError as error:
        at = f"column {error.colno}" + (f", line {error.lineno}" if error.lineno > 1 else "")
        raise InputError(f"{where}: {at}: {error.msg}; expected one JSON object a line") from error
    except _Finding as error:
        raise InputError(f"{where}: {error}") from error
    except RecursionError as error:
        raise InputError(f"{where}: JSON nested too deeply; expected one flat row") from error
    except ValueError as error:  # an integer of thousands of digits
        raise InputError(f"{where}: {str(error).splitlines()[0]}; expected JSON") from error


class _Finding(Exception):
    """What a parser hook found wrong; `_parse` adds the address."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Finding(f"{twice}: key stands twice in one object; expected each key once")
    return found


def _constant(name: str) -> Any:
    raise _Finding(f"found {name}, which is not JSON; expected a number or null")


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")
