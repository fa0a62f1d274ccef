"""Every key once, with its unit and meaning. A recipe starts from here and states only what differs."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict(convert_dict=False)
    c.seed = 0  # decides data order, dropout and sampling
    c.compat = ""  # "trl": epoch windows, data order and clip epsilon as TRL has them
    c.evaluators = ("heldout_loss",)  # names of files in itune/evaluators

    c.model = ConfigDict()
    c.model.path = ""  # folder with config.json and safetensors, or a hub id
    c.model.revision = ""  # commit, tag or branch of a hub id; "" is its main branch
    c.model.param_dtype = "float32"  # dtype of the weights that the optimizer updates
    c.model.compute_dtype = "float32"  # dtype of matrix products: bfloat16 on accelerators
    c.model.attention = "auto"  # auto chooses by device: xla (CPU), cudnn or pallas (GPU), splash (TPU)

    c.data = ConfigDict(convert_dict=False)
    c.data.train = ""  # JSONL (.gz, .zst), Parquet, folder, glob, hub dataset id, tfds:NAME; or a tuple of them
    c.data.eval = ""  # the same, for held-out items that stand in files of their own
    c.data.format = "auto"  # auto | messages | sharegpt | alpaca | prompt_completion
    c.data.fields = {}  # field map, ours -> theirs: {"prompt": "question", "completion": "answer"}
    c.data.held_out_by = ""  # field whose values are the groups to split by (a task); "" splits by conversation
    c.data.held_out_share = 0.0  # share of the groups held out of data.train for evaluation
    c.data.novel_min = 0  # fail when fewer held-out items remain
    c.data.max_length = 1024  # tokens a row
    c.data.overlong = "drop"  # conversations over max_length: drop | truncate; always counted
    c.data.packing = True  # several examples a row, kept apart by segment ids
    c.data.chat_template = ""  # name (chatml, llama3) or file, for a model that has none; "" is the tokenizer's own
    c.data.train_on = "assistant"  # assistant: all its turns | last: its last turn | all: every turn
    c.data.mixture = {}  # source name -> weight; {} takes every row of every source once an epoch
    c.data.limit = 0  # rows read from each source, 0 is all
    c.data.cache_dir = ""  # where tokenised data is kept; "" is the user's cache folder

    c.loss = ConfigDict()
    c.loss.weighting = "token"  # token | example | microbatch_mean | sum
    c.loss.chunk = 1024  # tokens whose logits exist at one time

    c.train = ConfigDict()
    c.train.epochs = 1.0  # passes over the data
    c.train.max_steps = 0  # optimizer steps; 0 means train.epochs decides
    c.train.batch_size = 8  # rows of the global batch of one optimizer step, accumulation included
    c.train.accumulation = 1  # micro-batches that a step is cut into
    c.train.remat = "none"  # recompute in the backward pass: none | full | dots (keep matrix products)
    c.train.deterministic = False  # bitwise repeatable on GPU, slower
    c.train.init_from = ""  # run directory whose trained parameters start this run
    c.train.freeze = ""  # parameters whose path this regular expression matches stay: "embed|layer_0/attention"
    c.train.max_skipped = 3  # updates in a row whose loss or gradient is not finite: each is skipped, the last ends it
    c.train.timeout = 1800.0  # seconds a step may take before the run writes all stacks and leaves; 0 is off

    c.optimizer = ConfigDict(convert_dict=False)
    c.optimizer.name = "adamw"  # adamw (as in torch), adafactor, sgd, or any optimizer of optax
    c.optimizer.learning_rate = 2e-5  # peak
    c.optimizer.schedule = "linear"  # after warm-up: linear | cosine | constant | wsd (stable, last 20 % decays)
    c.optimizer.warmup = 0.0  # steps; below 1 a share of all steps
    c.optimizer.weight_decay = 0.0  # norms and biases are never decayed
    c.optimizer.clip_norm = 1.0  # global gradient norm; 0 is off
    c.optimizer.b1 = 0.9  # decay of the first moment
    c.optimizer.b2 = 0.999  # decay of the second moment
    c.optimizer.eps = 1e-8  # added to the root of the second moment
    c.optimizer.moment_dtype = "float32"  # dtype of the first moment
    c.optimizer.second_moment_dtype = "float32"  # of adamw's second moment; bfloat16 is rounded stochastically
    c.optimizer.stochastic_rounding = False  # of updates to bfloat16 weights: small ones arrive on average
    c.optimizer.rates = {}  # learning rates by parameter path, the first match: {"embed": 0.1, "mlp/.*_proj": 2.0}
    c.optimizer.options = {}  # further keyword arguments of an optax optimizer

    c.lora = ConfigDict()
    c.lora.rank = 0  # 0 trains all parameters
    c.lora.alpha = 16.0  # adapters are scaled by alpha / rank
    c.lora.targets = r".*_proj"  # regular expression that a module's whole name matches: q_proj or attention/q_proj
    c.lora.dropout = 0.0  # share of an adapter's input entries that training zeroes
    c.lora.rslora = False  # scale by alpha / sqrt(rank)
    c.lora.init_from = ""  # adapter folder of peft to start from; "" starts new adapters

    c.mesh = ConfigDict()
    c.mesh.data = 1  # copies of the model; -1 takes the devices that the other axes leave
    c.mesh.fsdp = -1  # devices that share each copy's weights and optimizer state
    c.mesh.expert = 1  # devices that share the experts
    c.mesh.context = 1  # devices that share one sequence
    c.mesh.tensor = 1  # devices that share each matrix product

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 200  # steps; 0 saves at the end only
    c.checkpoint.keep = 2  # newest checkpoints that stay
    c.checkpoint.keep_best = ""  # evaluation metric whose best checkpoint stays too, such as heldout_loss/loss
    c.checkpoint.keep_every = 0  # checkpoints whose step is a multiple of this stay too; 0 is off
    c.checkpoint.minutes = 0.0  # saves when the last save is so many minutes ago, besides checkpoint.every; 0 is off

    c.eval = ConfigDict(convert_dict=False)
    c.eval.every = 0  # steps; 0 evaluates before and after training
    c.eval.batch_size = 16  # rows
    c.eval.max_new_tokens = 64  # tokens a generated answer may have
    c.eval.limit = 0  # items that generation evaluators answer; 0 is all
    c.eval.score = "exact"  # what is right: exact | normalized | package.module:function with arguments (item, answer)
    c.eval.by = "category"  # metadata field whose values results are broken down by
    c.eval.groups = ()  # further fields to break results down by, such as ("annotator",)
    c.eval.patience = 0  # stop after so many evaluations in a row without a better eval.metric; 0 is off
    c.eval.metric = "heldout_loss/loss"  # evaluator/number; lower is better where its name says loss, error, perplexity
    c.eval.min_delta = 0.0  # an improvement is larger than this
    c.eval.lm_eval = ()  # tasks of lm-evaluation-harness, for the evaluator lm_eval
    c.eval.lm_eval_path = ""  # folder with task files of your own; "" uses the harness's
    c.eval.lm_eval_options = {}  # such as {"apply_chat_template": True, "num_fewshot": 5, "limit": 200}

    c.log = ConfigDict()
    c.log.every = 10  # steps
    c.log.tensorboard = True  # event files in the run directory
    c.log.wandb = ""  # project name; "" is off

    c.profile = ConfigDict()
    c.profile.steps = ""  # "10:13" traces these steps
    return c
