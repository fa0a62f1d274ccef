"""Soak: what is compiled for real sizes, against MaxText's own figures and against our formulas. Needs libtpu."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path

import pytest

from itune.config import load_config
from itune.plan.apart import compiled_apart
from itune.plan.chips import parse_topology
from itune.plan.inputs import known
from itune.plan.run import compiled_report, plan
from itune.runtime.cuda import compiler_here

CONFIGS = Path(__file__).parents[1] / "goldens" / "configs"
pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is absent: nothing was compiled"),
]
needs_plugin = pytest.mark.skipif(
    not compiler_here(), reason="JAX's CUDA plugin is absent (pip install 'jax[cuda13-local]'): nothing was compiled"
)


def folder_of(model, tmp_path):
    (tmp_path / "config.json").write_text((CONFIGS / f"{model}.json").read_text())
    return str(tmp_path)


# MaxText 0.2.5, `train_compile`, Llama-3.1-8B, 4,096 tokens, one row a chip, remat full, fsdp over all chips, packed
# rows, splash attention, float32 weights and moments, clipping 1.0: the compiler's peak memory in bytes
@pytest.mark.parametrize("topology, maxtext", [
    ("v5e:4x4", 11323675648), ("v5p:2x2x1", 37557542144), ("v6e:2x4", 20893658880),
])  # fmt: skip
def test_llama_8b_needs_less_memory_than_maxtext(topology, maxtext, tmp_path):
    where = parse_topology(topology)
    config = load_config("sft", {
        "model.path": folder_of("Llama-3.1-8B", tmp_path), "model.compute_dtype": "bfloat16", "train.remat": "full",
        "train.batch_size": where.chips, "data.max_length": 4096, "train.max_steps": 10, "evaluators": (),
    })  # fmt: skip
    report = compiled_report(config, where, known(config), {})
    print(f"\n{topology}: {report.need.total} bytes, {report.need.total / maxtext:.3f} of MaxText's; {report.compiled}")
    assert report.need.total <= 0.97 * maxtext
    assert report.compiled["float32_product_flops"] == 0


@pytest.mark.parametrize("recipe, model, topology", [
    ("sft", "Qwen3-0.6B-Base", "v5e:2x2"), ("qwen3_0p6b_sft", "Qwen3-0.6B-Base", "v5e:2x2"),
    ("llama3p1_8b_sft", "Llama-3.1-8B", "v5p:2x2x1"), ("lora", "Qwen3-0.6B-Base", "v5p:2x2x1"),
    ("lora", "Llama-3.1-8B", "v5e:2x2"),
    *(pytest.param(*each, marks=needs_plugin) for each in (
        ("sft", "Qwen3-0.6B-Base", "gpu:h100:1"), ("qwen3_0p6b_sft", "Qwen3-0.6B-Base", "gpu:h200:4"),
        ("llama3p1_8b_sft", "Llama-3.1-8B", "gpu:h200:8"), ("lora", "Qwen3-0.6B-Base", "gpu:a100:1"),
        ("lora", "Llama-3.1-8B", "gpu:h100:1"),
    )),
])  # fmt: skip
def test_the_formula_is_within_15_percent_of_what_is_compiled(recipe, model, topology, tmp_path):
    values = {"model.path": folder_of(model, tmp_path), "train.max_steps": 10, "data.train": "", "evaluators": ()}
    config = load_config(recipe, values)
    report = compiled_apart(config, parse_topology(topology), known(config), {})
    ratio = report.compiled["formula_total"] / report.need.total
    print(f"\n{recipe} on {topology}: compiled {report.need.total / 2**30:.2f} GiB, formula {ratio:.3f} of it")
    assert 0.85 <= ratio <= 1.15


def test_search_for_an_8b_model(tmp_path):
    config = load_config("sft", {
        "model.path": folder_of("Llama-3.1-8B", tmp_path), "model.compute_dtype": "bfloat16",
        "train.batch_size": 32, "data.max_length": 4096, "train.max_steps": 1000,
    })  # fmt: skip
    begun = time.process_time()
    found = plan(config, "v5e:4x4", search=True)
    told = {key: found[key] for key in ("why", "overrides", "candidates", "seconds")}
    print(json.dumps(told), f"{time.process_time() - begun:.0f} CPU-seconds")
    assert found["best"]["fits"]
    times = [found[name]["seconds"]["step"] for name in ("best", "runner_up")]
    assert times[0] <= 1.021 * times[1] or not found["runner_up"]["fits"]
