"""What `itune data show` and `itune data stats` print: decoded examples by weight, the numbers of a data section."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from itune.config import Config
from itune.data.dataset import Dataset, prepare
from itune.data.jsonl import read_jsonl
from itune.data.loader import Loader, make_loader
from itune.data.overlong import Fitted, fit
from itune.data.render import render_many
from itune.data.selection import conversations
from itune.data.sources import open_sources
from itune.data.templates import Tokenizer, load_tokenizer
from itune.types import Conversation, Example, InputError

PERCENTILES = (5, 25, 50, 75, 95, 100)
SHOWN_TOKENS = 24  # of each run of tokens


def show(config: Config, index: int | None = None, source: str | None = None, limit: int = 3,
         console: Any = None, random: int | None = None, worst: str | None = None) -> list[dict[str, Any]]:  # fmt: skip
    """Print rows of data.train as the model sees them, and return what was printed.

    index: one row by its number, counted from 0 in the order of the sources. source: rows of this source only. limit:
    how many rows. random: a seed by which rows are drawn. worst: a file of `itune data score`, worst first.

    On a terminal weighted text is green and what `data.max_length` cuts off is red; elsewhere they
    stand in {+ +} and {- -}. A row that cannot be rendered shows its error. Raises InputError for an unknown source or
    number.
    """
    tokenizer = _tokenizer(config)
    sources = open_sources(config.data.train, "data.train")
    if source is not None:
        names = [found.name for found in sources]
        if source not in names:
            raise InputError(f"--source: no source is called {source}; sources: {', '.join(names)}")
        sources = [found for found in sources if found.name == source]
    rows = conversations(config.data, sources)
    if worst is not None:
        chosen = _worst(rows, worst, limit)
    elif random is not None:
        everything = list(rows)
        places = np.random.default_rng(random).permutation(len(everything))[:limit]
        chosen = [everything[place] for place in places.tolist()]
    else:
        chosen = list(itertools.islice(rows, index, index + 1) if index is not None else itertools.islice(rows, limit))
    if not chosen:
        raise InputError(f"--index: there is no row {index}; expected one from 0 to {_count(config, sources) - 1}")
    console = console or _console()
    console.print(_legend(console), style=None)
    found = []
    for conversation in chosen:
        entry = described(conversation, tokenizer, config)
        _print_entry(entry, tokenizer, console)
        found.append(entry)
    return found


def _worst(rows: Iterator[Conversation], scores: str, limit: int) -> list[Conversation]:
    """The rows that a file of scores lists first. Raises InputError for another file, or one about other rows."""
    wanted: list[str] = []
    for line, item in read_jsonl(scores):
        if "address" not in item or "suspicion" not in item:
            raise InputError(f"{scores}:{line}: no address and suspicion; expected "
                             "data_scores.jsonl of itune data score")
        wanted.append(item["address"])
    first = dict.fromkeys(wanted[:limit])
    found = {str(row.address): row for row in rows if str(row.address) in first}
    if not found:
        raise InputError(f"{scores}: names no row of data.train; expected the scores of these files")
    return [found[address] for address in first if address in found]


def described(conversation: Conversation, tokenizer: Tokenizer, config: Config) -> dict[str, Any]:
    """One row as `show` tells it: address, lengths, runs of tokens of one weight, or the error that refuses it."""
    outcome = render_many([conversation], tokenizer, config.data.train_on)[0]
    entry: dict[str, Any] = {"address": str(conversation.address), "metadata": dict(conversation.metadata)}
    if outcome.error is not None:
        return entry | {"error": str(outcome.error)}
    assert outcome.example is not None
    example, section = outcome.example, config.data
    fitted = fit(conversation, example, tokenizer, section.max_length, section.overlong, section.train_on)
    cut = _cut(example, [part.example for part in fitted.parts], section.max_length)
    return entry | {
        "tokens": len(example.token_ids),
        "supervised_tokens": int(np.count_nonzero(example.loss_weights)),
        "bos_tokens": example.token_ids.tolist().count(tokenizer.hf.bos_token_id),
        "stop_tokens": int(np.isin(example.token_ids[example.loss_weights != 0], tokenizer.stop_ids).sum()),
        "cut_at": cut[0] if cut else None,
        "fate": _fate(fitted, section.max_length),
        "notes": list(outcome.notes),
        "runs": [
            {"weight": weight, "cut": lost, "text": tokenizer.decode(ids), "token_ids": ids.tolist()}
            for weight, lost, ids in _runs(example, cut)
        ],
    }


def _fate(fitted: Fitted, length: int) -> str:
    if not fitted.parts:
        return f"left out: {fitted.reason}"
    if len(fitted.parts) > 1:
        return f"split by turns into {len(fitted.parts)} examples, {fitted.lost_tokens} tokens lost"
    if fitted.lost_tokens:
        return f"cut to data.max_length ({length} tokens), {fitted.lost_tokens} tokens lost"
    return "kept"


def _cut(whole: Example, parts: list[Example], length: int) -> tuple[int, int] | None:
    """Tokens [first, last) of the whole that are lost, where they are one run: its end, or turns after the system's."""
    count = len(whole.token_ids)
    if len(parts) > 1 or count <= length:
        return None
    if not parts:
        return length, count
    kept = parts[0].token_ids
    differs = np.flatnonzero(kept != whole.token_ids[: len(kept)])
    same = int(differs[0]) if len(differs) else len(kept)
    return same, count - (len(kept) - same)


