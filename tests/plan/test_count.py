"""FLOPs counted in a jaxpr: loops by trip count, recomputation seen, devices of a shard_map all counted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from itune.models.architecture import Experts, LayerKind, ModelConfig
from itune.models.model import Model
from itune.objectives import make_sft
from itune.plan.count import count_flops
from itune.plan.run import visible_share
from itune.sharding import make_mesh
from itune.types import Batch

M, K, N = 8, 16, 32
ONE = 2 * M * K * N
LAYERS, TOKENS = 2, 64


def products(function, *shapes, **options):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    return count_flops(jax.make_jaxpr(function)(*arguments), **options)["products"]


def test_a_scan_counts_its_length_and_a_loop_of_unknown_length_the_given_turns():
    def scanned(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w) @ w.T, None), x, w)[0]

    assert products(scanned, (M, K), (5, K, N)) == 5 * 2 * ONE

    def looped(n, x, w):
        return jax.lax.fori_loop(0, n, lambda i, x: (x @ w) @ w.T, x)

    arguments = jax.ShapeDtypeStruct((), jnp.int32), *(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((M, K), (K, N)))
    assert count_flops(jax.make_jaxpr(looped)(*arguments), turns=7)["products"] == 7 * 2 * ONE


def test_recomputation_shows():
    def loss(w, x, policy):
        def body(x, w):
            return jnp.tanh(x @ w) @ w.T, None

        return jax.lax.scan(policy(body), x, w)[0].astype(jnp.float32).sum()

    def gradient(policy):
        return lambda w, x: jax.grad(loss)(w, x, policy)

    kept = products(gradient(lambda f: f), (5, K, N), (M, K))
    recomputed = products(gradient(lambda f: jax.checkpoint(f, prevent_cse=False)), (5, K, N), (M, K))
    assert kept == 5 * 6 * ONE
    # the layer's last product is not needed again
    assert recomputed - kept in (5 * ONE, 5 * 2 * ONE)


def test_every_device_of_a_shard_map_counts():
    mesh = make_mesh({"fsdp": 4}, jax.devices()[:4])

    def run(x, w):
        inner = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(PartitionSpec("fsdp"), PartitionSpec()),
                              out_specs=PartitionSpec("fsdp"), check_vma=False)
        return inner(x, w)

    assert products(run, (M, K), (K, N)) == ONE


def test_half_of_the_square_is_visible_less_with_a_window():
    def config(*kinds):
        return ModelConfig(64, 16, len(kinds), 4, 4, 8, 32, kinds, max_length=64)

    length = 1000
    assert visible_share(config(LayerKind()), length) == pytest.approx(0.5, abs=0.001)
    half = visible_share(config(LayerKind(window=100), LayerKind()), length)
    assert half == pytest.approx((0.5 + 0.095) / 2, abs=0.001)


def counts(experts, dtype="bfloat16"):
    kinds = (LayerKind(experts=experts),) * LAYERS
    config = ModelConfig(64, 16, LAYERS, 4, 4, 8, 32, kinds, max_length=32)
    model = Model(config, "llama", compute_dtype=dtype, remat="full")
    objective = make_sft(model, chunk=16)
    rows, weights = (jax.ShapeDtypeStruct((2, TOKENS // 2), dtype) for dtype in (jnp.int32, jnp.float32))
    batch = Batch(rows, rows, weights, rows, rows)

    def loss(params, batch):
        return objective(params, {}, batch, None)[0]

    return count_flops(jax.make_jaxpr(jax.grad(loss))(model.abstract_params(), batch), turns=4)


def test_under_bfloat16_only_a_router_multiplies_in_float32():
    """Besides the scores of plain XLA attention, which a CPU computes; the kernels of TPU and GPU do not pass there."""
    dense, routed = counts(None), counts(Experts(4, 2, 16))
    router = 2.0 * TOKENS * 16 * 4 * LAYERS  # of four experts, forward
    assert routed["float32"] - dense["float32"] == 4 * router, "forward, forward again, and twice backward"
    assert routed["products"] > 10 * routed["float32"]
    assert (dense["exact"], routed["exact"]) == (0, 4 * router), "scores are rounded as bfloat16's"


@pytest.mark.parametrize("experts", [None, Experts(4, 2, 16)])
def test_under_float32_every_product_has_its_precision(experts):
    counted = counts(experts, "float32")
    assert counted["exact"] == counted["products"] > 0
