"""What a plan needs of the data: the number of steps, from the data where it is there, stand-ins otherwise."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

from itune.config import Config
from itune.models import load_model
from itune.setup_run import Data, prepare_data
from itune.types import InputError, RunError


@dataclasses.dataclass(frozen=True)
class Known:
    """`steps` of the whole run, 0 where nobody knows; `source`: from where; `rows_full`: share of tokens in rows."""

    data: Data
    steps: int
    source: str
    rows_full: float = 1.0


def known(config: Config, read_data: bool = True) -> Known:
    """Prepare the data where that is possible (its cache serves the run later); else stand-ins."""
    reason = "data.train is empty"
    if config.data.train and read_data:
        try:
            data = prepare_data(config, lambda line: None)
            return Known(data, data.loader.total_steps, "exact, from the data", data.loader.efficiency)
        except (InputError, RunError, OSError) as error:  # no network, no tokenizer here: planning needs neither
            reason = str(error).splitlines()[0][:160]
    steps = config.train.max_steps
    unread = f"; the data were not read: {reason}" if config.data.train and read_data else ""
    source = f"train.max_steps{unread}" if steps else f"unknown: {reason}, and train.max_steps is 0"
    return Known(stand_in(config, steps), steps, source)


def stand_in(config: Config, steps: int) -> Data:
    """Data with the vocabulary of the model's own config and rows that are full: enough to compile for."""
    section = config.model
    vocab = load_model(section.path, revision=section.revision or None).config.vocab_size
    return sizes_only(vocab, 0, max(steps, 1), 0)


def sizes_only(vocab_size: int, added_tokens: int, total_steps: int, max_segments: int) -> Data:
    """What a plan needs of a tokenizer (`added_tokens`: how many) and of a loader, without them."""
    tokenizer: Any = types.SimpleNamespace(vocab_size=vocab_size, added_tokens=("",) * added_tokens)
    loader: Any = types.SimpleNamespace(total_steps=total_steps, max_segments=max_segments)
    return Data(tokenizer, types.SimpleNamespace(held_out=()), loader)
