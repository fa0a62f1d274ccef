"""The demo: a generated world, a base model pretrained on its text, and the run that tunes it."""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
SEED = 0  # of the world: the facts stand in the shipped model's weights
