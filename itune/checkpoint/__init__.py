"""Checkpoints: state, data position and config as one unit, whole or absent."""

from itune.checkpoint.compatible import compare_configs
from itune.checkpoint.store import Saved, Store

__all__ = ["Saved", "Store", "compare_configs"]
