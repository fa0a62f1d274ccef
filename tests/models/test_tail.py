"""The last layer's MLP as part of the head: the same losses and gradients, for the tokens that the loss asks for."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from itune.models import LayerKind, Rope, load_pretrained
from itune.models.architecture import Experts
from itune.models.layers import ACTIVATIONS
from itune.models.lora import Lora, abstract_adapters
from itune.models.tail import CHUNK, TOKENS, Shortened, shortened
from itune.models.unrolled import unroll, unroll_params
from itune.objectives import make_sft
from itune.objectives.sft import full_parameters
from itune.sharding import make_mesh
from itune.types import Batch

ROWS, LENGTH = 3, 40
CASES = {
    "stacked": {},
    "two_kinds": {"num_layers": 4, "kinds": (LayerKind(), LayerKind(window=8)) * 2, "norm_placement": "both",
                  "norm_offset": True, "logit_softcap": 20.0, "residual_scale": 0.7},
    "last_apart": {"kinds": (LayerKind(), LayerKind(), LayerKind(window=8))},
    "all_differ": {"num_layers": 2, "kinds": (LayerKind(window=8), LayerKind(rope=Rope(base=500.0)))},
    "one_layer": {"num_layers": 1},
    "fused_after": {"fused_qkv": True, "fused_gate_up": True, "norm_placement": "post", "tie_embeddings": True,
                    "mlp_bias": True, "out_bias": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({}, jax.devices()[:1])


def make_batch(weight=0.3):
    """Two examples and padding a row; tokens of weight 0, 1 and between."""
    rng = np.random.default_rng(0)
    segments = np.repeat(np.array([1, 2, 0], np.int32), [17, 15, 8])[None].repeat(ROWS, 0)
    weights = (rng.random((ROWS, LENGTH)) < weight) * rng.choice([0.5, 1.0], (ROWS, LENGTH)) * (segments > 0)
    tokens, targets = rng.integers(1, 48, (2, ROWS, LENGTH)).astype(np.int32)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in (17, 15, 8)])[None].repeat(ROWS, 0)
    return Batch(tokens, targets, weights.astype(np.float32), segments, positions)


def values(model, trainable, frozen=None, parameters=full_parameters):
    """Loss, correct predictions, gradients, and what evaluation gets."""
    objective = objective_of(model, parameters)

    def loss(trainable):
        total, _, metrics = objective(trainable, frozen, make_batch(), None)
        return total, metrics["correct"]

    return jax.jit(lambda p: (jax.value_and_grad(loss, has_aux=True)(p), objective.per_token(p, frozen, make_batch())))(
        trainable
    )


def objective_of(model, parameters=full_parameters):
    parameters = model.parameters(parameters) if isinstance(model, Shortened) else parameters
    return make_sft(model, chunk=16, parameters=parameters)


def assert_close(wanted, found, tolerance=2e-5):
    """As equal as sums in another order can be, beside the largest gradient."""
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted[0][1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=tolerance * scale, rtol=1e-5), wanted, found)


def grid(fewer, rest):
    """The pairs that every run of the tests takes, and the rest for the soak."""
    return [pytest.param(*pair, marks=() if pair in fewer else pytest.mark.soak) for pair in rest]


REMAT = [(case, remat) for remat in ("none", "dots", "full") for case in CASES]


@pytest.mark.parametrize("case, remat", grid([*REMAT[:6], ("stacked", "dots"), ("two_kinds", "full")], REMAT))
def test_losses_and_gradients_are_those_of_the_whole_model(make_model, random_params, mesh, case, remat):
    model = make_model(mesh=mesh, remat=remat, **CASES[case])
    params = random_params(model)
    wanted, found = values(model, params), values(Shortened(model), params)
    assert_close(wanted, found)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(found[0][1]))


@pytest.mark.parametrize("case", ["stacked", "two_kinds"])
def test_layers_that_are_not_stacked(make_model, random_params, mesh, case):
    model = make_model(mesh=mesh, **CASES[case])
    params = unroll_params(model, random_params(model))
    assert_close(values(unroll(model), params), values(Shortened(unroll(model)), params))


TARGETS = [(case, which) for which in (".*_proj", "attention/q_proj") for case in [*CASES][:2] + ["all_differ"]]


@pytest.mark.parametrize("case, targets", grid(TARGETS[:4], TARGETS))
def test_adapters_train_beside_a_frozen_base(make_model, mesh, case, targets):
    model = make_model(mesh=mesh, **CASES[case])
    params, lora = model.init(jax.random.key(0)), Lora(rank=2, targets=targets)
    rng = np.random.default_rng(1)
    adapters = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(x.dtype), abstract_adapters(model, lora))
    wanted = values(model, adapters, params, lora.parameters)
    found = values(Shortened(model), adapters, params, lora.parameters)
    assert_close(wanted, found, 3e-4)  # adapters of this size amplify roundings: unrolled layers differ as much


def test_loss_and_gradients_equal_transformers(judge, mesh):
    config = transformers.Gemma2Config(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, sliding_window=8, query_pre_attn_scalar=8,
    )  # fmt: skip
    folder, theirs = judge(config)
    model, params = load_pretrained(folder, mesh)
    tokens = np.random.default_rng(0).integers(1, 48, (ROWS, LENGTH)).astype(np.int32)
    ones, positions = np.ones_like(tokens), np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    weights = np.zeros(tokens.shape, np.float32)
    weights[:, 25:-1] = 1
    batch = Batch(tokens, np.roll(tokens, -1, axis=1), weights, ones, positions)
    theirs = theirs.double()
    logits = theirs(input_ids=torch.tensor(tokens, dtype=torch.long)).logits[:, 25:-1]
    labels = torch.tensor(tokens[:, 26:], dtype=torch.long)
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    wanted.backward()
    errors = {}
    for each in (model, Shortened(model)):
        objective = objective_of(each)
        loss, gradients = jax.jit(jax.value_and_grad(lambda p, o=objective: o(p, {}, batch, None)[0]))(params)
        np.testing.assert_allclose(loss, wanted.detach(), rtol=1e-5)
        errors[each] = {name: np.abs(found - judged).max() for name, found, judged in in_pairs(gradients, theirs)}
    scale = float(max(parameter.grad.abs().max() for parameter in theirs.parameters()))
    for name, error in errors[Shortened(model)].items():
        assert error <= 2 * errors[model][name] + 1e-6 * scale, name


def in_pairs(gradients, theirs):
    """(name, gradient, that of transformers) of the last layer's parts, of both ends of the model, and of a first
    layer's."""
    blocks, layers = gradients["blocks"], theirs.model.layers
    attention = blocks["layer_0"]["attention"]
    names = [("mlp_norm", layers[3].pre_feedforward_layernorm), ("mlp_post_norm", layers[3].post_feedforward_layernorm)]
    yield from ((name, blocks["layer_1"][name]["scale"][1], norm.weight.grad.numpy()) for name, norm in names)
    for name in ("gate_proj", "up_proj", "down_proj"):
        for turn in (0, 1):
            judged = getattr(layers[2 * turn + 1].mlp, name).weight.grad.numpy()
            yield f"{name} {turn}", blocks["layer_1"]["mlp"][name]["kernel"][turn], judged
    yield "q_proj", attention["q_proj"]["kernel"][0], layers[0].self_attn.q_proj.weight.grad.numpy()
    yield "embedding", gradients["embed"]["embedding"], theirs.model.embed_tokens.weight.grad.numpy()
    yield "final_norm", gradients["final_norm"]["scale"], theirs.model.norm.weight.grad.numpy()


