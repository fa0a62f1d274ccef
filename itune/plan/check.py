"""The cheap check that `itune train` makes before it starts: one line, by formula."""

from __future__ import annotations

from typing import Any

from itune.config import Config
from itune.plan.layout import layout_of
from itune.plan.memory import formula_memory

SURE = 1.15  # the formula is within 15 % of what is compiled


def one_line(config: Config, model: Any, mesh: Any, state: Any) -> str:
    """What a device of `mesh` will hold for this abstract state, and a warning where that is more than it has."""
    need = formula_memory(layout_of(config, model, mesh.shape, state))
    device = mesh.devices.flat[0]
    text = (
        f"plan: about {_gb(need.total)} on each of {mesh.size} {device.device_kind} device"
        f"{'s' if mesh.size > 1 else ''} (parameters {_gb(need.parameters)}, optimizer {_gb(need.optimizer)}, "
        f"gradients {_gb(need.gradients)}, activations {_gb(need.activations)}, other {_gb(need.temporaries)})"
    )
    has = device_memory(device)
    if not has:
        return text
    if need.total > has:
        surely = "will not fit" if need.total > SURE * has else "may not fit"
        return f"warning: {text}; it has {_gb(has)}: the run {surely}; see itune plan --search"
    return f"{text} of {_gb(has)}"


def device_memory(device: Any) -> int:
    """Bytes that programs may use on a device of this machine; 0 where that is not known (CPU)."""
    try:
        stats = device.memory_stats() or {}
    except Exception:  # backends without statistics raise their own
        return 0
    return int(stats.get("bytes_limit", 0)) if device.platform != "cpu" else 0


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size < 1e10 else f"{size / 1e9:.1f} GB"
