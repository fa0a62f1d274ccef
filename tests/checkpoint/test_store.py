"""A checkpoint is whole or absent; damage is found before use; restore works onto another mesh."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from itune.checkpoint import Store
from itune.sharding import make_mesh, named, replicated
from itune.types import InputError, RunError, TrainState

CONFIG = {"seed": 0, "train": {"epochs": 1.0}}


def make_state(mesh, seed=0):
    """A small state with every kind of leaf: sharded, bfloat16, int, a masked optimizer, a typed key."""
    key = jax.random.key(seed)
    params = {
        "w": jax.device_put(jax.random.normal(key, (16, 8)), named(mesh, ("embed", "mlp"))),
        "norm": {"scale": jax.device_put(jnp.full(3, 1.5, jnp.bfloat16), replicated(mesh))},
    }
    optimizer = optax.chain(
        optax.scale_by_adam(mu_dtype=jnp.bfloat16),
        optax.masked(optax.add_decayed_weights(0.1), {"w": True, "norm": {"scale": False}}),
    )
    grads = jax.tree.map(lambda x: x * 0.5, params)
    opt_state = optimizer.update(grads, optimizer.init(params), params)[1]

    def put(x):
        return jax.device_put(x, replicated(mesh))

    return TrainState(
        step=put(jnp.int32(7)), trainable=params, frozen={}, opt_state=jax.tree.map(
            lambda x: x if x.ndim == 2 else put(x), opt_state), rng=put(key),
    )


def abstract(state, mesh):
    def leaf(x):
        axes = ("embed", "mlp") if x.ndim == 2 else (None,) * x.ndim
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=named(mesh, axes))

    return jax.tree.map(leaf, state)


def numbers(tree):
    def raw(x):
        return jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return [np.asarray(raw(leaf)) for leaf in jax.tree.leaves(tree)]


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(numbers(a), numbers(b), strict=True):
        assert x.dtype == y.dtype
        assert x.tobytes() == y.tobytes()


@pytest.fixture(scope="module")
def saved_folder(tmp_path_factory):
    """Two committed checkpoints, to copy from; the second holds a different state."""
    folder = tmp_path_factory.mktemp("store") / "checkpoints"
    mesh = make_mesh({"fsdp": 8})
    store = Store(folder, keep=3)
    store.open()
    store.save(10, make_state(mesh, 1), data={"step": 10}, config=CONFIG)
    store.save(20, make_state(mesh, 2), data={"step": 20}, config=CONFIG)
    store.wait()
    return folder


@pytest.fixture
def copy(saved_folder, tmp_path):
    return Path(shutil.copytree(saved_folder, tmp_path / "checkpoints"))


@pytest.mark.parametrize("shape", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"data": 8}])
def test_restored_state_equals_saved_on_any_mesh(saved_folder, shape):
    mesh = make_mesh(shape)
    restored = Store(saved_folder).restore(20, abstract(make_state(make_mesh({"fsdp": 8})), mesh))
    assert_equal(restored, make_state(make_mesh({"fsdp": 8}), 2))
    assert restored.trainable["w"].sharding == named(mesh, ("embed", "mlp"))


def test_restore_onto_one_device(saved_folder):
    one = make_mesh({"data": 1}, devices=jax.devices()[:1])
    restored = Store(saved_folder).restore(10, abstract(make_state(make_mesh({"fsdp": 8})), one))
    assert_equal(restored, make_state(make_mesh({"fsdp": 8}), 1))


def test_unit_holds_position_and_config(saved_folder):
    saved = Store(saved_folder).read(20)
    assert (saved.step, saved.data, saved.config) == (20, {"step": 20}, CONFIG)
    assert Store(saved_folder).size(20) > 16 * 8 * 4 * 2


def test_trainable_alone(saved_folder):
    mesh = make_mesh({"tensor": 8})
    part = Store(saved_folder).restore_part(20, "trainable", abstract(make_state(mesh).trainable, mesh))
    assert_equal(part, make_state(mesh, 2).trainable)


def test_state_is_copied_before_the_buffers_are_donated(tmp_path):
    mesh = make_mesh({"fsdp": 8})
    state = make_state(mesh, 3)
    expected = numbers(state)
    bump = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)
    store = Store(tmp_path)
    store.open()
    for step in range(3):
        store.save(step, state, data={}, config={})
        state = state.replace(trainable=bump(state.trainable))
    store.wait()
    restored = Store(tmp_path).restore(1, abstract(state, mesh))
    np.testing.assert_array_equal(np.asarray(restored.trainable["w"]), expected[2] + 1)


def test_every_kind_of_damage_in_every_file_is_found_and_named(copy):
    store = Store(copy)
    files = [p for p in store.path(20).rglob("*") if p.is_file()]
    assert len(files) > 5
    rng = np.random.default_rng(0)
    for path in files:
        whole = path.read_bytes()
        for damage in ("flip", "truncate", "delete"):
            if damage == "delete":
                path.unlink()
            elif not whole:
                continue
            else:
                changed = bytearray(whole)
                changed[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
                path.write_bytes(changed if damage == "flip" else whole[: int(rng.integers(len(whole)))])
            found = store.verify(20)
            assert len(found) == 1 and str(path) in found[0], (path, damage, found)
            path.write_bytes(whole)
    assert store.verify(20) == []


def damage_often(folder, count):
    """Flip, truncate or delete, anywhere: found and named each time, and the previous good step is what a run takes."""
    lines = []
    store = Store(folder, log=lines.append)
    files = [p for p in store.path(20).rglob("*") if p.is_file() and p.stat().st_size]
    rng = np.random.default_rng(1)
    for number in range(count):
        path = files[rng.integers(len(files))]
        whole = path.read_bytes()
        at, kind = int(rng.integers(len(whole))), ("flip", "flip", "truncate", "delete")[number % 4]
        if kind == "delete":
            path.unlink()
        else:
            flipped = whole[:at] + bytes([whole[at] ^ 1 << int(rng.integers(8))]) + whole[at + 1 :]
            path.write_bytes(flipped if kind == "flip" else whole[:at])
        lines.clear()
        assert store.newest_good() == 10, (number, kind, path)
        assert len(lines) == 1 and str(path) in lines[0], (number, kind, lines)
        path.write_bytes(whole)
    assert store.newest_good() == 20


def test_hundred_damages_are_all_found(copy):
    damage_often(copy, 100)


@pytest.mark.soak
def test_thousand_damages_are_all_found(copy):
    damage_often(copy, 1000)


def test_manifest_naming_a_file_outside_is_refused(copy):
    from itune.checkpoint import manifest

    facts = manifest.read_manifest(copy / "20")
    facts.pop("sha256")
    facts["files"]["../10/run.json"] = facts["files"]["run.json"]
    (copy / "20" / "manifest.json").write_text(manifest._render(facts))
    assert any("outside the folder" in line for line in Store(copy).verify(20))


def test_falls_back_to_the_previous_good_step(copy):
    lines = []
    store = Store(copy, log=lines.append)
    (copy / "20" / "run.json").unlink()
    assert store.newest_good() == 10
    assert "step 20 is damaged" in lines[0] and "run.json is missing" in lines[0]
    with pytest.raises(RunError, match=r"step 20 was asked for by name and is damaged: .*run\.json is missing"):
        store.check_named(20)
    store.set_aside_after(10)
    assert store.steps() == [10] and (copy / "damaged-20").is_dir()


def test_a_checkpoint_under_another_number_is_damaged(copy):
    """Copied by hand, it would be believed to be that step; `05` is no number of one, a file may stand in the way."""
    lines = []
    store = Store(copy, log=lines.append)
    for name in ("30", "05", "040", "\u0663"):
        shutil.copytree(copy / "20", copy / name)
    (copy / "damaged-30").write_text("mine")
    assert store.steps() == [10, 20, 30] and store.newest_good() == 20
    assert "step 30 is damaged and is passed over" in lines[0] and "manifest.json is of step 20" in lines[0]
    with pytest.raises(RunError, match="is of step 20: the folder was copied or renamed"):
        store.check_named(30)
    store.set_aside_after(20)
    assert store.steps() == [10, 20] and (copy / "damaged-30" / "run.json").is_file()


def test_clock_set_back_a_day_changes_no_order(copy):
    for path in [copy / "20", *(copy / "20").rglob("*")]:
        os.utime(path, (1.0, path.stat().st_mtime - 86400))
    assert Store(copy).steps() == [10, 20] and Store(copy).newest_good() == 20


def test_folder_without_manifest_is_no_checkpoint(copy):
    lines = []
    store = Store(copy, log=lines.append)
    (copy / "20" / "manifest.json").unlink()
    assert store.latest() == 10
    assert store.newest_good() == 10 and "manifest.json is missing" in lines[0]


def test_all_damaged_is_an_error_not_a_fresh_start(copy):
    for step in (10, 20):
        (copy / str(step) / "manifest.json").write_text("{}")
    with pytest.raises(RunError, match="every checkpoint is damaged"):
        Store(copy, log=lambda line: None).newest_good()


def test_unknown_named_step_lists_what_is_there(copy):
    with pytest.raises(InputError, match="no checkpoint of step 15; steps here: 10, 20"):
        Store(copy).check_named(15)


def test_no_folder_is_no_checkpoint(tmp_path):
    assert Store(tmp_path / "absent").newest_good() is None
    assert not (tmp_path / "absent").exists()


def test_litter_of_a_killed_run_is_removed_and_never_read(copy):
    shutil.copytree(copy / "20", copy / ".tmp-30")
    store = Store(copy)
    assert store.latest() == 20
    store.open()
    assert sorted(p.name for p in copy.iterdir()) == ["10", "20"]


def test_keeps_newest_and_best(tmp_path):
    mesh = make_mesh({"fsdp": 8})
    state = make_state(mesh)
    metrics = {}
    store = Store(tmp_path, keep=1, keep_best="heldout_loss/loss", metrics=lambda step: metrics.get(step, {}))
    store.open()
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None)):
        store.save(step, state, data={}, config={})
        if loss is not None:  # an evaluation comes after the save
            metrics[step] = {"heldout_loss/loss": loss}
    store.wait()
    assert store.steps() == [2, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "4"]


def test_a_step_saved_again_replaces_the_old_one(copy):
    mesh = make_mesh({"fsdp": 8})
    store = Store(copy)
    store.open()
    store.save(20, make_state(mesh, 5), data={"again": True}, config=CONFIG)
    store.wait()
    assert store.read(20).data == {"again": True} and store.verify(20) == []


def test_failed_save_surfaces_keeps_the_last_good_and_leaves_no_litter(copy, monkeypatch):
    from itune.checkpoint import manifest

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    store = Store(copy)
    store.open()
    monkeypatch.setattr(manifest, "write_manifest", full)
    store.save(30, make_state(make_mesh({"fsdp": 8})), data={}, config={})
    assert store._thread
    store._thread.join()
    with pytest.raises(RunError, match=r"step 30 could not be saved.*No space left.*checkpoint of step 20 is kept"):
        store.check()
    store.check()  # raised once
    assert sorted(p.name for p in copy.iterdir()) == ["10", "20"]


def test_on_a_mounted_bucket_the_manifest_is_the_commit(copy, monkeypatch, tmp_path):
    """Renames of folders are not one step there: killed in the middle, the new step is none and the old one stays."""
    from itune.checkpoint import commit

    mounts = tmp_path / "mountinfo"
    mounts.write_text("22 1 8:1 / / rw - ext4 /dev/vda rw\n"
                      f"23 22 0:30 / {tmp_path}/my\\040bucket rw - fuse.gcsfuse bucket rw\n")
    assert commit.renames_whole_folders(tmp_path, mounts)
    assert not commit.renames_whole_folders(tmp_path / "my bucket" / "run" / "checkpoints", mounts)
    monkeypatch.setattr(commit, "renames_whole_folders", lambda folder: False)
    store, done = Store(copy, keep=9, log=lambda line: None), []

    def interrupted(source, target):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(Path(target).name)
        os.rename(source, target)

    store.open()
    state = make_state(make_mesh({"fsdp": 8}))
    store.save(30, state, data={}, config={})
    store.wait()
    assert store.newest_good() == 30 and sorted(p.name for p in copy.iterdir()) == ["10", "20", "30"]
    monkeypatch.setattr(commit, "os", SimpleNamespace(rename=interrupted))
    store.save(40, state, data={}, config={})
    with pytest.raises(RunError, match="step 40 could not be saved"):
        store.wait()
    assert done == [".tmp-40-manifest", "40"] and store.latest() == 30
    store.open()
    assert store.newest_good() == 30 and sorted(p.name for p in copy.iterdir()) == ["10", "20", "30", "40"]
    store.set_aside_after(30)
    assert store.steps() == [10, 20, 30]


def test_room_for_one_checkpoint_but_not_for_all_that_are_kept_is_told(copy, monkeypatch):
    store, usage = Store(copy, keep=3), shutil.disk_usage(copy)
    state = make_state(make_mesh({"fsdp": 8}))
    assert store.space_warning(state) == ""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    assert "3 checkpoints (checkpoint.keep) and the next one need 0.02 GB" in store.space_warning(state)


def test_no_room_is_found_before_writing(copy, monkeypatch):
    store = Store(copy)
    usage = shutil.disk_usage(copy)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(RunError, match=r"out of disk: a checkpoint needs 0\.\d+ GB, .* has 0\.00 GB free"):
        store.save(30, make_state(make_mesh({"fsdp": 8})), data={}, config={})


def test_another_architecture_is_refused(saved_folder):
    mesh = make_mesh({"fsdp": 8})
    wrong = abstract(make_state(mesh), mesh)
    wrong.trainable["w"] = jax.ShapeDtypeStruct((16, 9), jnp.float32, sharding=replicated(mesh))
    with pytest.raises(RunError, match=r"1 arrays do not fit .*trainable/w: float32\[16, 8\] saved, float32\[16, 9\]"):
        Store(saved_folder).restore(20, wrong)
