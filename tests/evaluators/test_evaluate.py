import json
import types

import pytest

from itune import evaluators
from itune.config import from_dict
from itune.evaluators import generation, heldout_loss
from itune.evaluators.labels import lacking_labels
from itune.types import InputError

SMALL = {"data": {"max_length": 48}, "eval": {"batch_size": 4, "max_new_tokens": 6}}


def test_results_lie_where_the_report_looks(model, params, tokenizer, dataset, tmp_path):
    config = from_dict({**SMALL, "evaluators": ["heldout_loss", "generation"]})
    results = evaluators.evaluate(config, model, params, tokenizer, dataset, tmp_path / "eval" / "7")
    assert list(results) == ["heldout_loss", "generation"]
    assert json.loads((tmp_path / "eval" / "7" / "summary.json").read_text()) == results
    assert sorted(p.name for p in (tmp_path / "eval" / "7").iterdir()) == [
        "generation.jsonl", "heldout_loss.jsonl", "summary.json",
    ]  # fmt: skip
    for name in results:
        lines = (tmp_path / "eval" / "7" / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["address"] for line in lines] == [f"held.jsonl:{i}" for i in range(1, 12)]
    assert evaluators.flatten(results)["heldout_loss/loss"] == results["heldout_loss"]["loss"]
    assert "generation/categories/sky/low" in evaluators.flatten(results)


def test_a_second_evaluation_compiles_nothing(model, params, tokenizer, dataset):
    import jax

    config = from_dict({**SMALL, "evaluators": ["heldout_loss", "generation"]})
    evaluators.evaluate(config, model, params, tokenizer, dataset)
    trained = jax.tree.map(lambda x: x * 1.5, params)
    compiled = []

    def listen(event, *_, **__):
        compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        evaluators.evaluate(config, model, trained, tokenizer, dataset)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not [event for event in compiled if "backend_compile" in event]


def test_names_lead_to_classes(monkeypatch):
    assert evaluators.find_evaluator("generation") is generation.Evaluator
    assert evaluators.find_evaluator("itune.evaluators.heldout_loss:Evaluator") is heldout_loss.Evaluator
    with pytest.raises(InputError, match=r"cannot find 'heldout_los'.*did you mean heldout_loss"):
        evaluators.find_evaluator("heldout_los")
    with pytest.raises(InputError, match=r"there are .*generation, heldout_loss, .*or package\.module:Class"):
        evaluators.find_evaluator("stats")


def test_an_evaluator_named_twice_is_refused(model, params, tokenizer, dataset):
    """Their results would stand in the same files."""
    for names in (["heldout_loss", "heldout_loss"], ["one.mine:Evaluator", "two.mine:Evaluator"]):
        with pytest.raises(InputError, match=r"evaluators: .* is named twice"):
            evaluators.evaluate(from_dict({**SMALL, "evaluators": names}), model, params, tokenizer, dataset)


def test_a_field_that_no_held_out_row_has_is_warned_of(dataset):
    def warnings(**settings):
        return lacking_labels(from_dict({"eval": settings}), dataset.held_out_conversations)

    assert warnings() == warnings(by="task", groups=["category"]) == []
    assert warnings(by="tusk", groups=["task", "zzz"]) == [
        "warning: eval.by: no held-out row has a field 'tusk' (nearest: task)",
        "warning: eval.groups: no held-out row has a field 'zzz' (there are category, task)",
    ]


def test_nothing_held_out_is_said(model, params, tokenizer):
    empty = types.SimpleNamespace(held_out=[], held_out_conversations=[])
    with pytest.raises(InputError, match=r"no held-out items.*data\.held_out_share"):
        evaluators.evaluate(from_dict(SMALL), model, params, tokenizer, empty)
