"""Base against tuned on the same items: what changed, how surely, and what this many items could not have shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from itune.evaluators import stats
from itune.evaluators.labels import broken_down

Items = Sequence[Mapping[str, Any]]
SETTINGS = {"score_by": "score", "max_new_tokens": "eval.max_new_tokens", "gen_kwargs": "gen_kwargs"}  # of a summary


def compare(base: Items, tuned: Items) -> dict[str, Any]:
    """The comparison of two runs of one evaluator over the same items, overall and by category, source and group.

    Items have `score` (generation and its like: higher is better) or `loss` and `weight` (held-out loss: lower is
    better). Items are matched by address and prompt; those that one side lacks are counted under `unmatched`.
    Scores: n, clusters, base, tuned and difference (tuned - base), each with _low and _high; wins, losses and ties of
    tuned; `detectable`, the smallest true difference that these items find with 80 % probability.
    """
    before, after, unmatched = matched(base, tuned)
    if not after:
        return {"n": 0, "unmatched": unmatched}
    part = _scores if "score" in after[0] else _losses

    def chosen(places: Sequence[int]) -> dict[str, Any]:
        return part([before[place] for place in places], [after[place] for place in places])

    return {**chosen(range(len(after))), "unmatched": unmatched, **broken_down(after, chosen)}


def compare_judged(base: Items, tuned: Items, base_summary: Mapping[str, Any], summary: Mapping[str, Any]
                   ) -> dict[str, Any]:  # fmt: skip
    """`compare`, or {"n": 0, "refused": why} where the summaries say that their scores mean different things."""
    if why := differing(base_summary, summary):
        return {"n": 0, "refused": why}
    by = scored_by(summary)
    return {**compare(base, tuned), **({"score_by": by} if by else {})}


def scored_by(summary: Mapping[str, Any]) -> str:
    """What the scores of a summary are, those of lm_eval by task; "" where it does not say."""
    tasks = [f"{name}: {part['score_by']}" for name, part in summary.items()
             if isinstance(part, Mapping) and "score_by" in part]  # fmt: skip
    return str(summary.get("score_by", "; ".join(tasks)))


def differing(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> str:
    """Why scores of these two summaries of one evaluator mean different things; "" where they can be compared.

    A setting that one of them does not record says nothing.
    """
    said = [f"{words} is {base[name]} there and {tuned[name]} here" for name, words in SETTINGS.items()
            if name in base and name in tuned and base[name] != tuned[name]]  # fmt: skip
    for name, part in tuned.items():  # the tasks of lm_eval
        if isinstance(part, Mapping) and isinstance(base.get(name), Mapping) and (why := differing(base[name], part)):
            said.append(f"{name}: {why}")
    return "; ".join(said)


def comparable(items: Items) -> bool:
    """These items can be compared in pairs."""
    return bool(items) and all("address" in item and ("score" in item or "loss" in item) for item in items)


def matched(base: Items, tuned: Items) -> tuple[list[Any], list[Any], int]:
    """The items that both sides have, in the order of `tuned`, and how many either side has alone."""
    waiting: dict[Any, list[Any]] = {}
    for item in base:
        waiting.setdefault(_key(item), []).append(item)
    before, after = [], []
    for item in tuned:
        if there := waiting.get(_key(item)):
            before.append(there.pop(0))
            after.append(item)
    return before, after, len(base) + len(tuned) - 2 * len(after)


def _key(item: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    return item.get("address"), item.get("prompt"), item.get("reference")


def _scores(before: Items, after: Items) -> dict[str, Any]:
    base, tuned = ([float(item["score"]) for item in items] for items in (before, after))
    clusters = [item["cluster"] for item in after]
    differences = [t - b for b, t in zip(base, tuned, strict=True)]
    result: dict[str, Any] = {"n": len(after), "clusters": len(set(clusters))}
    for name, scores in (("base", base), ("tuned", tuned)):
        result |= named(name, stats.clustered_mean(scores, clusters))
    result |= named("difference", stats.paired_difference(base, tuned, clusters))
    return {
        **result,
        "wins": sum(d > 1e-9 for d in differences),
        "losses": sum(d < -1e-9 for d in differences),
        "ties": sum(abs(d) <= 1e-9 for d in differences),
        "detectable": stats.smallest_shown(differences, clusters),
        "sure": _sure(result),
    }


def _losses(before: Items, after: Items) -> dict[str, Any]:
    """Nats a supervised token; items with no weight count for nothing."""
    weights = [float(item["weight"]) for item in after]
    losses = ([float(item["loss"]) * w for item, w in zip(items, weights, strict=True)] for items in (before, after))
    base, tuned = losses
    clusters = [item.get("cluster", place) for place, item in enumerate(after)]
    change = [t - b for b, t in zip(base, tuned, strict=True)]
    result: dict[str, Any] = {"n": len(after), "clusters": len(set(clusters))}
    for name, sums in (("base", base), ("tuned", tuned), ("difference", change)):
        result |= named(name, stats.ratio(sums, weights, clusters))
    return {
        **result,
        "wins": sum(c < 0 for c in change), "losses": sum(c > 0 for c in change), "ties": sum(c == 0 for c in change),
        "sure": _sure(result),
    }  # fmt: skip


def _sure(result: Mapping[str, Any]) -> bool:
    """The interval of the difference does not hold 0."""
    low, high = result["difference_low"], result["difference_high"]
    return low is not None and high is not None and not low <= 0 <= high


def named(name: str, found: tuple[float, float, float]) -> dict[str, float | None]:
    """{name, name_low, name_high}; a bound that is not known is None."""
    mean, low, high = found
    return {name: mean, **{f"{name}_{end}": value if math.isfinite(value) else None
                           for end, value in (("low", low), ("high", high))}}  # fmt: skip
