"""Sources: every kind of file gives the same rows, every fault names file and line."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from itune.data.sources import open_sources
from itune.types import InputError

ROWS = [{"prompt": f"question {i}?", "completion": f"answer {i}", "task": "t" * (i % 2 + 1)} for i in range(5)]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS)


def rows_of(spec, **options) -> list:
    return [row for source in open_sources(spec, **options) for row in source.rows()]


def write(folder: Path, name: str) -> str:
    """ROWS in the kind of file that the name's suffix means."""
    path = folder / name
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif name.endswith(".json"):
        path.write_text(json.dumps(ROWS))
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(TEXT.encode()))
    elif name.endswith(".zst"):
        path.write_bytes(zstandard.compress(TEXT.encode()))
    else:
        path.write_text(TEXT)
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.parquet"])
def test_every_kind_of_file_gives_the_same_rows_with_addresses(tmp_path, name):
    path = write(tmp_path, name)
    rows = rows_of(path)
    assert [row.fields for row in rows] == ROWS
    assert [str(row.address) for row in rows] == [f"{path}:{line}" for line in range(1, 6)]
    assert {row.address.source for row in rows} == {"a"}


def test_folder_glob_tuple_and_dict(tmp_path):
    one, two = write(tmp_path, "one.jsonl"), write(tmp_path, "two.parquet")
    assert len(rows_of(str(tmp_path))) == 10
    assert len(rows_of(str(tmp_path / "*.jsonl"))) == 5
    assert [source.name for source in open_sources((one, two))] == ["one", "two"]
    assert [source.name for source in open_sources({"first": one, "second": one})] == ["first", "second"]
    (tmp_path / "sub").mkdir()
    same = write(tmp_path / "sub", "one.jsonl")
    assert [source.name for source in open_sources((one, same))] == [one, same]
    with pytest.raises(InputError, match="twice"):
        open_sources((one, one))


def test_saved_dataset_and_hub_cache_miss(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    rows = rows_of(str(tmp_path / "saved"))
    assert [row.fields for row in rows] == ROWS and rows[2].address.line == 3
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"dataset nobody/nothing cannot be opened .*expected a file"):
        rows_of("nobody/nothing")


def test_tfds_through_its_interface(monkeypatch):
    """The library is large and optional: a stand-in with the three calls that are made of it."""
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(InputError, match=r"tfds:toy needs the extra: pip install 'itune\[tfds\]'"):
        rows_of("tfds:toy")
    loaded = []

    def load(name, split, shuffle_files):
        loaded.append((name, split, shuffle_files))
        return [{"prompt": b"caf\xc3\xa9", "n": np.int64(3), "ids": np.array([1, 2])}]

    builder = SimpleNamespace(info=SimpleNamespace(full_name="toy/1.0.0"))
    toy = SimpleNamespace(load=load, as_numpy=lambda rows: rows, builder=lambda name: builder)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", toy)
    rows = rows_of("tfds:toy:test")
    assert rows[0].fields == {"prompt": "café", "n": 3, "ids": [1, 2]} and str(rows[0].address) == "tfds:toy:test:1"
    assert loaded == [("toy", "test", False)]
    assert open_sources("tfds:toy")[0].digest() != open_sources("tfds:toy:test")[0].digest()


def test_parquet_lists_and_structs(tmp_path):
    import pyarrow
    import pyarrow.parquet

    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages}]), tmp_path / "m.parquet")
    assert rows_of(str(tmp_path / "m.parquet"))[0].fields == {"messages": messages}
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not parquet")
    with pytest.raises(InputError, match=r"bad\.parquet: not a readable Parquet file"):
        rows_of(str(tmp_path / "bad.parquet"))


CALLS = [{"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": arguments}}]}],
          "tools": [{"a": 1, "b": None}]} for arguments in ({"city": "Paris"}, {"n": 2})]
PARTS = [{"messages": [{"role": "user", "content": content}]} for content in ("Say \"hi\"\n", [{"text": "é"}], "a")]


