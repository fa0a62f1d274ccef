"""Time and cost of a step and of a run, from what the chip can do at most and stated shares of it."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from itune import flops
from itune.plan.chips import CHIPS, OVERLAP_EFFICIENCY, Slice
from itune.plan.layout import Layout
from itune.types import InputError


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one step by limit. Compute and traffic inside a slice overlap, the update follows them.

    `model_flops` is what the model needs (all devices), `hardware_flops` what the devices do. `tokens` a step.
    `in_bfloat16`: seconds of `compute` were all products in bfloat16.
    """

    model_flops: float
    hardware_flops: float
    tokens: int
    compute: float
    interconnect: float
    network: float
    update: float
    in_bfloat16: float

    @property
    def step(self) -> float:
        return max(self.compute, self.interconnect, self.network) + self.update

    @property
    def bound(self) -> str:
        return max(("compute", "interconnect", "network"), key=lambda name: getattr(self, name))

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step

    @property
    def bfloat16_gain(self) -> float:
        """How many times as fast the step would be with all products in bfloat16, if it exchanged the same bytes."""
        return self.step / dataclasses.replace(self, compute=self.in_bfloat16).step


def model_flops(layout: Layout, positions_L: np.ndarray | None = None) -> float:
    """FLOPs that a step of full rows needs; adapters need no gradient of the kernels they stand beside (2/3)."""
    m, c = layout.model.config, layout.config
    rows, length = c.train.batch_size, c.data.max_length
    positions = np.arange(length)[None] if positions_L is None else positions_L[None]
    segments = np.ones_like(positions)
    pairs = {w: rows * flops.visible_pairs(positions, segments, w) for w in dict.fromkeys(flops.windows(m))}
    if c.train.freeze:
        from itune.setup_run import make_tuning  # which imports this floor's check

        return make_tuning(c, layout.model).train_flops()(m, rows * length, pairs)
    forward = flops.forward_flops(m, rows * length, pairs)
    products = 2.0 * flops.matrix_parameters(m) * rows * length
    return 3 * forward - (products if c.lora.rank else 0)


def hardware_flops(layout: Layout) -> float:
    """What the devices do by formula: model FLOPs, plus a forward pass of the layers again, plus flash attention's.

    The devices of the expert axis share the experts only: all else each of them does for the same tokens.
    """
    m, c = layout.model.config, layout.config
    rows, length = c.train.batch_size, c.data.max_length
    if not layout.through:
        return model_flops(layout)
    head = 2.0 * m.width * m.vocab_size * rows * length
    pairs = {w: rows * flops.visible_pairs(np.arange(length)[None], np.ones((1, length)), w) for w in
             dict.fromkeys(flops.windows(m))}  # fmt: skip
    forward = flops.forward_flops(m, rows * length, pairs)
    attention = forward - 2.0 * flops.matrix_parameters(m) * rows * length
    again = forward - head if c.train.remat == "full" else 0.0  # "dots" keeps what splash and cuDNN give
    once = model_flops(layout) + 0.5 * attention + again
    experts = 2.0 * flops.expert_parameters(m) * rows * length
    passes = 2 + layout.trained_layers + (c.train.remat == "full")
    return once + (layout.sizes["expert"] - 1) * (once - passes * experts)


def estimate(
    layout: Layout, where: Slice, traffic: float, across: float = 0.0, counted: Mapping[str, float] | None = None
) -> Estimate:
    """The estimate for a layout on a slice. `traffic`: bytes a device receives inside its slice; `across`: from others.

    `counted`: FLOPs of all devices from `count_flops`; without, by formula, all of them in the compute dtype.
    """
    chip, devices = where.chip, where.chips
    if counted is None:
        hardware = hardware_flops(layout)
        exact = hardware if layout.config.model.compute_dtype == "float32" else 0.0
    else:
        hardware, exact = counted["products"] + counted["attention"], counted["exact"]
    reached = devices * chip.efficiency  # of every peak, all devices together
    state = 2 * (layout.parameters + layout.optimizer) + 8 * layout.trained  # read and written, gradients read twice
    return Estimate(
        model_flops=model_flops(layout),
        hardware_flops=hardware,
        tokens=layout.config.train.batch_size * layout.config.data.max_length,
        compute=((hardware - exact) / chip.peak + exact / chip.peak_in("float32")) / reached,
        interconnect=traffic / (where.interconnect * OVERLAP_EFFICIENCY),
        network=across / (chip.network * OVERLAP_EFFICIENCY),
        update=state / (chip.memory_bandwidth * OVERLAP_EFFICIENCY),
        in_bfloat16=hardware / chip.peak / reached,
    )


def prices(path: str | Path | None = None) -> dict[str, Any]:
    """The price table: chip -> {"on_demand": dollars a chip and hour, "noted": date}. InputError if malformed."""
    from itune.config import configs_dir

    file = Path(path) if path else configs_dir() / "prices.toml"
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # also what is no TOML, or not UTF-8
        raise InputError(f"--prices {file}: cannot be read: {error}") from error
    for chip, row in table.items():
        if chip not in CHIPS:
            near = difflib.get_close_matches(chip.lower(), CHIPS, n=1)
            raise InputError(f"--prices {file}: [{chip}] is no chip that is known; expected {', '.join(CHIPS)}"
                             f"{f'; nearest: {near[0]}' if near else ''}")
        price = row.get("on_demand") if isinstance(row, dict) else None
        if isinstance(price, bool) or not isinstance(price, int | float) or not 0 <= price < float("inf"):
            raise InputError(f"--prices {file}: [{chip}] needs on_demand = dollars for one chip and hour, "
                             f"found {price!r}")
    return table