def test_the_last_mlp_is_computed_for_the_turns_that_the_loss_takes(make_model, random_params, mesh, monkeypatch):
    model, calls = make_model(mesh=mesh), []

    def counted(x):
        jax.debug.callback(lambda _: calls.append(x.size // model.config.mlp_width), x.sum())
        return jax.nn.silu(x)

    monkeypatch.setitem(ACTIVATIONS, "silu", counted)
    params, turns = random_params(model), -(-int((make_batch().loss_weights_BL > 0).sum()) // 16)
    for each, wanted in ((model, [ROWS * LENGTH] * 3), (Shortened(model), [ROWS * LENGTH] * 2 + [16] * turns)):
        objective = objective_of(each)
        jax.block_until_ready(jax.jit(lambda p, o=objective: o(p, {}, make_batch(), None)[0])(params))
        jax.effects_barrier()
        assert calls == wanted
        calls.clear()


def test_it_is_for_one_cpu_in_float32_without_experts_or_dropout(make_model, mesh):
    model = make_model(mesh=mesh)
    assert shortened(model, 1024, 3 * TOKENS) == (Shortened(model), CHUNK)
    assert shortened(model, 16, 3 * TOKENS) == (Shortened(model), 16)
    assert shortened(model, 1024, 3 * TOKENS - 1) == (model, 1024), "too few tokens for its layers"
    experts = (LayerKind(experts=Experts(4, 2, 16)),) * 3
    for other in (
        make_model(), make_model(mesh=make_mesh({"fsdp": 2}, jax.devices()[:2])), make_model(mesh=mesh, kinds=experts),
        make_model(mesh=mesh, dropout=0.1), dataclasses.replace(model, compute_dtype="bfloat16"),
    ):  # fmt: skip
        assert shortened(other, 1024, 4096) == (other, 1024)
