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
from itune.models.families.stored import Part
from itune.models.hf import files, read
from itune.models.hf.convert import convert, is_finite
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


def fill(tensor, part, cuts, dtype=np.float32):
    """What a Reader makes of these pieces (of the parameter's axes), and the bytes it read."""
    counter = Counter()
    targets = [read.Target(cut, np.empty([s.stop - s.start for s in cut], dtype)) for cut in cuts]
    with read.Reader(counter) as reader:
        for matrix in read.matrices(tensor, part, targets):
            reader.run(list(reader.jobs(matrix)))
    assert not reader.broken
    return [target.out for target in targets], counter.total


@pytest.mark.parametrize("chunk", [1, 10_000, 1 << 20])
def test_pieces_are_read_in_chunks_without_the_rest(tmp_path, monkeypatch, chunk):
    values = np.random.default_rng(0).normal(size=(500, 33)).astype(np.float32)
    save_file({"x": values[:1], "y": values}, tmp_path / "f.safetensors")
    tensor = files.read_header(tmp_path / "f.safetensors")["y"]
    monkeypatch.setattr(read, "CHUNK", chunk)
    cuts = [(slice(7, 407), slice(11, 22)), (slice(7, 407), slice(28, 33)), (slice(390, 420), slice(0, 5))]
    found, size = fill(tensor, Part("y"), cuts)
    for cut, out in zip(cuts, found, strict=True):
        np.testing.assert_array_equal(out, values[cut])
    # rows that two pieces share are read once for the columns that either wants
    assert size <= 4 * (400 * 16 + 30 * 5) + 4 * 30 * 6 + (0 if chunk < 10_000 else 4 * 500 * 5)
    (whole,), size = fill(tensor, Part("y"), [(slice(0, 500), slice(0, 33))])
    np.testing.assert_array_equal(whole, values)
    assert size == values.nbytes
    np.testing.assert_allclose(read.mean_row(tensor), values.mean(axis=0, dtype=np.float64), atol=1e-7)


@pytest.mark.parametrize("chunk", [100, 1 << 20])
@pytest.mark.parametrize("part", [Part("x", 1, 2, True), Part("x", 0, 2), Part("x", transposed=True)], ids=str)
def test_parts_of_a_tensor(tmp_path, monkeypatch, chunk, part):
    values = np.random.default_rng(0).normal(size=(3, 10, 12)).astype(np.float32)
    save_file({"x": values}, tmp_path / "f.safetensors")
    monkeypatch.setattr(read, "CHUNK", chunk)
    wanted = values[..., part.first :: part.step]
    wanted = wanted.swapaxes(1, 2) if part.transposed else wanted
    assert part.shape(wanted.shape) == values.shape
    cuts = [(slice(0, 3), slice(1, 4), slice(2, 5)), (slice(1, 2), slice(0, wanted.shape[1]), slice(0, 3))]
    found, _ = fill(files.read_header(tmp_path / "f.safetensors")["x"], part, cuts)
    for cut, out in zip(cuts, found, strict=True):
        np.testing.assert_array_equal(out, wanted[cut])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_is_found(dtype, value):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    values = np.concatenate([np.linspace(-3, 3, 99), [-0.0, float(ml_dtypes.finfo(dtype).max)]]).astype(dtype)
    assert is_finite(values) and is_finite(-values) and is_finite(values[:0])
    values[50] = value
    assert not is_finite(values) and not is_finite(values.reshape(101, 1)[50:51])


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_conversion(stored, wanted):
    rng = np.random.default_rng(0)
    source = np.concatenate([rng.normal(size=1000), [0.0, -0.0, np.inf, -np.inf, 1e-30]]).astype(
        getattr(ml_dtypes, stored, stored)
    )
    out = np.empty(source.shape, getattr(ml_dtypes, wanted, wanted))
    convert(source, out)
    np.testing.assert_array_equal(out, source.astype(out.dtype))
    halves = np.arange(2**16, dtype=np.uint32) << 16  # every bfloat16, and what lies halfway to the next or beside it
    source = np.concatenate([halves + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).view(np.float32)
    source = source[np.isfinite(source)].astype(getattr(ml_dtypes, stored, stored))
    source = source[np.isfinite(source.astype(np.float32))]
    out = np.empty(source.shape, getattr(ml_dtypes, wanted, wanted))
    convert(source, out, finite=True)
    assert out.tobytes() == source.astype(out.dtype).tobytes()


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


@pytest.mark.parametrize(("name", "value", "message"), [
    ("param_dtype", "nope", "param_dtype: found 'nope'; expected one of float32, bfloat16, float16"),
    ("compute_dtype", "int32", "compute_dtype: found 'int32'; expected one of float32"),
    ("compute_dtype", "float8", "compute_dtype: found 'float8'; expected"),
    ("remat", "some", "remat: found 'some'; expected one of none, full, dots"),
    ("attention", "flash", "model.attention: 'flash' is unknown; choose"),
])  # fmt: skip
def test_a_name_that_is_none_is_one_clear_error(base_folder, name, value, message):
    with pytest.raises(InputError, match=message):
        itune.models.load_pretrained(base_folder, **{name: value})


def test_offline_hub_is_one_clear_error():
    with pytest.raises(InputError) as error:  # HF_HUB_OFFLINE is set for the tests
        itune.models.load_model("org/not-here", revision="v1")
    message = str(error.value)
    assert "no folder org/not-here here" in message and "at revision v1 is not to be had from the hub" in message
    assert "\n" not in message
