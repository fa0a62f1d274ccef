"""Supervised tuning of any model on any instruction data, all parameters.

command    itune train --config sft --config.model.path=FOLDER_OR_HUB_ID --config.data.train=FILE_OR_DATASET
           --workdir runs/x
hardware   one device or many: the mesh takes what is there; set mesh.* to divide it otherwise
memory     16 bytes a parameter in float32 (weights, gradients, two moments), divided by mesh.fsdp, plus activations
expected   held-out loss below that of the base model after the first epoch; see "what to expect" in the README
"""

from itune.config import default_config


def get_config():
    c = default_config()
    c.train.epochs = 2.0
    c.train.batch_size = 16
    c.optimizer.learning_rate = 2e-5
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup = 0.03
    c.data.held_out_share = 0.05
    return c
