"""FLOPs by formula against published counts, hand counts, and XLA's own."""

import types

import jax
import numpy as np
import pytest

from itune.flops import (
    batch_pairs,
    forward_flops,
    matrix_parameters,
    peak_flops,
    train_flops,
    visible_pairs,
    windows,
)
from itune.types import Batch


def model(width, layers, heads, kv, head_dim, mlp, vocab, window=None):
    kinds = (types.SimpleNamespace(window=window, experts=None),) * layers
    return types.SimpleNamespace(width=width, num_layers=layers, num_heads=heads, num_kv_heads=kv, head_dim=head_dim,
                                 mlp_width=mlp, vocab_size=vocab, kinds=kinds)


LLAMA_8B = model(4096, 32, 32, 8, 128, 14336, 128256)
LLAMA_1B = model(2048, 16, 32, 8, 64, 8192, 128256)
QWEN_4B = model(2560, 36, 32, 8, 128, 9728, 151936)


@pytest.mark.parametrize(("config", "length", "gigaflops"), [
    (LLAMA_1B, 2048, 7.82), (QWEN_4B, 4096, 27.76), (LLAMA_8B, 2048, 46.64), (LLAMA_8B, 8192, 51.47),
])
def test_known_models_per_token(config, length, gigaflops):
    pairs = {None: length * (length + 1) // 2}
    assert train_flops(config, length, pairs) / length / 1e9 == pytest.approx(gigaflops, rel=2e-3)


def test_packed_lengths_are_counted_as_they_are():
    segment_ids = np.array([[1, 1, 1, 2, 2, 0]])
    positions = np.array([[0, 1, 2, 0, 1, 0]])
    assert visible_pairs(positions, segment_ids) == 6 + 3
    assert visible_pairs(positions, segment_ids, window=2) == 5 + 3
    batch = Batch(None, None, None, segment_ids, positions)
    assert batch_pairs(model(8, 2, 1, 1, 8, 8, 8, window=2), batch) == {2: 8}


def test_windows_reduce_attention_only():
    full, local = model(64, 2, 4, 4, 16, 128, 100), model(64, 2, 4, 4, 16, 128, 100, window=8)
    assert windows(local) == (8, 8)
    assert matrix_parameters(full) == matrix_parameters(local)
    difference = forward_flops(full, 10, {None: 55}) - forward_flops(local, 10, {8: 52})
    assert difference == 2 * 4 * 4 * 16 * 3


def test_matrix_term_equals_what_xla_counts():
    """A dense chain of the same matrices, compiled: XLA's count of its products is 2 N_mat a token."""
    config = model(32, 1, 4, 2, 8, 64, 96)

    def chain(x, q, k, v, o, gate, up, down, head):
        y = (x @ q) @ o + ((x @ k) @ np.ones((16, 32), np.float32)) * 0
        return ((y @ gate) * (y @ up)) @ down @ head, x @ k, x @ v

    shapes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32), (32, 96)]
    arguments = [jax.ShapeDtypeStruct(shape, "float32") for shape in [(128, 32), *shapes]]
    counted = jax.jit(chain).lower(*arguments).compile().cost_analysis()["flops"]
    assert counted == pytest.approx(2 * 128 * matrix_parameters(config), rel=0.15)


def test_peaks_by_device_kind():
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989.4e12
    assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU v5p") == 459e12 and peak_flops("TPU v5") == 459e12
    assert peak_flops("TPU v6 lite") == 920e12 and peak_flops("TPU v4") == 275e12
    assert peak_flops("cpu") is None
