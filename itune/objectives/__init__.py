"""Training objectives: what a step minimises. Each is one file and gives an `Objective`."""

from itune.objectives.objective import Objective
from itune.objectives.sft import make_sft

__all__ = ["Objective", "make_sft"]
