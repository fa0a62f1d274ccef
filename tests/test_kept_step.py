"""A kept step: found by what decides it, the same numbers, compared with the program before anything is saved."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import jax
import pytest
import tiny_run
from jax.experimental.compilation_cache import compilation_cache

import itune.ahead
from itune import kept_step
from itune.cli import main
from itune.loop import train
from itune.setup_run import make_plan, prepare_data
from itune.step import TrainStep
from itune.writers import read_metrics


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Caches of this test's own, jax's too; the folder of kept steps."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    use_jax_cache(tmp_path / "compiled")
    yield tmp_path / "cache" / "itune" / "steps"
    use_jax_cache(before)


def use_jax_cache(folder):
    jax.config.update("jax_compilation_cache_dir", str(folder) if folder else None)
    compilation_cache.reset_cache()


@pytest.fixture
def start(tiny_folder, tmp_path, caches, monkeypatch, capsys):
    """start(name, *more): the command's exit code, losses, what it wrote to stderr, and programs made before a step."""
    lowered, real_lower, real_settle = [], TrainStep.lower, itune.ahead.Ahead.settle

    def lower(self, *given):
        lowered.append("before")
        return real_lower(self, *given)

    def settle(self, plan):
        lowered.append("first step")
        real_settle(self, plan)

    monkeypatch.setattr(TrainStep, "lower", lower)
    monkeypatch.setattr(itune.ahead.Ahead, "settle", settle)

    def run(name, *more, steps=2):
        lowered.clear()
        words = tiny_run.command(tiny_folder, tmp_path / name, "--config.evaluators=()")
        code = main([*words, f"--config.train.max_steps={steps}", *more])
        losses = [record["loss"] for record in read_metrics(tmp_path / name / "metrics.jsonl")]
        first = lowered.index("first step") if "first step" in lowered else len(lowered)
        return code, losses, capsys.readouterr().err, first

    return run


def plan_of(folder, **changes):
    config = tiny_run.settings(folder, **{"train.max_steps": 2, **changes})
    return make_plan(config, prepare_data(config, lambda line: None), lambda line: None)


def test_a_second_start_lowers_nothing_before_its_first_step(start, caches):
    code, losses, _, made = start("first")
    assert (code, made, len(list(caches.iterdir()))) == (0, 1, 1)
    code, again, _, made = start("second")
    assert (code, made, len(list(caches.iterdir()))) == (0, 0, 1)
    assert again == losses and len(losses) == 2


def test_without_a_number_of_steps_too(start, caches):
    *_, first = start("first", "--config.train.epochs=0.1", steps=0)
    code, losses, _, second = start("second", "--config.train.epochs=0.1", steps=0)
    assert (first, code, second) == (1, 0, 0) and losses


def test_a_resumed_run_uses_it(start, caches):
    _, whole, _, _ = start("whole", steps=3)
    start("cut", "--config.checkpoint.every=1", "--config.checkpoint.keep=9", steps=3)
    shutil.rmtree(caches.parents[2] / "cut" / "checkpoints" / "3")
    code, losses, _, made = start("cut", "--config.checkpoint.every=1", "--config.checkpoint.keep=9", steps=3)
    assert (code, made, losses) == (0, 0, whole)


def test_the_state_is_donated_and_placed_as_by_a_fresh_step(tiny_folder, caches):
    plan = plan_of(tiny_folder, **{"train.batch_size": 8})
    made = kept_step.compile_step(plan, keep=True)
    made.settle(plan)
    found = kept_step.compile_step(plan, keep=True)
    assert (made.found, found.found) == (False, True) and made.program == found.program

    def zeros(leaf):
        return jax.device_put(jax.numpy.zeros(leaf.shape, leaf.dtype), leaf.sharding)

    ends = []
    for compiled in (made, found):
        state, batch = jax.tree.map(zeros, (plan.state, plan.batch))
        new, metrics = compiled.step(state, batch)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        placed, wanted = ([leaf.sharding for leaf in jax.tree.leaves(tree)] for tree in (new, plan.state))
        assert placed == wanted
        ends.append(jax.tree.map(lambda leaf: leaf.tobytes(), jax.device_get((new, metrics))))
    assert ends[0] == ends[1]


