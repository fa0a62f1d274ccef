"""Tasks of lm-evaluation-harness, run in this process on the model as it stands on its mesh."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from itune.config import Config
from itune.evaluators import stats
from itune.evaluators.paired import named
from itune.types import InputError, RunError

OPTIONS = ("apply_chat_template", "system_instruction", "num_fewshot", "fewshot_as_multiturn", "limit", "gen_kwargs",
           "confirm_run_unsafe_code")  # fmt: skip


class Evaluator:
    """The tasks `eval.lm_eval`, from the folder `eval.lm_eval_path` or from the harness's own.

    `eval.lm_eval_options` are keyword arguments of `lm_eval.simple_evaluate`; see `OPTIONS`.
    """

    needs_held_out = False

    def __init__(self, config: Config) -> None:
        require_lm_eval()
        self.settings = config.eval
        if not self.settings.lm_eval:
            raise InputError("eval.lm_eval: names no task for the evaluator lm_eval; expected one, such as ('gsm8k',)")
        for name in self.settings.lm_eval_options:
            if name not in OPTIONS:
                near = difflib.get_close_matches(name, OPTIONS, n=1)
                hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(OPTIONS)}"
                raise InputError(f"eval.lm_eval_options: {name!r} is not known; {hint}")

    def run(self, model: Any, params: Any, tokenizer: Any, dataset: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """(summary, items): {task: {metric: mean, metric_low, metric_high, n, score_by}}, and one item a document.

        `score` of an item is one metric of the task, the same for all its documents: `score_by` names it.

        An interval is Wilson's where each document scores 0 or 1, a bootstrap over documents for other scores up to 1,
        and 1.96 of the harness's standard errors for the rest, such as perplexities.
        """
        from lm_eval import simple_evaluate

        from itune.evaluators.harness import HarnessModel

        harness = HarnessModel(model, params, tokenizer, self.settings.batch_size)
        options = dict(self.settings.lm_eval_options)
        with _quiet():
            manager = task_manager(self.settings.lm_eval, self.settings.lm_eval_path)
            try:
                found = simple_evaluate(
                    model=harness, tasks=list(self.settings.lm_eval), task_manager=manager, log_samples=True,
                    bootstrap_iters=1000, **options,
                )
            except (InputError, RunError):
                raise
            except Exception as error:  # a task is a file of the user's or of the harness: say which ones were run
                names = ", ".join(self.settings.lm_eval)
                raise RunError(f"lm_eval: {names}: {type(error).__name__}: {error}") from error
        if found is None:
            raise RunError("lm_eval: the harness returned nothing")
        summary = {task: _summary(results, found["samples"].get(task, [])) for task, results in
                   sorted(found["results"].items())}  # fmt: skip
        items: list[dict[str, Any]] = []
        for task, samples in sorted(found["samples"].items()):
            config, higher = found["configs"].get(task, {}), found["higher_is_better"].get(task, {})
            scores = choose_score(samples, _metrics(config), higher)
            summary.setdefault(task, {}).update(scores.by)
            items += _items(task, samples, scores)
        if "gen_kwargs" in options:
            for part in summary.values():
                part["gen_kwargs"] = str(options["gen_kwargs"])
        return summary, items


def require_lm_eval() -> None:
    """Raise InputError where the package lm_eval is not installed."""
    import importlib.util

    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("lm_eval: lm-evaluation-harness is not installed; pip install 'itune[eval]'")


def task_manager(tasks: tuple[str, ...], folder: str) -> Any:
    """The harness's index of tasks: of `folder` alone where it has them all, else with those that the harness ships."""
    from lm_eval.tasks import TaskManager

    if folder and not os.path.isdir(folder):
        raise InputError(f"eval.lm_eval_path: no folder {folder}; expected one with task files (.yaml)")
    if folder:
        own = TaskManager(include_path=folder, include_defaults=False)
        if all(own.match_tasks([task]) for task in tasks):
            return own
    manager = TaskManager(include_path=folder or None)
    for task in tasks:
        if not manager.match_tasks([task]):
            near = difflib.get_close_matches(task, manager.all_tasks, n=1)
            where = f", nor has {folder}" if folder else ""
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"eval.lm_eval: the harness has no task {task!r}{where}{hint}")
    return manager


