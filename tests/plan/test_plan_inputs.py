"""What a plan is asked for: nonsense is one message, slices and frozen parameters count, prices are checked."""

from __future__ import annotations

import json
import re

import pytest

from itune.cli import main
from itune.plan.chips import parse_topology
from itune.types import InputError


@pytest.fixture
def plan(base_folder, tmp_path, capsys):
    """plan(*words): exit code, the numbers, what it wrote to stdout and stderr."""

    def run(*words, topology="v5e:2x2", data=""):
        file = tmp_path / "plan.json"
        file.unlink(missing_ok=True)
        code = main(["plan", "--config", "sft", f"--config.model.path={base_folder}", f"--config.data.train={data}",
                     "--config.train.max_steps=5", "--config.train.batch_size=8", "--config.data.max_length=128",
                     f"--topology={topology}", "--formula", f"--json={file}", *words])  # fmt: skip
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, json.loads(file.read_text()) if file.exists() else None, said.out, said.err

    return run


def test_what_is_frozen_needs_no_gradient(plan):
    whole, part = (plan(*more)[1] for more in ((), ("--config.train.freeze=proj|embed",)))
    assert part["flops"]["model"] < 0.95 * whole["flops"]["model"]  # most of it is attention
    assert part["traffic"].get("sum gradients over fsdp", 0) < 0.02 * whole["traffic"]["sum gradients over fsdp"]
    ends = plan("--config.train.freeze=blocks|embed")[1]  # nothing goes back through the layers
    assert ends["flops"]["hardware"] < 0.6 * part["flops"]["hardware"] and ends["memory"]["activations"] == 0
    half = plan("--config.train.freeze=attention")[1]["traffic"]["sum gradients over fsdp"]
    assert 0.3 < half / whole["traffic"]["sum gradients over fsdp"] < 0.9


def test_a_mesh_that_says_nothing_of_slices_spans_them(plan):
    for topology in ("2*v5e:2x2", "gpu:h200:16", "2*gpu:h200:8"):
        more = ("--config.train.batch_size=16",)
        said, unsaid = (plan(*more, *each, topology=topology)[1] for each in (("--config.mesh.dcn_fsdp=2",), ()))
        assert unsaid["seconds"]["network"] == said["seconds"]["network"] > 0, topology
    assert plan("--config.mesh.data=-1", "--config.mesh.fsdp=2", topology="2*v5e:2x2")[1]["seconds"]["network"] > 0
    assert plan(topology="gpu:h200:8")[1]["seconds"]["network"] == 0
    for topology, factor in (("v5e:2x2", 2), ("2*v5e:2x2", 4)):
        code, _, _, err = plan(f"--config.mesh.dcn_fsdp={factor}", topology=topology)
        assert code == 2 and "the devices lie in" in err


@pytest.mark.parametrize("words, message", [
    (["--config.lora.rank=4", "--config.lora.targets=nothing"], "config: .*matches no projection"),
    (["--config.loss.blocks=2"], r"none of .* of the last: .*loss\.blocks=2 is for one device"),
    (["--config.mesh.context=4", "--config.data.max_length=250"], "250 tokens do not divide over mesh.context=4"),
])  # fmt: skip
def test_a_search_says_what_was_refused(plan, words, message):
    code, _, _, err = plan("--search", *words)
    assert code == 2 and re.search(message, err), err


@pytest.mark.parametrize("word, message", [
    ("loss.blocks=4", r"loss\.blocks=4 is for one device, the mesh has 4"),
    ("loss.router_aux=0.1", r"loss\.router_aux=0\.1 needs a mixture of experts"),
    ("optimizer.rates={'nothing_like_it': 0.5}", "'nothing_like_it' decides about no parameter"),
    ("optimizer.options={'b1': 'much'}", "optimizer 'adamw' does not accept .*much"),
    ("optimizer.name=adamv", "nearest: adam"),
    ("profile.steps=abc", r"profile\.steps must be first:last such as 10:13, found 'abc'"),
    ("eval.patience=2", r"eval\.patience=2 needs evaluations during training; set eval\.every"),
])  # fmt: skip
def test_what_training_refuses_is_refused(plan, word, message):
    code, _, out, err = plan(f"--config.{word}")
    assert code == 2 and re.search(message, err), out + err


