"""Learning-rate schedules, the decay mask, and the optimizer by name."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from itune.optax_optimizer import accepted, dtypes, optax_optimizer
from itune.rounding import round_tree
from itune.types import InputError

Schedule = Callable[[Any], Any]

# what weight decay leaves alone: norms and biases, by any part of a parameter's path
NO_DECAY = re.compile(r"(^|_)(norm|layernorm|rmsnorm|bias)($|_|\d)")
DECAY_SHARE_OF_WSD = 0.2
_MOST_STEPS = 10_000_000  # of a run: the compiled step holds the learning rate of each


def learning_rates(section: Any, total_steps: int) -> np.ndarray:
    """The learning rate of steps 0..total_steps, float64 (total_steps + 1 numbers; the last is where the run arrives).

    Step k of T with w warm-up steps has k / w of the peak while k < w. Then linear: (T - k) / (T - w); cosine:
    (1 + cos(pi (k - w) / (T - w))) / 2; constant: 1; wsd: 1, and over the last 20 % of T linear to 0. `warmup` below 1
    is a share of T, rounded up. These are transformers' schedules (`optimization.py`; constant is its
    `constant_with_warmup`, wsd its `warmup_stable_decay` with a linear decay): a warm-up's step 0 has rate 0.
    Raises InputError for more than ten million steps.
    """
    if total_steps > _MOST_STEPS:
        raise InputError(f"config: train.epochs and train.max_steps make {total_steps:,} steps; expected at most "
                         f"{_MOST_STEPS:,}, whose learning rates fit into memory")
    warmup = math.ceil(section.warmup * total_steps) if section.warmup < 1 else int(section.warmup)
    k = np.arange(total_steps + 1, dtype=np.float64)
    left = np.maximum(0.0, total_steps - k)
    if section.schedule == "linear":
        after = left / max(1, total_steps - warmup)
    elif section.schedule == "cosine":
        after = np.maximum(0.0, 0.5 * (1.0 + np.cos(np.pi * (k - warmup) / max(1, total_steps - warmup))))
    elif section.schedule == "constant":
        after = np.ones_like(k)
    elif section.schedule == "wsd":
        after = np.minimum(1.0, left / max(1, int(DECAY_SHARE_OF_WSD * total_steps)))
    else:
        known = "linear, cosine, constant or wsd"
        raise InputError(f"config: optimizer.schedule must be {known}, found {section.schedule!r}")
    return section.learning_rate * np.where(k < warmup, k / max(1, warmup), after)


def make_schedule(section: Any, total_steps: int) -> Schedule:
    """`schedule(step) -> learning rate` (float32), step counted from 0, past the end the last value.

    The rates are computed in float64 and rounded once, as torch does, so they equal a torch run's.
    """
    table = learning_rates(section, total_steps).astype(np.float32)
    return lambda step: jnp.asarray(table)[jnp.minimum(step, total_steps)]


def decay_mask(params: Any) -> Any:
    """True for every parameter that weight decay shrinks: all but norms and biases."""
    def decayed(path: Any, _: Any) -> bool:
        return not any(NO_DECAY.search(str(getattr(key, "key", getattr(key, "name", key)))) for key in path)

    return jax.tree_util.tree_map_with_path(decayed, params)


def clip_by_global_norm(gradients: Any, max_norm: float, eps: float = 1e-6) -> tuple[Any, Any]:
    """(gradients * min(1, max_norm / (norm + eps)), norm before clipping); max_norm 0 clips nothing.

    With the default `eps` this is `torch.nn.utils.clip_grad_norm_`.
    """
    norm = optax.tree.norm(gradients)
    if max_norm == 0:
        return gradients, norm
    factor = jnp.minimum(1.0, max_norm / (norm + eps))
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), gradients), norm


def adamw(
    learning_rate: Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Any = None,
    mu_dtype: Any = jnp.float32,
    nu_dtype: Any = jnp.float32,
) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) as torch computes it: p <- p (1 - lr wd) - lr m_hat / (sqrt(v_hat) + eps).

    `mask(params)`: a tree of bools, True where weight decay applies. Moments are updated in float32 and stored in
    `mu_dtype` and `nu_dtype`. Bias corrections 1 - b^t go through expm1: in float32 the power itself makes them wrong
    by 1e-5 for b = 0.999 at t = 1.
    """
    def init(params: Any) -> optax.ScaleByAdamState:
        return optax.ScaleByAdamState(
            count=jnp.zeros((), jnp.int32),
            mu=jax.tree.map(lambda p: jnp.zeros_like(p, mu_dtype), params),
            nu=jax.tree.map(lambda p: jnp.zeros_like(p, nu_dtype), params),
        )

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        rate, count = learning_rate(state.count), state.count + 1
        correction1, correction2 = (-jnp.expm1(count * np.float32(math.log(b))) if b else 1.0 for b in (b1, b2))
        mu = jax.tree.map(lambda m, g: b1 * m.astype(jnp.float32) + (1 - b1) * g, state.mu, gradients)
        nu = jax.tree.map(lambda v, g: b2 * v.astype(jnp.float32) + (1 - b2) * g * g, state.nu, gradients)

        def change(m: Any, v: Any, p: Any, decayed: bool) -> Any:
            shrink = rate * weight_decay * p.astype(jnp.float32) if weight_decay and decayed else 0.0
            return -(rate / correction1) * m / (jnp.sqrt(v) / jnp.sqrt(correction2) + eps) - shrink

        decayed = mask(params) if mask is not None else jax.tree.map(lambda _: True, params)
        updates = jax.tree.map(change, mu, nu, params, decayed)
        mu = jax.tree.map(lambda m: m.astype(mu_dtype), mu)
        # to nearest, 0.999 v would round back to v in bfloat16 and never shrink
        nu = round_tree(nu, state.nu, jnp.uint32(0x6E75) + count.astype(jnp.uint32))
        return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def make_optimizer(section: Any, total_steps: int, params_abstract: Any = None) -> optax.GradientTransformation:
    """The optimizer that `section` (config `optimizer`) names, its schedule inside; clipping is the step's.

    `adamw` is torch's. Any other name is an optax optimizer that takes `learning_rate`; it gets `optimizer.options`,
    weight_decay, and b1, b2, eps and moment_dtype where they differ from the defaults (`itune.optax_optimizer`). `sgd`
    and `adafactor` decay as torch's do: the decay of `sgd` joins the gradient. `optimizer.rates` multiplies what an
    update changes in the parameters whose path a regular expression matches, decay included: their own learning rate.
    With `params_abstract`, the tree that will be trained, the optimizer is also traced on it. Raises InputError for an
    unknown name or option, and for a setting that the optimizer cannot follow.
    """
    rates = getattr(section, "rates", {})
    if params_abstract is not None:
        rate_multipliers(params_abstract, rates)
    try:
        optimizer = _with_rates(_build(section, make_schedule(section, total_steps)), rates)
        if params_abstract is not None:
            _check_state(section.name, optimizer, params_abstract)
    except (TypeError, ValueError, AttributeError) as error:  # what optax raises for a value of the wrong kind
        raise InputError(f"config: optimizer {section.name!r} does not accept {section.options}: {error}") from error
    return optimizer


