"""What a run needs before its first step, and what a later command needs of a run that is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from itune.checkpoint import compare_configs
from itune.config import Config
from itune.evaluators import check_held_out, check_names, find_evaluator
from itune.evaluators.labels import lacking_labels
from itune.judge import check_patience
from itune.models import load_model
from itune.models.lora import Lora
from itune.models.tail import shortened
from itune.objectives.sft import make_sft
from itune.optim import make_optimizer, make_schedule
from itune.plan.check import one_line
from itune.run_source import check_source
from itune.runtime.secrets import redact_tree
from itune.sharding import batch_sharding, make_mesh
from itune.spikes import with_window
from itune.step import TrainStep, abstract_state, check_batch, make_train_step
from itune.tuning import Tuning
from itune.types import Batch, InputError

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Data:
    """Tokenizer, dataset and loader of a run."""

    tokenizer: Any
    dataset: Any
    loader: Any


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything of a run but its weights: what to compile, and the shapes to compile it for."""

    config: Config
    mesh: Mesh
    model: Any
    tuning: Tuning
    optimizer: Any
    step: TrainStep
    state: Any  # TrainState of ShapeDtypeStructs with shardings
    batch: Batch  # of ShapeDtypeStructs with shardings
    total_steps: int


def prepare_data(config: Config, log: Log, tokenizer_known: Callable[[Any], None] = lambda tokenizer: None) -> Data:
    """Read, render, pack; says what is kept and what is dropped. Touches no device and reads no weights.

    `tokenizer_known(tokenizer)` is called before the data are read.
    """
    from itune.data.dataset import prepare
    from itune.data.loader import make_loader
    from itune.data.remembered import recall_tokenizer

    if not config.model.path:
        raise InputError("config: model.path is empty; set it to a folder with config.json and safetensors or a hub id")
    if not config.data.train:
        raise InputError("config: data.train is empty; set it to a file, a folder or a dataset id")
    tokenizer = recall_tokenizer(
        config.model.path, config.data.chat_template, config.model.revision or None, config.data.cache_dir
    )
    tokenizer_known(tokenizer)
    dataset = prepare(config.data, tokenizer, seed=config.seed, log=log)
    loader = make_loader(config, dataset.train)
    dataset.report["mixture"] = loader.realised()
    log(
        f"plan: {loader.total_steps} steps ({loader.steps_per_epoch} an epoch), {config.train.batch_size} rows of "
        f"{config.data.max_length} tokens a step, packing efficiency {loader.efficiency:.1%}"
    )
    return Data(tokenizer, dataset, loader)


def training_only(config: Config) -> Config:
    """The config without what judges the run: what its train step is made from, with any data."""
    return dataclasses.replace(config, evaluators=(), eval=dataclasses.replace(config.eval, patience=0))


