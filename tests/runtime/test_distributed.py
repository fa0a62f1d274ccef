"""What the environment says decides whether this process is one of several."""

import pytest
from jax.sharding import Mesh

from itune.export import export_adapter, export_run
from itune.runtime import distributed
from itune.sharding import make_mesh
from itune.types import InputError


@pytest.fixture
def calls(monkeypatch):
    for name in (*distributed._VARIABLES, "ITUNE_DISTRIBUTED", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    made = []
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *args, **kwargs: made.append((args, kwargs)))
    return made


def test_alone_without_variables(calls):
    distributed.start()
    assert calls == []


def test_given_coordinator_is_bound_to_its_address_only(calls, monkeypatch):
    for name, value in zip(distributed._VARIABLES, ("127.0.0.1:4000", "2", "0")):
        monkeypatch.setenv(name, value)
    distributed.start()
    expected = {"coordinator_bind_address": "127.0.0.1:4000", "heartbeat_timeout_seconds": 100}
    assert calls == [(("127.0.0.1:4000", 2, 0), expected)]


@pytest.mark.parametrize(("name", "value"), [("SLURM_STEP_NUM_TASKS", "2"), ("OMPI_COMM_WORLD_SIZE", "4")])
def test_launchers_are_recognised(calls, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    distributed.start()
    assert calls == [((), {"heartbeat_timeout_seconds": 100})]
    monkeypatch.setenv("ITUNE_DISTRIBUTED", "0")
    distributed.start()
    assert len(calls) == 1


def test_tpu_machine_that_is_no_pod_goes_on_alone(calls, monkeypatch):
    def none(*args, **kwargs):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(distributed, "tpu_here", lambda: True)
    monkeypatch.setattr(distributed.jax.distributed, "initialize", none)
    distributed.start()
    monkeypatch.setenv("ITUNE_DISTRIBUTED", "1")
    with pytest.raises(InputError, match="jax finds no job"):
        distributed.start()


@pytest.mark.parametrize(("values", "message"), [
    (("127.0.0.1:4000", "", ""), "ITUNE_NUM_PROCESSES, ITUNE_PROCESS_ID not set"),
    (("127.0.0.1", "2", "0"), "must be host:port, found '127.0.0.1'"),
    (("127.0.0.1:4000", "2", "2"), "number below ITUNE_NUM_PROCESSES, found '2' of '2'"),
])
def test_wrong_variables_are_named(calls, monkeypatch, values, message):
    for name, value in zip(distributed._VARIABLES, values):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        distributed.start()
    assert calls == []


@pytest.mark.parametrize(("index", "said"), [(0, "exported\n"), (1, "")])
def test_a_verb_of_all_processes_joins_the_job_and_the_first_prints(calls, monkeypatch, capsys, index, said):
    for name, value in zip(distributed._VARIABLES, ("127.0.0.1:4000", "2", str(index))):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed.jax, "process_index", lambda: index)

    @distributed.joined()
    def verb():
        assert len(calls) == 1
        print("exported")

    verb()
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("verb", [export_run, export_adapter])
def test_exports_join_the_job(calls, monkeypatch, tmp_path, verb):
    monkeypatch.setenv("ITUNE_COORDINATOR", "127.0.0.1:4000")
    monkeypatch.setenv("ITUNE_NUM_PROCESSES", "2")
    monkeypatch.setenv("ITUNE_PROCESS_ID", "0")
    with pytest.raises(InputError, match="not a run directory"):
        verb(tmp_path / "none", tmp_path / "out")
    assert len(calls) == 1


def test_one_process_needs_no_exchange():
    agreement = distributed.Agreement(make_mesh({"fsdp": 8}))
    assert [agreement.exchange(flag) for flag in (False, True)] == [False, True]


def test_flag_is_seen_one_step_later_by_all(monkeypatch):
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    mesh: Mesh = make_mesh({"data": 2, "fsdp": 4})
    agreement = distributed.Agreement(mesh)
    assert [agreement.exchange(flag) for flag in (False, True, False, False)] == [False, False, True, False]
