"""The same against an S3 in a process of its own, through s3fs."""

from __future__ import annotations

import json

import pytest
from s3_server import s3_server

from itune.cli import main
from itune.data.sources import open_sources
from itune.storage.bucket import Bucket
from itune.types import InputError


@pytest.fixture(scope="module")
def server():
    with s3_server() as environment:
        yield environment


@pytest.fixture
def s3(server, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in server.items():
        monkeypatch.setenv(name, value)


def row(text):
    return (json.dumps({"prompt": text, "completion": text}) + "\n").encode()


def test_list_write_read_replace_remove(s3, tmp_path):
    bucket = Bucket("s3://bucket/folder")
    assert bucket.list() == {} and bucket.read("x") is None
    bucket.write("sub/x", b"one")
    Bucket("s3://bucket/folder2").write("x", b"beside it")
    first = bucket.list()
    assert list(first) == ["sub/x"] and bucket.sizes("sub") == {"sub/x": 3} and bucket.read("sub/x") == b"one"
    bucket.write("sub/x", b"two")
    assert bucket.list() != first
    (tmp_path / "big").write_bytes(bytes(range(256)) * 50_000)  # more than one part of a multipart upload
    (tmp_path / "empty").touch()
    told = []
    bucket.put({name: tmp_path / name for name in ("big", "empty")}, told.append)
    assert sorted(told) == ["big", "empty"]
    bucket.get(["big", "sub/x", "missing", "empty"], tmp_path / "got")
    assert (tmp_path / "got" / "big").read_bytes() == (tmp_path / "big").read_bytes()
    assert sorted(path.name for path in (tmp_path / "got").rglob("*") if path.is_file()) == ["big", "empty", "x"]
    bucket.remove(["big", "missing", "sub/x", "empty"])
    assert bucket.list() == {} and Bucket("s3://bucket/folder2").read("x") == b"beside it"


def test_data_follow_the_object(s3):
    Bucket("s3://bucket/data").write("my.jsonl", row("one"))
    (source,) = open_sources("s3://bucket/data/my.jsonl")
    assert [r.fields["prompt"] for r in source.rows()] == ["one"]
    Bucket("s3://bucket/data").write("my.jsonl", row("two"))
    (again,) = open_sources("s3://bucket/data/*.jsonl")
    assert [r.fields["prompt"] for r in again.rows()] == ["two"] and again.digest() != source.digest()


def test_missing_objects_buckets_and_credentials_are_one_message(s3, monkeypatch, capsys):
    with pytest.raises(InputError, match=r"^data\.train: s3://bucket/nothing\.jsonl: no such object"):
        open_sources("s3://bucket/nothing.jsonl")
    with pytest.raises(InputError, match=r"^data\.train: s3://nowhere/x\.jsonl: no such object"):
        open_sources("s3://nowhere/x.jsonl")
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        words = ["data", "stats", "--config", "sft", "--config.data.train=s3://bucket/x.jsonl"]
        assert main([*words, "--config.model.path=s3://bucket/model"]) == 2
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("itune: model.path: s3://bucket/model cannot be reached: NoCredentialsError")
