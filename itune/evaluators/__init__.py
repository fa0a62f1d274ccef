"""What judges a model: before, between and after training steps, always on held-out items.

An evaluator is one file here with one class `Evaluator` that has one method, and one line in a recipe that names it:

    class Evaluator:
        def __init__(self, config: Config): ...
        def run(self, model, params, tokenizer, dataset) -> tuple[dict, Iterable[dict]]: ...

`run` returns the summary (nested dict of numbers) and one dict an item. Nothing is written there: `evaluate` does that.
An evaluator outside the package is named `package.module:Class`.
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from itune.config import Config
from itune.evaluators.paired import comparable, compare_judged
from itune.types import InputError
from itune.writers import plain, write_atomically


def evaluate(
    config: Config, model: Any, params: Any, tokenizer: Any, dataset: Any, out_folder: str | os.PathLike | None = None,
    names: Sequence[str] | None = None, base_folder: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Run the evaluators `names` (default: `config.evaluators`) and write what they find to `out_folder` where given.

    Where `base_folder` holds an evaluation of the same items, that of the base model, the comparison in pairs is
    entered in `paired.json`. Returns {name: summary}. What was compiled is kept, so that the next call with the same
    model compiles nothing. With several processes all call this; the first one writes. Raises InputError for an unknown
    evaluator, or when there are no held-out items.
    """
    check_names(config.evaluators)
    evaluators = {name: find_evaluator(name)(config) for name in (config.evaluators if names is None else names)}
    check_held_out(list(evaluators.values()), dataset)
    results = {}
    for name, evaluator in evaluators.items():
        summary, items = evaluator.run(model, params, tokenizer, dataset)
        results[name] = summary
        if out_folder is not None and jax.process_index() == 0:
            items = list(items)
            write_results(out_folder, name, summary, items)
            if base_folder is not None:
                write_comparison(base_folder, out_folder, name, items)
    return results


def check_names(names: Sequence[str]) -> None:
    """Raise InputError where two evaluators would write into the same files."""
    short = [short_name(name) for name in names]
    if twice := next((name for place, name in enumerate(short) if name in short[:place]), ""):
        raise InputError(f"evaluators: {twice} is named twice; expected each once")


def check_held_out(evaluators: Sequence[Any], dataset: Any) -> None:
    """Raise InputError where one of them judges by held-out items and there are none.

    An evaluator that brings its own questions says so with `needs_held_out = False`.
    """
    if any(getattr(one, "needs_held_out", True) for one in evaluators) and len(dataset.held_out) == 0:
        raise InputError(
            "evaluators: there are no held-out items; name files in data.eval, hold a share of data.train out with "
            "data.held_out_share=0.1, or set evaluators=()"
        )


def find_evaluator(name: str) -> Any:
    """The evaluator class of this name: a file here, or `package.module:Class`."""
    module_name, colon, class_name = name.partition(":")
    if not colon:
        module_name, class_name = f"itune.evaluators.{name}", "Evaluator"
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        known = [m.name for m in pkgutil.iter_modules(__path__) if _has_evaluator(m.name)]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}, or package.module:Class"
        raise InputError(f"evaluators: cannot find {name!r} ({error}){hint}") from error


def _has_evaluator(name: str) -> bool:
    try:
        return hasattr(importlib.import_module(f"itune.evaluators.{name}"), "Evaluator")
    except ImportError:  # it needs a package that is not installed
        return False


def flatten(results: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """{"heldout_loss": {"loss": 1.5}} -> {"heldout_loss/loss": 1.5}: the names that logs and `keep_best` use."""
    flat: dict[str, float] = {}
    for key, value in results.items():
        path = f"{prefix}/{key}" if prefix else key
        if isinstance(value, Mapping):
            flat |= flatten(value, path)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[path] = value
    return flat


def short_name(name: str) -> str:
    """The name under which an evaluator's results are kept: `package.module:Class` is `module.Class`."""
    return name.rpartition(".")[2].replace(":", ".")


def write_results(
    folder: str | os.PathLike, name: str, summary: Mapping[str, Any], items: Iterable[Mapping[str, Any]]
) -> None:
    """Write `<name>.jsonl`, one item a line, and enter the summary by name in `summary.json`; each atomically."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    short = short_name(name)
    lines = (json.dumps(item, ensure_ascii=False, default=plain) + "\n" for item in items)
    write_atomically(folder / f"{short}.jsonl", lines)
    _enter(folder / "summary.json", short, summary)


def write_comparison(
    base_folder: str | os.PathLike, folder: str | os.PathLike, name: str, items: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Enter the paired comparison with the base model's items in `paired.json`; None where nothing can be compared.

    Where the two were judged by different settings, `refused` says by which, and there are no numbers.
    """
    short = short_name(name)
    base = read_items(Path(base_folder) / f"{short}.jsonl")
    if not comparable(items) or not comparable(base):
        return None
    summaries = [read_json(Path(place) / "summary.json").get(short, {}) for place in (base_folder, folder)]
    found = compare_judged(base, items, *summaries)
    _enter(Path(folder) / "paired.json", short, found)
    return found


def read_items(path: Path) -> list[dict[str, Any]]:
    """The items of an evaluator's file; none where there is no such file. InputError for a line that is none."""
    items = []
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.is_file() else (), 1):
        try:
            items += [json.loads(line.decode())] if line else []
        except ValueError as error:
            raise InputError(f"{path}:{number}: is no JSON; expected the items of an evaluation") from error
    return items


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is no such file. Raises InputError for another one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise InputError(f"{path}: is damaged; expected a JSON object") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: is damaged; expected a JSON object, found {type(found).__name__}")
    return found


def read_summaries(path: Path) -> dict[str, dict[str, Any]]:
    """{evaluator: summary} of a `summary.json`; {} where there is none. Raises InputError for another file."""
    found = read_json(path)
    if wrong := [name for name, summary in found.items() if not isinstance(summary, dict)]:
        raise InputError(f"{path}: is damaged; expected a summary of {wrong[0]}, found {found[wrong[0]]!r}")
    return found


def _enter(path: Path, key: str, value: Any) -> None:
    try:
        before = read_summaries(path)
    except InputError:  # it is written anew
        before = {}
    write_atomically(path, json.dumps({**before, key: value}, indent=2, default=plain) + "\n")
