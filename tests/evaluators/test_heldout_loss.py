import math

import jax
import numpy as np
import pytest

from itune import models
from itune.config import from_dict
from itune.evaluators.heldout_loss import Evaluator
from itune.sharding import make_mesh, tree_shardings


def evaluate(model, params, dataset, batch_size=4):
    config = from_dict({"data": {"max_length": 48}, "eval": {"batch_size": batch_size}})
    return Evaluator(config).run(model, params, None, dataset)


@pytest.fixture(scope="module")
def by_hand(model, params, dataset):
    """(loss sum, weight, right, tokens, category) of each example, alone, from full logits in float64."""
    rows = []
    for number in range(len(dataset.held_out)):
        example = dataset.held_out[number]
        padded = np.zeros((1, 48), np.int32)
        padded[0, : len(example.token_ids)] = example.token_ids
        segments = (np.arange(48)[None] < len(example.token_ids)).astype(np.int32)
        logits_LV = np.asarray(models.forward(model, params, padded, segments)[0], np.float64)
        logits_LV = logits_LV[: len(example.token_ids) - 1]
        targets = example.token_ids[1:]
        nll = np.log(np.exp(logits_LV).sum(-1)) - logits_LV[np.arange(len(targets)), targets]
        weights = example.loss_weights[1:]
        right = ((logits_LV.argmax(-1) == targets) & (weights > 0)).sum()
        rows.append(((weights * nll).sum(), weights.sum(), right, (weights > 0).sum(), example.metadata["category"]))
    return rows


def test_loss_is_the_token_weighted_sum(model, params, dataset, by_hand):
    summary, items = evaluate(model, params, dataset)
    categories = summary["categories"]
    for group, found in ((("sky", "sea"), summary), (("sky",), categories["sky"]), (("sea",), categories["sea"])):
        loss, weight, right, tokens = (sum(row[k] for row in by_hand if row[4] in group) for k in range(4))
        assert found["loss"] == pytest.approx(loss / weight, rel=1e-6)
        assert found["perplexity"] == pytest.approx(math.exp(loss / weight), rel=1e-5)
        assert found["accuracy"] == right / tokens and found["tokens"] == tokens and found["weight"] == weight
    assert [item["loss"] for item in items] == pytest.approx([row[0] / row[1] for row in by_hand], rel=1e-5)
    assert [item["category"] for item in items] == [row[4] for row in by_hand]


def test_batch_size_changes_nothing(model, params, dataset):
    one, sixteen = (evaluate(model, params, dataset, size)[0] for size in (1, 16))
    assert one["loss"] == pytest.approx(sixteen["loss"], rel=1e-6)
    assert one["categories"]["sea"]["loss"] == pytest.approx(sixteen["categories"]["sea"]["loss"], rel=1e-6)
    assert (one["tokens"], one["examples"]) == (sixteen["tokens"], sixteen["examples"])


def test_a_mesh_changes_nothing(model, params, dataset):
    import dataclasses

    mesh = make_mesh({"data": 2, "fsdp": 4})
    sharded = dataclasses.replace(model, mesh=mesh)
    placed = jax.device_put(params, tree_shardings(mesh, sharded.logical_axes()))
    assert evaluate(sharded, placed, dataset)[0]["loss"] == pytest.approx(
        evaluate(model, params, dataset)[0]["loss"], rel=1e-6
    )
