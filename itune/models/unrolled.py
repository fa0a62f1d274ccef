"""The same model with every layer on its own: what decoding runs.

A scan reads each layer's weights and its part of the cache out of stacked arrays, and writes the cache back, in every
step: it copies both once a token. Training does not notice; a decode step, which does little else, takes twice as long.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from itune.models.architecture import layer_plan
from itune.models.layers import ADAPTERS
from itune.models.model import Model


def unroll(model: Model) -> Model:
    """The model that reads the results of `unroll_params` and `unroll_cache`."""
    return dataclasses.replace(model, scan=False, remat="none")


def unroll_params(model: Model, params: Any) -> Any:
    """Parameters with the stacked layers taken apart: rest_0 .. rest_(layers - 1) in the order of the model."""
    if ADAPTERS in params:
        base = {name: leaf for name, leaf in params.items() if name != ADAPTERS}
        return {**unroll_params(model, base), ADAPTERS: unroll_params(model, params[ADAPTERS])}
    whole = {name: leaf for name, leaf in params.items() if name != "blocks" and not name.startswith("rest_")}
    rest = [params.get(name, {}) for name in _rest_names(model)]
    layers = _layers(model, params.get("blocks", {}), "layer_{}", rest)
    return {**whole, **{f"rest_{i}": layer for i, layer in enumerate(layers)}}


def unroll_cache(model: Model, cache: Any) -> Any:
    """The cache of a prefill by `model`, as the unrolled model reads it."""
    blocks = {f"{i}": block for i, block in enumerate(cache["blocks"])}
    return {**cache, "blocks": (), "rest": tuple(_layers(model, blocks, "{}", cache["rest"]))}


def _rest_names(model: Model) -> list[str]:
    period, repeats = layer_plan(model.config.kinds)
    return [f"rest_{i}" for i in range(model.config.num_layers - period * repeats)]


def _layers(model: Model, blocks: Any, name: str, rest: Any) -> list[Any]:
    period, repeats = layer_plan(model.config.kinds)
    scanned = [
        jax.tree.map(lambda leaf, turn=layer // period: leaf[turn], blocks.get(name.format(layer % period), {}))
        for layer in range(period * repeats)
    ]
    return [*scanned, *rest]
