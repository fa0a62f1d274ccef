"""The run's own train step, compiled for TPUs and GPUs that are not there.

Needs libtpu and JAX's CUDA plugin, which the dev extra installs.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import re
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from load_script import load_script

from itune.cli import main
from itune.config import load_config
from itune.models.attention import tpu as splash
from itune.models.remat import POLICIES
from itune.plan.apart import _ended, compiled_apart
from itune.plan.chips import here, parse_topology
from itune.plan.compile import compile_step, slice_devices, topology_devices
from itune.plan.count import count_flops
from itune.plan.hlo import arrays, collectives
from itune.plan.inputs import known
from itune.plan.run import _no_compiler
from itune.runtime.cuda import compiler_here
from itune.setup_run import make_plan
from itune.types import InputError

ROWS, LENGTH, CHUNK, DEVICES = 8, 512, 256, 4

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is absent (pip install libtpu): no train step was compiled for a TPU",
)
needs_plugin = pytest.mark.skipif(
    not compiler_here(),
    reason="JAX's CUDA plugin is absent (pip install 'jax[cuda13-local]'): no train step was compiled for a GPU",
)
TPU, GPU = "v5e:2x2", "gpu:h200:4"


@pytest.fixture(scope="module", autouse=True)
def jax_answers_as_before():
    """What JAX says of GPUs, put back after this file: whoever compiles for one answers for it (runtime/cuda.py)."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
    from jax._src.pallas.triton import pallas_call_registration as pallas

    with pytest.MonkeyPatch.context() as patch:
        for name in ("cuda_versions", "check_compute_capability", "is_cuda_compute_capability_equal"):
            patch.setattr(cudnn, name, getattr(cudnn, name))
        if info := getattr(pallas, "gpu_info_lib", None):
            patch.setattr(info, "get_gpu_info", info.get_gpu_info)
        yield


@pytest.fixture(scope="module")
def model_15m(tmp_path_factory):
    """The config.json that `make_random_model.py --family qwen3 --size 15m` writes; planning reads no weights."""
    script = load_script("scripts/make_random_model.py")
    size = script.parse_size("15m")
    vocab = script.default_vocab(size)
    width, layers = script.choose_shape("qwen3", size, vocab, True)
    folder = tmp_path_factory.mktemp("qwen3-15m")
    (folder / "config.json").write_text(json.dumps(script.config("qwen3", width, layers, vocab, True, "float32")))
    return folder


@pytest.fixture(scope="module")
def for_tpu(model_15m):
    """(plan, Compiled) of the shipped recipe on v5e:2x2, fully sharded."""
    return _compile_once(model_15m, TPU)


@pytest.fixture(scope="module", params=[pytest.param(TPU, marks=needs_libtpu), pytest.param(GPU, marks=needs_plugin)])
def compiled(request, model_15m):
    """The same, and on four GPUs of a host."""
    return _compile_once(model_15m, request.param)


@functools.cache
def _compile_once(model_folder, where):
    return _compile(model_folder, where)


def _compile(model_folder, where=TPU, **changes):
    values = {
        "model.path": str(model_folder), "model.compute_dtype": "bfloat16", "train.remat": "full", "loss.chunk": CHUNK,
        "train.batch_size": ROWS, "data.max_length": LENGTH, "evaluators": (), **changes,
    }  # fmt: skip
    data = types.SimpleNamespace(
        tokenizer=types.SimpleNamespace(vocab_size=8192, added_tokens=()),
        loader=types.SimpleNamespace(total_steps=100, max_segments=9),
        dataset=types.SimpleNamespace(held_out=()),
    )
    with jax.default_matmul_precision("default"):  # as in a run; conftest's "highest" is for comparisons on CPU
        plan = make_plan(load_config("sft", values), data, print, slice_devices(parse_topology(where)))
        return plan, compile_step(plan.step, plan.state, plan.batch)


