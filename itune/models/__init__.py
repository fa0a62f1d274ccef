"""The decoder, the families it covers, and their checkpoints."""

from itune.models.architecture import LayerKind, ModelConfig, Rope
from itune.models.hf.write import save_pretrained
from itune.models.load import load_model, load_pretrained
from itune.models.model import Model, forward

__all__ = ["LayerKind", "Model", "ModelConfig", "Rope", "forward", "load_model", "load_pretrained", "save_pretrained"]
