"""Llama-3.1-8B on Tulu 3's SFT mixture with the settings that Tulu 3 8B SFT published, all parameters.

command    itune train --config llama3p1_8b_sft --workdir runs/llama-3.1-8b
hardware   a TPU v5p-8, v6e-8 or larger slice, or 8 GPUs with 80 GB
memory     129 GB for float32 weights, gradients and moments, divided by mesh.fsdp, plus activations
expected   not run yet; published for these settings (with summed loss, template tulu): average 60.4, GSM8K 76.2,
           MMLU 65.9, IFEval 72.8 (Lambert et al. 2024, arXiv 2411.15124)
"""

from itune.config import default_config


def get_config():
    c = default_config()
    c.model.path = "meta-llama/Llama-3.1-8B"
    c.model.compute_dtype = "bfloat16"
    c.data.train = "allenai/tulu-3-sft-mixture"
    c.data.held_out_share = 0.002
    c.data.max_length = 4096
    c.data.packing = False  # 128 conversations a step, as published; packing would put more into each
    c.data.chat_template = "tulu"
    c.data.overlong = "truncate"
    c.loss.weighting = "sum"
    c.train.epochs = 2.0
    c.train.batch_size = 128
    c.train.accumulation = 8
    c.train.remat = "full"
    c.optimizer.learning_rate = 5e-6
    c.optimizer.schedule = "linear"
    c.optimizer.warmup = 0.03
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = 0.0  # open-instruct's default: no clipping
    c.eval.every = 1000
    c.checkpoint.every = 500
    return c
