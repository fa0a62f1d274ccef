"""Small checkpoints for the model tests: written by transformers as the judge, or by itune where no judge is needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from itune.models import LayerKind, Model, ModelConfig, Rope, save_pretrained


def tiny_config(**changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "vocab_size": 48,
        "width": 16,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "mlp_width": 24,
        "max_length": 64,
        "init_std": 0.3,
    } | changes
    kinds = fields.pop("kinds", None) or (LayerKind(None, Rope()),) * fields["num_layers"]
    return ModelConfig(**fields, kinds=kinds)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Model]:
    """make_model(config fields ..., mesh=, remat=, ...) -> a tiny Model of the llama family."""

    def make(*, family: str = "llama", **changes: Any) -> Model:
        settings = {name: changes.pop(name) for name in ("mesh", "remat", "dropout") if name in changes}
        return Model(tiny_config(**changes), family, **settings)

    return make


@pytest.fixture(scope="session")
def random_params() -> Callable[..., Any]:
    """random_params(model, seed) -> parameters as NumPy arrays, about 1 for norms, else 0; compiles nothing."""

    def make(model: Model, seed: int = 0) -> Any:
        rng = np.random.default_rng(seed)

        def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
            return rng.normal(float(path[-1].key == "scale"), 0.3, leaf.shape).astype(leaf.dtype)

        return jax.tree_util.tree_map_with_path(draw, model.abstract_params())

    return make


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: Any, make_model: Callable[..., Model], random_params: Callable[..., Any]) -> Path:
    """A small Llama checkpoint with random weights. Tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("base") / "model"
    model = make_model()
    save_pretrained(folder, model, random_params(model))
    return folder


@pytest.fixture
def judge(tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """judge(config of transformers, seed) -> (folder, torch model): random weights, every one of them in use."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # the models are tiny: a second thread only spins

    def make(config: Any, seed: int = 0, dtype: Any = torch.float32, **save: Any) -> tuple[Path, Any]:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
        folder = tmp_path / f"judge{seed}"
        model.to(dtype).save_pretrained(folder, **save)
        return folder, model

    return make


@pytest.fixture(scope="session")
def judge_logits() -> Callable[..., np.ndarray]:
    """judge_logits(torch model, token ids (L,)) -> float32 logits (L, V), the sequence alone in its batch."""
    import torch

    def run(model: Any, tokens_L: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor(np.asarray(tokens_L))[None]).logits[0].numpy()

    return run