class Scores(NamedTuple):
    """What a task's documents are compared by, and {"score_by": that in words}; both empty where nothing serves."""

    metric: str
    filter: str
    higher: bool
    by: dict[str, str]


def choose_score(samples: Sequence[Mapping[str, Any]], metrics: Sequence[str], higher: Mapping[str, Any]) -> Scores:
    """The first of the task's `metrics` that is a number from 0 to 1 in every document, of the task's first filter."""
    first = samples[0]["filter"] if samples else ""
    chosen = [sample for sample in samples if sample["filter"] == first]
    for metric in dict.fromkeys([*metrics, *(chosen[0]["metrics"] if chosen else ())]):
        if all(_is_number(sample.get(metric)) and 0 <= sample[metric] <= 1 for sample in chosen):
            better = higher.get(metric) is not False
            words = metric + (f", filter {first}" if first != "none" else "") + ("" if better else ", 1 - value")
            return Scores(metric, first, better, {"score_by": words})
    return Scores("", first, True, {})


def _metrics(config: Mapping[str, Any]) -> list[str]:
    """The names of a task's metrics, as its file orders them."""
    return [str(entry["metric"]) for entry in config.get("metric_list") or []]


def _items(task: str, samples: Sequence[Mapping[str, Any]], scores: Scores) -> Iterator[dict[str, Any]]:
    """One item a document: its answer and score of the first filter, its metrics of all filters."""
    filters: dict[Any, list[Mapping[str, Any]]] = {}
    for sample in samples:
        filters.setdefault(sample["doc_id"], []).append(sample)
    for document, each in filters.items():
        sample = next((one for one in each if one["filter"] == scores.filter), each[0])
        metrics = {_named(name, one["filter"]): float(one[name]) for one in each for name in one["metrics"]
                   if _is_number(one.get(name))}  # fmt: skip
        value = float(sample[scores.metric]) if scores.metric else 0.0
        address = f"{task}:{document}"
        yield {
            "address": address, "category": task, "cluster": address, "task": task,
            "prompt": str(next(iter(next(iter(sample["arguments"]))))) if sample["arguments"] else "",
            "reference": str(sample["target"]), "answer": _answer(sample["filtered_resps"]),
            **({"score": value if scores.higher else 1 - value} if scores.metric else {}), **metrics,
        }  # fmt: skip


def _named(metric: str, filtered: str) -> str:
    return metric if filtered == "none" else f"{metric}({filtered})"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number | np.bool_)


def _answer(responses: Any) -> Any:
    """A text as it is; log-likelihoods as the harness gives them, one for each choice."""
    return responses[0] if len(responses) == 1 and isinstance(responses[0], str) else responses


def _summary(results: Mapping[str, Any], samples: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The harness's numbers under its names (the filter after a comma only where it is not `none`), with intervals."""
    summary: dict[str, Any] = {}
    for key, value in results.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        name = _named(metric, filtered)
        of_metric = [sample[metric] for sample in samples if sample["filter"] == filtered and metric in sample]
        scores = [float(score) for score in of_metric if isinstance(score, int | float) and 0 <= score <= 1]
        if scores and len(scores) == len(of_metric) and abs(sum(scores) / len(scores) - value) < 1e-6:
            low, high = stats.interval(scores)[1:]
        else:
            error = results.get(f"{metric}_stderr,{filtered}")
            spread = stats.Z95 * error if isinstance(error, int | float) else float("inf")
            low, high = value - spread, value + spread
        summary |= named(name, (float(value), low, high))
    return {**summary, "n": len({sample["doc_id"] for sample in samples})}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness forks for its bootstrap (not with JAX in the process) and logs much: neither happens here."""
    logger, before = logging.getLogger("lm_eval"), os.environ.get("DISABLE_MULTIPROC")
    level = logger.level
    os.environ["DISABLE_MULTIPROC"] = "1"
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if before is None:
            os.environ.pop("DISABLE_MULTIPROC", None)
        else:
            os.environ["DISABLE_MULTIPROC"] = before
