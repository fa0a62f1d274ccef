"""The parameters that a run starts from, goes on with, or ended with: from its model, another run, its checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from itune.checkpoint import Store
from itune.checkpoint.view import open_view
from itune.config import Config, load_config
from itune.models import load_pretrained
from itune.setup_run import Plan, make_tuning, model_settings
from itune.step import init_state
from itune.storage.bucket import is_url
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
    frozen = plan.tuning.frozen(base_weights(plan.config, plan.model, tokenizer, log))
    check_frozen(frozen, store.read(step).data, plan.config)
    return state.replace(frozen=frozen)


def base_weights(config: Config, model: Any, tokenizer: Any, log: Log) -> Any:
    """All parameters that a run begins with: of `model.path`, or those that the run of `train.init_from` ended with."""
    if not config.train.init_from:
        return load_pretrained(config.model.path, model.mesh, **model_settings(config, tokenizer))[1]
    start = config.train.init_from
    folder = open_view(start).folder if is_url(start) else Path(start)
    store = Store(folder / "checkpoints", log=log)
    step = store.newest_good()
    if step is None:
        raise InputError(f"train.init_from: {folder} has no checkpoint; it must be a run directory")
    log(f"start from the parameters of {start}, step {step}")
    theirs = load_config(folder / "config.json")
    tuning = make_tuning(theirs, model)
    return tuning.merged(*saved_halves(theirs, model, tokenizer, store, step, log))


def saved_halves(config: Config, model: Any, tokenizer: Any, store: Store, step: int, log: Log) -> tuple[Any, Any]:
    """(trainable, frozen) of a run's checkpoint; `config` is that run's."""
    tuning = make_tuning(config, model)
    trainable, frozen = tuning.abstract()
    trainable = store.restore_part(step, "trainable", trainable)
    if frozen:
        frozen = tuning.frozen(base_weights(config, model, tokenizer, log))
        check_frozen(frozen, store.read(step).data, config)
    return trainable, frozen


def check_frozen(frozen: Any, saved: dict[str, Any], config: Config) -> None:
    """Raise InputError when the frozen parameters are not those of the run that saved this data."""
    if saved.get("frozen") != frozen_digest(frozen):
        where = config.train.init_from or config.model.path
        raise InputError(
            f"{where}: its weights are not those that this run began with, and checkpoints hold only what trains; "
            "put the original model there again"
        )
