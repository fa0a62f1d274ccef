"""The cheap check that `itune train` makes before it starts: one line, by formula."""

from __future__ import annotations

from typing import Any

from itune.config import Config
from itune.plan.chips import device_memory, here
from itune.plan.gpu_target import cudnn_formula
from itune.plan.layout import layout_of
from itune.plan.memory import formula_memory
from itune.runtime.environment import machine_memory, resident_memory

SURE = 1.15  # the formula is within 15 % of what is compiled


def one_line(config: Config, model: Any, mesh: Any, state: Any) -> str:
    """What a device of `mesh` will hold for this abstract state, and a warning where that is more than it has."""
    layout, where = layout_of(config, model, mesh.shape, state), here(list(mesh.devices.flat))
    need = formula_memory(layout, cudnn_formula(layout, where.chip, model.max_segments) if where else 0)
    device = mesh.devices.flat[0]
    text = (
        f"plan: about {_gb(need.total)} on each of {mesh.size} {device.device_kind} device"
        f"{'s' if mesh.size > 1 else ''} (parameters {_gb(need.parameters)}, optimizer {_gb(need.optimizer)}, "
        f"gradients {_gb(need.gradients)}, activations {_gb(need.activations)}, "
        f"other {_gb(need.temporaries + need.attention)})"
    )
    if device.platform == "cpu":  # all of the process' devices share the machine's memory, the process' own data too
        holds, has = resident_memory(), machine_memory()
        takes = need.total * sum(each.process_index == device.process_index for each in mesh.devices.flat) + holds
        text += f" beside {_gb(holds)} that the process holds; the machine has {_gb(has)}"
    else:
        takes, has = need.total, device_memory(device)
        text += f"; it has {_gb(has)}" if has else ""
    if has and takes > has:
        surely = "will not fit" if takes > SURE * has else "may not fit"
        return f"warning: {text}: the run {surely}; see itune plan --search"
    return text


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size < 1e10 else f"{size / 1e9:.1f} GB"
