"""Data and weights in a bucket: fetched once, again when an object changes, whole or not; one message otherwise."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from itune.cli import main
from itune.data.sources import open_sources
from itune.data.templates import load_tokenizer
from itune.models import load_model, load_pretrained
from itune.storage import fetch
from itune.storage.bucket import Bucket
from itune.storage.cache import cache_folder
from itune.storage.fetch import local_folder
from itune.types import InputError, RunError


def rows(*numbers):
    return "".join(json.dumps({"prompt": str(n), "completion": str(n)}) + "\n" for n in numbers).encode()


@pytest.fixture
def fetched(memory, monkeypatch):
    """The names of the objects that were downloaded, in order."""
    names, get = [], type(memory).get_file
    monkeypatch.setattr(type(memory), "get_file",
                        lambda self, name, *more, **kw: (names.append(name), get(self, name, *more, **kw)))
    return names


def test_an_object_is_fetched_once_and_again_when_it_changes(memory, fetched):
    memory.pipe_file("/b/data/my.jsonl.gz", gzip.compress(rows(1, 2), mtime=0))
    (source,) = open_sources("memory://b/data/my.jsonl.gz")
    assert source.name == "my" and [row.fields["prompt"] for row in source.rows()] == ["1", "2"]
    first = source.digest()
    assert open_sources("memory://b/data/my.jsonl.gz")[0].digest() == first and fetched == ["/b/data/my.jsonl.gz"]
    memory.pipe_file("/b/data/my.jsonl.gz", gzip.compress(rows(1, 3), mtime=0))
    (source,) = open_sources("memory://b/data/my.jsonl.gz")
    assert [(row.fields["prompt"], str(row.address)) for row in source.rows()] == [
        ("1", "memory://b/data/my.jsonl.gz:1"), ("3", "memory://b/data/my.jsonl.gz:2")]  # the same on any machine
    assert source.digest() != first and len(fetched) == 2


def test_the_same_content_has_the_same_digest_in_a_folder_here_and_in_a_bucket(memory, tmp_path):
    (tmp_path / "my.jsonl").write_bytes(rows(1))
    memory.pipe_file("/b/my.jsonl", rows(1))
    assert open_sources("memory://b/my.jsonl")[0].digest() == open_sources(str(tmp_path / "my.jsonl"))[0].digest()


def test_folders_globs_and_several(memory):
    for name in ("a.jsonl", "sub/b.jsonl", "sub/notes.txt", "sub/deep/c.jsonl"):
        memory.pipe_file(f"/b/data/{name}", rows(name))
    memory.pipe_file("/b/database.jsonl", rows("not in the folder"))

    def found(spec):
        return [[row.fields["prompt"] for row in source.rows()] for source in open_sources(spec)]

    assert found("memory://b/data") == found("memory://b/data/") == [["a.jsonl", "sub/b.jsonl", "sub/deep/c.jsonl"]]
    assert found("memory://b/data/*.jsonl") == [["a.jsonl"]]
    assert found("memory://b/data/s*/?.jsonl") == [["sub/b.jsonl"]]
    assert found("memory://b/data/**/[bc].jsonl") == [["sub/b.jsonl", "sub/deep/c.jsonl"]]
    assert found(("memory://b/data/a.jsonl", "memory://b/database.jsonl")) == [["a.jsonl"], ["not in the folder"]]
    assert len(found("memory://b")[0]) == 4


@pytest.mark.parametrize(("spec", "message"), [
    ("memory://b/nothing.jsonl", r"^data\.train: memory://b/nothing\.jsonl: no such object, nor a folder with one"),
    ("memory://b/data/notes.txt", r"data/notes\.txt ends in none of \.jsonl, "),
    ("memory://b/data/*.parquet", r"\*\.parquet: no such object"),
    ("memory://", r"names no bucket; expected memory://BUCKET/PATH"),
    ("ftp://b/x.jsonl", r"ftp:// is not supported; expected a path on this machine, gs:// or s3://"),
    ("memory://b/../x.jsonl", r"a path in a bucket has no '\.\.'"),
])
def test_what_cannot_be_read_is_said_in_one_line(memory, spec, message):
    memory.pipe_file("/b/data/notes.txt", b"")
    with pytest.raises(InputError, match=message) as raised:
        open_sources(spec)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("scheme", "module", "extra"), [("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3")])
def test_without_the_extra_it_is_named_and_the_exit_code_is_2(tmp_path, monkeypatch, capsys, scheme, module, extra):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    words = ["data", "stats", "--config", "sft", f"--config.data.train={scheme}://b/x.jsonl"]
    assert main([*words, f"--config.model.path={scheme}://b/model"]) == 2
    assert f"needs the extra: pip install 'itune[{extra}]'" in capsys.readouterr().err


def test_a_failing_library_is_one_message(memory, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise ValueError("Unable to locate credentials\nmore")

    monkeypatch.setattr(type(memory), "find", refuse)
    with pytest.raises(InputError, match=r"^data\.train: memory://b/x\.jsonl cannot be reached: ValueError: Unable to "
                                         r"locate credentials; expected credentials that may use this bucket"):
        open_sources("memory://b/x.jsonl")


def upload(memory, folder, at):
    for path in Path(folder).rglob("*"):
        if path.is_file():
            memory.pipe_file(f"{at}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def test_a_model_of_a_bucket_is_the_model_of_the_folder(memory, fetched, base_folder):
    upload(memory, base_folder, "/b/models/base")
    memory.pipe_file("/b/models/base/pytorch_model.bin", b"never fetched")
    model, params = load_pretrained("memory://b/models/base")
    same, expected = load_pretrained(base_folder)
    assert model == same
    for ours, theirs in zip(*map(jax.tree.leaves, (params, expected)), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    tokenizer = load_tokenizer("memory://b/models/base", "chatml")
    assert tokenizer.fingerprint == load_tokenizer(str(base_folder), "chatml").fingerprint
    assert tokenizer.stop_ids == load_tokenizer(str(base_folder), "chatml").stop_ids
    assert [name for name in fetched if name.endswith((".bin", ".safetensors"))] == ["/b/models/base/model.safetensors"]


def test_weights_are_of_the_state_that_the_configuration_was_read_of(memory, base_folder):
    upload(memory, base_folder, "/b/models/base")
    load_model("memory://b/models/base")
    config = json.loads((base_folder / "config.json").read_text())
    memory.pipe_file("/b/models/base/config.json", json.dumps({**config, "rms_norm_eps": 0.001}).encode())
    with pytest.raises(InputError, match=r"models/base changed after this process had read of it; start again"):
        load_pretrained("memory://b/models/base")


def test_a_copy_that_somebody_removed_is_fetched_again(memory, base_folder):
    upload(memory, base_folder, "/b/models/base")
    before = load_model("memory://b/models/base")
    shutil.rmtree(cache_folder())
    assert load_model("memory://b/models/base") == before


def test_to_plan_no_weights_are_fetched_from_a_bucket(memory, fetched, base_folder):
    upload(memory, base_folder, "/b/models/base")
    assert load_model("memory://b/models/base") == load_model(base_folder)
    load_tokenizer("memory://b/models/base", "chatml")
    assert len(fetched) == len(set(fetched)) and not any(name.endswith(".safetensors") for name in fetched)


def test_a_model_appears_in_the_cache_whole_or_not_at_all(memory, base_folder, monkeypatch):
    upload(memory, base_folder, "/b/model")
    get = type(memory).get_file

    def failing(self, name, *more, **kwargs):  # by name: several are fetched at once
        if name.endswith("tokenizer.json"):
            raise ConnectionError("gone")
        get(self, name, *more, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "get_file", failing)
        with pytest.raises(RunError, match=r"^model\.path: memory://b/model cannot be reached: Conn.*: gone; try"):
            local_folder("memory://b/model")
    assert not [path for path in (cache_folder() / "fetched").iterdir() if path.is_dir() and path.name[0] != "."]
    folder = Path(local_folder("memory://b/model"))
    assert {path.name for path in folder.iterdir()} == {path.name for path in base_folder.iterdir()}
    memory.pipe_file("/b/model/generation_config.json", b"{}")
    assert local_folder("memory://b/model") == str(folder)  # one model for the whole of a process
    fetch._fetched_folder.cache_clear()  # as in another process
    fetch.LISTED.clear()
    assert (Path(local_folder("memory://b/model")) / "generation_config.json").read_text() == "{}"
    shutil.rmtree(folder)


@pytest.mark.parametrize("url", ["memory://b/nowhere", "https://example.org/model"])
def test_a_model_that_is_not_there(memory, url):
    for load in (load_tokenizer, load_pretrained):
        with pytest.raises(InputError, match=r"no model there|https:// is not supported"):
            load(url)


def test_a_key_that_leads_outside_is_refused(memory):
    bucket = Bucket("memory://b/x")
    for name in ("../y", "/etc/x", "a/../../y"):
        with pytest.raises(InputError, match="leads outside the folder"):
            bucket.get([name], Path("/nowhere"))
