"""Every config key has a class; a difference that matters is refused."""

import dataclasses

import pytest

from itune.checkpoint.compatible import CLASSES, SECTIONS, classify, compare_configs
from itune.config import Config, all_keys, from_dict


def test_table_names_only_keys_and_sections_that_exist():
    keys = set(all_keys())
    assert set(CLASSES) <= keys | SECTIONS


@pytest.mark.parametrize("key", all_keys())
def test_each_key_changed_alone(key):
    old = Config().to_dict()
    new = Config().to_dict()
    node = new
    *parents, last = key.split(".")
    for name in parents:
        node = node[name]
    value = node[last]
    node[last] = (not value) if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else "other"
    refused, allowed = compare_configs(old, new)
    assert len(refused) + len(allowed) == 1
    line = (refused + allowed)[0]
    assert line.startswith(f"{key}: {value!r} there, {node[last]!r} here")
    assert bool(refused) == (classify(key) == "must")


@pytest.mark.parametrize("loss", [{"weighting": "microbatch_mean"}, {"router_aux": 0.01}])
def test_micro_batches_stay_where_the_objective_depends_on_them(loss):
    def config(accumulation, **loss):
        return from_dict({"train": {"accumulation": accumulation}, "loss": loss}).to_dict()

    refused, allowed = compare_configs(config(1, **loss), config(4, **loss))
    assert (refused, allowed) == (["train.accumulation: 1 there, 4 here"], [])
    refused, allowed = compare_configs(config(1), config(4))
    assert (refused, allowed) == ([], ["train.accumulation: 1 there, 4 here (results change by rounding)"])


def test_moved_data_is_allowed_only_with_the_same_fingerprint():
    old = from_dict({"data": {"train": "a.jsonl"}}).to_dict()
    new = from_dict({"data": {"train": "b.jsonl"}}).to_dict()
    assert compare_configs(old, new, same_data=True)[0] == []
    assert compare_configs(old, new, same_data=False)[0] == ["data.train: 'a.jsonl' there, 'b.jsonl' here"]


def test_a_run_may_grow_but_not_shrink():
    def config(**train):
        base = Config()
        return dataclasses.replace(base, train=dataclasses.replace(base.train, **train)).to_dict()

    assert compare_configs(config(max_steps=10), config(max_steps=20))[0] == []
    assert compare_configs(config(epochs=1.0), config(epochs=2.5))[0] == []
    assert compare_configs(config(max_steps=20), config(max_steps=10))[0] == [
        "train.max_steps: 20 there, 10 here (may only grow)"
    ]
    assert compare_configs(config(max_steps=20), config(max_steps=0))[0] == []  # the number of steps decides


def test_same_config_has_no_difference():
    assert compare_configs(Config().to_dict(), Config().to_dict()) == ([], [])
