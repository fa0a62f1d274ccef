"""What is a GPU's own in a program compiled for one that is not there. Needs JAX's CUDA plugin (dev extra)."""

from __future__ import annotations

import json
import os
import types

import jax
import pytest
from test_compile import CHUNK, GPU, LENGTH, ROWS, _arrays, _compile_once, needs_plugin
from test_compile import jax_answers_as_before as jax_answers_as_before
from test_compile import model_15m as model_15m

from benchmarks import gpu_experts, gpu_rows
from benchmarks.gpu import COMPILED
from itune.cli import main
from itune.config import load_config
from itune.models.attention import gpu
from itune.plan import compile as compiling
from itune.plan import run
from itune.plan.chips import CHIPS, here, parse_topology
from itune.plan.count import count_flops
from itune.plan.gpu_target import TARGETS, cudnn_formula, cudnn_memory
from itune.plan.layout import lay_out
from itune.runtime import cuda
from itune.types import InputError


def forget():
    gpu.self_check.cache_clear()
    gpu.probe.cache_clear()
    jax.clear_caches()


@needs_plugin
@pytest.mark.parametrize("where, kernel, other", [
    (GPU, "__cudnn$fmhaSoftmaxBackward", "mha_backward"),
    ("gpu:a100:4", "mha_backward", "__cudnn"),  # cuDNN takes packed rows from Hopper on
])  # fmt: skip
def test_the_step_uses_the_kernel_of_its_gpu(model_15m, where, kernel, other):
    forget()  # what was traced for another GPU; a plan has a process of its own
    plan, program = _compile_once(model_15m, where)
    counted = count_flops(plan.step.trace(plan.state, plan.batch).jaxpr)["attention"]
    forget()
    config = plan.model.config
    forward = config.num_layers * 4 * config.num_heads * config.head_dim * ROWS * LENGTH**2 / 2
    assert counted == 4.5 * forward, "forward, again for the backward pass, and 2.5 for that itself"
    assert {device.device_kind for device in plan.mesh.devices.flat} == {parse_topology(where).chip.kind}
    assert plan.mesh.shape["fsdp"] == plan.mesh.size == 4
    assert kernel in program.text and other not in program.text
    squares = [shape for shape in _arrays(program.text) if shape[-2:] == (LENGTH, LENGTH) and len(shape) > 2]
    assert not squares, "attention scores reach memory"


@needs_plugin
def test_no_stack_of_kernels_is_turned_over(model_15m):
    """As NCCL gathers the outermost dimension, XLA did so outside the scan: a second copy of the weights."""
    plan, program = _compile_once(model_15m, GPU)
    kernels = [leaf for leaf in jax.tree.leaves(plan.state.trainable["blocks"]) if leaf.ndim == 3]
    shards = {leaf.sharding.shard_shape(leaf.shape) for leaf in kernels}
    assert shards & _arrays(program.text), "no stack was found: the test looks in the wrong place"
    turned = {(width, layers, rows) for layers, rows, width in shards}
    assert not turned & _arrays(program.text)


@needs_plugin
def test_memory_of_attention_is_a_gradient_a_segment(model_15m):
    plan, program = _compile_once(model_15m, GPU)
    config, segments = plan.model.config, plan.model.max_segments
    assert segments > 1
    rows = ROWS // plan.mesh.size
    assert cudnn_memory(program.text) == 4 * rows * segments * config.num_heads * LENGTH * config.head_dim
    assert cudnn_memory("") == 0


@pytest.mark.parametrize("chip, changes, takes", [
    ("h200", {}, True), ("a100", {}, False), ("v5e", {}, False), ("h200", {"model.attention": "xla"}, False),
    ("h200", {"model.compute_dtype": "float32"}, False), ("h200", {"train.freeze": "blocks|embed"}, False),
])  # fmt: skip
def test_the_formula_counts_the_same_where_cudnn_will_run(model_15m, chip, changes, takes):
    values = {"model.path": str(model_15m), "model.compute_dtype": "bfloat16", "data.max_length": LENGTH,
              "train.batch_size": ROWS, "train.max_steps": 7, **changes}  # fmt: skip
    layout = lay_out(load_config("sft", values), 4)
    config = layout.model.config
    for segments, counted in ((9, 9), (0, gpu.MAX_SEGMENTS)):
        expected = 4 * ROWS // 4 * counted * config.num_heads * LENGTH * config.head_dim
        assert cudnn_formula(layout, CHIPS[chip], segments) == (expected if takes else 0)


