"""The feed: order, how far it reads ahead, where the arrays lie."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from itune.feed import feed
from itune.sharding import batch_sharding, make_mesh
from itune.types import Batch


@pytest.mark.parametrize("ahead", [0, 2])
def test_batches_arrive_in_order_on_the_mesh_and_no_more_than_ahead(ahead):
    mesh = make_mesh({"fsdp": 4, "context": 2})
    read = []

    def source():
        for step in range(3, 8):
            read.append(step)
            array = np.full((8, 4), step, np.int32)
            yield step, Batch(array, array, array.astype(np.float32), array, array)

    for seen, (step, batch) in enumerate(feed(source(), mesh, ahead), start=1):
        assert step == seen + 2
        assert len(read) == min(seen + ahead, 5)
        assert all(array.sharding == batch_sharding(mesh) and isinstance(array, jax.Array) for array in batch)
        assert batch.tokens_BL.addressable_shards[0].data.shape == (2, 2)
        np.testing.assert_array_equal(batch.loss_weights_BL, np.full((8, 4), step, np.float32))
    assert seen == 5


def test_an_error_of_the_source_reaches_the_reader():
    def source():
        yield 0, Batch(*[np.zeros((1, 1), np.int32)] * 5)
        raise ValueError("line 7")

    with pytest.raises(ValueError, match="line 7"):
        list(feed(source(), make_mesh({}, jax.devices()[:1])))
