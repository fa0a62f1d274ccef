"""The feed: order, how far it reads ahead, where the arrays lie."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from itune.feed import feed, to_device
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


@pytest.mark.parametrize("first", [0, 2])
def test_the_rows_of_one_of_several_processes_find_their_places(monkeypatch, first):
    """Placed by where they begin in the global batch; the length may be divided too."""
    sharding = batch_sharding(mesh := make_mesh({"fsdp": 4, "context": 2}))
    whole = np.arange(32, dtype=np.int32).reshape(8, 4)
    here = [device for device, (rows, _) in sharding.devices_indices_map((8, 4)).items() if rows.start in range(2, 6)]
    asked = []

    def only_here(shape, sharding, part):  # as jax does it for the devices of this process
        indices = sharding.devices_indices_map(shape)
        asked.extend((indices[device], part(indices[device])) for device in (here if first else indices))
        return shape

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "make_array_from_callback", only_here)
    own = whole[2:6] if first else whole
    batch = to_device(Batch(own, own, own, own, own), mesh, first, 8)
    assert tuple(batch) == ((8, 4),) * 5 and len(asked) == (20 if first else 40)
    for index, part in asked:
        np.testing.assert_array_equal(part, whole[index])
        assert part.shape == (2, 2)
