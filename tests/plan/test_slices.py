"""The run's own train step, compiled for TPU slices: where devices lie, and what crosses the network between them."""

from __future__ import annotations

import json
import math

import jax
import pytest
import test_compile as ahead
from load_script import load_script

from itune.plan.hlo import arrays, between_slices, collectives, moved

INSIDE, SLICES = 4, 2  # devices of a slice, slices

pytestmark = ahead.needs_libtpu


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """The config.json of a Qwen 3 of two layers, 128 wide, with a head of its own."""
    script = load_script("scripts/make_random_model.py")
    folder = tmp_path_factory.mktemp("qwen3-small")
    (folder / "config.json").write_text(json.dumps(script.config("qwen3", 128, 2, 8192, False, "float32")))
    return folder


def compiled(model, **changes):
    return ahead._compile(model, f"{SLICES}*{ahead.TPU}", **{"data.max_length": 256, **changes})


def kernels(plan):
    """Entries of the layers' kernels and of embedding and head, all devices together."""
    leaves = jax.tree_util.tree_leaves_with_path(plan.state.trainable)
    layers = sum(leaf.size for path, leaf in leaves if "blocks" in str(path) and leaf.ndim == 3)
    return layers, sum(leaf.size for path, leaf in leaves if plan.model.config.vocab_size in leaf.shape)


def assert_no_operation_spans_slices(program):
    """What XLA itself moves stays among the devices of one slice; the rest went to the hosts' network."""
    found = collectives(program.text)
    assert found and {one.group for one in found} <= {INSIDE}, {(one.kind, one.group) for one in found}


def dims_of(one):
    return next(arrays(one.shape))[1]


def test_copies_on_two_slices_exchange_sums_of_gradients(small_model):
    plan, program = compiled(small_model, **{"mesh.dcn_data": SLICES})
    assert dict(plan.mesh.shape) == {"data": SLICES, "fsdp": INSIDE, "expert": 1, "context": 1, "tensor": 1}
    of_copies = plan.mesh.devices.reshape(SLICES, INSIDE)
    assert [{device.slice_index for device in row} for row in of_copies] == [{0}, {1}], "a copy lies in one slice"
    assert_no_operation_spans_slices(program)
    crossing = between_slices(program.text)
    sums = [one for one in crossing if one.kind == "all-reduce"]
    assert {one.group for one in crossing} == {SLICES}
    layers, table = kernels(plan)
    large = [one for one in sums if one.bytes_once > 8192]  # below: norms, counts, the gradient's norm
    assert {next(arrays(one.shape))[0] for one in large} == {"f32"}
    total = sum(one.bytes for one in large)  # 2 x 1/2 of what a device holds; 32 columns are padded to 128
    assert 4 * layers / INSIDE <= total <= 1.1 * 4 * layers / INSIDE + 4 * table / INSIDE * 4
    assert [one for one in crossing if one.kind != "all-reduce"] == []


@pytest.mark.soak
def test_a_copy_over_two_slices_exchanges_weights_and_sums(small_model):
    plan, program = compiled(small_model, **{"mesh.dcn_fsdp": SLICES})
    assert dict(plan.mesh.shape) == {"data": 1, "fsdp": 8, "expert": 1, "context": 1, "tensor": 1}
    assert [device.slice_index for device in plan.mesh.devices.flat] == [0] * INSIDE + [1] * INSIDE
    assert_no_operation_spans_slices(program)
    crossing = between_slices(program.text)
    layers, _ = kernels(plan)
    by_kind = moved(crossing)
    assert by_kind["all-gather"] >= 2 * layers / INSIDE / SLICES, "the layers' weights, at least once"
    assert by_kind["all-reduce"] + by_kind.get("reduce-scatter", 0) >= 4 * layers / INSIDE / SLICES
    config = plan.model.config
    hidden = ahead.ROWS * 256 * config.width
    for one in crossing:
        if one.kind in ("all-gather", "all-reduce"):
            dims = dims_of(one)
            assert math.prod(dims) < hidden, f"{one}: as large as the hidden states of all rows"
            assert config.vocab_size not in dims, f"{one}: over the vocabulary"


@pytest.mark.soak
def test_copies_in_and_over_slices(small_model):
    """dcn_data x dcn_fsdp on four slices, data and fsdp in each: every part of an axis lies in one slice."""
    changes = {"mesh.dcn_data": 2, "mesh.dcn_fsdp": 2, "mesh.data": 2, "mesh.fsdp": 2, "train.batch_size": 16}
    plan, program = ahead._compile(small_model, f"4*{ahead.TPU}", **{"data.max_length": 256, **changes})
    assert dict(plan.mesh.shape) == {"data": 4, "fsdp": 4, "expert": 1, "context": 1, "tensor": 1}
    grid = plan.mesh.devices.reshape(2, 2, 2, 2)  # slices of data, data, slices of fsdp, fsdp
    for outer in range(2):
        for along in range(2):
            assert len({device.slice_index for device in grid[outer, :, along].flat}) == 1
    assert {one.group for one in collectives(program.text)} <= {2, 4}
    assert between_slices(program.text)
