"""A trace of a real run, and where its time went: shares that add up, collectives and waits where they belong."""

from __future__ import annotations

import itertools
import json
import random
import sys
import time
from pathlib import Path

import jax
import pytest

import itune.setup_run
from itune.config import from_dict
from itune.data.loader import Loader
from itune.loop import train
from itune.runtime import trace
from itune.runtime.profiler import Profiler
from itune.runtime.trace import Shares, length, merge, overlap, read_shares, tenths, without
from itune.sharding import make_mesh

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_run import make_inputs

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        before = jax.config.jax_compilation_cache_dir
        yield folder
        jax.config.update("jax_compilation_cache_dir", before)


def traced(inputs, workdir, steps="10:12", last=14, **changes):
    """`summary.json` of a run that traces these steps, and what it printed."""
    tree = {
        "model": {"path": str(inputs / "model")}, "evaluators": (), "log": {"every": 1, "tensorboard": False},
        "data": {"train": str(inputs / "rows.jsonl"), "max_length": 48}, "train": {"batch_size": 8, "max_steps": last},
        "profile": {"steps": steps}, **changes,
    }  # fmt: skip
    train(from_dict(tree), workdir)
    return json.loads((workdir / "profile" / "summary.json").read_text())


def assert_whole(shares):
    four = [shares[name] for name in ("compute", "communication", "input_wait", "other")]
    assert all(0 <= share <= 1 for share in (*four, shares["communication_hidden"]))
    assert sum(four) == pytest.approx(1, abs=1e-9)
    assert shares["communication_hidden"] <= shares["compute"]
    assert shares["compute"] > 0 and shares["seconds"] > 0


def test_eight_devices_communicate(inputs, tmp_path, capsys):
    shares = traced(inputs, tmp_path, eval={"every": 11}, evaluators=("heldout_loss",), data={
        "train": str(inputs / "rows.jsonl"), "max_length": 48, "held_out_share": 0.1})
    assert_whole(shares)
    assert shares["devices"] == 8 and shares["communication"] > 0
    assert shares["steps"] == [10, 12]
    session = tmp_path / "profile" / "plugins" / "profile" / "steps-10-12"  # what XProf and TensorBoard look for
    assert sorted(path.name for path in session.iterdir()) == ["process-0.trace.json.gz", "process-0.xplane.pb"]
    assert tmp_path / "profile" / shares["trace"] == session / "process-0.xplane.pb"
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["plugins", "summary.json"]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("profile")]
    assert line == f"profile of steps 10 to 12: {Shares(**of(shares)).line()}: {tmp_path / 'profile'}"
    marks = trace._read(jax.profiler.ProfileData.from_file(str(session / "process-0.xplane.pb")))[1]
    assert len(marks[trace.INPUT]) == 3 and len(marks["itune/evaluate"]) == 1
    assert shares["seconds"] < (length(marks[trace.STEPS]) - length(marks["itune/evaluate"])) / 1e9 + 1e-6


def of(shares):
    return {name: value for name, value in shares.items() if name not in ("steps", "trace")}