@needs_plugin
@pytest.mark.parametrize("row", [row for row in COMPILED if row != "experts"])
def test_the_rows_of_the_gpu_benchmark_compile_without_one(row):
    """What changes for GPUs is seen to compile where there is none; the row `experts` is in another module."""
    forget()
    found = getattr(gpu_rows, row)(True, compiled_for="gpu:h200:1")
    forget()
    assert 0 < found["peak_bytes"] < 10e6
    if row != "cross_entropy":
        assert found["kernel"] == "cudnn" and found["cudnn_bytes"] > 0
        assert found["state_copied_bytes"] < 1000, "the state is not donated: a second copy would be made"


@needs_plugin
def test_a_mixture_of_experts_compiles_for_a_gpu():
    forget()
    found = gpu_experts.experts(True, compiled_for="gpu:h200:1")
    forget()
    assert found["kernel"] == "cudnn" and found["state_copied_bytes"] < 1000


@needs_plugin
def test_a_plan_for_gpus_is_compiled_in_a_process_of_its_own(model_15m, tmp_path, capsys):
    arguments = ["plan", "--config", "sft", f"--config.model.path={model_15m}", "--config.model.compute_dtype=bfloat16",
                 f"--config.loss.chunk={CHUNK}", f"--config.train.batch_size={ROWS}",
                 f"--config.data.max_length={LENGTH}", "--config.train.max_steps=7"]  # fmt: skip
    assert main([*arguments, f"--topology={GPU}", f"--json={tmp_path / 'plan.json'}"]) == 0
    said = capsys.readouterr()
    assert "compiled for these chips" in said.out and "by formula" not in said.out
    assert not said.err, said.err
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["compiled"]["fits_compiler"] == 1.0 and 0 < found["memory"]["evaluation"] < found["memory"]["total"]
    assert found["traffic"]["all-gather"] > 0 and found["traffic"]["reduce-scatter"] > 0
    assert found["memory"]["total"] == pytest.approx(found["compiled"]["formula_total"], rel=0.15)
    assert main([*arguments, "--config.train.batch_size=16", "--topology=gpu:h200:16"]) == 0
    said = capsys.readouterr().out
    assert "GPUs of several hosts cannot be compiled for here" in said and "(by formula" in said


def test_without_the_plugin_the_formula_answers_and_says_what_to_install(model_15m, monkeypatch, capsys):
    monkeypatch.setattr(run, "compiler_here", lambda: False)
    assert main(["plan", "--config", "sft", f"--config.model.path={model_15m}", "--config.train.max_steps=7",
                 f"--topology={GPU}"]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "JAX's CUDA plugin is absent (pip install 'itune[cuda-compiler]'): by formula only" in said


def test_a_plugin_that_refuses_is_one_message(monkeypatch):
    def refuses(where):
        raise RuntimeError("Unable to load plugin: built for jax 0.1\nstack")

    monkeypatch.setattr(compiling, "gpu_devices", refuses)
    expected = r"'gpu:h200:4': cannot compile for it here .*built for jax 0\.1\).*itune\[cuda-compiler\]"
    with pytest.raises(InputError, match=expected):
        compiling.slice_devices(parse_topology(GPU))


def test_every_gpu_that_has_a_name_can_be_described():
    assert set(TARGETS) == {name for name, chip in CHIPS.items() if chip.kind.startswith("NVIDIA")}


def test_gpus_of_one_host_have_a_name_and_those_of_several_have_none():
    def devices(count, hosts=1, kind="NVIDIA H200", memory=0):
        stats = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": memory}, device_kind=kind)
        return [types.SimpleNamespace(**vars(stats), process_index=i % hosts) for i in range(count)]

    assert (here(devices(8)).name, here(devices(2)).name) == ("gpu:h200:8", "gpu:h200:2")
    assert here(devices(16, 2)).name == here(devices(2, 2)).name == "this machine"
    assert here(devices(1, kind="NVIDIA GH200 480GB")) is None
    whole, part = (here(devices(1, kind="NVIDIA A100-SXM4-40GB", memory=size)) for size in (76 * 10**9, 38 * 10**9))
    assert (whole.name, part.name, part.chip.memory) == ("gpu:a100:1", "this machine", 38 * 10**9)


def test_a_run_may_use_the_memory_that_a_plan_counts(monkeypatch):
    """JAX takes three quarters of a GPU unless told: a run that "fits" would have ended for want of memory."""
    assert CHIPS["h200"].memory == int(cuda.MEMORY_SHARE * 139.8 * 2**30)
    for given in ({}, {"XLA_CLIENT_MEM_FRACTION": ".5"}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"}):
        for name in cuda.MEMORY_SETTINGS:
            monkeypatch.setenv(name, given.get(name, ""))
            if name not in given:
                monkeypatch.delenv(name)
        assert main(["checkpoints", "/nowhere"]) == 2
        found = {name: os.environ[name] for name in cuda.MEMORY_SETTINGS if name in os.environ}
        assert found == (given or {"XLA_CLIENT_MEM_FRACTION": "0.9"}), "jax takes one of the two, not both"