CHANGES = {
    "optimizer.learning_rate": 1e-4, "optimizer.schedule": "cosine", "train.max_steps": 3, "train.batch_size": 16,
    "data.max_length": 32, "loss.weighting": "example", "lora.rank": 2, "train.freeze": "embed", "train.remat": "full",
    "model.compute_dtype": "bfloat16", "train.accumulation": 1, "mesh.fsdp": 4,
}  # fmt: skip


def test_the_key_holds_what_decides_the_program(tiny_folder, monkeypatch, tmp_path):
    base = {"train.batch_size": 8, "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    keys = {"": kept_step.key(plan_of(tiny_folder, **base))}
    for name, value in CHANGES.items():
        changed = {**base, name: value} | ({"mesh.data": 1} if name == "mesh.fsdp" else {})
        keys[name] = kept_step.key(plan_of(tiny_folder, **changed))
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_cpu_enable_fast_math=true")
    keys["XLA_FLAGS"] = kept_step.key(plan_of(tiny_folder, **base))
    monkeypatch.undo()
    with jax.default_matmul_precision("default"):
        keys["precision"] = kept_step.key(plan_of(tiny_folder, **base))
    monkeypatch.setattr(kept_step, "code_digest", lambda package: "other code")
    keys["code"] = kept_step.key(plan_of(tiny_folder, **base))
    monkeypatch.undo()
    model = tmp_path / "model"
    shutil.copytree(tiny_folder / "model", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rope_theta": 12345.0, "rope_parameters": None}))
    keys["weights of another model"] = kept_step.key(plan_of(tiny_folder, **{**base, "model.path": str(model)}))
    same = keys.pop("train.accumulation")  # 1 is what it was
    assert same == keys[""]
    assert len(set(keys.values())) == len(keys), keys
    rates = [{"mlp": 2.0, "kernel": 0.5}, {"kernel": 0.5, "mlp": 2.0}]  # the first pattern that matches decides
    assert len({kept_step.key(plan_of(tiny_folder, **{**base, "optimizer.rates": given})) for given in rates}) == 2
    for name, value in {"seed": 7, "log.every": 3, "checkpoint.every": 5, "train.timeout": 9.0}.items():
        assert kept_step.key(plan_of(tiny_folder, **{**base, name: value})) == keys[""], name


def test_the_step_of_another_program_is_found_out_before_anything_is_saved(start, caches, tmp_path):
    _, losses, _, _ = start("base")
    (mine,) = caches.iterdir()
    start("other", "--config.optimizer.learning_rate=1e-2")
    (other,) = set(caches.iterdir()) - {mine}
    shutil.copy(other, mine)
    code, _, said, _ = start("run", "--config.checkpoint.every=1")
    assert code == 1 and str(mine) in said and "start again" in said and "Traceback" not in said
    assert not mine.exists() and not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    code, again, _, _ = start("run", "--config.checkpoint.every=1")
    assert (code, again) == (0, losses)


def test_a_step_that_fails_is_not_found_again(start, caches, monkeypatch):
    _, losses, _, _ = start("base")
    (kept,) = caches.iterdir()

    def fails(*given):
        raise RuntimeError("no such function")

    real = kept_step.serialize_executable.deserialize_and_load
    monkeypatch.setattr(kept_step.serialize_executable, "deserialize_and_load", lambda *given: fails)
    code, _, said, _ = start("run")
    assert code == 1 and "no such function" in said and not kept.exists()
    monkeypatch.setattr(kept_step.serialize_executable, "deserialize_and_load", real)
    code, again, _, _ = start("run")
    assert (code, again) == (0, losses)


def test_no_home_no_cache(start, caches, monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(kept_step, "cache_folder", nowhere)
    code, losses, _, _ = start("run")
    assert code == 0 and len(losses) == 2 and not caches.exists()


def test_a_wrong_step_that_was_compiled_early_is_found_out(start, caches, monkeypatch, tmp_path):
    real = itune.ahead.stand_in
    monkeypatch.setattr(itune.ahead, "stand_in", lambda config, steps: real(config, steps + 1))  # another schedule
    code, _, said, _ = start("run", "--config.checkpoint.every=1")
    assert code == 1 and "not the one of this run" in said and not caches.exists()
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


def test_a_run_goes_on_where_its_step_cannot_be_kept(start, caches, monkeypatch):
    def refuses(step):
        raise RuntimeError("UNIMPLEMENTED")

    monkeypatch.setattr(kept_step.serialize_executable, "serialize", refuses)
    code, losses, _, _ = start("first")
    assert code == 0 and len(losses) == 2 and not caches.exists()


@pytest.mark.parametrize("damage", ["cut", "bit"])
def test_a_damaged_file_is_not_run(start, caches, damage, tmp_path):
    _, losses, _, _ = start("first")
    (kept,) = caches.iterdir()
    data = kept.read_bytes()
    half = len(data) // 2
    flipped = data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :]
    kept.write_bytes({"cut": data[:half], "bit": flipped}[damage])
    shutil.rmtree(tmp_path / "compiled")  # jax's cache: so that it is compiled here, and kept again
    compilation_cache.reset_cache()
    code, again, _, made = start("second")
    assert (code, again, made) == (0, losses, 1)
    assert start("third")[3] == 0


def test_a_file_that_others_may_write_is_not_loaded(tiny_folder, caches):
    plan = plan_of(tiny_folder)
    kept_step.compile_step(plan, keep=True).settle(plan)
    (kept,) = caches.iterdir()
    assert kept.stat().st_mode & 0o777 == 0o600
    assert kept_step.compile_step(plan, keep=True).found
    kept.chmod(0o620)
    assert not kept_step.compile_step(plan, keep=True).found
    kept.chmod(0o600)
    if os.getuid() == 0:  # only root may give files away
        os.chown(kept, 12345, -1)
        assert not kept_step.compile_step(plan, keep=True).found


def test_what_jax_had_in_its_cache_is_not_written(start, caches):
    """jax 0.10 writes such an executable without its functions: it would fail when it runs."""
    start("first")
    shutil.rmtree(caches)
    code, losses, _, made = start("second")
    assert (code, made, len(losses)) == (0, 1, 2) and not caches.exists()


def test_a_program_that_calls_train_compiles_its_own(start, caches, tiny_folder, tmp_path):
    start("first")
    lowered = []
    (kept,) = caches.iterdir()
    kept.write_bytes(b"")  # what it would read
    run = tiny_run.settings(tiny_folder, **{"train.max_steps": 2})
    train(run, tmp_path / "run", on_step=lambda *given: lowered.append(given))
    assert kept.read_bytes() == b"" and len(lowered) == 2


def test_the_last_used_are_kept(tiny_folder, caches, monkeypatch):
    monkeypatch.setattr(kept_step, "KEEP", 2)
    plans = [plan_of(tiny_folder, **{"optimizer.learning_rate": rate}) for rate in (1e-3, 2e-3, 3e-3)]
    for second, plan in enumerate(plans[:2]):
        kept_step.compile_step(plan, keep=True).settle(plan)
        os.utime(caches / kept_step.key(plan), (second, second))
    assert kept_step.compile_step(plans[0], keep=True).found  # used just now
    kept_step.compile_step(plans[2], keep=True).settle(plans[2])
    assert {file.name for file in caches.iterdir()} == {kept_step.key(plans[0]), kept_step.key(plans[2])}


def test_processes_of_one_device(tiny_folder, tmp_path):
    """As a user starts them: the second loads what the first compiled, and logs the same."""
    logged = []
    for name in ("first", "second"):
        words = tiny_run.command(tiny_folder, tmp_path / name, "--config.evaluators=()", "--config.train.max_steps=2")
        environment = {**tiny_run.environment(tmp_path), **tiny_run.devices(1)}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        done = subprocess.run([sys.executable, "-m", "itune", *words], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        logged.append([record["loss"] for record in read_metrics(tmp_path / name / "metrics.jsonl")])
        (kept,) = (tmp_path / "cache" / "itune" / "steps").iterdir()
        if name == "first":
            os.utime(kept, (1, 1))
    assert kept.stat().st_mtime > 1, "it was not used"
    assert logged[0] == logged[1] and len(logged[0]) == 2