def test_one_device_does_not(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(itune.setup_run, "make_mesh", lambda *given: make_mesh(None, jax.devices()[:1]))
    shares = traced(inputs, tmp_path)
    assert_whole(shares)
    assert shares["devices"] == 1 and shares["communication"] == shares["communication_hidden"] == 0


def test_slow_data_shows_as_input_wait(inputs, tmp_path, monkeypatch):
    rows = Loader.rows

    def slow(loader, step, *given):
        time.sleep(0.5 * (step >= 8))
        return rows(loader, step, *given)

    monkeypatch.setattr(Loader, "rows", slow)
    shares = traced(inputs, tmp_path, steps="8:10", last=11)
    assert_whole(shares)
    assert shares["input_wait"] > 0.5, shares


def test_a_trace_that_cannot_be_begun_or_read_is_one_warning(tmp_path, monkeypatch):
    said = []
    with Profiler("2:3", tmp_path, said.append) as profiler:
        for step in range(4):
            if profiler.due(step):
                profiler.switch(step)
    assert len(said) == 1
    expected = "warning: profile of steps 2 to 3: no summary could be made (the trace holds no operation of a device"
    assert said[0].startswith(expected)
    with jax.profiler.trace(tmp_path / "other"), Profiler("2:3", tmp_path, said.append) as profiler:
        for step in range(4):
            if profiler.due(step):
                profiler.switch(step)
    assert len(said) == 2
    assert said[1].startswith("warning: profile.steps=2:3: no trace was begun (Profile has already been started.")


def test_steps_that_the_run_does_not_reach_are_said(tmp_path):
    said = []
    with Profiler("10:13", tmp_path, said.append) as profiler:
        assert not any(profiler.due(step) for step in range(9))
    assert said == ["profile.steps=10:13: none of these steps was run here; nothing was traced"]
    with Profiler("10:13", tmp_path, said.append) as profiler:
        assert profiler.due(11), "a run that was resumed within these steps traces what is left of them"
        profiler.switch(11)
        with profiler.step(11):
            jax.numpy.ones(8).block_until_ready()
    assert said[1].startswith("profile of steps 12 to 12: compute ")


def xplane(text):
    return jax.profiler.ProfileData.text_proto_to_serialized_xspace(text)


def plane(name, lines):
    """Text of an XPlane; `lines`: line -> [(event, start and end in microseconds)]."""
    names = sorted({event for events in lines.values() for event, *_ in events})
    metadata = "".join(f'event_metadata {{ key: {key} value {{ id: {key} name: "{one}" }} }}'
                       for key, one in enumerate(names))
    shown = "".join(
        f'lines {{ id: {number} name: "{line}" timestamp_ns: 5000 ' + "".join(
            f"events {{ metadata_id: {names.index(event)} offset_ps: {int(begin * 1e6)} "
            f"duration_ps: {int((end - begin) * 1e6)} }}" for event, begin, end in events) + "}"
        for number, (line, events) in enumerate(lines.items()))
    return f'planes {{ name: "{name}" {shown} {metadata} }}'


HOST = {"python": [("itune/steps", 0, 100), ("itune/input", 60, 80), ("itune/save", 90, 100)]}


def shares_of(tmp_path, *planes):
    path = tmp_path / "made.xplane.pb"
    path.write_bytes(xplane("\n".join(plane(*one) for one in planes)))
    return read_shares(path)


def test_tpu_events(tmp_path):
    """The operations' own line: a loop, computing, a wait for a collective that ran beside; one more exposed."""
    device = {
        "Steps": [("0", 0, 90)],
        "XLA Ops": [
            ("%while.1 = (f32[8]) while(%tuple.1), body=%body", 0, 50),
            ("%fusion.2 = bf16[8]{0} fusion(%p.1), kind=kOutput, calls=%fused_computation.2", 0, 40),
            ("%all-gather-start.1 = (bf16[8], bf16[64]) all-gather-start(%p.2)", 40, 41),
            ("%all-gather-done.1 = bf16[64] all-gather-done(%all-gather-start.1)", 41, 50),
            ("%fusion.9 = f32[8]{0} fusion(%p.4), kind=kCustom, calls=%all-reduce-scatter.3", 50, 55),
        ],
        "Async XLA Ops": [("all-gather-start.1", 30, 50), ("copy-start.3", 55, 60)],
    }
    shares = shares_of(tmp_path, ("/device:TPU:0", device), ("/host:CPU", HOST))
    assert shares.seconds == pytest.approx(90e-6) and shares.devices == 1
    assert shares[:5] == pytest.approx((40 / 90, 15 / 90, 10 / 90, 20 / 90, 15 / 90))


def test_gpu_events_of_two_devices(tmp_path):
    one = {"Stream #13(Compute)": [("gemm_fusion_dot_1", 0, 60)], "Stream #20(MemcpyH2D)": [("MemcpyH2D", 60, 90)]}
    other = {"Stream #13(Compute)": [("gemm_fusion_dot_1", 0, 30)],
             "Stream #21": [("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 20, 70)]}
    shares = shares_of(tmp_path, ("/device:GPU:0", one), ("/device:GPU:1", other), ("/host:CPU", HOST))
    assert shares.devices == 2
    assert shares[:5] == pytest.approx((45 / 90, 20 / 90, 5 / 90, 15 / 90, 10 / 90))


def test_a_trace_without_steps_or_operations_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no operation of a device within the steps"):
        shares_of(tmp_path, ("/host:CPU", HOST))
    with pytest.raises(ValueError, match="holds no steps"):
        shares_of(tmp_path, ("/device:GPU:0", {"Stream #1": [("gemm", 0, 1)]}))


@pytest.mark.parametrize(("name", "kind"), [
    *((name, "communication") for name in (
        "all-reduce", "all-reduce-start.3", "all-gather.1", "reduce-scatter.2", "all-to-all", "ragged-all-to-all.1",
        "collective-permute-done", "send.1", "recv-done.4", "psum.5", "ppermute.1", "all_gather.3",
        "ncclDevKernel_SendRecv")),
    *((name, "compute") for name in ("fusion.1", "custom-call.2", "reduce.4", "sender_fusion", "dot.3", "copy-done.1")),
    *((name, "") for name in ("while.5", "conditional", "call.2", "MemcpyD2H")),
])  # fmt: skip
def test_operations_are_told_apart_by_name(name, kind):
    class Event:
        start_ns, end_ns = 0, 1

    Event.name = name
    compute, communication = device = ([], [])
    trace._sort(Event, {}, device, False)
    assert (len(compute), len(communication)) == {"compute": (1, 0), "communication": (0, 1), "": (0, 0)}[kind]


def test_intervals_are_what_counting_points_gives():
    draw = random.Random(0)
    for _ in range(200):
        these, those = ([(start, start + draw.randint(0, 9)) for start in draw.choices(range(50), k=draw.randint(0, 8))]
                        for _ in range(2))  # fmt: skip
        a, b = ({point for start, end in pairs for point in range(start, end)} for pairs in (these, those))
        one, two = merge(these), merge(those)
        for found, points in ((one, a), (overlap(one, two), a & b), (without(one, two), a - b)):
            assert {point for start, end in found for point in range(start, end)} == points
            assert length(found) == len(points)
            assert found == sorted(found)
        assert all(before[1] < after[0] for before, after in itertools.pairwise(one))


def test_printed_shares_add_up():
    assert tenths((1 / 3, 1 / 3, 1 / 3, 0.0)) == [334, 333, 333, 0]
    assert tenths((0.99996, 0.00004, 0.0, 0.0)) == [1000, 0, 0, 0]
    shares = Shares(0.9104, 0.0604, 0.04, 0.0104, 0.0188, 2.0, 1)
    assert shares.line() == ("compute 91.0%, communication 6.1% (and 4.0% hidden behind compute), input wait 1.0%, "
                             "other 1.9%")  # fmt: skip
