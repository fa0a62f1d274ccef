"""The training step compiles while the data are read, once, and is the run's own."""

from __future__ import annotations

import gc
import threading

import jax
import pytest
from tiny_run import settings

import itune.ahead
import itune.data.dataset
import itune.data.remembered
from itune.loop import train
from itune.types import InputError
from itune.writers import read_metrics


@pytest.fixture
def compiling(monkeypatch):
    """The threads that compiled a step, and an event for the first."""
    threads, begun, real = [], threading.Event(), itune.ahead.compile_step

    def noted(plan, keep):
        threads.append(threading.current_thread())
        begun.set()
        return real(plan, keep)

    monkeypatch.setattr(itune.ahead, "compile_step", noted)
    return threads, begun


def losses(workdir):
    return [record["loss"] for record in read_metrics(workdir / "metrics.jsonl")]


def test_it_compiles_once_while_the_data_are_read(tiny_folder, tmp_path, compiling, monkeypatch):
    threads, begun = compiling
    real = itune.data.dataset.prepare

    def prepare(*given, **more):
        assert begun.wait(60), "nothing compiled while the data were read"
        return real(*given, **more)

    monkeypatch.setattr(itune.data.dataset, "prepare", prepare)
    train(settings(tiny_folder, **{"train.max_steps": 3}), tmp_path / "early")
    assert len(threads) == 1 and threads[0] is not threading.main_thread()
    monkeypatch.undo()
    monkeypatch.setattr(jax, "default_backend", lambda: "another")  # where it does not compile early
    train(settings(tiny_folder, **{"train.max_steps": 3}), tmp_path / "late")
    assert losses(tmp_path / "early") == losses(tmp_path / "late")


@pytest.mark.parametrize("template", ["", "chatml"])
def test_it_waits_for_the_tokenizer_where_that_may_add_tokens(tiny_folder, tmp_path, compiling, monkeypatch, template):
    threads, begun = compiling
    real = itune.data.remembered.recall_tokenizer

    def recall(*given):
        assert begun.wait(60) if not template else not threads
        return real(*given)

    monkeypatch.setattr(itune.data.remembered, "recall_tokenizer", recall)
    train(settings(tiny_folder, **{"train.max_steps": 2, "data.chat_template": template}), tmp_path / "run")
    assert len(threads) == 1


@pytest.mark.parametrize("wrong", [{"data.train": ""}, {"model.path": "some/hub-id"}])
def test_it_does_not_begin_where_the_config_is_wrong_or_a_model_must_be_fetched(tiny_folder, compiling, wrong):
    threads, begun = compiling
    itune.ahead.Ahead(settings(tiny_folder, **{"train.max_steps": 2, **wrong}))
    assert not begun.wait(1) and not threads


def test_without_a_number_of_steps_it_waits_for_the_data(tiny_folder, tmp_path, compiling, monkeypatch):
    threads, _ = compiling
    real = itune.data.dataset.prepare

    def prepare(*given, **more):
        assert not threads
        return real(*given, **more)

    monkeypatch.setattr(itune.data.dataset, "prepare", prepare)
    train(settings(tiny_folder, **{"train.epochs": 0.5}), tmp_path / "run")
    assert len(threads) == 1


def test_a_fault_of_the_config_is_said_once_and_by_the_run(tiny_folder, tmp_path, compiling):
    with pytest.raises(InputError, match=r"train\.batch_size"):
        train(settings(tiny_folder, **{"train.max_steps": 3, "train.batch_size": 3}), tmp_path / "run")


def test_garbage_is_collected_again_before_the_first_step(tiny_folder, tmp_path):
    seen = []
    gc.disable()
    try:
        run = settings(tiny_folder, **{"train.max_steps": 2})
        train(run, tmp_path / "run", on_step=lambda *_: seen.append(gc.isenabled()))
    finally:
        gc.enable()
    assert seen and all(seen)
