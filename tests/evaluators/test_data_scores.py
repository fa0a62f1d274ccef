"""Scores of training examples: hand-computed losses, ranks, and defects of a small world that come first."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from load_script import load_script

from itune.config import from_dict
from itune.data.store import memory_store
from itune.evaluators import data_scores
from itune.models import LayerKind, Model, ModelConfig, forward
from itune.types import Address, Example


def store_of(rows):
    return memory_store([Example(np.asarray(ids, np.int32), np.asarray(weights, np.float32), Address("s", "f", i + 1))
                         for i, (ids, weights) in enumerate(rows)])  # fmt: skip


ROWS = [([1, 2, 3, 4], [0, 0, 1, 1]), ([5, 6, 7, 8, 9, 3], [0, 1, 0, 0, 2, 0.5]), ([9, 9], [0, 1])]


@pytest.fixture(scope="module")
def scored():
    config = from_dict({"data": {"max_length": 16}, "eval": {"batch_size": 2}})
    model = Model(ModelConfig(12, 8, 1, 2, 1, 4, 16, (LayerKind(),), max_length=16, init_std=0.5), "qwen3")
    return config, model, model.init(jax.random.key(1))


def test_losses_and_the_least_likely_token_of_each_example(scored):
    config, model, params = scored
    loss, lowest, tokens = data_scores.example_losses(config, model, params, store_of(ROWS))
    for place, (ids, weights) in enumerate(ROWS):
        logits = np.asarray(forward(model, params, np.asarray([ids], np.int32)))[0]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nll = [-log_p[i - 1, ids[i]] for i in range(1, len(ids)) if weights[i]]
        assert loss[place] == pytest.approx(np.mean(nll), rel=1e-4) and tokens[place] == len(nll)
        assert lowest[place] == pytest.approx(np.exp(-max(nll)), rel=1e-4)


def test_a_limit_draws_some_and_all_come_ranked(scored, monkeypatch):
    config, model, params = scored
    monkeypatch.setattr(data_scores, "header_length", lambda tokenizer: 1)
    dataset = type("Dataset", (), {"train": store_of(ROWS)})
    summary, items = data_scores.Evaluator(config).run(model, params, None, dataset)
    assert summary["n"] == 3 == len(items) and [i["suspicion"] for i in items] == sorted(
        (i["suspicion"] for i in items), reverse=True)  # fmt: skip
    few = dataclasses.replace(config, eval=dataclasses.replace(config.eval, limit=2))
    assert len(data_scores.Evaluator(few).run(model, params, None, dataset)[1]) == 2


def test_answers_alone_keep_the_header_and_nothing_before_it():
    pieces, owner = data_scores.answers_alone(store_of(ROWS), header=1)
    assert [pieces[i].token_ids.tolist() for i in range(len(pieces))] == [[2, 3, 4], [5, 6], [8, 9, 3], [9, 9]]
    assert [pieces[i].loss_weights.tolist() for i in range(len(pieces))] == [[0, 1, 1], [0, 1], [0, 2, 0.5], [0, 1]]
    assert owner.tolist() == [0, 1, 1, 2]
    wide, _ = data_scores.answers_alone(store_of(ROWS), header=3)
    assert wide[0].token_ids.tolist() == [1, 2, 3, 4]


def test_ranks_and_average_precision_by_hand():
    assert data_scores.suspicions(np.asarray([1.0, 2.0, 3.0]), np.asarray([0.9, 0.5, 0.1])).tolist() == [0, 0.5, 1]
    tied = data_scores.suspicions(np.asarray([1.0, 1.0, 3.0]), np.asarray([0.5, 0.5, 0.5]))
    assert tied.tolist() == [0.375, 0.375, 0.75]
    found = data_scores.average_precision(np.asarray([0.9, 0.8, 0.7, 0.1]), np.asarray([1, 0, 1, 0]))
    assert found == pytest.approx((1 + 2 / 3) / 2)
    assert data_scores.average_precision(np.asarray([0.9]), np.asarray([0])) == 0.0


@pytest.mark.soak
def test_defects_of_the_demo_world_come_first(tmp_path):
    """16 % planted defects: the tuned model ranks them, the base model cannot (benchmarks/data_scores.py)."""
    benchmark = load_script("benchmarks/data_scores.py")
    found = benchmark.measure(tmp_path, seed=304, steps=200, count=6000)
    assert found["tuned"]["average_precision"] >= 0.75
    assert found["base"]["average_precision"] <= 0.25