def stats(config: Config, console: Any = None) -> dict[str, Any]:
    """Prepare the data as training would, print its numbers, and return them unrounded."""
    console = console or _console()
    lines: list[str] = []
    dataset = prepare(config.data, _tokenizer(config), seed=config.seed, log=lines.append)
    loader = make_loader(config, dataset.train)
    numbers = summary(dataset, loader)
    for line in [*lines, *_stat_lines(numbers, dataset, loader)]:
        console.print(line)
    return numbers


def summary(dataset: Dataset, loader: Loader) -> dict[str, Any]:
    """The numbers of a dataset under a loader."""
    lengths = dataset.train.lengths
    supervised = np.add.reduceat(dataset.train.weights != 0, dataset.train.offsets[:-1], dtype=np.int64)
    report = dataset.report
    return {
        "rows": report["rows"],
        "examples": len(dataset.train),
        "held_out": len(dataset.held_out),
        "dropped": report["dropped"],
        "truncated": report["truncated"],
        "notes": report["notes"],
        "sources": report["sources"],
        "removed_as_held_out": report["held_out"]["training_rows_removed"],
        "tokens": int(lengths.sum()),
        "supervised_tokens": int(supervised.sum()),
        "supervised_share": float(supervised.sum() / lengths.sum()),
        "length_percentiles": {str(p): float(np.percentile(lengths, p)) for p in PERCENTILES},
        "supervised_percentiles": {str(p): float(np.percentile(supervised, p)) for p in PERCENTILES},
        "packing": loader.packing,
        "packing_efficiency": loader.efficiency,
        "unpacked_efficiency": float(lengths.mean() / loader.max_length),
        "steps_per_epoch": loader.steps_per_epoch,
        "total_steps": loader.total_steps,
        "fingerprint": loader.fingerprint,
    }


