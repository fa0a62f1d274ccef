"""LoRA on any model and any instruction data: small adapters train beside a frozen base.

command    itune train --config lora --config.model.path=FOLDER_OR_HUB_ID --config.data.train=FILE_OR_DATASET
           --workdir runs/x
           itune export --workdir runs/x --out adapters/x --adapter    (a folder of peft)
           itune export --workdir runs/x --out models/x                (merged, a model folder)
hardware   one device or many; an 8B base in bfloat16 fits one GPU or TPU chip with 32 GB and room for activations
memory     2 bytes a parameter of the base in bfloat16 and 16 bytes an adapter parameter, divided by mesh.fsdp, plus
           activations; rank 16 on all projections is 0.5 % of an 8B model
expected   held-out loss close to that of `sft` on the same data (not better); see docs/lora.md
"""

from itune.config import default_config


def get_config():
    c = default_config()
    c.model.param_dtype = "bfloat16"
    c.model.compute_dtype = "bfloat16"
    c.data.held_out_share = 0.05
    c.train.epochs = 2.0
    c.train.batch_size = 16
    c.train.remat = "full"
    c.lora.rank = 16
    c.lora.alpha = 32.0
    c.optimizer.learning_rate = 2e-4  # ten times that of full tuning
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup = 0.03
    return c
