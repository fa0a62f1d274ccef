"""The demo's own model and data: 20 steps on eight devices, however they are cut, lose what one device loses."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from itune.config import OptimizerSection
from itune.data.loader import Loader
from itune.data.render import render
from itune.data.store import memory_store
from itune.data.templates import load_tokenizer
from itune.demo import ASSETS, tasks
from itune.feed import to_device
from itune.models import load_pretrained
from itune.objectives import make_sft
from itune.optim import make_optimizer, make_schedule
from itune.sharding import make_mesh
from itune.step import init_state, make_train_step

STEPS = 20
SECTION = OptimizerSection(learning_rate=1e-4, schedule="constant")


@pytest.fixture(scope="module")
def loader():
    tokenizer = load_tokenizer(str(ASSETS / "base"), "chatml")
    rows = tasks.train_rows(0, 400, 100, 1)
    store = memory_store([render(row["messages"], tokenizer) for row in rows])
    return Loader(store, batch_size=8, max_length=64, packing=True, seed=0, epochs=2)


def losses(loader, shape, devices):
    mesh = make_mesh(shape, jax.devices()[:devices])
    model, params = load_pretrained(ASSETS / "base", mesh, vocab_size=292)  # 289 words do not divide by tensor=4
    optimizer = make_optimizer(SECTION, STEPS)
    state = init_state(model, params, optimizer, 0, mesh)
    step = make_train_step(make_sft(model), optimizer, make_schedule(SECTION, STEPS), mesh)
    found = []
    for number in range(STEPS):
        state, metrics = step(state, to_device(loader.batch(number), mesh))
        found.append(float(metrics["loss"]))
    return np.array(found)


@pytest.fixture(scope="module")
def one_device(loader):
    return losses(loader, {}, 1)


@pytest.mark.parametrize("shape", [{"data": 8, "fsdp": 1}, {"fsdp": 8}, {"fsdp": 2, "tensor": 4}], ids=str)
def test_loss_on_eight_devices_is_that_of_one(loader, one_device, shape):
    found = losses(loader, shape, 8)
    assert one_device[-1] < one_device[0]
    np.testing.assert_allclose(found, one_device, rtol=1e-6)
