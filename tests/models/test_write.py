"""Writing: load then export gives the same keys, dtypes and bytes; a folder is there whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import transformers
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import itune.models
from itune.models import LayerKind
from itune.models.hf import write
from itune.models.hf.files import read_header
from itune.sharding import make_mesh
from itune.types import InputError, RunError

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def stored(folder: Path) -> dict[str, tuple]:
    """Tensor name -> (dtype, shape, bytes) over all files of a folder."""
    found = {}
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        for name, tensor in read_header(file).items():
            found[name] = (tensor.dtype, tensor.shape, content[tensor.start : tensor.stop])
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_load_then_export_is_byte_identical(judge, tmp_path, dtype):
    import torch

    config = transformers.Qwen2Config(**SHAPE, tie_word_embeddings=dtype == "float16")
    folder, _ = judge(config, dtype=getattr(torch, dtype), max_shard_size="10KB")
    assert (folder / "model.safetensors.index.json").is_file()
    model, params = itune.models.load_pretrained(folder)
    out = tmp_path / "out"
    itune.models.save_pretrained(out, model, params, source=folder, max_shard_bytes=5000)
    assert stored(out) == stored(folder)
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(len(entry[2]) for entry in stored(out).values())
    sizes = [sum(t.stop - t.start for t in read_header(file).values()) for file in out.glob("*.safetensors")]
    assert len(sizes) > 2 and max(sizes) <= 5000
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert loaded.dtype == getattr(torch, dtype)


def test_a_model_of_our_own_is_loaded_by_transformers(make_model, random_params, judge_logits, tmp_path):
    kinds = (LayerKind(4), LayerKind(None), LayerKind(4))
    for family, fields in {
        "llama": {"mlp_bias": True, "qkv_bias": True, "out_bias": True},
        "mistral": {"kinds": (LayerKind(3),) * 3, "tie_embeddings": True},
        "qwen2": {"kinds": kinds, "qkv_bias": True},
        "qwen3": {"kinds": kinds, "qk_norm": True},
    }.items():
        model = make_model(family=family, **fields)
        params = random_params(model)
        folder = tmp_path / family
        itune.models.save_pretrained(folder, model, params)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        tokens = np.arange(12) % 48
        ours = itune.models.forward(model, params, tokens[None])[0]
        np.testing.assert_allclose(ours, judge_logits(theirs, tokens), atol=1e-4)
        assert itune.models.load_model(folder).config == model.config


def test_config_keeps_its_spelling_and_only_what_changed(base_folder, tmp_path):
    folder = Path(shutil.copytree(base_folder, tmp_path / "old"))
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None,
        "torch_dtype": config.pop("dtype"),
        "my_key": [1],
    }
    (folder / "config.json").write_text(json.dumps(config))
    model, params = itune.models.load_pretrained(folder, vocab_size=50)
    itune.models.save_pretrained(tmp_path / "new", model, params, source=folder, dtype="bfloat16")
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert written == config | {"vocab_size": 50, "torch_dtype": "bfloat16"}
    assert list(written) == list(config)
    assert {entry[0] for entry in stored(tmp_path / "new").values()} == {"BF16"}


def test_a_config_that_says_its_dtype_twice_says_the_new_one_twice(base_folder, tmp_path):
    source = shutil.copytree(base_folder, tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    (source / "config.json").write_text(json.dumps(config))
    model, params = itune.models.load_pretrained(source)
    itune.models.save_pretrained(tmp_path / "out", model, params, source=source, dtype="float32")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == config | {"dtype": "float32", "torch_dtype": "float32"}
    assert str(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype) == "torch.float32"


def test_each_tensor_keeps_its_own_dtype(base_folder, tmp_path):
    import ml_dtypes

    folder = Path(shutil.copytree(base_folder, tmp_path / "mixed"))
    tensors = load_file(folder / "model.safetensors")
    tensors = {n: t if "norm" in n else t.astype(ml_dtypes.bfloat16) for n, t in tensors.items()}
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model, params = itune.models.load_pretrained(folder)
    itune.models.save_pretrained(tmp_path / "out", model, params, source=folder)
    assert stored(tmp_path / "out") == stored(folder)
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_sharded_parameters_are_written_whole(base_folder, tmp_path):
    model, params = itune.models.load_pretrained(base_folder, make_mesh({"fsdp": 4, "tensor": 2}))
    itune.models.save_pretrained(tmp_path / "out", model, params, source=base_folder)
    assert stored(tmp_path / "out") == stored(base_folder)


def test_a_folder_with_something_in_it_is_not_touched(base_folder, tmp_path):
    model, params = itune.models.load_pretrained(base_folder)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="exists and is not empty"):
        itune.models.save_pretrained(tmp_path / "out", model, params, source=base_folder)
    assert os.listdir(tmp_path / "out") == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    itune.models.save_pretrained(tmp_path / "empty", model, params, source=base_folder)
    assert (tmp_path / "empty" / "config.json").is_file()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_leaves_nothing_behind(base_folder, tmp_path, monkeypatch, code):
    model, params = itune.models.load_pretrained(base_folder)

    def fail(stream):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(write, "_sync", fail)
    with pytest.raises(RunError, match="the disk is full" if code == errno.ENOSPC else "could not be written"):
        itune.models.save_pretrained(tmp_path / "out", model, params, source=base_folder)
    assert os.listdir(tmp_path) == []


def test_a_source_of_another_shape_is_refused(base_folder, make_model, random_params, tmp_path):
    model = make_model(mlp_width=32)
    with pytest.raises(InputError, match=r"mlp.up_proj.weight is \[24, 16\], expected \[32, 16\]"):
        itune.models.save_pretrained(tmp_path / "out", model, random_params(model), source=base_folder)
