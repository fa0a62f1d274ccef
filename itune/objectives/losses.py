"""Cross-entropy whose full logits never exist.

Tokens of weight 0 are left out before the head, the others pass it in chunks. The forward pass also forms the
gradients of hidden states and head kernel, so that each chunk's logits are computed once: 6 T D V floating point
operations for forward and backward together, where recomputing takes 8. (Idea: Wijmans et al., arXiv 2411.09009, and
Hsu et al., arXiv 2410.10989.)

On a mesh every device orders its own tokens. With `fsdp` there are two ways, chosen by what moves less between devices
(`_spread`): each device keeps a part of the vocabulary, and the chunks of hidden states visit it; or the kernel is
gathered whole, once, and its gradient summed, once. The first needs no room for a whole kernel and its gradient.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import Mesh, PartitionSpec

from itune.objectives.blocks import cross_entropy_in_blocks
from itune.sharding import spec
from itune.types import InputError

LogitsFn = Callable[[Any, Any], Any]


class CrossEntropy(NamedTuple):
    """`loss_sum` = sum(weights * nll) is differentiable; `nll` and `correct` (per token, float32) are not.

    Both are 0 for tokens of weight 0. A token counts as correct when no other logit exceeds its target's; without
    gradients, which is evaluation, also none before it may equal it, as in argmax.
    """

    loss_sum: Any
    nll: Any
    correct: Any


def chunked_cross_entropy(
    logits_fn: LogitsFn,
    kernel_VD: Any,
    hidden: Any,
    targets: Any,
    weights: Any,
    *,
    chunk: int = 1024,
    blocks: int = 1,
    mesh: Mesh | None = None,
) -> CrossEntropy:
    """Weighted negative log-likelihood of `targets`, in float32, `chunk` tokens at a time on each device.

    `blocks` above 1: where the kernel is differentiated, the vocabulary comes in as many parts (`objectives/blocks.py`:
    less memory, a third more products). Only without a mesh or on one device.

    `kernel_VD`: the head's kernel; on one device it may be a tree of all that `logits_fn` reads of the parameters.
    hidden: (B, L, D) or (T, D) in the compute dtype; targets int32 and weights float32 >= 0 of the leading shape.
    `logits_fn(kernel_VD, hidden_TD) -> logits_TV` float32 must treat each vocabulary entry alone (scale, softcap do):
    on a mesh with a `tensor` axis it sees a shard of the vocabulary. It must not close over traced values. With `mesh`,
    hidden must be (B, L, D), its rows divisible by data x fsdp and its length by context.
    Gradients reach the kernel and the hidden states; targets and weights count as constants.
    """
    check_blocks(blocks, mesh)
    kernel_VD, hidden, targets, weights = jax.tree.map(jnp.asarray, (kernel_VD, hidden, targets, weights))
    static = _Static(logits_fn, chunk, blocks, mesh)
    loss_sum, nll, correct = _cross_entropy(static, kernel_VD, hidden, targets, weights.astype(jnp.float32))
    return CrossEntropy(loss_sum, jax.lax.stop_gradient(nll), jax.lax.stop_gradient(correct))


def check_blocks(blocks: int, mesh: Any) -> None:
    """Raise InputError for `blocks` above 1 on a mesh of several devices."""
    if blocks > 1 and mesh is not None and mesh.size > 1:
        raise InputError(f"config: loss.blocks={blocks} is for one device, the mesh has {mesh.size}; set it to 1 "
                         "(fsdp and tensor divide the vocabulary)")


class _Static(NamedTuple):
    logits_fn: LogitsFn
    chunk: int
    blocks: int
    mesh: Mesh | None
    moves: tuple[bool, ...] = (True,)  # whether the kernel is differentiated; of a tree of them, each
    gradient_dtype: Any = jnp.float32  # of the kernel, where its gradient is formed in blocks


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(static: _Static, kernel_VD: Any, hidden: Any, targets: Any, weights: Any) -> CrossEntropy:
    return _run(static, False, kernel_VD, hidden, targets, weights)[0]


def _forward(static: _Static, *arguments: Any) -> Any:
    """A kernel that is not differentiated (LoRA, freezing) costs neither its product nor the memory of its gradient."""
    static = static._replace(moves=tuple(leaf.perturbed for leaf in jax.tree.leaves(arguments[0])))
    return _run(static, True, *jax.tree.map(lambda argument: argument.value, arguments))


def _backward(static: _Static, gradients: Any, cotangents: CrossEntropy) -> Any:
    scale = cotangents.loss_sum
    if isinstance(scale, SymbolicZero):
        return None, None, None, None
    dkernel_VD, dhidden = jax.tree.map(lambda g: (scale * g).astype(g.dtype), gradients)
    return dkernel_VD, dhidden, None, None


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _run(static: _Static, with_gradients: bool, kernel_VD: Any, hidden: Any, targets: Any, weights: Any) -> Any:
    """CrossEntropy and, when asked, (dkernel_VD, dhidden) of the loss sum, in the dtypes of kernel and hidden.

    dkernel_VD is None where the kernel is not differentiated.
    """
    def narrowed(leaf: Any) -> Any:  # once, and before devices exchange it
        return leaf.astype(hidden.dtype) if hidden.dtype.itemsize < leaf.dtype.itemsize else leaf

    static = static._replace(gradient_dtype=jax.tree.leaves(kernel_VD)[0].dtype)
    result, gradients = _spread(static, with_gradients, jax.tree.map(narrowed, kernel_VD), hidden, targets, weights)
    if gradients is not None:
        moving = _moving(static, kernel_VD)
        gradients = jax.tree.map(lambda g, leaf: g.astype(leaf.dtype), gradients[0], moving), gradients[1]
    return result, gradients


def _moving(static: _Static, kernel_VD: Any) -> Any:
    """The kernel, or None if it is not differentiated; of a tree the same, leaf by leaf."""
    leaves, structure = jax.tree.flatten(kernel_VD)
    kept = [leaf if moves else None for leaf, moves in zip(leaves, static.moves, strict=True)]
    return jax.tree.unflatten(structure, kept)


class _Layout(NamedTuple):
    """How a device's tokens and vocabulary entries lie on the mesh."""

    row_axes: tuple[str, ...] = ()  # mesh axes over which tokens are spread
    vocab_axes: tuple[str, ...] = ()  # those over which the vocabulary is, major first; () where each device has it all
    visit: bool = False  # tokens of the fsdp group visit each device's part of the vocabulary
    entries: int = 0  # vocabulary entries of one tensor shard


