"""The load-balancing loss of mixtures of experts against transformers, padding masked; off by default."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from itune.config import Config
from itune.models import load_pretrained
from itune.objectives import make_sft
from itune.sharding import batch_sharding, make_mesh
from itune.types import Batch, InputError

SIZES = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2,
}  # fmt: skip
CONFIGS = {
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=4, sliding_window=None),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **SIZES, num_experts=6, moe_intermediate_size=12, head_dim=8, decoder_sparse_step=2, norm_topk_prob=True
    ),
}
AUX = 0.3


def padded(rng, lengths, width):
    """A batch of one example a row, every token but the first a target, and the attention mask of it."""
    mask = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int32)
    tokens = rng.integers(1, 48, mask.shape).astype(np.int32) * mask
    weights = (np.roll(mask, -1, axis=1) * mask).astype(np.float32)
    weights[:, -1] = 0
    positions = np.tile(np.arange(width, dtype=np.int32), (len(mask), 1))
    return Batch(tokens, np.roll(tokens, -1, axis=1), weights, mask, positions)


@pytest.mark.parametrize("family", CONFIGS)
def test_loss_and_gradients_equal_transformers(judge, family):
    folder, theirs = judge(CONFIGS[family])
    model, params = load_pretrained(folder)
    batch = padded(np.random.default_rng(0), [9, 4, 7], 9)
    objective = make_sft(model, router_aux=AUX)

    def ours(params):
        loss_sum, weight_sum, metrics = objective(params, {}, batch, None)
        return loss_sum / weight_sum, metrics["router_aux"] / weight_sum

    gradients, aux = jax.jit(jax.grad(ours, has_aux=True))(params)

    ids, mask = torch.tensor(batch.tokens_BL, dtype=torch.long), torch.tensor(batch.segment_ids_BL, dtype=torch.long)
    out = theirs(input_ids=ids, attention_mask=mask, output_router_logits=True)
    hf = theirs.config
    count = getattr(hf, "num_local_experts", None) or hf.num_experts
    wanted = load_balancing_loss_func(out.router_logits, count, hf.num_experts_per_tok, mask)
    np.testing.assert_allclose(aux, wanted.detach(), rtol=1e-6)
    unmasked = load_balancing_loss_func(out.router_logits, count, hf.num_experts_per_tok)
    assert abs(float((unmasked - wanted).detach())) > 1e-3, "the mask matters here"

    labels = torch.where(mask[:, 1:] > 0, ids[:, 1:], -100)
    nll = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels.flatten())
    (nll + AUX * wanted).backward()
    theirs.save_pretrained(folder / "gradients", state_dict={n: p.grad for n, p in theirs.named_parameters()})
    expected = load_pretrained(folder / "gradients")[1]
    for path, gradient in jax.tree_util.tree_leaves_with_path(expected):
        mine = gradients
        for key in path:
            mine = mine[key.key]
        distance = np.linalg.norm(mine - gradient) / np.linalg.norm(gradient)
        assert distance < 1e-4, (jax.tree_util.keystr(path), distance)


@pytest.fixture(scope="module")
def moe_kinds():
    from itune.models import LayerKind
    from itune.models.architecture import Experts

    return (LayerKind(experts=Experts(4, 2, 12)),) * 3


def test_packing_remat_and_mesh_change_nothing(make_model, random_params, moe_kinds):
    rng = np.random.default_rng(1)
    plain = padded(rng, [5, 4, 8, 3], 9)
    packed = Batch(*(np.zeros((4, 9), array.dtype) for array in plain))
    for row, segment, source, start, length in [(0, 1, 0, 0, 5), (0, 2, 1, 5, 4), (1, 1, 2, 0, 8), (2, 1, 3, 4, 3)]:
        for array, from_array in zip(packed, plain):
            array[row, start : start + length] = from_array[source, :length]
        packed.segment_ids_BL[row, start : start + length] = segment
    params = random_params(make_model(kinds=moe_kinds))
    mesh = make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
    results = []
    placed = Batch(*jax.device_put(tuple(plain), batch_sharding(mesh)))
    for model, batch in [
        (make_model(kinds=moe_kinds), plain),
        (make_model(kinds=moe_kinds), packed),
        (make_model(kinds=moe_kinds, mesh=mesh, remat="full"), placed),
    ]:
        objective = make_sft(model, router_aux=AUX)
        step = jax.jit(lambda p, b, objective=objective: jax.grad(lambda q: objective(q, {}, b, None)[0])(p))
        results.append(step(params, batch))
    for other in results[1:]:
        for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, float(np.abs(a).max())))


def test_an_even_router_has_loss_equal_to_the_chosen(make_model, random_params, moe_kinds):
    """The closed form: with equal probabilities E * sum(C / E * 1 / E) = C, whoever is chosen."""
    model = make_model(kinds=moe_kinds)
    params = random_params(model)
    params["blocks"]["layer_0"]["mlp"]["router"]["kernel"] *= 0
    batch = padded(np.random.default_rng(2), [9, 6], 9)
    _, loss = model.hidden_and_balance(params, batch.tokens_BL, batch.segment_ids_BL, batch.positions_BL)
    np.testing.assert_allclose(loss, 2.0, rtol=1e-6)
    assert jnp.result_type(loss) == jnp.float32


def test_off_by_default_and_refused_without_experts(make_model):
    assert Config().loss.router_aux == 0
    with pytest.raises(InputError, match=r"loss\.router_aux=0\.01 needs a mixture of experts"):
        make_sft(make_model(), router_aux=0.01)
