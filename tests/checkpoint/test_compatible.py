"""Every config key has a class; a difference that matters is refused."""

import dataclasses

import pytest

from itune.checkpoint.compatible import (
    CLASSES,
    SECTIONS,
    classify,
    compare_configs,
    compare_models,
    describe_model,
)
from itune.config import Config, all_keys, from_dict
from itune.models import LayerKind, ModelConfig, Rope


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


def test_models_are_compared_by_what_the_record_has():
    kinds = tuple(LayerKind(rope=Rope(base=base)) for base in (10.0, 20.0, 10.0))
    model = ModelConfig(264, 16, 3, 4, 2, 8, 24, kinds, max_length=128)
    saved = describe_model(model)
    assert compare_models(saved, model) == compare_models(None, model) == []
    older = {**saved, "kinds": [{"window": None, "rope": {"base": rope.base}} for rope in (k.rope for k in kinds)]}
    assert compare_models({name: older[name] for name in ("width", "kinds", "norm_eps")}, model) == []
    without = dataclasses.replace(model, kinds=(kinds[0], LayerKind(rope=None), kinds[2]), max_length=9, init_std=1.0)
    assert [line.partition(":")[0] for line in compare_models(older, without)] == ["kinds.rope", "kinds.rope.base"]
    bare = dataclasses.replace(model, kinds=(LayerKind(rope=None),) * 3)
    assert compare_models(saved, bare) == ["kinds.rope: 'some' there, None here"]
    assert compare_models(describe_model(bare), model) == ["kinds.rope: None there, 'some' here"]
    swapped = dataclasses.replace(model, kinds=(kinds[1], kinds[0], kinds[0]), activation="gelu")
    assert compare_models(saved, swapped) == ["kinds.rope.base: 10.0, 20.0 there, 20.0, 10.0 here",
                                              "activation: 'silu' there, 'gelu' here"]
