"""Attention on NVIDIA GPUs: cuDNN's flash attention with segments as offsets, and the Triton kernel in JAX's Pallas.

cuDNN's packed layout has no public name in JAX (jax-ml/jax pull request 29731 would give it one), and the private one
has been silently wrong before (pull request 39521: grouped heads, fixed in 0.11.1). So nothing here is trusted by
version alone: `unsupported` runs the kernel once on a small input, forward and backward, against the XLA path.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from itune.models.attention import xla
from itune.sharding import RULES, rows_divisor, stands_in

MAX_SEGMENTS = 32  # a row, when nobody says; see `cudnn`
GROUPED_SINCE = (0, 11, 1)  # the first jax whose packed cuDNN attention reads grouped keys from the right place
TOLERANCE = 0.03  # bfloat16 kernel against float32 reference, relative to the largest entry: a wrong kernel is off by 1
TRITON_BLOCK = 128
# compiler options for XLA's own attention where it is only compared with: XLA tries out many ways to run each product
# of each block, which took over a minute a shape on an H200
UNTUNED = {"xla_gpu_autotune_level": 0}


def cudnn(
    query_BLNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    *,
    q_segments_BL: jax.Array,
    window: int | None,
    scale: float,
    softcap: float | None = None,
    mesh: Mesh | None = None,
    max_segments: int = 0,
    **_: Any,
) -> jax.Array:
    """See `itune.models.attention.attention`; segments must be contiguous in a row. bfloat16 or float16.

    `max_segments` bounds the runs of equal segment id in a row, padding included (0: MAX_SEGMENTS). cuDNN's softmax
    statistics take 4 * B * max_segments * N * L bytes, so a tight bound matters. A row with more runs than that comes
    out as NaN: it cannot be computed, and must not be computed wrongly.
    """
    most = min(max_segments or MAX_SEGMENTS, query_BLNH.shape[1])
    if jax.__version_info__ < GROUPED_SINCE:
        group = query_BLNH.shape[2] // key_BSKH.shape[2]
        key_BSKH, value_BSKH = jnp.repeat(key_BSKH, group, axis=2), jnp.repeat(value_BSKH, group, axis=2)
    run = functools.partial(_cudnn_rows, window=window, scale=scale, most=most)
    return _on_mesh(run, mesh, query_BLNH, key_BSKH, value_BSKH, q_segments_BL)


def _cudnn_rows(query_BLNH, key_BSKH, value_BSKH, segments_BL, *, window, scale, most):
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    if most == 1:
        options: dict[str, Any] = {"mask_type": MaskType.CAUSAL}
        count_B = runs(segments_BL, 1)[2]
    else:
        starts_BM, lengths_BM, count_B = runs(segments_BL, most)
        # one offset more than there are segments; cuDNN takes the lengths from the lengths
        offsets = jnp.pad(starts_BM, ((0, 0), (0, 1)), constant_values=-1)
        options = {"mask_type": MaskType.PADDING_CAUSAL, "q_seqlen": lengths_BM, "kv_seqlen": lengths_BM}
        options |= {"q_offsets": offsets, "kv_offsets": offsets}
    out = dot_product_attention(
        query_BLNH, key_BSKH, value_BSKH, scale=scale, sliding_window_length=window, **options
    )
    return jnp.where((count_B <= most)[:, None, None, None], out, jnp.nan)


def runs(segments_BL: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Start and length of each run of equal segment ids, int32 (B, most), -1 past the last; and their number (B,).

    Padding is a run like any other: it attends to itself, so every output and gradient is written by the kernel.
    """
    length = segments_BL.shape[1]
    first_BL = jnp.pad(segments_BL[:, 1:] != segments_BL[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    ends = functools.partial(jnp.nonzero, size=most + 1, fill_value=length)
    bounds_BM = jax.vmap(lambda first_L: ends(first_L)[0])(first_BL).astype(jnp.int32)
    starts_BM, lengths_BM = bounds_BM[:, :-1], jnp.diff(bounds_BM, axis=1)
    here_BM = starts_BM < length
    return jnp.where(here_BM, starts_BM, -1), jnp.where(here_BM, lengths_BM, -1), first_BL.sum(axis=1)


def triton(
    query_BLNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    *,
    q_segments_BL: jax.Array,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    mesh: Mesh | None = None,
    interpret: bool = False,
    **_: Any,
) -> jax.Array:
    """See `itune.models.attention.attention`; no window, no soft cap. Any number of segments, Ampere and newer."""
    run = functools.partial(_triton_rows, scale=scale, interpret=interpret)
    return _on_mesh(run, mesh, query_BLNH, key_BSKH, value_BSKH, q_segments_BL)


def _triton_rows(query_BLNH, key_BSKH, value_BSKH, segments_BL, *, scale, interpret):
    from jax.experimental.pallas.ops.gpu import attention as kernels

    length, group = query_BLNH.shape[1], query_BLNH.shape[2] // key_BSKH.shape[2]
    pad = -length % TRITON_BLOCK
    # the kernel has no grouped heads
    rows = (query_BLNH, jnp.repeat(key_BSKH, group, axis=2), jnp.repeat(value_BSKH, group, axis=2))
    query, key, value = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in rows)
    segments = jnp.pad(segments_BL, ((0, 0), (0, pad)))
    out = kernels.mha(query, key, value, segments, sm_scale=scale, causal=True, interpret=interpret)
    return out[:, :length]


def _on_mesh(run, mesh, query_BLNH, key_BSKH, value_BSKH, segments_BL):
    """`run` on each device's rows and heads."""
    if mesh is None or mesh.size == 1:
        return run(query_BLNH, key_BSKH, value_BSKH, segments_BL)
    rows = RULES["batch"] if query_BLNH.shape[0] % rows_divisor(mesh) == 0 else None
    heads = PartitionSpec(rows, None, "tensor")
    inner = jax.shard_map(
        run, mesh=mesh, in_specs=(heads, heads, heads, PartitionSpec(rows)), out_specs=heads, check_vma=False
    )
    return inner(query_BLNH, key_BSKH, value_BSKH, segments_BL)


def unsupported(
    name: str, query: Any, key: Any, *, window: int | None, softcap: float | None, mesh: Mesh | None
) -> str:
    """Why kernel `name` ("cudnn" or "pallas") cannot run on these shapes (arrays or ShapeDtypeStructs), or ""."""
    if reason := unfit(name, query, key, window=window, softcap=softcap, mesh=mesh):
        return reason
    (heads, head_dim), runs = query.shape[2:], mesh is None or not stands_in(mesh)
    return self_check(name, heads // key.shape[2], head_dim, window is not None, jnp.dtype(query.dtype).name, runs)


def unfit(name: str, query: Any, key: Any, *, window: int | None, softcap: float | None, mesh: Any) -> str:
    """The reasons that shapes alone give; of `mesh` only its sizes are looked at."""
    head_dim = query.shape[3]
    if softcap is not None:
        return "it has no soft cap on the scores"
    if name == "pallas" and window is not None:
        return "it has no sliding window"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16, found {query.dtype}"
    if name == "cudnn" and (head_dim % 8 or head_dim > 256):
        return f"head_dim must be a multiple of 8 and at most 256, found {head_dim}"
    if mesh is not None and mesh.shape["context"] > 1:
        return "it has no mesh.context"
    if mesh is not None and key.shape[2] % mesh.shape["tensor"]:
        return f"mesh.tensor={mesh.shape['tensor']} does not divide {key.shape[2]} key/value heads"
    return ""


@functools.lru_cache(maxsize=32)
def self_check(name: str, group: int, head_dim: int, windowed: bool, dtype: str, runs: bool = True) -> str:
    """Run a kernel on 2 rows of 256 tokens in 5 segments, and compare output and gradients with XLA in float32.

    -> "" when they agree within TOLERANCE of the largest entry, else what was wrong. Runs at once, even while a
    function is being traced. For a GPU that is not there (`runs` False) the kernel is only traced: JAX's own checks.
    """
    kernels: dict[str, Callable[..., jax.Array]] = {"cudnn": cudnn, "pallas": triton}
    window = 40 if windowed else None
    # a thread of its own knows nothing of a trace under way here; under jax.ensure_compile_time_eval, which also steps
    # out of a trace, no Pallas kernel can be traced and cuDNN's partitioning rule asserts (seen with jax 0.11.2)
    with ThreadPoolExecutor(1) as fresh:
        try:
            found = fresh.submit(probe, kernels[name], group, head_dim, window, dtype, runs).result()
        except Exception as error:  # whatever a driver, cuDNN or a private entry of another jax raises means "not here"
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        if not runs:
            return ""
        wanted = fresh.submit(probe, xla.attention, group, head_dim, window, "float32").result()
    for what, a, b in zip(("output", "query gradient", "key gradient", "value gradient"), found, wanted):
        off = np.abs(a - b).max() / np.abs(b).max()
        if not off <= TOLERANCE:
            return f"self-check failed: {what} is off by {off:.3g} of its largest entry (at most {TOLERANCE})"
    return ""


@functools.lru_cache(maxsize=32)
def probe(
    kernel: Callable[..., jax.Array], group: int, head_dim: int, window: int | None, dtype: str, runs: bool = True
) -> list[Any]:
    """Output and the gradients of query, key, value on the fixed input of `self_check`, float32 arrays.

    Nothing, and nothing is run, where `runs` is False: what JAX refuses when it traces the kernel, it raises.
    """
    rng = np.random.default_rng(0)
    query, key, value, weight = (
        jnp.asarray(rng.normal(size=(2, 256, heads, head_dim)), "bfloat16").astype(dtype)
        for heads in (2 * group, 2, 2, 2 * group)
    )
    lengths = ([70, 3, 110, 41, 32], [1, 129, 50, 76, 0])
    segments = jnp.asarray([np.repeat([1, 2, 3, 4, 0], row) for row in lengths], jnp.int32)
    real = (segments != 0)[:, :, None, None]

    def masked(query, key, value):
        out = kernel(
            *(query, key, value),
            q_segments_BL=segments,
            kv_segments_BS=segments,
            q_positions_BL=None,
            kv_positions_BS=None,
            offset=0,
            window=window,
            scale=head_dim**-0.5,
            softcap=None,
            mesh=None,
        )
        return jnp.where(real, out, 0)

    def both(query, key, value):
        out, pullback = jax.vjp(masked, query, key, value)
        return out, *pullback(weight)

    if not runs:
        jax.eval_shape(both, query, key, value)
        return []
    run = jax.jit(both, compiler_options=UNTUNED if kernel is xla.attention else None)
    return [np.asarray(x.astype(jnp.float32)) for x in run(query, key, value)]
