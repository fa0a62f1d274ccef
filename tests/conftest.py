"""Shared test set-up: eight CPU devices for meshes, highest matmul precision, the shared data folder."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")
# tests compile more than they compute; what runs in a process of its own (demo, kills, verbs) is compiled as for a user
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real instruction data; a test that needs it says what it skipped when it is absent."""
    folder = Path(os.environ.get("ITUNE_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real instruction data is absent: no folder {folder}; set ITUNE_SHARED_DATA")
    return folder


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    """Prepared data and compiled programs of the tests of one file, not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        before = jax.config.jax_compilation_cache_dir
        yield
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> Path:
    """`model/` and `rows.jsonl` of `tiny_run`, for the tests of one file."""
    import tiny_run

    folder = tmp_path_factory.mktemp("inputs")
    tiny_run.make_inputs(folder)
    return folder


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    """A tiny model folder in bfloat16 with a byte tokenizer (any text survives it), without a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from itune.models import LayerKind, Model, ModelConfig, save_pretrained

    folder = tmp_path_factory.mktemp("base") / "model"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<eos>", special=True)])
    config = ModelConfig(264, 16, 3, 4, 2, 8, 24, (LayerKind(),) * 3, max_length=128, init_std=0.3, qk_norm=True)
    model = Model(config, "qwen3")
    save_pretrained(folder, model, model.init(jax.random.key(0)), dtype="bfloat16")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 256, "temperature": 0.6}')
    return folder
