"""What trains and what is frozen: all parameters, those that a regular expression spares, or adapters beside them."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from itune import flops
from itune.models.hf.plan import leaf_paths
from itune.models.lora import Lora, abstract_adapters, adapter_shardings, init_adapters, merge
from itune.models.model import Model
from itune.models.peft import read_adapter
from itune.types import InputError


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the parameters of `model` are divided into what the optimizer updates and what stays.

    freeze: a regular expression; parameters whose path (`blocks/layer_0/mlp/up_proj/kernel`) it matches anywhere stay.
    lora: adapters train and all parameters stay. init_from: a peft folder whose adapters training begins with.
    """

    model: Model
    freeze: str = ""
    lora: Lora | None = None
    init_from: str = ""

    def divide(self, load: Callable[[], Any], seed: int) -> tuple[Any, Any]:
        """(trainable, frozen) of all parameters, which `load` gives and which are not copied, as training begins.

        New adapters follow from `seed`; those of `init_from` are read first, so that a fault of theirs is found soon.
        """
        if self.lora is None:
            return self._halves(load())
        if self.init_from:
            return read_adapter(self.init_from, self.model, self.lora), load()
        return init_adapters(self.model, self.lora, jax.random.key(seed)), load()

    def frozen(self, params: Any) -> Any:
        """What stays, of all parameters."""
        return self._halves(params)[1] if self.lora is None else params

    def abstract(self) -> tuple[Any, Any]:
        """(trainable, frozen) as ShapeDtypeStructs with the shardings of the model's mesh."""
        params = self.abstract_params()
        if self.lora is None:
            return self._halves(params)
        return _placed(abstract_adapters(self.model, self.lora), adapter_shardings(self.model, self.lora)), params

    def abstract_params(self) -> Any:
        """All parameters of the model itself as ShapeDtypeStructs with shardings."""
        return _placed(self.model.abstract_params(), self.model.shardings())

    def parameters(self, trainable: Any, frozen: Any) -> Any:
        """What the model reads; copies no parameter."""
        if self.lora is not None:
            return self.lora.parameters(trainable, frozen)
        return _union(trainable, frozen)

    def merged(self, trainable: Any, frozen: Any) -> Any:
        """The tuned parameters without anything beside them."""
        if self.lora is not None:
            return merge(self.model, self.lora, trainable, frozen)
        return _union(trainable, frozen)

    def train_flops(self) -> Callable[[Any, int, Mapping[int | None, int]], float]:
        """`itune.flops.train_flops`, or what takes its place where some parameters are frozen."""
        config, (trainable, frozen) = self.model.config, self.abstract()
        if not frozen:
            return flops.train_flops
        shares = {kind.experts.chosen / kind.experts.count for kind in config.kinds if kind.experts is not None}
        head = "embed/embedding" if config.tie_embeddings else "lm_head/kernel"
        trained = sum(
            leaf.size * (max(shares) if "/experts/" in path else 1)
            for path, leaf in leaf_paths(trainable).items()
            if path == head or path.rpartition("/")[2] in ("kernel", "a", "b")
        )
        added = trained if self.lora is not None else 0.0
        through = any(not path.startswith(("lm_head/", "final_norm/")) for path in leaf_paths(trainable))
        return functools.partial(flops.partial_train_flops, trained=trained, added=added, through=through)

    def describe(self, trainable: Any, frozen: Any) -> str:
        """One line for the log: how many parameters train, and how many are frozen in which dtype."""
        trains, stays = (sum(leaf.size for leaf in jax.tree.leaves(half)) for half in (trainable, frozen))
        dtypes = " and ".join(sorted({leaf.dtype.name for leaf in jax.tree.leaves(frozen)}))
        beside = f", {stays:,} are frozen in {dtypes}" if stays else ""
        return f"{trains:,} parameters train{beside}"

    def _halves(self, params: Any) -> tuple[Any, Any]:
        if not self.freeze:
            return params, {}
        paths = leaf_paths(params)
        stays = matching(self.freeze, list(paths), "train.freeze")
        if len(stays) == len(paths):
            raise InputError(f"config: train.freeze={self.freeze!r} matches every parameter; nothing would train")
        return _chosen(params, set(paths) - stays), _chosen(params, stays)


def matching(pattern: str, paths: list[str], key: str) -> set[str]:
    """The parameter paths that a regular expression matches anywhere. Raises InputError when there is none."""
    try:
        found = {path for path in paths if re.search(pattern, path)}
    except re.error as error:
        raise InputError(f"config: {key}: {pattern!r} is no regular expression: {error}") from error
    if not found:
        near = difflib.get_close_matches(pattern, paths, n=1, cutoff=0.0)
        raise InputError(f"config: {key}: {pattern!r} matches no parameter; the nearest path is {near[0]}")
    return found


def frozen_digest(frozen: Any) -> int:
    """A number that tells frozen parameters apart, the same on any mesh; 0 where nothing is frozen.

    Checkpoints leave out what is frozen: this shows whether a resumed run has the same again.
    """
    leaves = jax.tree.leaves(frozen)
    return int(_digest(leaves)) if leaves else 0


@jax.jit
def _digest(leaves: list[jax.Array]) -> jax.Array:
    total = jnp.zeros((), jnp.uint32)
    for leaf in leaves:  # sums of integers modulo 2^32: the order in which devices add does not matter
        bits = jax.lax.bitcast_convert_type(leaf, {2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize])
        place = jnp.zeros((), jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        total = total * jnp.uint32(1000003) + jnp.sum(bits.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)
    return total


def _placed(abstract: Any, shardings: Any) -> Any:
    if shardings is None:
        return abstract
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)


def _chosen(tree: Any, paths: set[str], prefix: str = "") -> Any:
    """The branches of a nested dict that lead to these paths."""
    found: dict[str, Any] = {}
    for name, node in tree.items():
        path = f"{prefix}{name}"
        if isinstance(node, dict):
            inner = _chosen(node, paths, f"{path}/")
            found |= {name: inner} if inner else {}
        elif path in paths:
            found[name] = node
    return found


def _union(one: Any, other: Any) -> Any:
    """Both nested dicts in one; they have no leaf in common."""
    if not other:
        return one
    both = {name: _union(one[name], other[name]) for name in one.keys() & other.keys()}
    return {**one, **other, **both}
