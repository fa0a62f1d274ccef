"""A plan as data: one configuration on one slice, by formula or compiled, with time and cost; and as lines to print."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from itune.plan.chips import OVERLAP_EFFICIENCY, Slice
from itune.plan.estimate import Estimate
from itune.plan.memory import Need

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Report:
    """`need`: bytes on one device; `limit`: what it has, 0 where unknown. `evaluation`: peak of the evaluation step.

    `traffic`: what one device receives a step, by purpose (formula) or by operation (compiled). `compiled`: what
    compiling took, None by formula.
    """

    where: Slice
    settings: dict[str, Any]
    need: Need
    limit: int
    traffic: dict[str, float]
    time: Estimate
    steps: int
    steps_source: str
    price: float | None
    compiled: dict[str, float] | None = None
    evaluation: int = 0

    @property
    def left(self) -> int:
        """Bytes free on a device; negative: how much is missing."""
        return self.limit - max(self.need.total, self.evaluation)

    @property
    def fits(self) -> bool:
        return not self.limit or self.left >= 0

    @property
    def hours(self) -> float:
        return self.steps * self.time.step / 3600

    @property
    def cost(self) -> float | None:
        """Dollars of the whole run; None where price or steps are not known."""
        return None if self.price is None or not self.steps else self.hours * self.where.chips * self.price

    @property
    def compute_peak(self) -> float:
        """FLOP/s that a chip has at most in the compute dtype."""
        return self.where.chip.peak_in(self.settings["compute_dtype"])

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, unrounded."""
        t = self.time
        return {
            "topology": self.where.name, "chips": self.where.chips, "settings": self.settings, "fits": self.fits,
            "memory": {**dataclasses.asdict(self.need), "total": self.need.total, "limit": self.limit,
                       "evaluation": self.evaluation, "left": self.left if self.limit else None},
            "traffic": self.traffic, "compiled": self.compiled,
            "flops": {"model": t.model_flops, "hardware": t.hardware_flops, "peak": self.where.chip.peak,
                      "compute_peak": self.compute_peak, "efficiency": self.where.chip.efficiency},
            "seconds": {"step": t.step, "compute": t.compute, "interconnect": t.interconnect, "network": t.network,
                        "update": t.update},
            "tokens_per_second": t.tokens_per_second, "mfu": mfu(self), "steps": self.steps,
            "steps_source": self.steps_source, "hours": self.hours if self.steps else None,
            "dollars_per_chip_hour": self.price, "dollars": self.cost,
        }  # fmt: skip


def mfu(report: Report) -> float:
    """Model FLOPs that the estimated step does, as a share of the bfloat16 peak in any compute dtype, as in a run."""
    return report.time.model_flops / (report.time.step * report.where.chips * report.where.chip.peak)


def lines(report: Report, price_file: str | None = None) -> Iterator[str]:
    """The report for a terminal."""
    need, t, where, dtype = report.need, report.time, report.where, report.settings["compute_dtype"]
    how = "compiled for these chips" if report.compiled else "by formula, within about 15 %"
    yield f"{where.name}: {where.chips} x {where.chip.name}, {settings_text(report.settings)}"
    yield f"memory of one device ({how}), GiB"
    for name in ("parameters", "optimizer", "gradients", "activations", "temporaries"):
        yield f"  {name:<14}{getattr(need, name) / GIB:9.2f}"
    if need.attention:
        yield f"  {'attention':<14}{need.attention / GIB:9.2f}   (an estimate of what cuDNN takes beside XLA)"
    yield f"  {'total':<14}{need.total / GIB:9.2f}"
    if report.evaluation:
        yield f"  {'evaluation':<14}{report.evaluation / GIB:9.2f}   (another program; it runs between steps)"
    if report.limit:
        verdict = f"fits, {report.left / GIB:.2f} to spare" if report.fits else f"too large by {-report.left / GIB:.2f}"
        yield f"  {'chip':<14}{report.limit / GIB:9.2f}   {verdict}"
    yield "bytes that one device receives a step, GB" + ("" if report.traffic else ": none, it is alone")
    for purpose, size in sorted(report.traffic.items(), key=lambda item: -item[1]):
        yield f"  {purpose:<28}{size / 1e9:9.2f}" if size >= 1e8 else f"  {purpose:<28}{size / 1e9:9.2g}"
    waste = t.hardware_flops / t.model_flops
    yield (
        f"FLOPs a step: model {t.model_flops:.3e}, hardware {t.hardware_flops:.3e} "
        f"({waste:.2f}x: recomputation, attention kernels, padding)"
    )
    yield (
        f"estimated step {spell(t.step)}, bound by {t.bound}: compute {spell(t.compute)} at "
        f"{where.chip.efficiency:.0%} of {report.compute_peak / 1e12:.3g} TFLOP/s ({dtype}), interconnect "
        f"{spell(t.interconnect)} and network {spell(t.network)} at {OVERLAP_EFFICIENCY:.0%}, then update "
        f"{spell(t.update)}"
    )
    rate = t.tokens_per_second
    yield f"  {rate:,.0f} tokens/s, {rate / where.chips:,.0f} a chip, MFU {mfu(report):.1%} of the bfloat16 peak"
    if dtype == "float32":
        gain = f"about {t.bfloat16_gain:.1f} times as fast"
        yield f"  bfloat16 compute would be {gain}: --config.model.compute_dtype=bfloat16"
    if not report.steps:
        yield f"steps: {report.steps_source}"
        return
    prices = price_file or "configs/prices.toml"
    price = f", no price of {where.chip.name} in {prices}"
    if report.cost is not None:
        cost = f"about ${report.cost:,.0f}" if report.cost >= 1 else "less than $1"
        price = f", {cost} at ${report.price:.2f} a chip and hour (your prices: {prices})"
    yield (
        f"run: {report.steps:,} steps ({report.steps_source}), {spell(report.hours * 3600)} without evaluation and "
        f"start{price}"
    )


def spell(seconds: float) -> str:
    """A duration in the unit that shows it: 0, 4.1 ms, 0.75 s, 12.5 minutes, 3.20 hours."""
    if seconds >= 7200:
        return f"{seconds / 3600:,.2f} hours"
    if seconds >= 120:
        return f"{seconds / 60:.1f} minutes"
    if seconds >= 0.1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2g} ms" if seconds else "0"


def settings_text(settings: dict[str, Any]) -> str:
    mesh = " x ".join(f"{axis}={size}" for axis, size in settings["mesh"].items() if size > 1) or "one device"
    return (
        f"mesh {mesh}; {settings['rows']} rows of {settings['length']} tokens a step in {settings['accumulation']} "
        f"micro-batch{'es' if settings['accumulation'] > 1 else ''}, remat {settings['remat']}"
    )
