"""A user's config, shrunk to a few small steps that show every difference there could be."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import numpy as np

from itune.config import Config, from_dict
from itune.models import load_model
from itune.setup_run import Data, model_settings, prepare_data
from itune.types import Batch

STEPS = 5
ROWS = 16  # of the global batch
LENGTH = 256  # tokens a row, at most, unless the user's examples are longer
EXAMPLES = 32  # at least so many of the user's examples must fit into such rows
READ = 512  # rows read from each source
LEARNING_RATE = 1e-4


@dataclasses.dataclass(frozen=True)
class Small:
    """The shrunk config, its data, and what differs from the user's, in sentences."""

    config: Config
    data: Data
    notes: list[str]


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """The config with these dotted keys set."""
    tree = config.to_dict()
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        (tree[section] if section else tree)[name] = value
    return from_dict(tree)


def make_small(config: Config) -> Small:
    """Same model, template, objective and optimizer; little data, short rows, a constant learning rate, float32."""
    notes, limit = [], min(config.data.limit or READ, READ)
    for key in ("param_dtype", "compute_dtype"):
        if getattr(config.model, key) != "float32":
            notes.append(f"model.{key} is {getattr(config.model, key)}; verified in float32, where a difference is a "
                         "fault and not rounding")
    if config.lora.rank and config.lora.dropout:
        notes.append(f"lora.dropout is {config.lora.dropout}; verified without, since it draws anew for every layout")
    if config.model.attention not in ("auto", "xla"):
        notes.append(f"model.attention is {config.model.attention}; float32 runs in XLA")
    small = changed(config, {
        "evaluators": (), "model.param_dtype": "float32", "model.compute_dtype": "float32", "model.attention": "xla",
        "data.limit": limit, "data.novel_min": 0, "data.packing": True, "data.limits": {}, "data.mixture": {},
        "data.counts": {}, "data.cap": 0, "data.temperature": 0.0, "data.balance": {}, "data.max_repeats": 0.0,
        "data.draws": 0, "lora.dropout": 0.0, "optimizer.moment_dtype": "float32",
        "optimizer.second_moment_dtype": "float32", "optimizer.stochastic_rounding": False,
        "train.batch_size": ROWS, "train.accumulation": 1, "train.max_steps": STEPS, "train.remat": "none",
        "train.max_skipped": 1, "optimizer.learning_rate": LEARNING_RATE, "optimizer.schedule": "constant",
        "optimizer.warmup": 0.0, "checkpoint.every": 0, "checkpoint.minutes": 0.0, "checkpoint.keep_best": "",
        "eval.every": 0, "eval.patience": 0, "log.every": 1, "log.tensorboard": False, "log.wandb": "",
        "profile.steps": "", "mesh": dataclasses.asdict(type(config.mesh)()),
    })  # fmt: skip
    length = _multiple(config.data.max_length)
    if length > LENGTH:
        lengths = np.sort(prepare_data(small, quiet).dataset.train.lengths)
        length = min(length, max(LENGTH, _multiple(int(lengths[min(EXAMPLES, len(lengths)) - 1]))))
        notes.append(f"rows of {length} tokens, not {config.data.max_length}: longer examples are left out here")
    small = changed(small, {"data.max_length": length, "loss.chunk": min(config.loss.chunk, ROWS * length // 8)})
    data = prepare_data(small, quiet)
    padded = _even_vocabulary(small, data.tokenizer)
    if padded is not data.tokenizer:
        notes.append(f"the embedding is padded to {padded.vocab_size} rows, so that mesh.tensor=2 divides it")
    return Small(small, dataclasses.replace(data, tokenizer=padded), notes)


def one_example_a_row(batches: list[Batch], multiple: int) -> list[Batch]:
    """The same examples, each alone in a row; every batch gets the same number of rows, a multiple of `multiple`."""
    pieces = [[(b, segment) for b in range(batch.tokens_BL.shape[0])
               for segment in range(1, int(batch.segment_ids_BL[b].max()) + 1)] for batch in batches]  # fmt: skip
    rows = -(-max(map(len, pieces)) // multiple) * multiple
    alone = []
    for batch, places in zip(batches, pieces, strict=True):
        arrays = [np.zeros((rows, array.shape[1]), array.dtype) for array in batch]
        for row, (b, segment) in enumerate(places):
            own = np.flatnonzero(batch.segment_ids_BL[b] == segment)
            for target, source in zip(arrays, batch, strict=True):
                target[row, : len(own)] = source[b, own]
        batch = Batch(*arrays)
        alone.append(batch._replace(segment_ids_BL=np.minimum(batch.segment_ids_BL, 1)))
    return alone


def _multiple(length: int) -> int:
    """Rows are a multiple of 16: eight devices may share one, each with a whole number of tokens to halve."""
    return -(-length // 16) * 16


def _even_vocabulary(config: Config, tokenizer: Any) -> Any:
    """The tokenizer, or what `model_settings` reads of one that has a token more."""
    rows = load_model(config.model.path, **model_settings(config, tokenizer)).config.vocab_size
    if rows % 2 == 0:
        return tokenizer
    return types.SimpleNamespace(
        vocab_size=rows + 1, added_tokens=(*tokenizer.added_tokens, *[""] * (rows + 1 - tokenizer.vocab_size))
    )


def quiet(text: str) -> None:
    del text
