"""Tiny models of four families, written by transformers with every weight in use, and conversations to tune them on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from itune.config import load_config

COMMON = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": None,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {"sliding_window": 20, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 4.0,
                          "final_logit_softcapping": 6.0}),
    "qwen3_moe": ("Qwen3Moe", MOE),
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick_compilation():
    """Compiling takes most of the time here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def family_config(tmp_path_factory, base_folder):
    """family_config(family, **overrides by dotted key) -> Config, its model and data written when first asked for."""
    folder = tmp_path_factory.mktemp("families")

    def make(family: str, **overrides: Any) -> Any:
        if not (folder / family).is_dir():
            _write_model(family, folder / family, base_folder)
        if not (folder / "rows.jsonl").is_file():
            _write_rows(folder / "rows.jsonl")
        values = {
            "model.path": str(folder / family), "data.train": str(folder / "rows.jsonl"), "data.max_length": 128,
            "data.cache_dir": str(folder / "cache"), "data.chat_template": "chatml", "data.held_out_share": 0.1,
            "optimizer.weight_decay": 0.1,
        }  # fmt: skip
        return load_config("default", values | overrides)

    return make


def _write_model(family: str, folder: Path, base_folder: Path) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(0)
    name, fields = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**COMMON | fields)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            middle = 1.0 if "norm" in path and family != "gemma2" else 0.0
            parameter.normal_(middle, 0.2)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base_folder / file, folder / file)


def _write_rows(path: Path) -> None:
    rng = np.random.default_rng(0)
    letters = list("abcdefgh ")
    with path.open("w") as rows:
        for number in range(240):
            question, answer = ("".join(rng.choice(letters, rng.integers(2, 24))) for _ in range(2))
            turns = [("user", f"{number} {question}"), ("assistant", f"{answer}.")]
            rows.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
