"""An optimizer of optax by its name, made fit for a run: its settings, its weight decay, its precision, its tensors."""

from __future__ import annotations

import difflib
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from itune.types import InputError

# those that read norms of whole tensors: the layers that a model stacks must reach them one by one
BY_TENSOR = frozenset({"adafactor", "fromage", "lamb", "lars", "novograd"})
_MASKS = ("mask", "weight_decay_mask")  # what optimizers call the choice of the parameters that decay


class LayersState(NamedTuple):
    """The states of an optimizer for the stacked layers (a leading axis of layers everywhere) and for all else."""

    layers: Any
    others: Any


class DecayState(NamedTuple):
    """The state of an optimizer, and the steps so far (int32)."""

    inner: Any
    count: Any


def optax_optimizer(
    section: Any, schedule: Callable[[Any], Any], mask: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """The optax optimizer that `section` (config `optimizer`) names. `mask(params)`: a tree of bools, what decays.

    Its state is float32 whatever the dtype of the parameters, where no setting says otherwise. Raises InputError for an
    unknown name, and for a setting that the optimizer does not have.
    """
    names = optimizer_names()
    if section.name not in names:
        near = difflib.get_close_matches(section.name, names, n=1, cutoff=0.4)
        hint = f"; nearest: {near[0]}" if near else ""
        raise InputError(
            f"config: optimizer.name {section.name!r} is no optimizer that optax or itune has{hint}; "
            f"there are {', '.join(names)}"
        )
    build = getattr(optax, section.name)
    known = inspect.signature(build).parameters
    settings = accepted(section.name, build, {**_changed(section, known), **dtypes(section.options)})
    decays = bool(settings.get("weight_decay") or settings.get("weight_decay_rate"))
    masks = [name for name in _MASKS if name in known]
    if decays and masks:
        settings = {masks[0]: mask, **settings}
    optimizer = build(schedule, **settings)
    if decays and not masks:
        optimizer = _in_two(optimizer, build(schedule, **{**settings, "weight_decay": 0.0}), mask)
    if section.name in BY_TENSOR:
        optimizer = _layer_by_layer(optimizer)
    if section.weight_decay and section.name == "sgd":
        optimizer = optax.chain(optax.add_decayed_weights(section.weight_decay, mask), optimizer)
    if section.weight_decay and "weight_decay_rate" in known:
        optimizer = _with_decay(optimizer, schedule, section.weight_decay, mask)
    return _in_float32(optimizer)


def optimizer_names() -> list[str]:
    """`adamw` and every optax optimizer that takes a schedule and needs nothing else."""
    names = {"adamw"}
    for name, build in vars(optax).items():
        if not inspect.isfunction(build) or name.startswith(("_", "scale_by_")) or name == "lbfgs":  # it needs the loss
            continue
        known = inspect.signature(build).parameters
        needed = {p.name for p in known.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
        rate = known.get("learning_rate")
        if rate is not None and needed <= {"learning_rate"} and "Callable" in str(rate.annotation):
            names.add(name)
    return sorted(names)


def _in_float32(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer` on float32 copies of the parameters. Gradients are float32: beside bfloat16 parameters the state of
    most optimizers would begin in bfloat16 and be float32 after a step."""
    def view(params: Any) -> Any:
        return jax.tree.map(lambda p: p.astype(jnp.float32), params)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return optimizer.update(gradients, state, view(params))

    return optax.GradientTransformation(lambda params: optimizer.init(view(params)), update)


def _layer_by_layer(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer` for each layer of `blocks`, whose leaves have a leading axis of layers, and for all else as it is."""
    def apart(tree: Any) -> tuple[Any, Any]:
        layers = {name: part for name, part in tree.items() if name == "blocks"}
        return layers, {name: part for name, part in tree.items() if name != "blocks"}

    def init(params: Any) -> LayersState:
        layers, others = apart(params)
        return LayersState(jax.vmap(optimizer.init)(layers) if layers else (), optimizer.init(others))

    def update(gradients: Any, state: LayersState, params: Any = None) -> tuple[Any, LayersState]:
        (layer_gradients, other_gradients), (layers, others) = apart(gradients), apart(params)
        updates, state_of_layers = {}, ()
        if layers:
            updates, state_of_layers = jax.vmap(optimizer.update)(layer_gradients, state.layers, layers)
        other_updates, state_of_others = optimizer.update(other_gradients, state.others, others)
        return {**updates, **other_updates}, LayersState(state_of_layers, state_of_others)

    return optax.GradientTransformation(init, update)


def _in_two(decaying: Any, plain: Any, mask: Callable[[Any], Any]) -> optax.GradientTransformation:
    """`decaying` for the parameters of the mask and `plain` for the others: for an optimizer that knows no mask."""
    def others(params: Any) -> Any:
        return jax.tree.map(operator.not_, mask(params))

    return optax.chain(optax.masked(decaying, mask), optax.masked(plain, others))


def _with_decay(
    optimizer: optax.GradientTransformation, schedule: Callable[[Any], Any], rate: float, mask: Callable[[Any], Any]
) -> optax.GradientTransformation:
    """`optimizer`, and p <- p - learning rate x `rate` p for the parameters of the mask, as torch's Adafactor decays.

    Optax's own adds its rate after the learning rate was applied: 0.1 would take a tenth of a weight in every step.
    """
    def update(gradients: Any, state: DecayState, params: Any = None) -> tuple[Any, DecayState]:
        updates, inner = optimizer.update(gradients, state.inner, params)
        shrink = schedule(state.count) * rate
        updates = jax.tree.map(lambda u, p, decays: u - shrink * p if decays else u, updates, params, mask(params))
        return updates, DecayState(inner, state.count + 1)

    return optax.GradientTransformation(lambda p: DecayState(optimizer.init(p), jnp.zeros((), jnp.int32)), update)


def _changed(section: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the section that differ from their defaults, under the names that the optax optimizer gives them."""
    defaults = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
    settings = {name: getattr(section, name) for name, usual in defaults.items() if getattr(section, name) != usual}
    ours = section.name == "sgd" or "weight_decay_rate" in known  # `optax_optimizer` makes their decay
    if not ours and (section.weight_decay or "weight_decay" in known):  # 0 too: some decay by default
        settings["weight_decay"] = section.weight_decay
    if section.moment_dtype != "float32":
        name = next((n for n in ("mu_dtype", "accumulator_dtype", "dtype_momentum") if n in known), "moment_dtype")
        settings[name] = jnp.dtype(section.moment_dtype)
    if getattr(section, "second_moment_dtype", "float32") != "float32":
        settings["second_moment_dtype"] = section.second_moment_dtype  # which no optimizer of optax has
    return settings


def dtypes(options: Any) -> dict[str, Any]:
    """Options with the text of every `*dtype*` key as a dtype."""
    return {key: jnp.dtype(v) if "dtype" in key and isinstance(v, str) else v for key, v in options.items()}


def accepted(name: str, build: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """`settings`, after a check that the function which builds the optimizer takes each of them."""
    known = [key for key in inspect.signature(build).parameters if key != "learning_rate"]
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; nearest: {near[0]}" if near else ""
            raise InputError(f"config: optimizer {name!r} has no setting {key!r}{hint}; it takes {', '.join(known)}")
    return settings