def _arrays(text):
    """Every array shape in the compiled program, as tuples of dimensions on one device."""
    return {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", text)}


@needs_libtpu
def test_the_step_uses_splash_attention_on_a_tpu(for_tpu):
    plan, program = for_tpu
    assert {device.device_kind for device in plan.mesh.devices.flat} == {"TPU v5 lite"}
    assert plan.mesh.shape["fsdp"] == DEVICES
    assert "splash_mha_fwd_segmented" in program.text
    assert "splash_mha_dkv_segmented" in program.text
    squares = [shape for shape in _arrays(program.text) if shape[-2:] == (LENGTH, LENGTH) and len(shape) > 2]
    assert not squares, "attention scores reach memory"


@needs_libtpu
@pytest.mark.parametrize("policy, passes", [("dots", 1), ("full", 2)])
def test_dots_spares_the_second_forward_pass_of_splash_attention(policy, passes):
    """In five layers scanned; without its policy the kernel would run again in the backward pass."""

    def layer(x_BLNH, segments_BL):
        given = {"q_segments_BL": segments_BL, "kv_segments_BS": segments_BL, "scale": 1.0}
        return jnp.tanh(splash.attention(2 * x_BLNH, 3 * x_BLNH, 4 * x_BLNH, **given))

    def loss(x_BLNH, segments_BL):
        body = jax.checkpoint(layer, policy=POLICIES[policy], prevent_cse=False)
        out, _ = jax.lax.scan(lambda x, _: (body(x, segments_BL), None), x_BLNH, None, length=5)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    place = SingleDeviceSharding(topology_devices("v5e:2x2")[0])
    shapes = ((2, 256, 2, 128), jnp.bfloat16), ((2, 256), jnp.int32)
    inputs = [jax.ShapeDtypeStruct(*shape, sharding=place) for shape in shapes]
    with jax.default_matmul_precision("default"):  # the kernel knows no other
        traced = jax.jit(jax.grad(loss)).trace(*inputs)
    text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    assert len(re.findall(r"%splash_mha_fwd\S* = ", text)) == passes
    assert len(re.findall(r"%splash_mha_dkv\S* = ", text)) == 1
    one = 4 * 2 * 2 * 256 * 256 * 128 * 0.5  # forward, of the pairs that are visible
    assert count_flops(traced.jaxpr)["attention"] == pytest.approx(5 * (passes + 2.5) * one)


def test_full_logits_never_exist(compiled):
    plan, program = compiled
    vocab = plan.model.config.vocab_size
    per_entry = {shape: math.prod(shape) // vocab for shape in _arrays(program.text) if vocab in shape}
    assert per_entry, "no array over the vocabulary was found: the test looks in the wrong place"
    tokens = ROWS * LENGTH // DEVICES
    allowed = max(CHUNK, plan.model.config.width)
    assert allowed < tokens
    assert max(per_entry.values()) <= allowed, {shape for shape, rows in per_entry.items() if rows > allowed}


@needs_libtpu
@pytest.mark.soak  # tests/models/test_context.py asks the same of a step compiled for CPU
def test_a_shared_sequence_is_whole_in_keys_and_values_only(model_15m):
    """context=2 x fsdp=2: splash attention over half of the queries, and no other array spans the row."""
    length, rows = 1024, 4
    changes = {"mesh.context": 2, "mesh.fsdp": 2, "data.max_length": length, "train.batch_size": rows}
    plan, program = _compile(model_15m, **changes)
    config = plan.model.config
    assert plan.mesh.shape["context"] == plan.mesh.shape["fsdp"] == 2
    assert "splash_mha_fwd_segmented" in program.text and "splash_mha_dkv_segmented" in program.text
    whole = {shape for shape in _arrays(program.text) if length in shape}
    by_token = {shape: math.prod(shape) / (length * rows // 2) for shape in whole}
    keys = config.num_kv_heads * config.head_dim
    assert keys in by_token.values(), "no gathered keys were found: the test looks in the wrong place"
    assert max(by_token.values()) <= 2 * keys, by_token  # keys and values gathered at once
    divided = {config.num_heads, config.width, config.mlp_width}
    assert not [shape for shape in whole if len(shape) > 2 and divided & set(shape)], whole


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("where", [pytest.param(TPU, marks=needs_libtpu), pytest.param(GPU, marks=needs_plugin)])
def test_devices_exchange_no_activation_of_a_whole_sequence_and_no_logits(model_15m, where, copies):
    copied = {"mesh.data": copies, "mesh.fsdp": 2}
    plan, program = _compile_once(model_15m, where) if copies == 1 else _compile(model_15m, where, **copied)
    assert plan.mesh.shape["data"] == copies
    config = plan.model.config
    gathered = [
        dims
        for one in collectives(program.text) if one.kind in ("all-gather", "all-reduce")
        for dtype, dims in arrays(one.shape) if dtype in ("bf16", "f32")
    ]  # fmt: skip
    assert any(config.mlp_width in dims for dims in gathered) or any(
        one.kind == "collective-permute" for one in collectives(program.text)
    ), "the layers' kernels are gathered nowhere: the test looks in the wrong place"
    table = config.vocab_size, config.width // plan.mesh.shape["fsdp"]  # its gradient is summed over copies
    for dims in gathered:
        if copies > 1 and dims == table:
            continue
        assert math.prod(dims) < ROWS * LENGTH * config.width, f"{dims}: as large as the hidden states of all rows"
        rows = LENGTH in dims and math.prod(dims) >= ROWS * LENGTH * config.width // DEVICES
        assert not rows, f"{dims}: hidden states of several copies"
        assert not {config.vocab_size, config.vocab_size // DEVICES} & set(dims), f"{dims}: over the vocabulary"
    moved = [
        dims for one in collectives(program.text) if one.kind in ("all-to-all", "collective-permute")
        for _, dims in arrays(one.shape)
    ]  # fmt: skip
    shards = {config.vocab_size // parts for parts in (1, 2, DEVICES)}
    for dims in moved:  # where a table lies divided by width, its parts or a device's own rows change hands for it
        most = config.vocab_size if shards & set(dims) else ROWS * LENGTH
        assert math.prod(dims) <= most * config.width // plan.mesh.shape["fsdp"], f"{dims}: more than a device holds"
        assert not (shards & set(dims) and CHUNK in dims), f"{dims}: logits"


def test_every_product_of_the_step_takes_bfloat16(compiled):
    plan, program = compiled
    counted = count_flops(plan.step.trace(plan.state, plan.batch).jaxpr)
    assert counted["float32"] == 0
    config = plan.model.config
    forward = config.num_layers * 4 * config.num_heads * config.head_dim * ROWS * LENGTH**2 / 2
    assert counted["attention"] == 4.5 * forward, "forward, again for the backward pass, and 2.5 for that itself"
    wide = [line for line in program.text.splitlines() if re.search(r" (dot|convolution)\(", line)]
    assert wide, "no product was found in the text"
    operands = re.compile(r"(?:dot|convolution)\((?:f32\[|%)")
    names = {m[1]: m[2] for m in re.finditer(r"%([\w.\-]+) = (\w+)\[", program.text)}
    for line in wide:
        inside = re.search(operands, line) and line.split("(", 1)[1].split(")")[0]
        kinds = [names.get(name, "") for name in re.findall(r"%([\w.\-]+)", inside or "")]
        assert kinds[:2] != ["f32", "f32"], line[:200]


def test_gradients_are_summed_over_devices_in_float32(compiled):
    """Contract 3 under bfloat16 compute: the mesh changes float32 rounding only."""
    plan, program = compiled
    kernels = {leaf.shape[-2:] for leaf in jax.tree.leaves(plan.state.trainable["blocks"]) if leaf.ndim == 3}
    parts = {(rows // DEVICES, width) for rows, width in kernels} | {(rows, w // DEVICES) for rows, w in kernels}
    every = collectives(program.text)
    backward = [one for one in every if "transpose" in one.source]
    # several that XLA for GPUs made into one say no source; counts are whole numbers
    backward += [one for one in every if not one.source and not one.shape.startswith("s32")]
    summed = [one for one in backward if one.kind in ("reduce-scatter", "all-reduce")]
    rings = [one for one in backward if one.kind == "collective-permute"]
    found = {dtype for one in (*summed, *rings) for dtype, dims in arrays(one.shape) if dims in (parts | kernels)}
    assert "f32" in found, found
    assert all(dtype == "f32" for one in summed for dtype, _ in arrays(one.shape)), summed


@needs_libtpu
@pytest.mark.soak
def test_adapters_beside_normed_queries_compile(tmp_path):
    """libtpu 0.0.52 aborted: LoRA of Qwen3-0.6B on v5p:2x2x1, of Qwen3-8B on v5e:2x2 as well."""
    (tmp_path / "config.json").write_text(json.dumps({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 1024, "max_position_embeddings": 4096,
        "num_attention_heads": 16, "num_key_value_heads": 8, "num_hidden_layers": 2, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "tie_word_embeddings": True, "vocab_size": 8192,
    }))  # fmt: skip
    config = load_config("sft", {
        "model.path": str(tmp_path), "model.compute_dtype": "bfloat16", "model.param_dtype": "bfloat16",
        "lora.rank": 16, "lora.targets": "attention/q_proj", "train.remat": "full", "train.batch_size": 4,
        "data.max_length": 4096, "train.max_steps": 1, "evaluators": (),
    })  # fmt: skip
    assert compiled_apart(config, parse_topology("v5p:2x2x1"), known(config), {}).need.total < 1e9


@needs_libtpu
@pytest.mark.parametrize("rank", [pytest.param(0, id="full"), pytest.param(16, id="lora", marks=pytest.mark.soak)])
def test_kernels_of_experts_are_rounded_and_gathered_a_layer_at_a_time(rank, tmp_path):
    """Whole stacks of them, rounded before the scan over layers, took a quarter of a chip; those of narrow adapters
    eight times their size, since a TPU pads rows to 128. Their gradients are summed in float32 (contract 3)."""
    layers, experts, width, inner = 6, 8, 256, 128
    (tmp_path / "config.json").write_text(json.dumps({
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False, "head_dim": 64,
        "hidden_act": "silu", "hidden_size": width, "intermediate_size": 512, "max_position_embeddings": 4096,
        "moe_intermediate_size": inner, "mlp_only_layers": [], "decoder_sparse_step": 1, "norm_topk_prob": True,
        "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": experts, "num_experts_per_tok": 2,
        "num_hidden_layers": layers, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True,
        "vocab_size": 8192,
    }))  # fmt: skip
    plan, program = _compile(tmp_path, **{"lora.rank": rank})
    routers = count_flops(plan.step.trace(plan.state, plan.batch).jaxpr)["float32"]
    forward = 2 * ROWS * LENGTH * width * experts * layers
    assert routers == (3 if rank else 4) * forward, "products in float32 beside those of routers"
    rounded = {dims for dtype, dims in arrays(program.text) if dtype == "bf16"}
    assert (experts, inner, width) in {dims[-3:] for dims in rounded}, "nothing was gathered: the test looks elsewhere"
    stacks = {dims for dims in rounded if len(dims) == 4 and dims[0] == layers and LENGTH not in dims}
    assert not stacks, stacks
    sides = {(rank, inner), (rank, width)} if rank else {(inner, width)}
    summed = [
        dtype for one in collectives(program.text) if one.kind in ("all-reduce", "reduce-scatter")
        for dtype, dims in arrays(one.shape) if tuple(sorted(dims[-2:])) in sides
    ]  # fmt: skip
    assert len(summed) >= 2 and set(summed) == {"f32"}, summed


def test_memory_holds_no_surprise(compiled):
    plan, program = compiled
    memory = program.memory
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(plan.state.trainable))
    state = 12 * parameters / DEVICES  # float32 weights and two moments, shared by all devices
    assert state <= memory.arguments <= 1.1 * state
    assert memory.outputs - memory.aliased < 0.01 * state, "the state is not donated: a second copy would be made"
    config = plan.model.config
    gradients, layer_inputs = 4 * parameters, 2 * config.num_layers * config.width * LENGTH * ROWS // DEVICES
    logits = 3 * CHUNK * config.vocab_size * 4
    assert memory.temporaries < gradients + layer_inputs + logits
    where = plan.mesh.devices.flat[0].device_kind
    shared = 0.02 * memory.peak if where.startswith("NVIDIA") else 0  # there the two share a little
    assert memory.arguments + memory.temporaries - shared <= memory.peak < 200e6
    print(f"\n4 x {where}, 15m, {ROWS} x {LENGTH}: {memory}, compiled in {program.seconds:.0f} s")


@needs_libtpu
def test_a_slice_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match=r"topology 'v5e:3x5'.*expected a slice such as v5e:2x2"):
        topology_devices("v5e:3x5")


@needs_libtpu
@pytest.mark.parametrize("name, taken, expected", [
    ("v5e:2x4", slice(None), "v5e:2x4"), ("v5p:2x2x2", slice(None), "v5p:2x2x2"), ("v6e:2x4", slice(0, 2), "v6e:2x1"),
    ("v6e:2x4", slice(0, 3), "this machine"), ("2*v5e:2x2", slice(None), "2*v5e:2x2"),
])  # fmt: skip
def test_chips_of_this_machine_have_the_name_of_their_slice(name, taken, expected):
    slices, _, of_one = name.rpartition("*")
    devices = topology_devices(of_one, int(slices or 1))[taken]
    found = here(devices)
    assert (found.name, found.chips, found.chip.name) == (expected, len(devices), of_one[:3])
    assert (not _no_compiler(found)) == (expected != "this machine")
    assert here(jax.devices()) is None


@needs_libtpu
def test_a_plan_is_compiled_in_a_process_of_its_own(for_tpu, model_15m, monkeypatch, tmp_path, capsys):
    program = for_tpu[1]
    arguments = ["plan", "--config", "sft", f"--config.model.path={model_15m}", "--config.model.compute_dtype=bfloat16",
                 "--config.train.remat=full", f"--config.loss.chunk={CHUNK}", f"--config.train.batch_size={ROWS}",
                 f"--config.data.max_length={LENGTH}", "--config.train.max_steps=7", "--config.evaluators=()",
                 "--config.eval.patience=3", "--config.eval.every=5"]  # which needs an evaluator to run, none to plan
    assert main([*arguments, "--topology=v5e:2x2", f"--json={tmp_path / 'plan.json'}"]) == 0
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["memory"]["total"] == pytest.approx(program.memory.peak, rel=0.01)  # it packs no segments beside
    assert (found["steps"], found["topology"], found["compiled"]["fits_compiler"]) == (7, "v5e:2x2", 1.0)
    assert "compiled for these chips" in capsys.readouterr().out
    assert main([*arguments, "--config.train.batch_size=12", "--topology=v5e:3x4"]) == 2
    assert re.match(r"itune: --topology 'v5e:3x4': no slice has these sides; expected sides", capsys.readouterr().err)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--no_such_option=1")  # libtpu ends its process, without a Python error
    assert main([*arguments, "--topology=v5e:2x2"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("itune: v5e:2x2: the process that compiles ended with exit code 1, saying: ERROR: Unknown ")
    assert said.count("\n") == 1 and "no_such_option" in said


def test_without_libtpu_the_message_says_what_to_install(monkeypatch):
    from jax.experimental import topologies

    def absent(**_):
        raise RuntimeError("Unknown backend tpu")

    monkeypatch.setattr(topologies, "get_topology_desc", absent)
    with pytest.raises(InputError, match=r"Unknown backend tpu.*pip install libtpu"):
        topology_devices("v5e:2x2")


def test_the_end_of_the_compiler_is_told_in_its_own_words():
    said = "W1128 10:00 a.cc:1] slow\nF1128 10:00:00.1 7 fusion_util.cc:5409] Check failed: split\n*** trace ***\n"
    aborted = _ended(-signal.SIGABRT, said)
    assert aborted.startswith("the compiler ended its process by SIGABRT, saying: Check failed: split\n")
    assert "Change the mesh" in aborted
    assert "runs out of memory" in _ended(-signal.SIGKILL, said)
    other = _ended(1, "Traceback\nImportError: no jax\n")
    assert other == "the process that compiles ended with exit code 1, saying: ImportError: no jax"


def test_a_step_that_does_not_fit_is_bad_input():
    class Lowered:
        def compile(self, compiler_options=None):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory: 19.3G of 15.7G hbm")

    step = types.SimpleNamespace(lower=lambda state, batch: Lowered())
    with pytest.raises(InputError, match=r"does not fit the device's memory: .*19.3G of 15.7G"):
        compile_step(step, None, np.zeros(1))
