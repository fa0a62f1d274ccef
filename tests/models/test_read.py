"""Reading: only the slices a device needs, dtypes converted on the way, rows added to the vocabulary."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import itune.models
from itune.models.hf import files, read
from itune.models.hf.plan import leaf_paths, make_plan
from itune.sharding import make_mesh
from itune.types import InputError

MESHES = [{"fsdp": 8}, {"tensor": 8}, {"fsdp": 2, "tensor": 4}, {"data": 8}]
WIDE = {"width": 16, "num_heads": 8, "num_kv_heads": 8, "head_dim": 4, "mlp_width": 32}


class Counter:
    """Sums the bytes of the slices that threads report."""

    def __init__(self):
        self.total, self.lock = 0, threading.Lock()

    def __call__(self, size: int) -> None:
        with self.lock:
            self.total += size


@pytest.fixture(scope="module")
def wide(tmp_path_factory, make_model, random_params) -> Path:
    model = make_model(**WIDE)
    folder = tmp_path_factory.mktemp("wide") / "model"
    itune.models.save_pretrained(folder, model, random_params(model))
    return folder


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_every_device_reads_its_own_share(wide, shape):
    whole = leaf_paths(itune.models.load_pretrained(wide)[1])
    model = itune.models.load_model(wide, make_mesh(shape))
    counter = Counter()
    plan = make_plan(wide, model, model.config.vocab_size)
    params = leaf_paths(read.read_params(model, plan, counter))
    needed = 0
    for path, leaf in params.items():
        np.testing.assert_array_equal(leaf, whole[path])
        # jax asks once for each different shard, however many devices hold it
        needed += sum({str(shard.index): shard.data.nbytes for shard in leaf.addressable_shards}.values())
    assert counter.total == needed == sum(leaf.nbytes for leaf in whole.values())
    kernel = params["blocks/layer_0/mlp/up_proj/kernel"]
    assert kernel.addressable_shards[0].data.nbytes * (8 if shape != {"data": 8} else 1) == kernel.nbytes


def test_a_slice_is_read_in_chunks_without_the_rest(tmp_path, monkeypatch):
    values = np.random.default_rng(0).normal(size=(5000, 33)).astype(np.float32)
    save_file({"x": values[:1], "y": values}, tmp_path / "f.safetensors")
    tensor = files.read_header(tmp_path / "f.safetensors")["y"]
    monkeypatch.setattr(read, "CHUNK", 10_000)
    out, counter = np.empty((4000, 11), np.float32), Counter()
    read.read_slice(tensor, [slice(7, 4007), slice(11, 22)], out, counter)
    np.testing.assert_array_equal(out, values[7:4007, 11:22])
    assert counter.total == out.nbytes
    np.testing.assert_allclose(read.mean_row(tensor), values.mean(axis=0, dtype=np.float64), atol=1e-7)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_conversion(stored, wanted):
    rng = np.random.default_rng(0)
    source = np.concatenate([rng.normal(size=1000), [0.0, -0.0, np.inf, -np.inf, 1e-30]]).astype(
        getattr(ml_dtypes, stored, stored)
    )
    out = np.empty(source.shape, getattr(ml_dtypes, wanted, wanted))
    read.convert(source, out)
    np.testing.assert_array_equal(out, source.astype(out.dtype))


def test_parameters_take_the_dtype_asked_for(wide):
    params = itune.models.load_pretrained(wide, param_dtype="bfloat16")[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize("shape", [None, {"fsdp": 4, "tensor": 2}], ids=str)
def test_vocabulary_grows_with_the_mean_of_its_rows(wide, tmp_path, shape, caplog):
    mesh = make_mesh(shape) if shape else None
    with caplog.at_level(logging.INFO, "itune"):
        model, params = itune.models.load_pretrained(wide, mesh, vocab_size=54)
    assert "embed/embedding: 6 rows added to the 48" in caplog.text and "lm_head/kernel: 6 rows" in caplog.text
    old = load_file(wide / "model.safetensors")["model.embed_tokens.weight"]
    grown = np.asarray(params["embed"]["embedding"])
    assert grown.shape == (54, 16) and model.config.vocab_size == 54
    np.testing.assert_array_equal(grown[:48], old)
    np.testing.assert_allclose(grown[48:], np.broadcast_to(old.mean(axis=0), (6, 16)), atol=1e-7)
    itune.models.save_pretrained(tmp_path / "grown", model, params, source=wide)
    again, reread = itune.models.load_pretrained(tmp_path / "grown")
    assert again.config == model.config
    np.testing.assert_array_equal(reread["lm_head"]["kernel"], params["lm_head"]["kernel"])
    assert (
        itune.models.load_model(wide, vocab_size=12).config.vocab_size == 48
    )  # a size below the file's keeps the file's


class Hub:
    """Stands in for huggingface_hub.snapshot_download."""

    def __init__(self, answer):
        self.answer, self.calls = answer, []

    def __call__(self, repo, **options):
        self.calls.append((repo, options))
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


def test_hub_id_is_pinned_and_brings_no_pickle(base_folder, monkeypatch):
    import huggingface_hub

    hub = Hub(base_folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    itune.models.load_model("org/some-model", revision="abc123")
    ((repo, options),) = hub.calls
    assert (repo, options["revision"]) == ("org/some-model", "abc123")
    assert "*.safetensors" in options["allow_patterns"]
    assert not [p for p in options["allow_patterns"] if p == "*" or p.endswith((".bin", ".pt", ".py"))]


def test_offline_hub_is_one_clear_error():
    with pytest.raises(InputError) as error:  # HF_HUB_OFFLINE is set for the tests
        itune.models.load_model("org/not-here", revision="v1")
    message = str(error.value)
    assert "no folder org/not-here here" in message and "at revision v1 is not to be had from the hub" in message
    assert "\n" not in message
