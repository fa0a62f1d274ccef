"""The training step and the evaluation step: pure functions, jitted once, the state donated."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from itune.objectives.objective import Objective
from itune.optim import Schedule, clip_by_global_norm
from itune.rounding import round_tree
from itune.sharding import batch_sharding, is_one_cpu, replicated, rows_divisor, spec, tree_shardings
from itune.spikes import judge
from itune.types import Batch, InputError, TrainState
from itune.xla import options

Metrics = dict[str, Any]
_ROUNDING = 0x726F756E  # the stream of random bits of stochastic rounding: no micro-batch has this number


def init_state(
    model: Any, params: Any, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh, *, frozen: Any = None
) -> TrainState:
    """The state of step 0. `params` on the mesh keep their placement; the optimizer's state is born in the same.

    Parameters that do not lie on `mesh` are placed by the model's logical axes first. `frozen`: what the model also
    reads and the optimizer leaves alone (nothing for full tuning; then `params` is what trains, an adapter say).
    """
    if frozen is None and not all(_placed(leaf, mesh) for leaf in jax.tree.leaves(params)):
        params = jax.device_put(params, tree_shardings(mesh, model.logical_axes()))
    shardings = optimizer_shardings(optimizer, params, mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    step, rng = jax.device_put((jnp.zeros((), jnp.int32), jax.random.key_data(jax.random.key(seed))), replicated(mesh))
    return TrainState(step=step, trainable=params, frozen=frozen or {}, opt_state=opt_state, rng=rng)


def abstract_state(
    model: Any, optimizer: optax.GradientTransformation, mesh: Mesh, *, trainable: Any = None, frozen: Any = None
) -> TrainState:
    """The same state as ShapeDtypeStructs with shardings: for ahead-of-time compilation and for restoring."""
    if trainable is None:
        trainable = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            model.abstract_params(),
            tree_shardings(mesh, model.logical_axes()),
        )
    opt_state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(optimizer.init, trainable),
        optimizer_shardings(optimizer, trainable, mesh),
    )
    rng = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh)),
        trainable=trainable,
        frozen=frozen or {},
        opt_state=opt_state,
        rng=jax.ShapeDtypeStruct(rng.shape, rng.dtype, sharding=replicated(mesh)),
    )


def optimizer_shardings(optimizer: optax.GradientTransformation, params: Any, mesh: Mesh) -> Any:
    """Shardings of the optimizer's state: what stands for a parameter (same path, same shape) lies as it does.

    All else (counts, factored moments) is replicated. `params`: arrays or ShapeDtypeStructs with shardings.
    """
    by_path = dict(jax.tree_util.tree_leaves_with_path(params))

    def lies(path: Any, leaf: Any) -> Any:
        for start in range(len(path)):
            twin = by_path.get(path[start:])
            if twin is not None and twin.shape == leaf.shape and twin.sharding is not None:
                return twin.sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(lies, jax.eval_shape(optimizer.init, params))


def _placed(leaf: Any, mesh: Mesh) -> bool:
    return isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh == mesh


class TrainStep:
    """`step(state, batch) -> (state, metrics)`; `step.lower(state, batch)` for ahead-of-time compilation.

    The state is donated: do not use it again. The new state lies on the devices as the old one did.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self._jitted: Any = None

    def _jit(self, state: TrainState) -> Any:
        if isinstance(state.step, jax.core.Tracer):  # inside another jit or eval_shape, where nothing has a place yet
            return self._function
        if self._jitted is None:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
            told = options(next(iter(shardings.step.device_set)))
            self._jitted = jax.jit(
                self._function, donate_argnums=0, out_shardings=(shardings, None), compiler_options=told
            )
        return self._jitted

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return self._jit(state)(state, batch)

    def trace(self, state: TrainState, batch: Batch) -> Any:
        """What `jax.jit(...).trace` gives: its `.jaxpr` to count in, its `.lower()` to compile."""
        return self._jit(state).trace(state, batch)

    def lower(self, state: TrainState, batch: Batch) -> Any:
        return self._jit(state).lower(state, batch)


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    mesh: Mesh,
    *,
    accumulation: int = 1,
    clip_norm: float = 1.0,
    clip_eps: float = 1e-6,
    stochastic_rounding: bool = False,
    spike_sigmas: float = 0.0,
) -> TrainStep:
    """One optimizer step on one global batch, in `accumulation` micro-batches whose gradients are summed in float32.

    Row r belongs to micro-batch r mod `accumulation`, so that every device keeps its rows. Gradients of the loss sums
    are divided once by the weight sum of the whole batch, then clipped to the global norm `clip_norm` (0: not).
    Metrics (device scalars): loss (what is minimised), grad_norm (before clipping), learning_rate (the one used),
    accuracy, supervised_tokens (weight above 0), tokens (padding left out), finite (loss and norm are; if not,
    parameters and moments stay as they were); router_aux where the objective has it (before its coefficient).
    With `stochastic_rounding` bfloat16 parameters take their update at random up or down (`itune.rounding`), by the
    state's rng and step. With `spike_sigmas` (the optimizer is then one `with_window`) the metrics have also spike:
    whether the update was left out as `itune.spikes.judge` says.
    Raises InputError at the first call when the batch cannot be cut.
    """
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        check_batch(batch, mesh, accumulation)
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        gradients, sums = _accumulate(objective, state, batch, rng, mesh, accumulation)
        weight = sums["weight"] if objective.divide else jnp.ones(())
        inverse = jnp.where(weight > 0, 1 / jnp.where(weight > 0, weight, 1), 0)
        gradients = jax.tree.map(lambda g: g * inverse, gradients)
        gradients, grad_norm = clip_by_global_norm(gradients, clip_norm, clip_eps)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
        if stochastic_rounding:
            exact = jax.tree.map(lambda p, u: p.astype(jnp.float32) + u, state.trainable, updates)
            seed = jax.random.bits(jax.random.fold_in(rng, _ROUNDING), (), jnp.uint32)
            trainable = round_tree(exact, state.trainable, seed)
        else:
            trainable = optax.apply_updates(state.trainable, updates)
        loss = sums["loss"] * inverse
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        taken, marks = finite, {"finite": finite}
        if spike_sigmas:
            marks["spike"], window = judge(state.opt_state.window, loss, grad_norm, spike_sigmas)
            taken = finite & ~marks["spike"]
        trainable = _chosen(taken, trainable, state.trainable)
        opt_state = _chosen(taken, opt_state, state.opt_state)
        if spike_sigmas:
            opt_state = opt_state._replace(window=window)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step),
            "accuracy": sums["correct"] / jnp.maximum(sums["supervised_tokens"], 1),
            "supervised_tokens": sums["supervised_tokens"],
            "tokens": sums["tokens"],
            **marks,
        }
        if "router_aux" in sums:
            metrics["router_aux"] = sums["router_aux"] * inverse
        return state.replace(step=state.step + 1, trainable=trainable, opt_state=opt_state), metrics

    return TrainStep(train_step)


