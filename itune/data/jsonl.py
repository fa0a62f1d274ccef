"""Strict JSON reading: every fault has a file, a line and what was expected. Plain, gzip and zstandard files."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any

from itune.types import InputError

BOM = b"\xef\xbb\xbf"
WHITE = " \t\r\n"  # what JSON counts as white space; str.strip takes more


def read_jsonl(file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line counted from 1, object) of a JSON Lines file; blank lines are skipped, a BOM and CRLF are tolerated.

    Raises InputError as `file:line: finding; expectation` for invalid UTF-8 (with the byte offset in the file),
    malformed JSON, NaN and Infinity, a key that stands twice, a row that is not an object, a damaged or cut archive.
    """
    offset = 0
    for line, raw in enumerate(_lines(file), start=1):
        skip = len(BOM) if line == 1 and raw.startswith(BOM) else 0
        body = raw[skip:].strip(WHITE.encode())
        if body:
            where = f"{file}:{line}"
            value = _parse(_decode(raw[skip:], where, offset + skip).strip(WHITE), where)
            if not isinstance(value, dict):
                raise InputError(f"{where}: found {_kind(value)}; expected a JSON object with the fields of one row")
            yield line, value
        offset += len(raw)


def read_json_array(file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(item counted from 1, object) of a JSON array of objects, or of JSON Lines that end in `.json`."""
    try:
        chunks = _chunks(file)
        head = next(chunks, b"")
        lines = not head.removeprefix(BOM).lstrip().startswith(b"[")
        raw = head if lines else b"".join([head, *chunks])
    except _Finding as error:
        raise InputError(f"{file}: {error}") from error
    if lines:
        yield from read_jsonl(file)
        return
    skip = len(BOM) if raw.startswith(BOM) else 0
    rows = _parse(_decode(raw[skip:], file, skip), file)
    for item, value in enumerate(rows, start=1):
        if not isinstance(value, dict):
            raise InputError(f"{file}:{item}: found {_kind(value)}; expected a JSON object with the fields of one row")
        yield item, value


def _lines(file: str) -> Iterator[bytes]:
    line, rest = 1, b""
    try:
        for chunk in _chunks(file):
            *whole, rest = (rest + chunk).split(b"\n")
            for raw in whole:
                line += 1
                yield raw + b"\n"
    except _Finding as error:
        raise InputError(f"{file}:{line}: {error}") from error
    if rest:
        yield rest


def _chunks(file: str) -> Iterator[bytes]:
    """The bytes of a file, unpacked, a MiB or so at a time. Raises _Finding for a damaged or cut archive."""
    try:
        with gzip.open(file, "rb") if file.endswith(".gz") else open(file, "rb") as stream:
            packed = iter(lambda: stream.read(1 << 20), b"")
            yield from _unzstd(packed) if file.endswith(".zst") else packed
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _Finding(f"the archive is damaged or cut short ({error}); expected a complete file") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error}") from error


def _unzstd(packed: Iterator[bytes]) -> Iterator[bytes]:
    import zstandard

    frame = None
    for chunk in packed:
        while chunk:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            try:
                yield frame.decompress(chunk)
            except zstandard.ZstdError as error:
                raise EOFError(error) from error
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the last frame has no end")


def _decode(raw: bytes, where: str, offset: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: byte 0x{raw[error.start]:02x} at offset {offset + error.start} is not UTF-8 "
                         f"({error.reason}); expected UTF-8 text") from error


def _parse(text: str, where: str) -> Any:
    try:
        if text.startswith("\ufeff"):
            raise _Finding("column 1: found a byte order mark (U+FEFF); expected one only where a file begins")
        return _DECODER.decode(text)
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
    """What was found wrong; the caller adds the address."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Finding(f"{twice}: key stands twice in one object; expected each key once")
    return found


def _constant(name: str) -> Any:
    raise _Finding(f"found {name}, which is not JSON; expected a number or null")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)  # json.loads makes one for every line


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")