def test_a_kernel_is_judged_by_the_chip_that_is_planned_for(plan):
    for kernel, good, bad in (("splash", "v5e:2x2", "gpu:h200:1"), ("cudnn", "gpu:h200:1", "v5e:2x2")):
        word = f"--config.model.attention={kernel}"
        assert plan(word, topology=good)[0] == 0
        code, _, _, err = plan(word, topology=bad)
        assert code == 2 and f"model.attention={kernel} cannot run on {bad}; choose auto, xla or" in err


@pytest.mark.parametrize("axis", ["data", "fsdp", "expert", "tensor", "context"])
def test_no_axis_is_empty(plan, axis):
    code, _, _, err = plan(f"--config.mesh.{axis}=0")
    assert code == 2 and f"mesh.{axis}=0: expected at least 1, or -1" in err


def test_data_that_could_not_be_read_are_named(plan):
    code, _, out, _ = plan(data="nofile.jsonl")
    assert code == 0 and "5 steps (train.max_steps; the data were not read: " in out and "nofile.jsonl" in out
    assert "(train.max_steps)" in plan()[2]


@pytest.mark.parametrize("content, message", [
    (b"[v5e]\non_demand = -1.2\n", "found -1.2"), (b"[v5e]\non_demand = nan\n", "found nan"),
    (b"[v5e]\non_demand = inf\n", "found inf"), (b"[v5e]\non_demand = true\n", "found True"),
    (b"[V5E]\non_demand = 1.2\n", r"\[V5E\] is no chip that is known; expected v5e, .*; nearest: v5e"),
    (b"\xff\xfe", "cannot be read"), (b"v5e = 3\n", "found None"),
])  # fmt: skip
def test_bad_prices_are_one_message(plan, tmp_path, content, message):
    (tmp_path / "prices.toml").write_bytes(content)
    code, _, _, err = plan("--prices", str(tmp_path / "prices.toml"))
    assert code == 2 and re.search(message, err) and err.count("\n") == 1


def test_the_prices_that_were_used_are_named(plan, tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text("[v5e]\non_demand = 2.5\n")
    assert f"at $2.50 a chip and hour (your prices: {mine})" in plan("--prices", str(mine))[2]
    mine.write_text("[v5p]\non_demand = 2.5\n")
    assert f"no price of v5e in {mine}" in plan("--prices", str(mine))[2]


@pytest.mark.parametrize("name, message", [
    ("v5e:3x3", "no slice has these sides; expected sides of 1, 2, 4, 8 or 16"), ("v5e:1000x1000", "no slice has"),
    ("v5p:3x4x4", "a multiple of 4 up to 28"), ("h200:8", "a GPU is gpu:h200:8"), ("gpu:h200:12", "multiple of it"),
    ("gpu:h200:8x2", "takes 1 size of at least 1, such as gpu:h200:8"), ("v5e:4", "takes 2 sizes"),
])  # fmt: skip
def test_topologies_that_are_none(name, message):
    with pytest.raises(InputError, match=message):
        parse_topology(name)


def test_topologies_by_any_case_and_hosts_of_gpus():
    assert parse_topology("V5E:2x2") == parse_topology("v5e:2x2")
    assert (parse_topology("gpu:h200:16").slices, parse_topology("gpu:h200:16").chips) == (2, 16)
    assert parse_topology("2*gpu:h200:16").slices == 4
    assert parse_topology("v5p:4x12x28").chips == 4 * 12 * 28


@pytest.mark.parametrize("where", [".", "/proc/x.json"])
def test_a_place_that_takes_no_numbers_is_one_message(base_folder, capsys, where):
    code = main(["plan", "--config", "sft", f"--config.model.path={base_folder}", "--config.train.max_steps=5",
                 "--topology=v5e:2x2", "--formula", f"--json={where}"])  # fmt: skip
    said = capsys.readouterr()
    assert code == 2 and said.err.startswith("itune: --json ") and said.err.count("\n") == 1
    assert where != "." or "estimated step" not in said.out, "before the work, not after it"  # root may write anywhere