@pytest.mark.parametrize("saved", [False, True])
def test_what_datasets_made_of_rows_is_read_as_they_were(tmp_path, saved):
    """Structs that differ get each other's keys as nulls; contents of two types become JSON in a text (type Json)."""
    datasets = pytest.importorskip("datasets")
    for name, rows in (("calls", CALLS), ("parts", PARTS)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        made = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
        target = str(tmp_path / name) if saved else str(tmp_path / f"{name}.parquet")
        made.save_to_disk(target) if saved else made.to_parquet(target)
        tools = [{"tools": [{"a": 1}]}] if name == "calls" else [{}]
        assert [row.fields for row in rows_of(target)] == [row | tools[0] for row in rows]


def test_parquet_that_cannot_be_read_names_the_column(tmp_path):
    import pyarrow
    import pyarrow.parquet

    def refused(table, said):
        pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
        with pytest.raises(InputError, match=r"x\.parquet: " + said):
            rows_of(str(tmp_path / "x.parquet"))

    text, far = pyarrow.array(["a"]), pyarrow.array([2**60])
    refused(pyarrow.table([text, text, text], ["prompt", "completion", "prompt"]), "two columns are named prompt; expe")
    refused(pyarrow.table({"p": text, "when": far.cast(pyarrow.timestamp("ms"))}), "column when: a value cannot be re")
    refused(pyarrow.table({"when": far.cast(pyarrow.timestamp("us", "Mars/One"))}), "column when: a value cannot be")
    raw = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"),
                                                           pyarrow.py_buffer(b"\xff")])
    refused(pyarrow.table({"p": raw}), r"column p: a value cannot be read \(UnicodeDecodeError")
    nan = pyarrow.table({"p": text, "score": pyarrow.array([float("nan")])})
    pyarrow.parquet.write_table(nan, tmp_path / "n.parquet")
    assert rows_of(str(tmp_path / "n.parquet"))[0].fields == {"p": "a", "score": None}  # as JSON, which has no NaN


def test_a_folder_of_several_splits_is_not_taken_whole(tmp_path):
    """As the hub's are laid out, and as `itune data split` writes them; hidden folders hold no data."""
    (tmp_path / "data").mkdir()
    (tmp_path / ".ipynb_checkpoints").mkdir()
    write(tmp_path / ".ipynb_checkpoints", "train-checkpoint.jsonl")
    write(tmp_path / "data", "train-00000-of-00001.jsonl")
    write(tmp_path / "data", "train-00001-of-00001.jsonl")
    assert len(rows_of(str(tmp_path))) == 10
    write(tmp_path / "data", "contests.jsonl")
    assert len(rows_of(str(tmp_path))) == 15
    write(tmp_path / "data", "test-00000.jsonl")
    with pytest.raises(InputError, match=r"data\.train: folder .* holds several splits \(test: .*test-00000.jsonl; t"):
        open_sources(str(tmp_path))
    assert len(rows_of(str(tmp_path / "data" / "train-*"))) == 10


