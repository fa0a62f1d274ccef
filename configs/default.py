"""Every key once, with its unit and meaning. A recipe starts from here and states only what differs."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict(convert_dict=False)
    c.seed = 0  # decides data order, dropout and sampling
    c.compat = ""  # "trl": data order and micro-batches as TRL has them, see docs/from_trl.md
    c.evaluators = ("heldout_loss",)  # names of files in itune/evaluators

    c.model = ConfigDict()
    c.model.path = ""  # folder with config.json and safetensors (here, gs:// or s3://), or a hub id
    c.model.revision = ""  # commit, tag or branch of a hub id; "" is its main branch
    c.model.param_dtype = "float32"  # dtype of the weights that the optimizer updates
    c.model.compute_dtype = "float32"  # dtype of matrix products: bfloat16 on accelerators
    c.model.attention = "auto"  # auto chooses by device: blocks (CPU), cudnn or pallas (GPU), splash (TPU)

    c.data = ConfigDict(convert_dict=False, type_safe=False)  # a recipe may set several files; the Config checks types
    c.data.train = ""  # JSONL (.gz, .zst), Parquet, folder, glob (here, gs://, s3://), hub id, tfds:NAME; or a tuple
    c.data.eval = ""  # the same, for held-out items that stand in files of their own
    c.data.format = "auto"  # auto | messages | sharegpt | alpaca | prompt_completion
    c.data.fields = {}  # field map, ours -> theirs: {"prompt": "question", "completion": "answer"}
    c.data.limit = 0  # rows read from each source, 0 is all
    c.data.source_field = ""  # field that names a row's source, for files that hold several; "" takes the file's name
    c.data.category_field = "category"  # field that labels a row's category; other taxonomies' labels are mapped
    c.data.categories = {}  # source name -> category of its rows without a label; the others go by rules
    c.data.group_field = ""  # field with the annotator, or the annotator's group: coverage, and with a rating agreement
    c.data.rating_field = ""  # field with what an annotator answered, where several answered the same prompt

    c.data.held_out_by = ""  # field whose values are the groups to split by (a task); "" splits by conversation
    c.data.held_out_share = 0.0  # share of the groups held out of data.train for evaluation
    c.data.novel_min = 0  # fail when fewer different held-out prompts remain
    c.data.overlap_grams = 0.5  # a prompt matches a held-out one that shares over this share of its words in 8-grams
    c.data.overlap_cosine = 0.8  # or whose character n-grams have at least this TF-IDF cosine; 1 turns either off
    c.data.overlap_removes = "train"  # what goes where they match: train | held_out
    c.data.benchmarks = ""  # files of benchmarks that are not evaluated here but must not be trained on: name -> file

    c.data.quality = ConfigDict()  # each filter: off | keep (count, list) | drop; contradiction also: majority
    c.data.quality.exact_duplicate = "keep"  # the same text, case and spaces aside
    c.data.quality.near_duplicate = "keep"  # similar texts, see data.near_duplicate
    c.data.quality.contradiction = "keep"  # same question, incompatible answers; majority keeps the most frequent one
    c.data.quality.empty = "keep"  # an answer without content
    c.data.quality.placeholder = "keep"  # "TODO", "[insert answer here]"
    c.data.quality.refusal = "keep"  # the answer declines
    c.data.quality.truncated = "keep"  # the answer stops in the middle
    c.data.quality.script = "keep"  # the answer is in another script than the question
    c.data.quality.language = "keep"  # the answer is in another language of Latin script
    c.data.quality.missing_input = "keep"  # the question speaks of a text that is not there
    c.data.quality.echo = "keep"  # the answer repeats the question
    c.data.quality.secret = "keep"  # keys, tokens and passwords, by pattern
    c.data.quality.personal = "keep"  # e-mail addresses, telephone, card and account numbers, by pattern
    c.data.quality.predicate = "drop"  # what data.predicate does not keep
    c.data.near_duplicate = 0.7  # Jaccard similarity of character 5-grams from which two texts are near duplicates
    c.data.predicate = ""  # your own filter, package.module:function: Conversation -> True, or False or a reason

    c.data.limits = ConfigDict()  # a run fails before it starts where the data go beyond one of these
    c.data.limits.duplicates = 1.0  # highest share of rows that repeat another, exactly or nearly
    c.data.limits.contradictions = 1.0  # highest share of rows that contradict another
    c.data.limits.broken = 1.0  # highest share of rows with any of the eight broken kinds, empty to echo
    c.data.limits.secrets = 1.0  # highest share of rows with a secret; 0.0 allows none
    c.data.limits.personal = 1.0  # highest share of rows with personal data
    c.data.limits.contamination = 1.0  # highest share of training rows that match a held-out item or a benchmark
    c.data.limits.dropped = 1.0  # highest share of rows left out, for whatever reason; held-out rows do not count
    c.data.limits.lost_tokens = 1.0  # highest share of tokens lost to data.max_length
    c.data.limits.unknown_category = 1.0  # highest share of rows whose category nothing tells
    c.data.limits.supervised = 0.0  # lowest share of tokens that carry weight
    c.data.limits.examples = 0  # lowest number of examples to train on
    c.data.limits.effective_groups = 0.0  # lowest effective number of data.group_field's groups

    c.data.max_length = 1024  # tokens a row
    # over max_length: drop | truncate (oldest turns first, then the end of the answer) | split (by turns into several)
    # | keep_start (the first tokens, wherever that ends)
    c.data.overlong = "drop"
    c.data.packing = True  # several examples a row, kept apart by segment ids
    c.data.chat_template = ""  # name (chatml, llama3) or file, for a model that has none; "" is the tokenizer's own
    c.data.train_on = "assistant"  # assistant: all its turns | last: its last turn | all: every turn

    c.data.source_weights = {}  # source name -> factor of its loss weights; a message's own "weight" counts as well
    c.data.mixture = {}  # source name -> share of an epoch's draws; {} takes every row of every source once
    c.data.counts = {}  # source name -> draws an epoch: a whole number of rows, or a float of passes over the source
    c.data.cap = 0  # no source counts for more rows than this; 0 is off
    c.data.temperature = 0.0  # shares go by rows ** (1 / T): 1 is proportional, large is even; 0 is off
    c.data.balance = {}  # category -> share of an epoch's draws; categories that are not named are left out
    c.data.max_repeats = 0.0  # no source is drawn more than so many times over an epoch; 0 is off
    c.data.draws = 0  # examples drawn an epoch; 0 takes as many as there are
    c.data.cache_dir = ""  # where tokenised data is kept; "" is the user's cache folder

    c.loss = ConfigDict()
    c.loss.weighting = "token"  # token | example | microbatch_mean | sum
    c.loss.chunk = 1024  # tokens whose logits exist at one time
    c.loss.blocks = 1  # parts of the vocabulary, on one device: more take less memory, and a third more products
    c.loss.router_aux = 0.0  # coefficient of the load-balancing loss of a mixture of experts; 0 is off
    c.loss.shorten = True  # on one CPU, few layers, float32: the last MLP for target tokens only, at most 256 at a time

    c.train = ConfigDict()
    c.train.epochs = 1.0  # passes over the data
    c.train.max_steps = 0  # optimizer steps; 0 means train.epochs decides
    c.train.batch_size = 8  # rows of the global batch of one optimizer step, accumulation included
    c.train.accumulation = 1  # micro-batches that a step is cut into
    c.train.remat = "none"  # recompute in the backward pass: none | full | dots (keep projections)
    c.train.deterministic = False  # bitwise repeatable on GPU, slower
    c.train.init_from = ""  # run directory (folder or URL) whose trained parameters start this run
    c.train.freeze = ""  # parameters whose path this regular expression matches stay: "embed|layer_0/attention"
    c.train.max_skipped = 3  # updates in a row whose loss or gradient is not finite: each is skipped, the last ends it
    c.train.skip_spikes = 0.0  # skip an update whose loss or norm is so many deviations over recent steps'; 0 is off
    c.train.spike_window = 128  # steps that train.skip_spikes compares with
    c.train.timeout = 1800.0  # seconds a step may take before the run writes all stacks and leaves; 0 is off

    c.optimizer = ConfigDict(convert_dict=False)
    c.optimizer.name = "adamw"  # adamw (as in torch), adafactor, sgd, or any optimizer of optax
    c.optimizer.learning_rate = 2e-5  # peak
    c.optimizer.schedule = "linear"  # after warm-up: linear | cosine | constant | wsd (stable, last 20 % decays)
    c.optimizer.warmup = 0.0  # steps; below 1 a share of all steps
    c.optimizer.weight_decay = 0.0  # 0 is none with any optimizer; norms and biases are never decayed
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
    c.lora.init_from = ""  # adapter folder of peft (folder, URL or hub id) to start from; "" starts new adapters

    c.mesh = ConfigDict()
    c.mesh.data = 1  # copies of the model; -1 takes the devices that the other axes leave
    c.mesh.fsdp = -1  # devices that share each copy's weights and optimizer state
    c.mesh.expert = 1  # devices that share the experts
    c.mesh.context = 1  # devices that share one sequence
    c.mesh.tensor = 1  # devices that share each matrix product
    c.mesh.dcn_data = 1  # slices (joined by a network only) that hold copies; mesh.data counts inside one
    c.mesh.dcn_fsdp = 1  # slices that share a copy's weights and optimizer state; mesh.fsdp counts inside one

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
    c.eval.limit = 0  # items that generation evaluators answer, examples that data score judges; 0 is all
    # what is right: exact | normalized | contains | rouge_l | maths | constraints | constraints_loose |
    # package.module:function with arguments (item, answer)
    c.eval.score = "exact"
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
    c.profile.steps = ""  # "10:13" traces steps 10 to 13 for XProf and says where their time went (docs/launch.md)
    return c
