"""The same against an S3 in a process of its own, through s3fs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from s3_server import s3_server

import itune
from itune.checkpoint.mirror import Mirror
from itune.checkpoint.store import Store
from itune.checkpoint.view import uploaded
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


def test_a_bucket_that_cannot_be_written_is_said_before_the_work(s3):
    with pytest.raises(InputError, match=r"^s3://nowhere/models/x: no such object or bucket \("), \
            uploaded("s3://nowhere/models/x", "proof"):
        pytest.fail("the work began")
    pages = Bucket("s3://bucket/pages")
    with uploaded("s3://bucket/pages/page.html") as path:
        assert pages.list() == {}  # the trial of it left nothing
        path.write_text("page")
    assert list(pages.list()) == ["page.html"]


_PUSH = """
import sys
from pathlib import Path
from itune.checkpoint.manifest import write_manifest
from itune.checkpoint.mirror import Mirror
folder = Path(sys.argv[1])
mirror = Mirror("s3://bucket/run", folder)
mirror.take()
for step in (4, 8):
    for name in ("arrays/a", "arrays/b", "run.json"):
        path = folder / "checkpoints" / str(step) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name * step)
    write_manifest(folder / "checkpoints" / str(step), step=step)
    mirror.push(step)
"""


def test_killed_before_the_manifest_an_upload_has_left_no_checkpoint(s3, tmp_path):
    (tmp_path / "one").mkdir()
    killed = subprocess.run([sys.executable, "-c", _PUSH, str(tmp_path / "one")], capture_output=True, text=True,
                            env={**os.environ, "ITUNE_MARK_KILL": "before-manifest:8"},
                            cwd=Path(itune.__file__).parents[1])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    there = Bucket("s3://bucket/run").list("checkpoints")
    names = [f"checkpoints/8/{name}" for name in ("arrays/a", "arrays/b", "run.json")]
    assert sorted(name for name in there if "/8/" in name) == names
    for name, step in (("two", 4), ("one", 8)):  # a new machine goes on from 4; the old one has lost nothing
        (tmp_path / name).mkdir(exist_ok=True)
        mirror = Mirror("s3://bucket/run", tmp_path / name)
        mirror.take()
        assert Store(tmp_path / name / "checkpoints", mirror=mirror).newest_good() == step == mirror.steps()[-1]