def _layout(mesh: Mesh, kernel_shape: tuple[int, ...], hidden_shape: tuple[int, ...]) -> _Layout:
    vocab = kernel_shape[0]
    row_axes = tuple(axis for axis in ("data", "fsdp", "context") if mesh.shape[axis] > 1)
    tensor = mesh.shape["tensor"]
    vocab_axes = ("tensor",) if tensor > 1 and vocab % tensor == 0 else ()
    tokens = math.prod(hidden_shape[:-1]) // (mesh.shape["data"] * mesh.shape["context"])
    visit = visits_vocabulary(mesh.shape, kernel_shape, tokens)
    entries = vocab // tensor if vocab_axes else vocab
    return _Layout(row_axes, (*vocab_axes, "fsdp") if visit else vocab_axes, visit, entries)


def visits_vocabulary(sizes: Mapping[str, int], kernel_shape: tuple[int, ...], tokens: int) -> bool:
    """Whether tokens visit the parts of the vocabulary: where a group of fsdp devices has at most 2 V `tokens`.

    Per device 6 D bytes a token move then, against 6 D bytes a vocabulary entry for the gathered kernel (2 there in
    bfloat16, 4 back in float32): they move as much at V tokens. Up to 2 V the memory is worth it.
    """
    vocab, width = kernel_shape
    return sizes["fsdp"] > 1 and width % sizes["fsdp"] == 0 and tokens <= 2 * vocab


def _spread(static: _Static, with_gradients: bool, kernel_VD: Any, hidden: Any, targets: Any, weights: Any) -> Any:
    """`_local` on the one device there is, or on each device of the mesh."""
    mesh = static.mesh
    if mesh is None or mesh.size == 1:
        return _local(static, with_gradients, _Layout(), kernel_VD, hidden, targets, weights)
    layout = _layout(mesh, kernel_VD.shape, hidden.shape)
    rows = spec(("batch", "length"))
    split = "tensor" if "tensor" in layout.vocab_axes else None
    scatter = mesh.shape["fsdp"] > 1 and kernel_VD.shape[1] % mesh.shape["fsdp"] == 0
    kernel_spec = PartitionSpec(split, "fsdp" if layout.visit else None)
    hidden_spec = PartitionSpec(*rows, None)
    loss_specs = CrossEntropy(PartitionSpec(), rows, rows)
    gradient_specs = PartitionSpec(split, "fsdp" if scatter else None), hidden_spec

    def body(kernel_VD: Any, *arrays: Any) -> Any:
        if layout.visit:  # a part of every entry becomes the whole of a part of the entries
            kernel_VD = jnp.pad(kernel_VD, ((0, -layout.entries % mesh.shape["fsdp"]), (0, 0)))
            kernel_VD = jax.lax.all_to_all(kernel_VD, "fsdp", 0, 1, tiled=True)
        result, gradients = _local(static, with_gradients, layout, kernel_VD, *arrays)
        result = result._replace(loss_sum=jax.lax.psum(result.loss_sum, layout.row_axes))
        if gradients is None:
            return result, None
        dkernel_VD, dhidden = gradients
        if dkernel_VD is None:
            return result, (None, dhidden)
        if layout.visit:
            dkernel_VD = jax.lax.all_to_all(dkernel_VD, "fsdp", 1, 0, tiled=True)[: layout.entries]
        elif scatter:  # each device keeps its columns, as it keeps its part of the parameter
            dkernel_VD = jax.lax.psum_scatter(dkernel_VD, "fsdp", scatter_dimension=1, tiled=True)
        others = tuple(axis for axis in layout.row_axes if not (scatter and axis == "fsdp"))
        return result, (jax.lax.psum(dkernel_VD, others), dhidden)

    return jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(kernel_spec, hidden_spec, rows, rows),
        out_specs=(loss_specs, gradient_specs if with_gradients else None),
        check_vma=False,
    )(kernel_VD, hidden, targets, weights)


