"""Loss spikes: an update whose loss or gradient norm stands far above those of the last steps is not made.

The rule is that of OLMo-core's `SkipStepOptimizer` (OLMo 2, arXiv:2501.00656), inside the compiled step.
The window of past numbers is part of the optimizer's state, so a checkpoint holds it and a resumed run judges alike.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax


class Window(NamedTuple):
    """The last W finite losses and gradient norms, float32 rings; `seen` (int32) counts all that ever entered."""

    losses_W: Any
    norms_W: Any
    seen: Any


class WindowedState(NamedTuple):
    """The state of an optimizer, and the window that its spikes are judged by."""

    inner: Any
    window: Window


def with_window(optimizer: optax.GradientTransformation, length: int) -> optax.GradientTransformation:
    """`optimizer`, its state beside an empty window of `length` steps. The step fills it, an update does not."""

    def init(params: Any) -> WindowedState:
        empty_W = jnp.zeros(length, jnp.float32)
        return WindowedState(optimizer.init(params), Window(empty_W, empty_W, jnp.zeros((), jnp.int32)))

    def update(gradients: Any, state: WindowedState, params: Any = None) -> tuple[Any, WindowedState]:
        updates, inner = optimizer.update(gradients, state.inner, params)
        return updates, WindowedState(inner, state.window)

    return optax.GradientTransformation(init, update)


def judge(window: Window, loss: Any, norm: Any, sigmas: float) -> tuple[Any, Window]:
    """Whether this step is a spike (boolean scalar), and the window with its numbers.

    A spike is a loss or a norm more than `sigmas` standard deviations above the mean of the window; nothing is one
    while the window is less than half full. A spike enters the window too, so that a lasting change of level is soon
    none. Numbers that are not finite are no spike and never enter.
    """
    length = window.losses_W.shape[0]
    count = jnp.minimum(window.seen, length)
    there_W = jnp.arange(length) < count
    high = _above(window.losses_W, there_W, count, loss, sigmas) | _above(window.norms_W, there_W, count, norm, sigmas)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    here_W = (jnp.arange(length) == window.seen % length) & finite
    after = Window(jnp.where(here_W, loss, window.losses_W), jnp.where(here_W, norm, window.norms_W),
                   window.seen + finite.astype(jnp.int32))
    return high & finite & (count >= max(2, length // 2)), after


def _above(values_W: Any, there_W: Any, count: Any, value: Any, sigmas: float) -> Any:
    mean = jnp.sum(jnp.where(there_W, values_W, 0)) / jnp.maximum(count, 1)
    variance = jnp.sum(jnp.where(there_W, (values_W - mean) ** 2, 0)) / jnp.maximum(count - 1, 1)
    return value - mean > sigmas * jnp.sqrt(variance)
