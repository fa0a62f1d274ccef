"""Weights that do not fit are refused before anything is read, with everything that is wrong in one message."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import itune.models
from itune.models.hf import read
from itune.types import InputError

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def folder(tmp_path: Path, base_folder: Path) -> Path:
    """A fresh copy of a small Llama checkpoint in one file."""
    return Path(shutil.copytree(base_folder, tmp_path / "model"))


def edit(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(folder: Path, **keys) -> None:
    config = json.loads((folder / "config.json").read_text()) | keys
    kept = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))


def refusal(folder: Path | str) -> str:
    with pytest.raises(InputError) as error:
        itune.models.load_pretrained(folder)
    return str(error.value)


def test_everything_that_is_wrong_is_listed_before_anything_is_read(folder, monkeypatch):
    def change(tensors):
        del tensors[NORM]
        tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((24, 16), np.float32)
        tensors[UP] = np.zeros((16, 24), np.float32)
        tensors[HEAD] = np.zeros((48, 16), np.int8)

    edit(folder, change)
    monkeypatch.setattr(read, "Reader", lambda *_: pytest.fail("read before the plan was checked"))
    message = refusal(folder)
    assert "4 problems" in message
    assert f"missing: {NORM} [16]" in message
    assert "extra: model.layers.7.mlp.up_proj.weight [24, 16] F32" in message
    assert f"shape: {UP} is [16, 24], expected [24, 16]" in message
    assert f"dtype: {HEAD} is I8, expected one of F32, BF16, F16" in message


def test_old_rotary_buffers_are_left_out_counted_and_exported(folder, tmp_path, caplog):
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.arange(4, dtype=np.float32) for i in range(3)}
    edit(folder, lambda tensors: tensors.update(extra))
    with caplog.at_level(logging.INFO, "itune"):
        model, params = itune.models.load_pretrained(folder)
    assert "3 tensors that the model does not use are left out" in caplog.text
    itune.models.save_pretrained(tmp_path / "out", model, params, source=folder)
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(load_file(folder / "model.safetensors"))


def test_tied_head_may_be_absent_or_equal_but_not_different(folder):
    edit_config(folder, tie_word_embeddings=True)
    message = refusal(folder)  # the head of this checkpoint is its own
    assert f"{HEAD} differs from {EMBED}" in message and "set tie_word_embeddings to false" in message
    edit(folder, lambda tensors: tensors.update({HEAD: tensors[EMBED].copy()}))
    model, params = itune.models.load_pretrained(folder)
    assert model.config.tie_embeddings and "lm_head" not in params
    edit(folder, lambda tensors: tensors.pop(HEAD))
    itune.models.load_pretrained(folder)
    edit_config(folder, tie_word_embeddings=False)
    assert f"missing: {HEAD} [48, 16]" in refusal(folder)


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The checkpoint in two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, group in parts.items():
        save_file({name: tensors[name] for name in group}, folder / file)
    places = {name: file for file, group in parts.items() for name in group}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def edit_index(folder: Path, change) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def test_sharded_checkpoint_loads(sharded, base_folder):
    ours, theirs = itune.models.load_pretrained(sharded)[1], itune.models.load_pretrained(base_folder)[1]
    np.testing.assert_array_equal(ours["embed"]["embedding"], theirs["embed"]["embedding"])


def test_index_naming_a_missing_file(sharded):
    (sharded / "b.safetensors").unlink()
    message = refusal(sharded)
    assert "index.json: names b.safetensors, which the folder lacks" in message and "there: a.safetensors" in message


def test_index_that_disagrees_with_the_files(sharded):
    def change(places):
        places[EMBED] = "b.safetensors" if places[EMBED] == "a.safetensors" else "a.safetensors"
        places["model.ghost"] = "a.safetensors"
        del places[NORM]

    edit_index(sharded, change)
    message = refusal(sharded)
    assert f"index: {EMBED} is in" in message
    assert "index: model.ghost is not in a.safetensors" in message
    assert f"index: {NORM} of" in message and "is not listed" in message


@pytest.mark.parametrize("name", ["../b.safetensors", "/etc/passwd", "sub/b.safetensors", "..", ""])
def test_index_with_a_path_is_refused(sharded, name):
    edit_index(sharded, lambda places: places.update({EMBED: name}))
    assert f"file name {name!r} leads out of the folder" in refusal(sharded)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_link_out_of_the_folder_is_refused_but_not_the_hub_cache(folder, tmp_path, name):
    outside = tmp_path / "models--x" / "blobs"
    outside.mkdir(parents=True)
    shutil.move(folder / name, outside / "0123")
    os.symlink(outside / "0123", folder / name)
    assert f"{name}: is a link to {outside / '0123'}, outside the folder" in refusal(folder)
    snapshot = tmp_path / "models--x" / "snapshots" / "abcdef"
    snapshot.parent.mkdir()
    shutil.copytree(folder, snapshot, symlinks=True)
    itune.models.load_pretrained(snapshot)


def test_pickle_is_refused_with_advice(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "only as pickle (pytorch_model.bin)" in message and "save_pretrained(NEW_FOLDER)" in message
    (folder / "pytorch_model.bin").unlink()
    assert "no model.safetensors and no model.safetensors.index.json" in refusal(folder)


def test_damaged_files(folder):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-8])
    assert "cut short" in refusal(folder)
    for damaged in (b"", b"12345", b"\xff" * 64, content[:100], content.replace(b'"shape"', b'"shade"', 1)):
        file.write_bytes(damaged)
        assert str(file) in refusal(folder)
    file.write_bytes(content.replace(b"[48,16]", b"[48,15]", 1))
    assert "malformed safetensors header" in refusal(folder)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported: llama, mistral, mixtral, "),
        ({"model_type": "gpt2"}, "its tensors have the names of llama or mistral or"),
        ({"model_type": ...}, "no model_type is not supported"),
        ({"hidden_size": ...}, "key 'hidden_size' is missing; expected int"),
        ({"hidden_size": "16"}, "hidden_size is '16'; expected int"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; expected at least 1"),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported; supported: silu"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"head_dim": ..., "num_attention_heads": 3, "num_key_value_heads": 3}, "hidden_size 16 is not a multiple"),
        ({"quantization_config": {"quant_method": "gptq"}}, "the weights are quantized (gptq)"),
        ({"layer_types": ["full_attention"]}, "found 1 layer types for 3 layers"),
        ({"layer_types": ["full_attention", "mamba", "full_attention"]}, "found layer type mamba"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_window is not set"),
        (
            {"model_type": "mistral", "sliding_window": 4, "layer_types": ["full_attention"] * 3},
            "found different layers; expected one kind",
        ),
        ({"num_hidden_layers": 4}, "missing: model.layers.3.input_layernorm.weight"),
        ({"vocab_size": 50}, f"shape: {EMBED} is [48, 16], expected [50, 16]"),
    ],
)
def test_config_is_refused(folder, keys, expected):
    edit_config(folder, **keys)
    message = refusal(folder)
    assert expected in message and str(folder) in message


def test_config_that_is_absent_or_not_json(folder):
    (folder / "config.json").write_text('{"a": 1,}')
    assert "config.json: not JSON" in refusal(folder) and "line 1" in refusal(folder)
    (folder / "config.json").unlink()
    assert "no config.json; expected a Hugging Face model folder, found model.safetensors" in refusal(folder)


def test_no_such_folder_names_the_nearest(folder):
    message = refusal(str(folder.parent / "modle"))
    assert f"no folder {folder.parent / 'modle'}" in message and f"nearest folder: {folder}" in message
    assert "is a file; expected a folder" in refusal(folder / "config.json")
