"""Where metrics go: `metrics.jsonl`, TensorBoard event files, and Weights & Biases when asked for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import socket
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from itune.types import InputError


def dump(values: Any) -> str:
    """One line of JSON that any reader takes: numbers that JSON cannot hold (NaN, infinity) become null."""
    return json.dumps(_finite(values), allow_nan=False)


def plain(value: Any) -> Any:
    """For json's `default`: NumPy's and JAX's numbers and arrays as Python's, all else that JSON lacks as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_atomically(path: Path, text: str | Iterable[str]) -> None:
    """Write a text file, or its lines, in one step: a reader sees the old or the new one. An OSError names the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines([text] if isinstance(text, str) else text)
        os.replace(temporary, path)
    except OSError as error:  # a full disk: leave no half of it
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


class Writers:
    """All writers of one run; `step` counts finished optimizer steps.

    Args:
      workdir: the run directory.
      resumed_step: what was logged after this step is cut away, since those steps run again.
      tensorboard: write event files into `tensorboard/`.
      wandb: a Weights & Biases project; "" is off.
      config: the resolved config, for Weights & Biases.
    """

    def __init__(
        self, workdir: Path, *, resumed_step: int = 0, tensorboard: bool = False, wandb: str = "",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = workdir / "metrics.jsonl"
        cut_back(workdir, resumed_step)
        self._lines = self.path.open("a", encoding="utf-8")
        self._events = EventFile(workdir / "tensorboard", resumed_step) if tensorboard else None
        self._wandb = _start_wandb(wandb, workdir, config) if wandb else None

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One logged step."""
        self._lines.write(dump({"step": step, **values}) + "\n")
        self._lines.flush()
        self._send(step, {f"train/{name}": value for name, value in values.items()})

    def write_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers of the evaluators at a step, named `evaluator/metric`. Their files are the loop's."""
        self._send(step, {f"eval/{name}": value for name, value in metrics.items()})

    def close(self) -> None:
        for stream in (self._lines, self._events):
            if stream:
                with contextlib.suppress(OSError):  # a full disk: said when the step was written
                    stream.close()
        if self._wandb:
            self._wandb.finish()

    def _send(self, step: int, values: Mapping[str, Any]) -> None:
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        if self._events:
            self._events.scalars(step, numbers)
        if self._wandb:
            self._wandb.log(numbers, step=step)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The logged steps of a `metrics.jsonl`, in order; a last line that a crash cut short is left out.

    Raises InputError, with the line, for a file that holds anything else.
    """
    records, wrong = _records(path)
    if wrong:
        raise InputError(f"{path}:{wrong}: is no record of a step; expected a JSON object with its number as step")
    return records


def mend_metrics(path: Path, log: Callable[[str], None], write: bool = True) -> list[dict[str, Any]]:
    """`read_metrics` for a run that goes on: a damaged file is cut at its first line that is no record, which is said.

    `write` False (the processes other than the first) leaves the file.
    """
    records, wrong = _records(path)
    if wrong:
        log(f"warning: {path}:{wrong}: is no record of a step; the file is cut there")
        if write:
            write_atomically(path, (dump(record) + "\n" for record in records))
    return records


def _records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records up to the first line that is none, and that line's number; 0 where all are."""
    records: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.is_file() else (), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode())
        except ValueError:
            return records, number
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            return records, number
        records.append(record)
    return records, 0


def cut_back(workdir: Path, step: int) -> None:
    """Remove from `metrics.jsonl` and `eval/` what belongs to steps after `step`."""
    path = workdir / "metrics.jsonl"
    if path.is_file():
        write_atomically(path, (dump(record) + "\n" for record in _records(path)[0] if record["step"] <= step))
    for folder in (workdir / "eval").glob("[0-9]*"):
        if folder.name.isdecimal() and int(folder.name) > step:
            shutil.rmtree(folder)


def _start_wandb(project: str, workdir: Path, config: Mapping[str, Any] | None) -> Any:
    try:
        import wandb
    except ImportError:
        raise InputError("config: log.wandb needs the package wandb: pip install 'itune[wandb]'") from None
    own = hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:8]  # the same run when it resumes
    return wandb.init(project=project, dir=str(workdir), name=workdir.name, config=dict(config or {}), resume="allow",
                      id=f"{workdir.name}-{own}")


class EventFile:
    """A TensorBoard event file of scalars: TFRecords of `tensorflow.Event` messages (event.proto, record_writer.cc).

    Written here because the packages that do it import a second framework when one is installed.
    """

    def __init__(self, folder: Path, resumed_step: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        stamp = f"{time.time_ns() // 1000:016d}"
        self._stream = (folder / f"events.out.tfevents.{stamp}.{socket.gethostname()}.itune").open("ab")
        self._record(_double(1, time.time()) + _bytes(3, b"brain.Event:2"))
        if resumed_step:  # a session start makes TensorBoard drop what it has of later steps
            session = _bytes(7, _varint(1, 1))
            self._record(_double(1, time.time()) + _varint(2, resumed_step + 1) + session)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        summary = b"".join(_bytes(1, _bytes(1, name.encode()) + _float(2, value)) for name, value in values.items())
        self._record(_double(1, time.time()) + _varint(2, step) + _bytes(5, summary))

    def close(self) -> None:
        self._stream.close()

    def _record(self, data: bytes) -> None:
        length = struct.pack("<Q", len(data))
        self._stream.write(length + _masked_crc(length) + data + _masked_crc(data))
        self._stream.flush()


def _number(value: int) -> bytes:
    """Base-128 varint of protocol buffers."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varint(field: int, value: int) -> bytes:
    return _number(field << 3) + _number(value)


def _double(field: int, value: float) -> bytes:
    return _number(field << 3 | 1) + struct.pack("<d", value)


def _float(field: int, value: float) -> bytes:
    return _number(field << 3 | 5) + struct.pack("<f", value)


def _bytes(field: int, value: bytes) -> bytes:
    return _number(field << 3 | 2) + _number(len(value)) + value


def _crc_table() -> Iterable[int]:
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        yield byte


_CRC = tuple(_crc_table())


def _masked_crc(data: bytes) -> bytes:
    """CRC-32C, rotated and shifted as TFRecord wants it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