def _local(
    static: _Static, with_gradients: bool, layout: _Layout, kernel_VD: Any, hidden: Any, targets: Any, weights: Any
) -> Any:
    """CrossEntropy and gradients (the kernel's in float32) of one device: of its tokens, or its vocabulary entries."""
    hidden_TD, targets_T, weights_T = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), weights.reshape(-1)
    tokens = targets_T.shape[0]
    chunk = min(static.chunk, tokens)
    # places of the supervised tokens, in order; the rest points past the end, where reads clip and writes drop
    places = jnp.nonzero(weights_T > 0, size=math.ceil(tokens / chunk) * chunk)[0]
    count, order = jnp.sum(weights_T > 0), jnp.arange(places.shape[0])
    places = jnp.where(order < count, places, tokens + order)
    if layout.row_axes:  # every device takes the same number of turns, whatever its own tokens
        count = jax.lax.pmax(count, layout.row_axes)
    head = functools.partial(_chunk, static, with_gradients, layout, kernel_VD)
    if layout.visit:
        head = functools.partial(_visited, head)

    def write(array: Any, at: Any, values: Any) -> Any:
        return array.at[at].set(values, mode="drop", unique_indices=True, indices_are_sorted=True)

    def read(array: Any, at: Any) -> Any:
        return array.at[at].get(mode="clip")

    def turn(i: Any, carry: Any) -> Any:
        total, nll_T, correct_T, gradients = carry
        at = jax.lax.dynamic_slice_in_dim(places, i * chunk, chunk)
        hidden_CD, targets_C = read(hidden_TD, at), read(targets_T, at)
        weights_C = jnp.where(at < tokens, read(weights_T, at), 0)
        nll_C, correct_C, chunk_gradients = head(hidden_CD, targets_C, weights_C)
        if with_gradients:
            dkernel_VD, dhidden_TD = gradients
            dkernel_C, dhidden_C = chunk_gradients
            dhidden_TD = write(dhidden_TD, at, dhidden_C.astype(dhidden_TD.dtype))
            dkernel_VD = jax.tree.map(lambda so_far, g: so_far + g.astype(jnp.float32), dkernel_VD, dkernel_C)
            gradients = dkernel_VD, dhidden_TD
        total += jnp.sum(weights_C * nll_C)
        return total, write(nll_T, at, nll_C), write(correct_T, at, correct_C), gradients

    turns = (count + chunk - 1) // chunk
    zeros_T = jnp.zeros((tokens,), jnp.float32)
    if static.blocks > 1 and with_gradients and static.moves == (True,):
        weights_P = jnp.where(places < tokens, read(weights_T, places), 0)
        nll_P, correct_P, dkernel_VD, dhidden_PD = cross_entropy_in_blocks(
            static.logits_fn, kernel_VD, read(hidden_TD, places), read(targets_T, places), weights_P,
            turns=turns, chunk=chunk, blocks=static.blocks, gradient_dtype=static.gradient_dtype,
        )  # fmt: skip
        total = jnp.sum(weights_P * nll_P)
        nll_T, correct_T = write(zeros_T, places, nll_P), write(zeros_T, places, correct_P)
        dhidden_TD = write(jnp.zeros_like(hidden_TD), places, dhidden_PD.astype(hidden_TD.dtype))
        gradients: Any = dkernel_VD, dhidden_TD
    else:
        gradients = None
        if with_gradients:
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), _moving(static, kernel_VD))
            gradients = zeros, jnp.zeros_like(hidden_TD)
        carry = (jnp.zeros((), jnp.float32), zeros_T, zeros_T, gradients)
        total, nll_T, correct_T, gradients = jax.lax.fori_loop(0, turns, turn, carry)
    if gradients is not None:
        gradients = gradients[0], gradients[1].reshape(hidden.shape)
    return CrossEntropy(total, nll_T.reshape(targets.shape), correct_T.reshape(targets.shape)), gradients