def _check_state(name: str, optimizer: optax.GradientTransformation, params_abstract: Any) -> None:
    """Raise InputError where an update leaves a state of other dtypes, which no compiled step could take in place."""
    gradients = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), params_abstract)
    before = jax.eval_shape(optimizer.init, params_abstract)
    _, after = jax.eval_shape(optimizer.update, gradients, before, params_abstract)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        if old.dtype != new.dtype:
            raise InputError(f"config: optimizer {name!r} cannot run with these dtypes: its state is {old.dtype} "
                             f"before a step and {new.dtype} after it")


def rate_multipliers(params: Any, rates: Mapping[str, float]) -> Any:
    """The tree of numbers that learning rates are multiplied by: of the first pattern of `rates` that matches, else 1.

    Patterns are regular expressions over paths such as blocks/layer_0/mlp/up_proj/kernel and may match any part.
    Raises InputError for a number below 0, and for a pattern that decides about no parameter.
    """
    unused = set(rates)

    def multiplier(path: Any, _: Any) -> float:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        pattern = next((pattern for pattern in rates if re.search(pattern, name)), None)
        unused.discard(pattern or "")
        return 1.0 if pattern is None else float(rates[pattern])

    for pattern, value in rates.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise InputError(f"config: optimizer.rates[{pattern!r}] must be a number of at least 0, found {value!r}")
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"config: optimizer.rates: {pattern!r} is no regular expression: {error}") from error
    tree = jax.tree_util.tree_map_with_path(multiplier, params)
    if unused:
        leaves = jax.tree_util.tree_leaves_with_path(params)
        paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
        near = difflib.get_close_matches(sorted(unused)[0], paths, n=1, cutoff=0.0)
        raise InputError(
            f"config: optimizer.rates: {sorted(unused)[0]!r} decides about no parameter that trains (the first pattern "
            f"that matches does); the nearest path is {near[0]}"
        )
    return tree


def _with_rates(optimizer: optax.GradientTransformation, rates: Any) -> optax.GradientTransformation:
    if not rates:
        return optimizer

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(gradients, state, params)
        return jax.tree.map(lambda u, rate: u * rate, updates, rate_multipliers(params, rates)), state

    return optax.GradientTransformation(optimizer.init, update)


def _build(section: Any, schedule: Schedule) -> optax.GradientTransformation:
    if section.name == "adamw":
        settings = {name: getattr(section, name) for name in ("b1", "b2", "eps", "weight_decay")}
        of_moments = {"mu_dtype": section.moment_dtype, "nu_dtype": getattr(section, "second_moment_dtype", "float32")}
        settings |= {"mask": decay_mask, **dtypes({**of_moments, **section.options})}
        return adamw(schedule, **accepted("adamw", adamw, settings))
    return optax_optimizer(section, schedule, decay_mask)
