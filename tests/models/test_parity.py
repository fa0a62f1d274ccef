"""Contract 1: float32 logits equal those of transformers (eager, float32), every switch exercised, segments ragged."""

from __future__ import annotations

import json

import numpy as np
import pytest
import transformers

import itune.models
from itune.models import LayerKind

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 24, "rope_theta": 500.0}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1000.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention"]

# five configurations a family; "old" rewrites config.json in the older spelling before it is read
CASES = [
    ("Llama", {}, "new"),
    ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16, "num_key_value_heads": 1}, "new"),
    ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "num_key_value_heads": 4}, "old"),
    ("Llama", {"rope_parameters": LINEAR, "hidden_act": "gelu", "rms_norm_eps": 1e-3}, "old"),
    ("Llama", {"rope_parameters": DYNAMIC, "hidden_act": "gelu_pytorch_tanh", "num_hidden_layers": 1}, "old"),
    ("Mistral", {"sliding_window": 5}, "new"),
    ("Mistral", {"sliding_window": None, "head_dim": 16}, "new"),
    ("Mistral", {"sliding_window": 1, "tie_word_embeddings": True}, "old"),
    ("Mistral", {"sliding_window": 100, "rope_parameters": YARN}, "old"),
    ("Mistral", {"sliding_window": 9, "num_key_value_heads": 4, "rope_parameters": LINEAR}, "new"),
    ("Qwen2", {}, "new"),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}, "old"),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "layer_types": MIXED, "num_hidden_layers": 5}, "new"),
    ("Qwen2", {"rope_parameters": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False}}, "new"),
    ("Qwen2", {"tie_word_embeddings": True, "sliding_window": 4}, "old"),
    ("Qwen3", {"head_dim": 16}, "new"),
    ("Qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}, "old"),
    ("Qwen3", {"head_dim": 16, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}, "new"),
    ("Qwen3", {"head_dim": 8, "rope_parameters": {**YARN, "attention_factor": 0.7}, "rms_norm_eps": 1e-2}, "new"),
    ("Qwen3", {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}, "old"),
]


def old_spelling(folder) -> None:
    """rope_theta, rope_scaling and torch_dtype, and `layer_types` absent, as older folders have them."""
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else {"type": rope.pop("rope_type"), **rope}
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: f"{CASES[i][0]}-{i % 5}")
def test_logits_equal_transformers(case, judge, judge_logits):
    family, changes, spelling = CASES[case]
    config = getattr(transformers, f"{family}Config")(**SHAPE | changes)
    folder, hf = judge(config, seed=case)
    if spelling == "old":
        old_spelling(folder)
    model, params = itune.models.load_pretrained(folder)

    rng = np.random.default_rng(case)
    lengths = [[17, 1, 30, 40], [64], [5, 70]]  # packed rows of 100 slots, padding after them
    tokens_BL, segments_BL, positions_BL = (np.zeros((len(lengths), 100), np.int32) for _ in range(3))
    for row, parts in enumerate(lengths):
        start = 0
        for segment, length in enumerate(parts, 1):
            part = (row, slice(start, start + length))
            tokens_BL[part], segments_BL[part] = rng.integers(0, SHAPE["vocab_size"], length), segment
            positions_BL[part] = np.arange(length)
            start += length
    ours_BLV = np.asarray(itune.models.forward(model, params, tokens_BL, segments_BL, positions_BL))
    assert ours_BLV.dtype == np.float32
    assert np.isfinite(ours_BLV).all()
    for row, parts in enumerate(lengths):
        start = 0
        for length in parts:
            theirs_LV = judge_logits(hf, tokens_BL[row, start : start + length])
            np.testing.assert_allclose(ours_BLV[row, start : start + length], theirs_LV, atol=1e-4, rtol=0)
            start += length
    assert np.abs(theirs_LV).max() > 0.5  # the comparison is of numbers that matter


def test_windows_scan_only_what_repeats(judge):
    windows = {"num_hidden_layers": 5, "use_sliding_window": True, "sliding_window": 4, "layer_types": MIXED}
    config = transformers.Qwen2Config(**SHAPE | windows)
    model, params = itune.models.load_pretrained(judge(config)[0])
    assert [kind.window for kind in model.config.kinds] == [4, None, 4, None, 4]
    assert params["blocks"]["layer_1"]["mlp"]["up_proj"]["kernel"].shape == (2, 40, 32)
    assert params["rest_0"]["mlp"]["up_proj"]["kernel"].shape == (40, 32)
    assert all(isinstance(kind, LayerKind) for kind in model.config.kinds)
