"""Qwen3-0.6B-Base on Tulu 3's SFT mixture, all parameters.

command    itune train --config qwen3_0p6b_sft --workdir runs/qwen3-0.6b
hardware   one GPU or TPU chip with 24 GB or more, or a TPU v5e-4
memory     9.5 GB for float32 weights, gradients and moments, plus about 4 GB of activations at 8 rows of 4,096 tokens
expected   not run yet
"""

from itune.config import default_config


def get_config():
    c = default_config()
    c.model.path = "Qwen/Qwen3-0.6B-Base"
    c.model.compute_dtype = "bfloat16"
    c.data.train = "allenai/tulu-3-sft-mixture"
    c.data.held_out_share = 0.002
    c.data.max_length = 4096
    c.data.chat_template = "chatml"
    c.train.epochs = 2.0
    c.train.batch_size = 32
    c.train.accumulation = 4
    c.train.remat = "full"
    c.optimizer.learning_rate = 2e-5
    c.optimizer.warmup = 0.03
    c.eval.every = 1000
    c.checkpoint.every = 500
    return c
