"""The proof of an export: the folder is loaded again and compared with what was trained."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from itune.data.stops import GENERATION, stop_ids
from itune.export.hashes import PROOF, file_hashes
from itune.models import Model, forward, load_pretrained
from itune.models.hf.files import DTYPES, read_json
from itune.models.hf.plan import leaf_paths, make_plan
from itune.sharding import rows_divisor
from itune.types import InputError, Message, RunError
from itune.writers import plain

TOLERANCE = 1e-5  # the same values in the same program: only a non-deterministic kernel could differ at all
TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs.",
    "  Zwölf große Boxkämpfer\n\tjagen 7,5 % der Äpfel, «naïve» café.",
    "def f(x):\n    return [x ** 2, '\\n']\n",
    "日本語 и русский, 😀 emoji.",
)


def prove_weights(folder: Path, model: Model, params: Any) -> dict[str, Any]:
    """Reload the weights, compare every tensor, then the logits of probe tokens. Raises RunError when they differ."""
    settings = {name: getattr(model, name) for name in ("compute_dtype", "attention", "remat")}
    try:
        reloaded, again = load_pretrained(folder, model.mesh, model.param_dtype, **settings)
    except InputError as error:
        raise RunError(f"{folder}: cannot be loaded again: {error}") from error
    if reloaded.config != model.config or reloaded.family != model.family:
        raise RunError(f"{folder}: reads back as another architecture: {reloaded.config}; expected {model.config}")
    plan = make_plan(folder, model, model.config.vocab_size)
    trained, read = leaf_paths(params), leaf_paths(again)
    stored = {path: tuple(DTYPES[tensor.dtype].name for tensor in plan.leaves[path]) for path in trained}
    changed = {
        path: float(_largest_difference(_as_stored(leaf, stored[path]), read[path])) for path, leaf in trained.items()
    }
    wrong = {path: value for path, value in changed.items() if value != 0}  # NaN is wrong too
    if wrong:
        worst = max(wrong, key=lambda path: np.nan_to_num(wrong[path], nan=np.inf))
        raise RunError(
            f"{folder}: {len(wrong)} of {len(changed)} parameters read back with other values, worst {worst} by "
            f"{wrong[worst]:.3g}; expected the trained values in {stored[worst][0]}"
        )
    probes_BL = probe_tokens(model)
    reference_BLV = forward(model, params, probes_BL)
    exact = all(set(stored[path]) == {leaf.dtype.name} for path, leaf in trained.items())
    rounded_BLV = reference_BLV if exact else forward(model, _round(params, stored.values()), probes_BL)
    exported_BLV = forward(dataclasses.replace(reloaded, max_segments=model.max_segments), again, probes_BL)
    difference, rounding = (float(jnp.max(jnp.abs(x - rounded_BLV))) for x in (exported_BLV, reference_BLV))
    if not difference <= TOLERANCE:
        raise RunError(
            f"{folder}: logits of the reloaded model differ by {difference:.3g}; expected at most {TOLERANCE:.0e}"
        )
    tensors = list({tensor.name: tensor for leaf in plan.leaves.values() for tensor in leaf}.values())
    return {
        "parameters": sum(leaf.size for leaf in trained.values()),
        "bytes": sum(tensor.stop - tensor.start for tensor in tensors),
        "dtypes": dict(Counter(DTYPES[tensor.dtype].name for tensor in tensors)),
        "max_abs_logit_difference": difference,
        "rounding_logit_difference": rounding,
    }


def probe_tokens(model: Model) -> np.ndarray:
    """Token ids that the logits are compared on: spread over the whole vocabulary, the same ones every time."""
    rows = 4 if model.mesh is None else max(4, rows_divisor(model.mesh))
    length = min(64, model.config.max_length)
    return np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, length), np.int32)


@jax.jit
def _largest_difference(one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(one.astype(jnp.float32) - other.astype(jnp.float32)))


def _round(params: Any, stored: Iterable[tuple[str, ...]]) -> Any:
    leaves, structure = jax.tree.flatten(params)
    return jax.tree.unflatten(structure, [_as_stored(leaf, names) for leaf, names in zip(leaves, stored, strict=True)])


def _as_stored(leaf: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """The leaf's values after they were written in these dtypes, one for each tensor that the leaf stacks.

    Not for jit: inside one program XLA may drop a conversion to a narrower dtype and back.
    """
    if len(set(names)) == 1:
        return leaf.astype(names[0]).astype(leaf.dtype)
    return jnp.stack([layer.astype(name).astype(leaf.dtype) for layer, name in zip(leaf, names, strict=True)])


def prove_tokenizer(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Load the folder's tokenizer and compare ids, chat template and stop tokens with the training run's.

    Returns what was compared; {} where the folder has no tokenizer. Raises RunError when something differs.
    """
    if not (folder / "tokenizer.json").is_file() and tokenizer is None:
        return {}
    from itune.data.render import as_tokenizer, render, render_prompt
    from itune.data.templates import load_tokenizer

    try:
        read = load_tokenizer(str(folder))
    except InputError as error:
        raise RunError(f"{folder}: the tokenizer cannot be loaded again: {error}") from error
    ours = read if tokenizer is None else as_tokenizer(tokenizer)
    generation = read_json(folder / GENERATION) if (folder / GENERATION).is_file() else {}
    found: dict[str, Any] = {"tokens": read.vocab_size, "chat_template": ours.template is not None}
    checks: dict[str, tuple[Any, Any]] = {text: (ours.encode_plain(text), read.encode_plain(text)) for text in TEXTS}
    checks["vocabulary size"] = (ours.vocab_size, read.vocab_size)
    checks["end of turn"] = (ours.end_of_turn_id, read.end_of_turn_id)
    if ours.template is not None:
        turns = (Message("user", TEXTS[0]), Message("assistant", TEXTS[1]), Message("user", TEXTS[2]))
        try:
            pairs = [(render(turns[:2], t).token_ids.tolist(), render_prompt(turns, t).tolist()) for t in (ours, read)]
        except InputError as error:
            raise RunError(f"{folder}: the chat template reads back otherwise: {error}") from error
        checks["a chat"] = (pairs[0], pairs[1])
    for name, (expected, value) in checks.items():
        if value != expected:
            raise RunError(f"{folder}: the tokenizer reads back otherwise: {name!r} gives {value}; expected {expected}")
    if tokenizer is not None and set(ours.stop_ids) - set(stop_ids(generation)):
        raise RunError(
            f"{folder}: {GENERATION} stops at {stop_ids(generation)}; expected all of {sorted(ours.stop_ids)}"
        )
    return {**found, "stop_ids": sorted(ours.stop_ids), "compared": len(checks)}


def write_proof(folder: Path, report: dict[str, Any], info: dict[str, Any]) -> None:
    """Write `itune_proof.json`: what was compared, and the SHA-256 of every file of the folder."""
    record = {**report, **info, "tolerance": TOLERANCE, "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    record["sha256"] = file_hashes(folder)
    (folder / PROOF).write_text(json.dumps(record, indent=2, default=plain) + "\n", encoding="utf-8")
