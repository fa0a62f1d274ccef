"""Takes the few steps of a run and keeps its numbers; what two rows need is computed once."""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from itune.config import Config
from itune.data.store import memory_store
from itune.evaluators.heldout_loss import Evaluator
from itune.feed import to_device
from itune.models.model import Model
from itune.models.unrolled import unroll_params
from itune.optim import rate_multipliers
from itune.setup_run import Data, Plan, make_plan
from itune.step import init_state
from itune.types import Batch, TrainState
from itune.verify.devices import usable
from itune.verify.small import STEPS, changed, quiet
from itune.verify.table import Numbers
from itune.weights import first_state

JUDGED = 24  # examples in an evaluation


class Bench:
    """A shrunk config with its data; `folder` takes the runs and exports that rows make."""

    def __init__(self, config: Config, data: Data, folder: Path) -> None:
        self.config, self.data, self.folder = config, data, folder
        self.devices = usable()

    @functools.cached_property
    def batches(self) -> list[Batch]:
        return [self.data.loader.batch(step) for step in range(STEPS)]

    @functools.cached_property
    def reference(self) -> Numbers:
        """One device, one batch a step, packed, nothing recomputed, layers scanned, the loss in chunks."""
        return self.measure({})

    def plan(self, changes: Mapping[str, Any], devices: int = 1, scan: bool = True) -> Plan:
        config = changed(self.config, changes)
        if not scan:
            config = changed(config, _unrolled_patterns(self.plan(changes, devices)))
        return make_plan(config, self.data, quiet, jax.devices()[:devices], scan=scan)

    def measure(
        self, changes: Mapping[str, Any], devices: int = 1, *, batches: Sequence[Batch] | None = None, scan: bool = True
    ) -> Numbers:
        """The numbers of the plan's own step over the batches, from the weights of the config."""
        batches = self.batches if batches is None else batches
        plan = self.plan({"train.batch_size": batches[0].tokens_BL.shape[0], **changes}, devices, scan)
        state = self.start(plan)
        metrics = []
        for batch in batches:
            state, step_metrics = plan.step(state, to_device(batch, plan.mesh))
            metrics.append(step_metrics)
        losses, norms = (np.array([float(m[name]) for m in metrics]) for name in ("loss", "grad_norm"))
        return Numbers(losses, norms, tensors(plan.model, state.trainable))

    def start(self, plan: Plan) -> TrainState:
        """The state of step 0; an unrolled model gets the layers of the scanned one."""
        if plan.model.scan:
            return first_state(plan, self.data.tokenizer, quiet)
        own = {"optimizer.rates": self.config.optimizer.rates, "train.freeze": self.config.train.freeze}
        stacked = make_plan(changed(plan.config, own), self.data, quiet, list(plan.mesh.devices.flat))
        state = first_state(stacked, self.data.tokenizer, quiet)
        trainable = unroll_params(plan.model, state.trainable)
        frozen = unroll_params(plan.model, state.frozen) if state.frozen else None
        return init_state(plan.model, trainable, plan.optimizer, plan.config.seed, plan.mesh, frozen=frozen)

    def held_out_loss(self, model: Model, params: Any, batch_size: int) -> float:
        """Loss of some held-out examples, or of training examples where nothing is held out."""
        dataset = self.data.dataset
        store = dataset.held_out if len(dataset.held_out) else dataset.train
        some = types.SimpleNamespace(held_out=memory_store(store[i] for i in range(min(JUDGED, len(store)))))
        config = changed(self.config, {"eval.batch_size": batch_size})
        return float(Evaluator(config).run(model, params, self.data.tokenizer, some)[0]["loss"])


def _unrolled_patterns(stacked: Plan) -> dict[str, Any]:
    """What optimizer.rates and train.freeze choose in the stacked model, by the paths that the unrolled one has."""
    def by_path(tree: Any, values: Any) -> dict[str, float]:
        a_layer = jax.tree.map(lambda leaf, value: np.full(leaf.shape[:1], value), tree, values)
        leaves = jax.tree_util.tree_leaves_with_path(unroll_params(stacked.model, a_layer))
        paths = {jax.tree_util.keystr(path, simple=True, separator="/"): float(leaf.flat[0]) for path, leaf in leaves}
        return {f"^{re.escape(path)}$": value for path, value in paths.items()}

    config, state = stacked.config, stacked.state
    changes: dict[str, Any] = {}
    if config.optimizer.rates:
        rates = rate_multipliers(state.trainable, config.optimizer.rates)
        changes["optimizer.rates"] = by_path(state.trainable, rates)
    if config.train.freeze:
        changes["train.freeze"] = "|".join(by_path(state.frozen, jax.tree.map(lambda leaf: 0.0, state.frozen)))
    return changes


def tensors(model: Model, params: Any) -> dict[str, np.ndarray]:
    """Path -> tensor on the host, every layer by itself, as checkpoints of Hugging Face have them."""
    params = jax.tree.map(np.asarray, params)
    if model.scan:
        params = unroll_params(model, params)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
