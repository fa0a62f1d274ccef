"""Contract 1 for every family: logits, gradients, exported bytes, on configurations of scripts/check_families."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import transformers

from itune.models.families import FAMILIES
from itune.models.families.common import Fields

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_families.py"
# test_parity.py has five more configurations of the first four; gemma2 and olmo3 meet what gemma and olmo2 do
ONCE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "olmo2")
DEFAULT = [(family, seed) for family in FAMILIES for seed in ((0,) if family in ONCE else (0, 1))]
SOAK = [(family, seed) for family in FAMILIES for seed in range(5) if (family, seed) not in DEFAULT]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("check_families", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_families"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["check_families"]


@pytest.mark.parametrize(
    ("family", "seed"), [*DEFAULT, *(pytest.param(*case, marks=pytest.mark.soak) for case in SOAK)]
)
def test_family_equals_transformers(script, tmp_path, family, seed):
    row = script.check(family, seed, tmp_path)
    assert row.round_trip == ""
    assert row.logit <= 1e-4 and row.grad <= 1e-4
    assert row.size > 0.1  # the comparison is of numbers that matter


def test_the_page_lists_every_family():
    page = (SCRIPT.parents[1] / "docs" / "models.md").read_text()
    for family in FAMILIES:
        assert f"\n| {family} | " in page, f"run scripts/check_families.py --out docs/models.md: no row for {family}"


def test_qwen3_moe_whose_every_layer_is_dense_is_written_and_read_back():
    module = FAMILIES["qwen3_moe"]
    fields = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
              "num_attention_heads": 4, "mlp_only_layers": [0, 1]}
    config = module.config_from_hf(Fields(fields, "given"))
    assert module.config_from_hf(Fields(module.config_to_hf(config), "written")) == config


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe"])
def test_null_in_a_config_of_qwen_means_what_it_means_in_transformers(family):
    fields = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
              "num_attention_heads": 4, "num_key_value_heads": 4, "use_sliding_window": True, "max_window_layers": 0}
    for changes in ({"sliding_window": None}, {"sliding_window": 5}, {}):
        theirs = transformers.CONFIG_MAPPING[family](**fields, **changes)
        config = FAMILIES[family].config_from_hf(Fields(fields | changes, "given"))
        assert {kind.window for kind in config.kinds} == {theirs.sliding_window}
    if family != "qwen3_moe":  # transformers refuses null there
        theirs = transformers.CONFIG_MAPPING[family](**fields | {"num_key_value_heads": None})
        config = FAMILIES[family].config_from_hf(Fields(fields | {"num_key_value_heads": None}, "given"))
        assert config.num_kv_heads == theirs.num_key_value_heads == 4