def _stat_lines(numbers: dict[str, Any], dataset: Dataset, loader: Loader) -> Iterator[str]:
    for name, counts in numbers["sources"].items():
        detail = ", ".join(f"{count:,} {what}" for what, count in counts.items() if what != "rows")
        yield f"source {name}: {counts['rows']:,} rows: {detail}"
    for note, count in numbers["notes"].items():
        yield f"note: {count:,} rows have {note}"
    for label, key in (("length", "length_percentiles"), ("supervised", "supervised_percentiles")):
        values = "  ".join(f"p{p} {value:,.0f}" for p, value in numbers[key].items())
        yield f"{label}, tokens an example: {values}"
    yield (f"tokens: {numbers['tokens']:,}, of which {numbers['supervised_tokens']:,} supervised "
           f"({numbers['supervised_share']:.1%})")
    kind = "packed" if loader.packing else "one example a row"
    yield (f"rows of {loader.max_length} tokens, {kind}: {numbers['packing_efficiency']:.2%} filled "
           f"(without packing {numbers['unpacked_efficiency']:.2%})")
    yield (f"steps: {numbers['steps_per_epoch']:,} an epoch, {numbers['total_steps']:,} in all, "
           f"{loader.batch_size} rows each")
    proof = dataset.report["held_out"]
    if numbers["held_out"]:
        by = f", split by {proof['by']}" if proof["by"] else ""
        yield (f"held out: {numbers['held_out']:,} items, {proof['prompts']:,} different prompts{by}; "
               f"{numbers['removed_as_held_out']:,} training rows removed because they ask the same")


def _runs(example: Example, cut: tuple[int, int] | None) -> Iterator[tuple[float, bool, np.ndarray]]:
    """(weight, lost, ids) of each run of tokens that share them."""
    weights, count = example.loss_weights, len(example.token_ids)
    first, last = cut or (count, count)
    borders = {0, count, first, last, *(np.flatnonzero(np.diff(weights)) + 1).tolist()}
    for start, end in itertools.pairwise(sorted(borders)):
        yield float(weights[start]), first <= start < last, example.token_ids[start:end]


def _legend(console: Any) -> Any:
    if not console.is_terminal:
        return "{+weight above 0+}  context  {-cut off by data.max_length-}"
    from rich.text import Text

    return Text.assemble(("weight above 0", "bold green"), "  context  ", ("cut off by data.max_length", "strike red"))


def _print_entry(entry: dict[str, Any], tokenizer: Tokenizer, console: Any) -> None:
    from rich.text import Text

    about = " ".join(f"{k}={v}" for k, v in entry["metadata"].items() if isinstance(v, str | int | float))
    console.print(Text(f"\n--- {entry['address']}  {about}"[:200], style="bold"))
    if "error" in entry:
        console.print(Text(entry["error"], style="red"))
        return
    console.print(Text(f"{entry['tokens']} tokens, {entry['supervised_tokens']} supervised, "
                       f"{entry['bos_tokens']} BOS, {entry['stop_tokens']} stop tokens learnt; {entry['fate']}"
                       + "".join(f"; {note}" for note in entry["notes"])))  # fmt: skip
    body = Text()
    for run in entry["runs"]:
        style = "strike red" if run["cut"] else "bold green" if run["weight"] else "dim"
        left, right = ("{-", "-}") if run["cut"] else ("{+", "+}") if run["weight"] else ("", "")
        body.append(run["text"] if console.is_terminal else f"{left}{run['text']}{right}", style=style)
    console.print(body, soft_wrap=True)
    for run in entry["runs"]:
        pieces = [f"{i} {tokenizer.decode([i])!r}" for i in run["token_ids"][:SHOWN_TOKENS]]
        more = len(run["token_ids"]) - len(pieces)
        tail = f", and {more} more" if more else ""
        label = f"weight {run['weight']:g}" + (", cut off" if run["cut"] else "")
        console.print(Text(f"  {label}: {', '.join(pieces)}{tail}"), soft_wrap=True)


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False, markup=False, soft_wrap=True)


def _tokenizer(config: Config) -> Tokenizer:
    if not config.model.path:
        raise InputError("config: model.path is empty; expected a folder or hub id with a tokenizer")
    return load_tokenizer(config.model.path, config.data.chat_template, config.model.revision or None)


def _count(config: Config, sources: list[Any]) -> int:
    return sum(1 for _ in conversations(config.data, sources))