def _chosen(taken: Any, new: Any, old: Any) -> Any:
    """`new` where the update is made. Counters advance all the same: the learning rate stays that of the step."""
    def choose(after: Any, before: Any) -> Any:
        return jnp.where(taken, after, before) if jnp.issubdtype(after.dtype, jnp.inexact) else after

    return jax.tree.map(choose, new, old)


def all_finite(tree: Any) -> Any:
    """Whether every number of a pytree is finite: a boolean scalar on the devices."""
    found = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack(found).all() if found else jnp.ones((), bool)


def _accumulate(
    objective: Objective, state: TrainState, batch: Batch, rng: Any, mesh: Mesh, accumulation: int
) -> tuple[Any, Metrics]:
    """Float32 gradients of the loss sum, and the sums to report, over all micro-batches."""
    def one(micro: Batch, rng: Any) -> tuple[Any, Metrics]:
        def loss(trainable: Any) -> tuple[Any, Metrics]:
            loss_sum, weight_sum, metrics = objective(trainable, state.frozen, micro, rng)
            return loss_sum, {**metrics, "loss": loss_sum, "weight": weight_sum}

        gradients, sums = jax.grad(loss, has_aux=True)(state.trainable)
        sums["supervised_tokens"] = jnp.sum(micro.loss_weights_BL > 0)
        sums["tokens"] = jnp.sum(micro.segment_ids_BL > 0)
        return jax.tree.map(lambda g: g.astype(jnp.float32), gradients), sums

    if accumulation == 1:
        return one(batch, rng)

    def cut(array_BL: Any) -> Any:
        rows, length = array_BL.shape
        micro_ABL = array_BL.reshape(rows // accumulation, accumulation, length).swapaxes(0, 1)
        layout = NamedSharding(mesh, PartitionSpec(None, *spec(("batch", "length"))))
        return jax.lax.with_sharding_constraint(micro_ABL, layout)

    def add(total: Any, micro: Any) -> tuple[Any, None]:
        index, micro_batch = micro

        def added(total: Any) -> Any:
            return jax.tree.map(jnp.add, total, one(micro_batch, jax.random.fold_in(rng, index)))

        if not is_one_cpu(mesh):
            return added(total), None
        # the last batch of a pass is filled up with rows of padding, and zeros are what a micro-batch of them adds
        return jax.lax.cond(jnp.all(micro_batch.segment_ids_BL == 0), lambda total: total, added, total), None

    micro_batches = Batch(*map(cut, batch))
    first = Batch(*(array[0] for array in micro_batches))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(one, first, rng))
    return jax.lax.scan(add, zeros, (jnp.arange(accumulation), micro_batches))[0]


def check_batch(batch: Batch, mesh: Mesh, accumulation: int = 1) -> None:
    """Raises InputError when the rows cannot be cut into micro-batches over the mesh, or the length over `context`."""
    rows, length = batch.tokens_BL.shape
    unit, context = rows_divisor(mesh) * accumulation, mesh.shape["context"]
    if rows % unit:
        raise InputError(
            f"train.batch_size: {rows} rows do not divide into {accumulation} micro-batches over "
            f"{rows_divisor(mesh)} devices (data x fsdp): it must be a multiple of {unit}; "
            f"nearest: {_nearest(rows, unit)}"
        )
    if length % context:
        raise InputError(
            f"data.max_length: rows of {length} tokens do not divide over mesh.context={context}; "
            f"nearest: {_nearest(length, context)}"
        )


def _nearest(number: int, unit: int) -> str:
    below = number // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def make_eval_step(objective: Objective, mesh: Mesh) -> Any:
    """Jitted `(trainable, frozen, batch) -> (nll_BL, correct_BL)`: float32, 0 where the weight is 0, not weighted.

    The losses are per token and whole on every device, so that the caller attributes them to examples and categories.
    """
    def eval_step(trainable: Any, frozen: Any, batch: Batch) -> tuple[Any, Any]:
        check_batch(batch, mesh)
        batch = Batch(*(jax.lax.with_sharding_constraint(array, batch_sharding(mesh)) for array in batch))
        return objective.per_token(trainable, frozen, batch)

    return jax.jit(eval_step, out_shardings=replicated(mesh), compiler_options=options(mesh.devices.flat[0]))
