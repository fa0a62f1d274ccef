"""`itune plan --search`: mesh shapes, micro-batch and rematerialisation; the fastest that fits, the runner-up, and why.

The global batch stays what the config says, so that every choice trains to the same result (contract 3), and so does
train.accumulation where the objective depends on it. All candidates are ranked by formula; the best five are compiled
where that is possible, and ranked again by what was compiled.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any, Literal

from itune.config import Config
from itune.models import load_model
from itune.objectives.sft import by_micro_batch
from itune.plan.apart import OutOfTime, compiled_apart
from itune.plan.chips import Slice
from itune.plan.inputs import Known
from itune.plan.report import Report, lines, settings_text, spell
from itune.setup_run import Log, training_only
from itune.types import InputError, RunError

COMPILED = 5
SECONDS = 570.0  # no compilation goes on longer, nor begins if it would, taking as long as the longest before it
SAME = 0.02  # two steps whose times differ by less are equally fast: the estimate knows no better
REMATS: tuple[Literal["none", "dots", "full"], ...] = ("none", "dots", "full")


def search(
    config: Config, where: Slice, facts: Known, table: dict[str, Any], can_compile: bool, log: Log,
    price_file: str | None = None,
) -> dict[str, Any]:
    """Print and return the best plan, the runner-up, and every candidate that was compiled."""
    from itune.plan.run import formula_report

    begun = time.monotonic()
    ranked: list[tuple[Config, Report]] = []
    refused, last = 0, ""
    for candidate in candidates(config, where, _experts(config)):
        try:
            ranked.append((candidate, formula_report(candidate, where, facts, table)))
        except InputError as error:  # this mesh does not divide the model or the batch
            refused, last = refused + 1, str(error)
    if not ranked and last:
        raise InputError(f"--search: none of {refused} ways to divide {where.chips} devices takes this run; of the "
                         f"last: {last}")
    if not ranked:
        raise InputError(f"--search: nothing divides {config.train.batch_size} rows over {where.chips} devices; "
                         "change train.batch_size")
    ranked.sort(key=lambda pair: order(pair[1], slack=1.05))
    log(f"search: {len(ranked)} candidates by formula ({refused} do not divide), {time.monotonic() - begun:.0f} s")
    tried = compiled(ranked[:COMPILED], begun, where, facts, table, log) if can_compile else ranked[:COMPILED]
    tried.sort(key=lambda pair: order(pair[1]))
    best = tried[0][1]
    if not best.fits:
        log(f"search: none of the {len(tried)} best fits; the nearest is too large by {-best.left / 2**30:.2f} GiB")
    for line in lines(best, price_file):
        log(line)
    second = tried[1][1] if len(tried) > 1 else None
    why = reason(best, second) if second else ""
    if second:
        log(f"runner-up: {describe(second)}; {why}")
    log("set: " + " ".join(overrides(tried[0][0])))
    return {
        "best": best.to_dict(), "runner_up": second.to_dict() if second else None, "why": why,
        "overrides": overrides(tried[0][0]), "tried": [report.to_dict() for _, report in tried],
        "candidates": len(ranked), "seconds": time.monotonic() - begun,
    }


def compiled(
    ranked: list[tuple[Config, Report]], begun: float, where: Slice, facts: Known, table: dict[str, Any], log: Log
) -> list[tuple[Config, Report]]:
    """The candidates with what compiling says of them, as many as there is time for; by formula where it was none."""
    tried, left, longest = [], list(ranked), 0.0
    for candidate, by_formula in ranked:
        started = time.monotonic()
        spent = started - begun
        if spent + longest > SECONDS:
            log("search: out of time, the rest stays by formula")
            break
        try:
            report = compiled_apart(training_only(candidate), where, facts, table, SECONDS - spent)
        except OutOfTime:
            log(f"  {settings_text(by_formula.settings)}: not compiled in what was left of {SECONDS:.0f} s")
            break
        except (InputError, RunError) as error:
            log(f"  {settings_text(by_formula.settings)}: left out; {str(error).splitlines()[0]}")
            left.remove((candidate, by_formula))
        else:
            log(f"  {describe(report)} (formula: {by_formula.need.total / 2**30:.2f} GiB)")
            tried.append((candidate, report))
        longest = max(longest, time.monotonic() - started)
    if not left:
        raise RunError("--search: the compiler took none of the best by formula, see above")
    return tried or left


def candidates(config: Config, where: Slice, experts: int = 1) -> Iterator[Config]:
    """Configs with every division of the devices over data, fsdp, tensor and the axis of a model's `experts`, every
    micro-batch (the config's where the objective depends on it), every remat policy. Several slices hold a copy of the
    model each, or share one. mesh.context stays.
    """
    context = max(config.mesh.context, 1)
    of_one = where.chips // where.slices
    if of_one % context:
        raise InputError(f"--search: mesh.context={context} does not divide the {of_one} devices of a slice of "
                         f"{where.name}; set it to a divisor")
    fixed = by_micro_batch(config.loss.weighting, config.loss.router_aux)
    cuts = (config.train.accumulation,) if fixed else (1, 2, 4, 8, 16, 32, 64)
    for data, fsdp, tensor, expert in meshes(of_one // context, experts):
        for dcn_data in {where.slices, 1}:
            mesh = dataclasses.replace(config.mesh, data=data, fsdp=fsdp, tensor=tensor, expert=expert, context=context,
                                       dcn_data=dcn_data, dcn_fsdp=where.slices // dcn_data)
            groups = data * fsdp * where.slices
            for accumulation in (n for n in cuts if config.train.batch_size % (n * groups) == 0):
                for remat in REMATS:
                    train = dataclasses.replace(config.train, accumulation=accumulation, remat=remat)
                    yield dataclasses.replace(config, mesh=mesh, train=train)


def meshes(devices: int, experts: int) -> Iterator[tuple[int, int, int, int]]:
    """(data, fsdp, tensor, expert) of every division of so many devices."""
    for tensor in (n for n in (1, 2, 4, 8) if devices % n == 0):
        for expert in (n for n in (1, 2, 4, 8, 16, 32) if devices // tensor % n == 0 and experts % n == 0):
            rest = devices // tensor // expert
            yield from ((data, rest // data, tensor, expert) for data in range(1, rest + 1) if rest % data == 0)


def _experts(config: Config) -> int:
    """Experts of a layer of the model, 1 where it has none."""
    kinds = load_model(config.model.path, revision=config.model.revision or None).config.kinds
    return max((kind.experts.count for kind in kinds if kind.experts), default=1)


def order(report: Report, slack: float = 1.0) -> tuple[bool, float, float, float]:
    """What fits first (with `slack` for the formula's error), then the fastest; of what does not fit, the smallest.

    Of those that are as fast as each other (SAME) the one that exchanges least: computing may hide less than assumed.
    """
    fits = not report.limit or max(report.need.total, report.evaluation) <= slack * report.limit
    size = round(math.log(report.time.step) / SAME) if fits else report.need.total
    return not fits, size, report.time.interconnect + report.time.network, report.time.step


def describe(report: Report) -> str:
    left = f"{report.left / 2**30:.2f} to spare" if report.fits else f"too large by {-report.left / 2**30:.2f}"
    return (f"{settings_text(report.settings)}: {report.need.total / 2**30:.2f} GiB, {left}, "
            f"{spell(report.time.step)} a step")


def reason(best: Report, second: Report) -> str:
    """Why the second is second."""
    if not second.fits:
        return "it does not fit"
    slower = second.time.step / best.time.step - 1
    limits = ("compute", "interconnect", "network", "update")
    parts = {name: getattr(second.time, name) - getattr(best.time, name) for name in limits}
    worst = max(parts, key=lambda name: parts[name])
    if slower <= 0 < parts["interconnect"] + parts["network"]:
        return f"as fast ({slower:+.1%}), but exchanges more"
    if parts[worst] <= 0:
        return "as fast by these limits; the first needs " + (
            "less memory" if best.need.total <= second.need.total else "more memory")
    return f"{slower:.1%} slower: {spell(parts[worst])} more {worst} a step"


def overrides(config: Config) -> list[str]:
    """The command-line options that make the choice."""
    axes = ("data", "fsdp", "tensor", "expert", "context", "dcn_data", "dcn_fsdp")
    mesh = {f"mesh.{axis}": getattr(config.mesh, axis) for axis in axes}
    settings = {**mesh, "train.accumulation": config.train.accumulation, "train.remat": config.train.remat}
    return [f"--config.{key}={value}" for key, value in settings.items()]
