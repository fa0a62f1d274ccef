"""`compat = "trl"`: a whole run against TRL's SFTTrainer on the same folder and the same rows.

Float32 on CPU; ragged conversations with completion masks, accumulation 3, cosine with warm-up, weight decay with TRL's
exclusions, clipping, two epochs over 37 rows whose last window holds one.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
from pathlib import Path

import datasets
import jax
import numpy as np
import pytest
import torch
import transformers
import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from itune.config import all_keys, from_dict, load_config
from itune.data.templates import LLAMA3
from itune.feed import feed
from itune.models import load_pretrained
from itune.optim import decay_mask
from itune.setup_run import make_plan, prepare_data
from itune.weights import first_state

ROWS, MICRO, ACCUMULATION, EPOCHS, STEPS, SEED, RATE = 37, 4, 3, 2, 8, 42, 3e-4
SIZES = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 8, "bos_token_id": 256, "eos_token_id": 259,
    "pad_token_id": 260, "attn_implementation": "eager",
}  # fmt: skip
JUDGES = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SIZES, query_pre_attn_scalar=8, sliding_window=16)
    ),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """37 prompt and completion rows, and their file."""
    draw, found = random.Random(1), []
    for number in range(ROWS):
        long = number % 6 == 0  # an answer before, which is no target, and more tokens than are kept
        answer = "".join(draw.choice("abcdefgh ") for _ in range(draw.randint(60, 80) if long else draw.randint(2, 30)))
        before = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No."}] if long else []
        asked = {"role": "user", "content": f"Say {number} {'' if long else 'x' * draw.randint(0, 20)}"}
        answer = answer.strip() or "a"
        found.append({
            "prompt": [*before, asked],
            "completion": [{"role": "assistant", "content": answer}],
        })  # fmt: skip
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return found, path


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes and Llama 3's markers, with its chat template: a turn ends with the end-of-turn token and nothing more."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    markers = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>"]
    backend.add_special_tokens([AddedToken(marker, special=True) for marker in markers])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=markers[0], eos_token=markers[3], pad_token=markers[4], chat_template=LLAMA3
    )


@pytest.fixture(scope="module", params=JUDGES)
def runs(request, rows, tokenizer, tmp_path_factory):
    """(our history and parameters, TRL's) of one family: a list of (loss, gradient norm, learning rate) a step."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.set_num_threads(1)  # the models are tiny: a second thread only spins
    torch.manual_seed(0)
    judge = JUDGES[request.param]().float()
    judge.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    ours = our_run(folder, rows[1])
    theirs = trl_run(judge, tokenizer, rows[0], folder)
    return ours, theirs


def our_run(folder, path):
    config = from_dict({
        "compat": "trl", "seed": SEED, "evaluators": (),
        "model": {"path": str(folder / "model")},
        "data": {
            "train": str(path), "max_length": 96, "overlong": "keep_start", "packing": False,
            "cache_dir": str(folder / "cache"),
        },
        "train": {"epochs": EPOCHS, "batch_size": MICRO * ACCUMULATION, "accumulation": ACCUMULATION},
        "optimizer": {"learning_rate": RATE, "schedule": "cosine", "warmup": 3, "weight_decay": 0.1, "clip_norm": 0.5},
    })  # fmt: skip
    data = prepare_data(config, print)
    plan = make_plan(config, data, print, devices=jax.devices()[:1])
    state = first_state(plan, data.tokenizer, print)
    history = []
    for _, batch in feed(data.loader.iterate(), plan.mesh):
        state, metrics = plan.step(state, batch)
        history.append([float(metrics[name]) for name in ("loss", "grad_norm", "learning_rate")])
    return np.array(history), state.trainable


def trl_run(judge, tokenizer, rows, folder):
    settings = trl.SFTConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=MICRO, gradient_accumulation_steps=ACCUMULATION,
        num_train_epochs=EPOCHS, learning_rate=RATE, lr_scheduler_type="cosine", warmup_steps=3, weight_decay=0.1,
        max_grad_norm=0.5, seed=SEED, logging_steps=1, save_strategy="no", report_to="none", bf16=False, use_cpu=True,
        gradient_checkpointing=False, max_length=96, disable_tqdm=True,
    )  # fmt: skip
    data = datasets.Dataset.from_list(rows)
    trainer = trl.SFTTrainer(judge, settings, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    names = ("loss", "grad_norm", "learning_rate")
    history = [[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry]
    trainer.model.save_pretrained(folder / "tuned")
    return np.array(history), load_pretrained(folder / "tuned")[1]


def test_every_step_and_the_parameters_equal_trl(runs):
    (ours, params), (theirs, tuned) = runs
    assert len(theirs) == STEPS and theirs[:, 1].max() > 0.5, "clipping is exercised"
    np.testing.assert_allclose(ours[:, 0], theirs[:, 0], atol=2e-6, rtol=0)
    np.testing.assert_allclose(ours[:, 1], theirs[:, 1], rtol=1e-5)
    np.testing.assert_array_equal(ours[:, 2].astype(np.float32), theirs[:, 2].astype(np.float32))
    for mine, yours in zip(jax.tree.leaves(params), jax.tree.leaves(tuned), strict=True):
        np.testing.assert_allclose(mine, yours, atol=1e-6, rtol=0)


DECAY = {
    **{name: lambda name=name: JUDGES[name]().config for name in JUDGES},
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4),
    "olmo2": lambda: transformers.Olmo2Config(**SIZES),
    "phi3": lambda: transformers.Phi3Config(**SIZES),
}


@pytest.mark.parametrize("family", DECAY)
def test_decay_leaves_out_what_trl_leaves_out(family, tmp_path):
    """A checkpoint that holds 1 where transformers' Trainer decays and 0 elsewhere reads back as our mask."""
    judge = transformers.AutoModelForCausalLM.from_config(DECAY[family]())
    decayed = set(transformers.Trainer.get_decay_parameter_names(None, judge))
    with torch.no_grad():
        for name, parameter in judge.named_parameters():
            parameter.fill_(float(name in decayed))
    judge.save_pretrained(tmp_path)
    params = load_pretrained(tmp_path)[1]
    for (path, leaf), mask in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(decay_mask(params)), strict=True):
        assert bool(np.asarray(leaf).all()) == bool(np.asarray(leaf).any()) == mask, jax.tree_util.keystr(path)


