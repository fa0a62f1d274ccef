"""Our side of the training rows: the run's own plan, step and feed, timed like the peer."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.peer import measures
from benchmarks.row import Clock
from itune.config import Config, from_dict
from itune.data.loader import make_loader
from itune.data.store import memory_store
from itune.feed import feed
from itune.runtime.compilation import use_compilation_cache
from itune.setup_run import Data, make_plan, prepare_data
from itune.types import Address, Example
from itune.weights import first_state


def config_of(folder: Path, compat: str = "", **sections: dict[str, Any]) -> Config:
    """A config without evaluators, with `sections` on top."""
    tree: dict[str, Any] = {
        "seed": 42, "compat": compat, "evaluators": (), "model": {"path": str(folder / "model")},
        "data": {"cache_dir": str(folder / "cache" / "itune-data")},
    }  # fmt: skip
    for name, keys in sections.items():
        tree[name] = {**tree.get(name, {}), **keys}
    return from_dict(tree)


def without_filters() -> dict[str, str]:
    """`data.quality` with every filter off: the peer has none."""
    return dict.fromkeys(from_dict({}).to_dict()["data"]["quality"], "off")


def data_of_ids(config: Config, ids_NL: np.ndarray) -> Data:
    """Rows of token ids, every token a target, as a run's data."""
    from itune.data.templates import load_tokenizer

    tokenizer = load_tokenizer(config.model.path)
    ones = np.ones(ids_NL.shape[1], np.float32)
    store = memory_store(Example(row, ones, Address("ids", "ids", n)) for n, row in enumerate(ids_NL))
    dataset: Any = types.SimpleNamespace(train=store, held_out=[])
    return Data(tokenizer, dataset, make_loader(config, store))


def data_of_rows(config: Config) -> Data:
    return prepare_data(config, lambda _: None)


def timed(config: Config, data: Data) -> dict[str, Any]:
    """Train from `data`, one device, and measure from the end of the first step.

    As in `itune.loop` the numbers of a step are fetched after the next one was dispatched.
    """
    use_compilation_cache()
    plan = make_plan(config, data, lambda _: None)
    state = first_state(plan, data.tokenizer, lambda _: None)
    step = plan.step.lower(plan.state, plan.batch).compile()
    clock, reads, losses, tokens, waiting = Clock(), [], [], [], []

    def fetch(metrics: Any) -> None:
        losses.append(float(metrics["loss"]))
        tokens.append(float(metrics["tokens"]))
        reads.append(clock.read())

    for _, batch in feed(data.loader.iterate(), plan.mesh):
        state, metrics = step(state, batch)
        waiting.append(metrics)
        if len(waiting) > 1:
            fetch(waiting.pop(0))
    fetch(waiting.pop(0))
    jax.block_until_ready(state)
    return measures(losses, reads, sum(tokens[1:]))