def test_missing_things_name_the_nearest(tmp_path):
    write(tmp_path, "train.jsonl")
    with pytest.raises(InputError, match=r"no such file .*trian\.jsonl; nearest: .*train\.jsonl"):
        open_sources(str(tmp_path / "trian.jsonl"))
    with pytest.raises(InputError, match="does not exist"):
        open_sources(str(tmp_path / "absent" / "train.jsonl"))
    with pytest.raises(InputError, match="no file matches"):
        open_sources(str(tmp_path / "*.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no file that ends in"):
        open_sources(str(tmp_path / "empty"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"ends in \.txt; expected one of \.jsonl"):
        open_sources(str(tmp_path / "notes.txt"))
    with pytest.raises(InputError, match="is empty"):
        open_sources("")
    with pytest.raises(InputError, match="must be text"):
        open_sources({"a": 3})


GOOD = b'{"prompt": "a", "completion": "b"}\n'
FAULTS = {
    "malformed": (GOOD + b'{"prompt": "a", \n', r":2: column \d+: .*expected one JSON object"),
    "cut off": (GOOD + GOOD[:-8], r":2: column \d+: "),
    "trailing comma": (b'{"prompt": "a",}\n', r":1: column \d+: "),
    "two objects": (b"{} {}\n", r":1: column 4: Extra data"),
    "NaN": (GOOD + b'{"prompt": NaN}\n', r":2: found NaN"),
    "Infinity": (b'{"prompt": -Infinity}\n', r":1: found -Infinity"),
    "key twice": (GOOD * 2 + b'{"prompt": "a", "prompt": "b"}\n', r":3: prompt: key stands twice"),
    "nested key twice": (b'{"m": [{"r": 1, "r": 1}]}\n', r":1: r: key stands twice"),
    "array row": (GOOD + b"[1, 2]\n", r":2: found an array; expected a JSON object"),
    "string row": (b'"text"\n', r":1: found a string; expected a JSON object"),
    "null row": (b"null\n", r":1: found null"),
    "number row": (b"3\n", r":1: found a number"),
    "bare text": (b"hello\n", r":1: column 1"),
    "two files joined": (GOOD + b"\xef\xbb\xbf" + GOOD, r":2: column 1: found a byte order mark"),
    "invalid UTF-8": (GOOD + b'{"prompt": "\xff"}\n', r":2: byte 0xff at offset 47 is not UTF-8"),
    "UTF-16": (GOOD.decode().encode("utf-16"), r":1: byte 0xff at offset 0"),
    "control character": (b'{"prompt": "a\x01"}\n', r":1: column \d+: Invalid control character"),
    "huge integer": (b'{"n": ' + b"9" * 5000 + b"}\n", r":1: .*expected JSON"),
    "deep nesting": (b"[" * 100_000 + b"\n", r":1: "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_of_a_line_has_its_address(tmp_path, fault):
    body, message = FAULTS[fault]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(body)
    with pytest.raises(InputError, match=r"rows\.jsonl" + message):
        rows_of(str(path))


@pytest.mark.parametrize("body", [
    b"\xef\xbb\xbf" + GOOD * 2, GOOD.replace(b"\n", b"\r\n") * 2, b"\n\n" + GOOD + b"  \n" + GOOD, GOOD + GOOD.strip(),
], ids=["bom", "crlf", "blank", "no final newline"])  # fmt: skip
def test_harmless_variants_are_read(tmp_path, body):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(body)
    rows = rows_of(str(path))
    assert [row.fields for row in rows] == [{"prompt": "a", "completion": "b"}] * 2
    if body.startswith(b"\n"):
        assert [row.address.line for row in rows] == [3, 5]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("kept", [0.4, 0.8])
def test_truncated_and_damaged_archives(tmp_path, name, kept):
    text = "".join(json.dumps({"prompt": f"{i * i}", "completion": "x"}) + "\n" for i in range(5000)).encode()
    whole = gzip.compress(text) if name.endswith(".gz") else zstandard.compress(text)
    path = tmp_path / name
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(InputError, match=rf"{name}:\d+: "):
        rows_of(str(path))
    path.write_bytes(b"no archive at all")
    with pytest.raises(InputError, match=rf"{name}:1: the archive is damaged"):
        rows_of(str(path))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_lines_are_read_or_refused_with_an_address(tmp_path_factory, data):
    """Whatever bytes stand in a file: rows that JSON reads the same way, or one InputError with file and line."""
    raw = bytearray(TEXT.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(raw)
    try:
        rows = rows_of(str(path))
    except InputError as error:
        assert str(error).startswith(f"{path}:")
    else:
        lines = [line for line in raw.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip(b" \t\r\n")]
        assert [row.fields for row in rows] == [json.loads(line) for line in lines]


def test_digest_follows_content_and_not_place(tmp_path):
    one = write(tmp_path, "a.jsonl")
    before = open_sources(one)[0].digest()
    (tmp_path / "elsewhere").mkdir()
    other = write(tmp_path / "elsewhere", "a.jsonl")
    assert open_sources(other)[0].digest() == before
    Path(one).write_text(TEXT.replace("answer 3", "answer 4"))
    assert open_sources(one)[0].digest() != before


@pytest.mark.parametrize("stray", ["\x0b", "\x0c", "\x1c", "\xa0", "\u3000"])
def test_white_space_that_json_does_not_know_is_refused(tmp_path, stray):
    """`str.strip` would take it away; other readers would refuse the file."""
    path = tmp_path / "stray.jsonl"
    for after in (stray, stray + "\n"):  # before an object, and alone in a line
        path.write_text(TEXT.replace("\n", "\n" + after, 1), encoding="utf-8")
        with pytest.raises(InputError, match=r"stray.jsonl:2: "):
            rows_of(str(path))
