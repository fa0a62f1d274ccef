"""The defaults of TRL's SFTConfig (1.16) in itune's keys, for a run that repeats one of TRL; see docs/from_trl.md.
Not of TRL: the event files of TensorBoard (log.tensorboard).

command    itune train --config trl --config.model.path=FOLDER --config.data.train=ROWS.jsonl --workdir runs/x
hardware   one device; train.batch_size is the global batch: rows a device x devices x accumulation
memory     16 bytes a parameter in float32 (weights, gradients, two moments), plus the activations of one layer; on disk
           12 bytes a parameter a checkpoint: all stay, as there; only the newest two with checkpoint.keep_every=0
expected   the losses of SFTTrainer with bf16=False, step by step, within float32 rounding (tests/test_trl.py)
"""

from itune.config import default_config


def get_config():
    c = default_config()
    c.compat = "trl"
    c.seed = 42
    c.evaluators = ()
    c.data.packing = False
    c.data.max_length = 1024
    c.data.overlong = "keep_start"
    c.train.epochs = 3.0
    c.train.batch_size = 8
    c.train.remat = "full"
    c.optimizer.learning_rate = 2e-5
    c.optimizer.schedule = "linear"
    c.checkpoint.every = 500
    c.checkpoint.keep_every = 1
    c.eval.batch_size = 8
    return c