def table():
    """Field of SFTConfig -> what stands beside it in docs/from_trl.md."""
    text = (Path(__file__).parents[1] / "docs" / "from_trl.md").read_text()
    return dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", text, re.MULTILINE))


def test_every_field_of_sftconfig_stands_in_the_table():
    assert {field.name for field in dataclasses.fields(trl.SFTConfig)} == set(table())


def test_the_table_names_keys_that_exist_or_a_reason():
    for field, said in table().items():
        named = re.findall(r"`([a-z_]+(?:\.[a-z0-9_]+)?)`", said)
        found = [name for name in named if name in all_keys()]
        assert found or said.startswith("none") or "`--workdir`" in said, f"{field}: {said}"
        assert all(name in all_keys() for name in named if "." in name), f"{field}: {said}"


def test_the_recipe_has_the_defaults_of_sftconfig():
    theirs, ours = trl.SFTConfig(output_dir="x", use_cpu=True, bf16=False), load_config("trl")
    assert ours.compat == "trl"
    pairs = [
        (ours.seed, theirs.seed), (ours.data.max_length, theirs.max_length), (ours.data.packing, theirs.packing),
        (ours.train.epochs, theirs.num_train_epochs), (ours.train.batch_size, theirs.per_device_train_batch_size),
        (ours.train.accumulation, theirs.gradient_accumulation_steps), (ours.optimizer.b1, theirs.adam_beta1),
        (ours.optimizer.learning_rate, theirs.learning_rate), (ours.optimizer.schedule, theirs.lr_scheduler_type),
        (ours.optimizer.warmup, theirs.warmup_steps), (ours.optimizer.weight_decay, theirs.weight_decay),
        (ours.optimizer.clip_norm, theirs.max_grad_norm), (ours.optimizer.b2, theirs.adam_beta2),
        (ours.optimizer.eps, theirs.adam_epsilon), (ours.checkpoint.every, theirs.save_steps),
        (ours.train.remat == "full", theirs.gradient_checkpointing), (ours.log.every, theirs.logging_steps),
        (ours.checkpoint.keep_every == 1, theirs.save_total_limit is None), (ours.log.wandb, "".join(theirs.report_to)),
    ]  # fmt: skip
    assert all(mine == yours for mine, yours in pairs), pairs


def test_numbers_that_the_table_sets_against_each_other_are_equal_in_the_recipe():
    theirs, ours, compared = trl.SFTConfig(output_dir="x", use_cpu=True, bf16=False), load_config("trl").to_dict(), []
    for field, said in table().items():
        named = re.match(r"`([a-z_]+)\.([a-z0-9_]+)`", said)
        mine, yours = ours[named[1]].get(named[2]) if named else None, getattr(theirs, field)
        if all(isinstance(number, int | float) for number in (mine, yours)):
            assert (mine, field) == ({-1: 0}.get(yours, yours), field)  # max_steps: -1 there, 0 here
            compared.append(field)
    assert {"per_device_eval_batch_size", "save_steps", "max_length", "max_steps", "ddp_timeout"} < set(compared)