def make_plan(
    config: Config, data: Data, log: Log, devices: Sequence[Any] | None = None, *, scan: bool = True
) -> Plan:
    """Mesh, model, optimizer and step of a run. Raises InputError for whatever does not fit; no weight is read.

    `devices`: what to plan for, this machine's by default; they need not be there (`itune.plan.compile`). `scan` False:
    no layer is stacked (`itune.models.unrolled`).
    """
    check_evaluators(config, data.dataset)
    check_patience(config)
    if config.evaluators:
        for line in lacking_labels(config, getattr(data.dataset, "held_out_conversations", ())):
            log(line)
    mesh = make_mesh(dataclasses.asdict(config.mesh), devices)
    shape = (config.train.batch_size, config.data.max_length)
    dtypes = [np.float32 if name == "loss_weights_BL" else np.int32 for name in Batch._fields]
    batch = Batch(*(jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh)) for dtype in dtypes))
    check_batch(batch, mesh, config.train.accumulation)
    model = load_model(config.model.path, mesh, **model_settings(config, data.tokenizer))
    dropout = config.lora.dropout if config.lora.rank else 0.0
    model = dataclasses.replace(model, max_segments=data.loader.max_segments, dropout=dropout, scan=scan)
    if config.data.max_length > model.config.max_length:
        log(
            f"warning: data.max_length is {config.data.max_length} tokens, {config.model.path} was made for at most "
            f"{model.config.max_length}"
        )
    tuning = make_tuning(config, model)
    trainable, frozen = tuning.abstract()
    optimizer = make_optimizer(config.optimizer, data.loader.total_steps, trainable)
    if config.train.skip_spikes:
        optimizer = with_window(optimizer, config.train.spike_window)
    seen, chunk, parameters = model, config.loss.chunk, tuning.parameters
    if config.loss.shorten and config.loss.blocks == 1:
        seen, chunk = shortened(model, chunk, shape[0] * shape[1] // config.train.accumulation)
        parameters = parameters if seen is model else seen.parameters(parameters)
    objective = make_sft(
        seen, config.loss.weighting, chunk, blocks=config.loss.blocks, parameters=parameters,
        router_aux=config.loss.router_aux,
    )  # fmt: skip
    step = make_train_step(
        objective, optimizer, make_schedule(config.optimizer, data.loader.total_steps), mesh,
        accumulation=config.train.accumulation, clip_norm=config.optimizer.clip_norm,
        stochastic_rounding=config.optimizer.stochastic_rounding, spike_sigmas=config.train.skip_spikes,
    )
    log(tuning.describe(trainable, frozen))
    state = abstract_state(model, optimizer, mesh, trainable=trainable, frozen=frozen)
    if devices is None:
        log(one_line(config, model, mesh, state))
    return Plan(config, mesh, model, tuning, optimizer, step, state, batch, data.loader.total_steps)


def make_tuning(config: Config, model: Any) -> Tuning:
    """What trains of `model`. Raises InputError for settings that exclude each other or do nothing."""
    section = config.lora
    rounds = config.optimizer.stochastic_rounding
    if rounds and (config.model.param_dtype != "bfloat16" or section.rank):
        why = "adapters are float32" if section.rank else f"model.param_dtype is {config.model.param_dtype}"
        raise InputError(f"config: optimizer.stochastic_rounding is for bfloat16 weights that train; here {why}")
    if not section.rank:
        if section.init_from:
            raise InputError("config: lora.init_from needs lora.rank; set it to the adapter's r")
        return Tuning(model, config.train.freeze)
    if config.train.freeze:
        raise InputError("config: train.freeze and lora.rank exclude each other: beside adapters all is frozen already")
    settings = {name: getattr(section, name) for name in ("rank", "alpha", "targets", "dropout", "rslora")}
    return Tuning(model, lora=Lora(**settings), init_from=section.init_from)


def check_evaluators(config: Config, dataset: Any) -> None:
    """Raise InputError, before anything is computed, for an unknown evaluator or when there is nothing to judge by."""
    check_names(config.evaluators)
    check_held_out([find_evaluator(name)(config) for name in config.evaluators], dataset)


def model_settings(config: Config, tokenizer: Any) -> dict[str, Any]:
    """Keyword arguments of `load_model` and `load_pretrained` for this config and tokenizer.

    The embedding grows for tokens that `data.chat_template` adds. Raises InputError when the tokenizer had more tokens
    than the model has embedding rows before anything was added: the two do not belong together.
    """
    section = config.model
    settings: dict[str, Any] = {
        "param_dtype": section.param_dtype, "revision": section.revision or None,
        "compute_dtype": section.compute_dtype, "attention": section.attention, "remat": config.train.remat,
    }
    rows = load_model(section.path, **settings).config.vocab_size
    own = tokenizer.vocab_size - len(tokenizer.added_tokens)
    if own > rows:
        raise InputError(
            f"{section.path}: the tokenizer's ids go up to {own - 1}, the embedding has {rows} rows; take the "
            "tokenizer that belongs to the model"
        )
    return {**settings, "vocab_size": tokenizer.vocab_size}


def check_resume(workdir: Path, saved: Any, config: Config, data: Data | None, log: Log) -> None:
    """Raise InputError when `config` and `data` may not continue the run that saved this checkpoint.

    Without `data` only what needs none is compared, so that it is said before anything is prepared.
    """
    same_data = data is None or saved.data["fingerprint"] == data.loader.fingerprint
    refused, allowed = compare_configs(saved.config, redact_tree(config.to_dict()), same_data)
    if not same_data and not refused:
        refused.append("the content of the training data, the tokenizer or the chat template is not what it was")
    total = saved.data["total_steps"]
    if data is not None and data.loader.total_steps < total:
        refused.append(f"the run has {total} steps, it would have {data.loader.total_steps} (may only grow)")
    if refused:
        raise InputError(
            f"{workdir} is the workdir of a different config:\n  " + "\n  ".join(refused)
            + "\nset these back to continue that run, or choose another --workdir"
        )
    if data is not None:
        check_source(config.model, data.tokenizer, saved.data, log)
        for line in allowed:
            log(f"resumed with a change: {line}")
        if data.loader.total_steps > total:
            log(f"extended from {total} to {data.loader.total_steps} steps; from here on the longer schedule holds")


def local_rows(mesh: Mesh, batch: Batch) -> tuple[int, int]:
    """The rows [start, stop) of the global batch that this process's devices hold, with any that lie between them."""
    shape = batch.tokens_BL.shape
    slices = [index[0].indices(shape[0]) for index in
              batch_sharding(mesh).addressable_devices_indices_map(shape).values() if index is not None]
    return min(start for start, _, _ in slices), max(stop for _, stop, _ in slices)
