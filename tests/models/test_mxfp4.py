"""MXFP4 folders: the values that transformers unpacks, the same logits, an export in bfloat16 that it opens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import itune.models
from itune.export import export_pretrained
from itune.models.hf import mxfp4
from itune.models.hf.plan import leaf_paths
from itune.sharding import make_mesh
from itune.types import InputError

EXPERTS = "model.layers.{}.mlp.experts.{}_proj"
# of openai/gpt-oss-20b, in its spelling of config.json
QUANTIZATION = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A small GPT-OSS folder as OpenAI stores them, and transformers' model of it."""
    import torch
    from transformers import AutoModelForCausalLM, GptOssConfig, Mxfp4Config

    folder = tmp_path_factory.mktemp("packed") / "model"
    config = GptOssConfig(
        vocab_size=62, hidden_size=64, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.to(torch.bfloat16).save_pretrained(folder)
    with_torch = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rng = np.random.default_rng(0)
    for layer in range(3):
        for name, out, width in (("gate_up", 64, 64), ("down", 64, 32)):
            del with_torch[EXPERTS.format(layer, name)]
            shape = (4, out, width // 32)
            blocks, scales = rng.integers(0, 256, (*shape, 16)), rng.integers(123, 126, shape)
            with_torch[EXPERTS.format(layer, name) + "_blocks"] = torch.tensor(blocks, dtype=torch.uint8)
            with_torch[EXPERTS.format(layer, name) + "_scales"] = torch.tensor(scales, dtype=torch.uint8)
    from safetensors.torch import save_file as save_torch

    save_torch(with_torch, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, quantization_config=QUANTIZATION)
    judge = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32, attn_implementation="eager"
    )
    return folder, judge.eval()


def edit_config(folder: Path, **keys) -> None:
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps(config))


def test_every_byte_and_scale_is_what_transformers_unpacks():
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    scales = np.arange(255, dtype=np.uint8).reshape(1, 255, 1)  # 255 is no number
    for first in range(0, 256, 16):
        blocks = np.broadcast_to(np.arange(first, first + 16, dtype=np.uint8), (1, 255, 1, 16)).copy()
        theirs = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32)
        ours = mxfp4.unpack(blocks.reshape(255, 16), scales.reshape(255, 1))
        np.testing.assert_array_equal(ours.view(np.uint32), theirs[0].T.contiguous().numpy().view(np.uint32))
    assert np.isnan(mxfp4.unpack(blocks[0, :1, 0], np.full((1, 1), 255, np.uint8))).all()


def test_a_packed_folder_has_the_logits_of_transformers(packed, judge_logits, tmp_path):
    folder, judge = packed
    model, params = itune.models.load_pretrained(folder)
    tokens = np.random.default_rng(1).integers(0, 61, 40)
    expected = judge_logits(judge, tokens)
    np.testing.assert_allclose(itune.models.forward(model, params, tokens[None])[0], expected, atol=1e-4)
    assert np.abs(expected).max() > 0.5

    report = export_pretrained(tmp_path / "out", model, params, folder)  # proven: values and logits read back
    assert set(report.dtypes) == {"bfloat16"} and report.max_abs_logit_difference == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    import torch
    import transformers

    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values())
    ours, theirs = again.state_dict(), judge.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("shape", [{"fsdp": 8}, {"expert": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_devices_take_their_shares(packed, shape):
    alone = leaf_paths(itune.models.load_pretrained(packed[0], param_dtype="bfloat16")[1])
    spread = leaf_paths(itune.models.load_pretrained(packed[0], make_mesh(shape), "bfloat16")[1])
    kernel = spread["blocks/layer_0/mlp/experts/gate_proj/kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    for path, leaf in alone.items():
        np.testing.assert_array_equal(np.asarray(leaf), jax.device_get(spread[path]))


def test_what_is_wrong_with_a_packed_folder(packed, tmp_path):
    folder = Path(shutil.copytree(packed[0], tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")  # uint8 and bfloat16: numpy has both here
    whole, down = EXPERTS.format(1, "gate_up"), EXPERTS.format(2, "down")
    tensors[f"{whole}_scales"][2, 5, 0] = 255
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"1 tensors hold NaN or infinity[^\n]*\n  {whole}$"):
        itune.models.load_pretrained(folder)
    del tensors[f"{whole}_scales"]
    tensors[f"{down}_scales"] = np.zeros((4, 64, 2), np.uint8)
    tensors["model.norm.weight"] = np.zeros(64, np.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError) as error:
        itune.models.load_pretrained(folder)
    for line in (
        f"missing: {whole}_scales (of {whole}_blocks [4, 64, 2, 16])",
        f"shape: {down}_blocks and {down}_scales are [4, 64, 1, 16] and [4, 64, 2], expected [E, out, in / 32, 16]",
        "dtype: model.norm.weight is U8, expected one of F32, BF16, F16",
    ):
        assert line in str(error.value)
    edit_config(folder, quantization_config={"quant_method": "fp8"})
    with pytest.raises(InputError, match=r"the weights are quantized \(fp8\); expected float32, .* or mxfp4 weights"):
        itune.models.load_pretrained(folder)
