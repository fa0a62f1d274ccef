"""The parameters that a run starts from, goes on with, or ended with: from its model, another run, its checkpoints."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from itune.checkpoint import Store
from itune.config import Config
from itune.data.templates import load_tokenizer
from itune.models import load_model, load_pretrained
from itune.run_source import check_source
from itune.setup_run import Plan, make_tuning, model_settings
from itune.start_run import open_start, run_config
from itune.step import init_state
from itune.tuning import frozen_digest
from itune.types import InputError, TrainState

Log = Callable[[str], None]


def first_state(plan: Plan, tokenizer: Any, log: Log) -> TrainState:
    """The state of step 0: the parameters of the model or of `train.init_from`, divided; new adapters where asked."""
    load = functools.partial(base_weights, plan.config, plan.model, tokenizer, log)
    trainable, frozen = plan.tuning.divide(load, plan.config.seed)
    return init_state(plan.model, trainable, plan.optimizer, plan.config.seed, plan.mesh, frozen=frozen or None)


def resumed_state(plan: Plan, store: Store, step: int, tokenizer: Any, log: Log) -> TrainState:
    """The state of a checkpoint, with what is frozen read again where the run began.

    Raises InputError when that is no longer what the run began with.
    """
    state = store.restore(step, plan.state.replace(frozen={}))
    if not plan.state.frozen:
        return state
    return state.replace(frozen=frozen_weights(plan.config, plan.model, tokenizer, store.read(step).data, log))


def base_weights(config: Config, model: Any, tokenizer: Any, log: Log, step: int | None = None) -> Any:
    """All parameters that a run begins with: of `model.path`, or those that the run of `train.init_from` ended with.

    `step`: of that run, its newest without one. They are brought to the dtype of `model` and to its vocabulary.
    """
    if not config.train.init_from:
        return load_pretrained(config.model.path, model.mesh, **model_settings(config, tokenizer))[1]
    start = config.train.init_from
    folder, store = open_start(config, log)
    step = store.newest_good() if step is None else step
    if step is None:
        raise InputError(f"train.init_from: {folder} has no checkpoint; it must be a run directory")
    log(f"start from the parameters of {start}, step {step}")
    theirs = run_config(folder)
    their_model, their_tokenizer = _their_model(theirs, model, tokenizer, store.read(step).data, log)
    tuning = make_tuning(theirs, their_model)
    params = tuning.merged(*saved_halves(theirs, their_model, their_tokenizer, store, step, log))
    return _brought(params, their_model, model, start)


def frozen_weights(config: Config, model: Any, tokenizer: Any, saved: dict[str, Any], log: Log) -> Any:
    """What is frozen in a run whose checkpoint has this data, as when the run began. InputError where it is gone."""
    tuning, steps = make_tuning(config, model), []
    for step in _start_steps(config, log):
        frozen = tuning.frozen(base_weights(config, model, tokenizer, log, step))
        if saved.get("frozen") == frozen_digest(frozen):
            return frozen
        steps.append(str(step))
    where, what = config.model.path, "its weights are not those"
    if config.train.init_from:
        where, what = config.train.init_from, f"none of its steps ({', '.join(reversed(steps))}) is the one"
    raise InputError(f"{where}: {what} that this run began with, and checkpoints hold only what trains; put the "
                     "original there again")


def _start_steps(config: Config, log: Log) -> Iterator[int | None]:
    """Steps of `train.init_from` that this run may have begun with, the newest first: that run may have gone on."""
    if not config.train.init_from:
        yield None
        return
    store = open_start(config, log)[1]
    newest = store.newest_good()
    yield newest
    yield from (step for step in reversed(store.steps()) if step < (newest or 0) and not store.verify(step))


def saved_halves(config: Config, model: Any, tokenizer: Any, store: Store, step: int, log: Log) -> tuple[Any, Any]:
    """(trainable, frozen) of a run's checkpoint; `config` is that run's."""
    trainable, frozen = make_tuning(config, model).abstract()
    trainable = store.restore_part(step, "trainable", trainable)
    if frozen:
        frozen = frozen_weights(config, model, tokenizer, store.read(step).data, log)
    return trainable, frozen


def _their_model(theirs: Config, model: Any, tokenizer: Any, saved: dict[str, Any], log: Log) -> tuple[Any, Any]:
    """Model and tokenizer of another run, whose checkpoint has the data `saved`, on our mesh, in its own dtypes.

    Raises InputError where another model lies now where it began.
    """
    path, template = theirs.model.path, theirs.data.chat_template
    try:
        own = load_tokenizer(path, template, theirs.model.revision or None)
        found = load_model(path, model.mesh, **model_settings(theirs, own))
    except InputError:  # what it began from is gone: of a run that trained everything nothing else is needed
        return dataclasses.replace(model, param_dtype=theirs.model.param_dtype), tokenizer
    check_source(theirs.model, own, saved, log)
    return found, own


def _brought(params: Any, theirs: Any, ours: Any, start: str) -> Any:
    """Parameters of one model for another that differs in dtype, or in tokens that its template adds."""
    if differ := [
        field.name for field in dataclasses.fields(ours.config)
        if field.name not in ("vocab_size", "init_std", "max_length")
        and getattr(ours.config, field.name) != getattr(theirs.config, field.name)
    ]:  # fmt: skip
        raise InputError(f"train.init_from: {start} tuned another model than model.path: {', '.join(differ)} differ")
    if theirs.config.vocab_size > ours.config.vocab_size:
        raise InputError(f"train.init_from: {start} has {theirs.config.vocab_size} tokens, this run "
                         f"{ours.config.vocab_size}; take its data.chat_template")
    wanted, structure = jax.tree.flatten(ours.abstract_params())
    places = jax.tree.leaves(ours.shardings()) or [None] * len(wanted)
    leaves = jax.tree.leaves(params)
    del params
    for index, (leaf, place) in enumerate(zip(wanted, places, strict=True)):
        if (leaves[index].shape, leaves[index].dtype) != (leaf.shape, leaf.dtype):  # one by one: no second copy of all
            leaves[index] = jax.jit(_fitted, static_argnums=(1, 2), out_shardings=place)(
                leaves[index], leaf.shape[0], leaf.dtype.name
            )
    return jax.tree.unflatten(structure, leaves)


def _fitted(leaf: jax.Array, rows: int, dtype: str) -> jax.Array:
    """In another dtype, with more rows: each the mean of those that there were, as for tokens new to a checkpoint."""
    if leaf.shape[0] == rows:
        return leaf.astype(dtype)
    mean = leaf.astype(jnp.float32).mean(0, keepdims=True).astype(dtype)
    return jnp.concatenate([leaf.astype(dtype), jnp.broadcast_to(mean, (rows - leaf.shape[0], *leaf.shape[1:]))])