def _visited(head: Any, hidden_CD: Any, targets_C: Any, weights_C: Any) -> Any:
    """`head` of the chunks of all devices of the fsdp group; what it says of this device's tokens comes back."""
    gathered = (jax.lax.all_gather(x, "fsdp", tiled=True) for x in (hidden_CD, targets_C, weights_C))
    *by_token, gradients = head(*gathered)
    start = jax.lax.axis_index("fsdp") * targets_C.shape[0]
    nll_C, correct_C = (jax.lax.dynamic_slice_in_dim(x, start, targets_C.shape[0]) for x in by_token)
    if gradients is None:
        return nll_C, correct_C, None
    dkernel_VD, dhidden_TD = gradients
    dhidden_CD = jax.lax.psum_scatter(dhidden_TD, "fsdp", scatter_dimension=0, tiled=True)
    # the barrier keeps XLA from rounding the parts to the hidden states' dtype before it sums them
    return nll_C, correct_C, (dkernel_VD, jax.lax.optimization_barrier(dhidden_CD))


def _chunk(
    static: _Static,
    with_gradients: bool,
    layout: _Layout,
    kernel_VD: Any,
    hidden_TD: Any,
    targets_T: Any,
    weights_T: Any,
) -> Any:
    """(nll_T, correct_T, (dkernel_VD, dhidden_TD) or None) of one chunk; gradients in float32.

    `dhidden_TD` lacks the sum over the fsdp devices where tokens visit.
    """
    pull: Any = None
    if not with_gradients:
        logits_TV = static.logits_fn(kernel_VD, hidden_TD)
    else:  # as float32 arguments, so that their gradients are not rounded before they are summed
        kernel_VD, hidden_TD = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (kernel_VD, hidden_TD))

        def logits(moving: Any, hidden_TD: Any) -> Any:
            whole_VD = jax.tree.map(
                lambda moved, leaf: leaf if moved is None else moved, moving, kernel_VD, is_leaf=lambda x: x is None
            )
            return static.logits_fn(whole_VD, hidden_TD)

        logits_TV, pull = jax.vjp(logits, _moving(static, kernel_VD), hidden_TD)
    axes, entries = layout.vocab_axes, jnp.arange(logits_TV.shape[-1])
    if layout.visit:  # the last device's part ends in entries that do not exist
        entries += jax.lax.axis_index("fsdp") * logits_TV.shape[-1]
        entries = jnp.where(entries < layout.entries, entries, jnp.iinfo(jnp.int32).min)  # which no target equals
        logits_TV = jnp.where(entries >= 0, logits_TV, -jnp.inf)
    if "tensor" in axes:
        targets_T = targets_T - jax.lax.axis_index("tensor") * layout.entries
    is_target_TV = entries[None, :] == targets_T[:, None]
    highest_T = jnp.max(logits_TV, axis=-1)
    highest_T = jax.lax.pmax(highest_T, axes) if axes else highest_T
    normaliser_T = jnp.sum(jnp.exp(logits_TV - highest_T[:, None]), axis=-1)
    target_T = jnp.sum(jnp.where(is_target_TV, logits_TV, 0), axis=-1)
    if axes:
        normaliser_T, target_T = jax.lax.psum((normaliser_T, target_T), axes)
    nll_T = highest_T + jnp.log(normaliser_T) - target_T
    correct_T = (target_T >= highest_T).astype(jnp.float32)
    if pull is None:
        tied_T = jnp.any((logits_TV == highest_T[:, None]) & (entries[None, :] < targets_T[:, None]), axis=-1)
        tied_T = jax.lax.pmax(tied_T.astype(jnp.int32), axes) if axes else tied_T
        return nll_T, jnp.where(tied_T, 0, correct_T), None
    softmax_TV = jnp.exp(logits_TV - highest_T[:, None]) / normaliser_T[:, None]
    dkernel_VD, dhidden_TD = pull(weights_T[:, None] * (softmax_TV - is_target_TV))
    if "tensor" in axes:
        dhidden_TD = jax.lax.psum(dhidden_TD, "tensor")
    return nll_T, correct_T, (dkernel_VD, dhidden_TD)
