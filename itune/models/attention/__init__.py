"""One attention function; a file per backend. Which backend runs is decided here and nowhere else."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from itune.models.attention import context, cpu, gpu, tpu
from itune.sharding import platform
from itune.types import InputError

log = logging.getLogger("itune")

# name in `model.attention` -> function with the keyword arguments of `attention`, less `backend`
BACKENDS: dict[str, Callable[..., jax.Array]] = {
    "xla": context.attention,
    "blocks": cpu.attention,
    "splash": tpu.attention,
    "cudnn": gpu.cudnn,
    "pallas": gpu.triton,
}
# platform of the devices -> kernels for it, best first
KERNELS = {"cpu": ("blocks",), "tpu": ("splash",), "gpu": ("cudnn", "pallas")}
SHORT = 128  # rows below this length gain nothing from a kernel


def choose_backend(
    backend: str,
    query: Any,
    key: Any,
    *,
    whole_rows: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    mesh: Mesh | None = None,
) -> str:
    """The backend that runs on these shapes, by the devices of `mesh` (which need not exist on this machine).

    "auto" takes the first kernel of the platform that can, and says so once when none can. Kernels compute whole rows;
    with a KV cache (`whole_rows` False) every choice means XLA. Raises InputError for a kernel that cannot run here.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise InputError(f"model.attention: {backend!r} is unknown; choose one of auto, {', '.join(BACKENDS)}")
    if backend == "xla" or not whole_rows:
        return "xla"
    runs_on = platform(mesh)
    if backend != "auto":
        reason = _unsupported(backend, runs_on, query, key, sinks, window=window, softcap=softcap, mesh=mesh)
        if reason:
            raise InputError(f"model.attention={backend} cannot run here: {reason}; choose auto or xla")
        return backend
    if query.shape[1] < SHORT:
        return "xla"
    reasons = []
    for name in KERNELS.get(runs_on, ()):
        reason = _unsupported(name, runs_on, query, key, sinks, window=window, softcap=softcap, mesh=mesh)
        if not reason:
            return name
        reasons.append(f"{name}: {reason}")
    if reasons and runs_on != "cpu":
        _say_once("; ".join(reasons), 4 * query.shape[0] * query.shape[2] * query.shape[1] * key.shape[1] // 2)
    return "xla"


def _unsupported(name: str, platform: str, query: Any, key: Any, sinks: bool, **options: Any) -> str:
    homes = [home for home, names in KERNELS.items() if name in names]
    if platform not in homes:
        return f"it needs a {homes[0].upper()}, the devices are {platform.upper()}"
    if sinks:
        return "it has no attention sinks"
    if name == "blocks":
        return cpu.unsupported(query, key, **options)
    return tpu.unsupported(query, key, **options) if name == "splash" else gpu.unsupported(name, query, key, **options)


@functools.lru_cache(maxsize=64)
def _say_once(reasons: str, score_bytes: int) -> None:
    log.warning(
        "attention runs in plain XLA instead of a flash kernel (%s). Same result; it costs time: each layer moves "
        "about %.1f GB of scores through memory, several times a step",
        *(reasons, score_bytes / 1e9),
    )


def attention(
    query_BLNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    *,
    q_segments_BL: jax.Array,
    kv_segments_BS: jax.Array,
    q_positions_BL: jax.Array | None = None,
    kv_positions_BS: jax.Array | None = None,
    offset: jax.Array | int = 0,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks_N: jax.Array | None = None,
    backend: str = "auto",
    mesh: Mesh | None = None,
    max_segments: int = 0,
) -> jax.Array:
    """Causal grouped-query attention inside segments -> (B, L, N, H) in the query's dtype.

    Query l stands in slot `offset + l` of the S key slots (an int 0 with L == S is self-attention over whole rows). It
    sees the keys in slots up to its own whose segment equals its own and is not 0, and of those the last `window`,
    itself included. Distances for the window are counted in slots, or in positions where those are given (a KV cache
    with padding inside a row). `scale` defaults to 1/sqrt(H); `softcap` c turns scores s into c * tanh(s / c).
    `sinks_N` has a score a head that every query sees beside its keys, with no value to it. A query
    that sees nothing (padding) gets some finite vector. Softmax in float32. `max_segments` bounds the runs of equal
    segment id in a row, padding included (0: unknown); only cuDNN needs it, see gpu.py.
    """
    aligned = isinstance(offset, int) and offset == 0 and query_BLNH.shape[1] == key_BSKH.shape[1]
    whole_rows = aligned and q_positions_BL is None
    options: dict[str, Any] = {"window": window, "softcap": softcap, "mesh": mesh}
    sinks = {} if sinks_N is None else {"sinks_N": sinks_N}
    name = choose_backend(backend, query_BLNH, key_BSKH, whole_rows=whole_rows, sinks=bool(sinks), **options)
    return BACKENDS[name](
        query_BLNH,
        key_BSKH,
        value_BSKH,
        q_segments_BL=q_segments_BL,
        kv_segments_BS=kv_segments_BS,
        q_positions_BL=q_positions_BL,
        kv_positions_BS=kv_positions_BS,
        offset=offset,
        scale=query_BLNH.shape[-1] ** -0.5 if scale is None else scale,
        max_segments=max_segments,
        **options,
        **sinks,
    )
