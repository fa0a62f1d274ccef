"""Plans by formula: slices, memory, time, cost, search, and the line that `itune train` says."""

from __future__ import annotations

import json
import math
import re
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from itune import flops
from itune.cli import main
from itune.config import load_config
from itune.models import load_model
from itune.optim import make_optimizer
from itune.plan import check
from itune.plan.apart import OutOfTime
from itune.plan.check import one_line
from itune.plan.chips import CHIPS, parse_topology
from itune.plan.estimate import estimate, hardware_flops, model_flops, prices
from itune.plan.inputs import known
from itune.plan.layout import lay_out
from itune.plan.memory import formula_memory
from itune.plan.report import lines, spell
from itune.plan.run import formula_report
from itune.plan.search import candidates, order, overrides, reason, search
from itune.plan.traffic import across_slices, formula_traffic
from itune.sharding import make_mesh
from itune.step import abstract_state
from itune.types import InputError, RunError

LLAMA = Path(__file__).parents[1] / "goldens" / "configs" / "Llama-3.1-8B.json"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with the published config.json of Llama-3.1-8B: planning reads no weights."""
    folder = tmp_path_factory.mktemp("plan") / "Llama-3.1-8B"
    folder.mkdir()
    (folder / "config.json").write_text(LLAMA.read_text())
    return folder


def config_8b(folder, **values):
    base = {"model.path": str(folder), "model.compute_dtype": "bfloat16", "train.remat": "full", "evaluators": (),
            "data.max_length": 4096, "train.batch_size": 16, "train.max_steps": 100}  # fmt: skip
    return load_config("sft", {**base, **{key.replace("__", "."): value for key, value in values.items()}})


@pytest.mark.parametrize("name, chips, chip", [
    ("v5e:4x4", 16, "v5e"), ("v5p:2x2x1", 4, "v5p"), ("gpu:h200:8", 8, "h200"), ("2*v6e:2x4", 16, "v6e"),
])  # fmt: skip
def test_topologies(name, chips, chip):
    where = parse_topology(name)
    assert (where.chips, where.chip.name) == (chips, chip)
    assert where.chip.peak > 1e14


@pytest.mark.parametrize("name, message", [
    ("v5e", "expected CHIP:SHAPE"), ("v5x:4x4", "unknown chip 'v5x'.*nearest: v5"), ("v5e:4", "takes 2 sizes"),
    ("gpu:v5e:4x4", "unknown chip 'v5e'"), ("v5p:2x2", "takes 3 sizes"), ("h200:8", "unknown chip 'h200'"),
])  # fmt: skip
def test_bad_topologies_are_one_message(name, message):
    with pytest.raises(InputError, match=message):
        parse_topology(name)


def test_the_state_is_exact_and_divides_over_fsdp(llama):
    parameters = 8_030_261_248  # of Llama-3.1-8B
    one, sixteen = (formula_memory(lay_out(config_8b(llama), n)) for n in (1, 16))
    assert one.parameters == 4 * parameters
    assert one.optimizer == pytest.approx(8 * parameters, abs=64)
    assert sixteen.parameters == pytest.approx(4 * parameters / 16, rel=0.001)
    assert sixteen.gradients == pytest.approx(4 * parameters / 16, rel=0.001)
    assert sixteen.activations == 32 * 4096 * 4096 * 2, "the inputs of 32 layers in bfloat16"


def test_what_costs_memory_costs_memory(llama):
    base = formula_memory(lay_out(config_8b(llama), 16)).total
    for change in ({"train__remat": "none"}, {"train__remat": "dots"}, {"train__batch_size": 32},
                   {"model__compute_dtype": "float32"}, {"mesh__fsdp": 8, "mesh__data": 2}):
        assert formula_memory(lay_out(config_8b(llama, **change), 16)).total > base, change
    less = {"optimizer__moment_dtype": "bfloat16"}
    assert formula_memory(lay_out(config_8b(llama, **less), 16)).total < base


def test_traffic_of_fsdp_is_two_gathers_and_one_float32_sum(llama):
    traffic = formula_traffic(lay_out(config_8b(llama), 16))
    layers = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    assert traffic["gather weights"] == pytest.approx(2 * 2 * layers * 15 / 16, rel=0.001)
    assert traffic["sum gradients over fsdp"] == pytest.approx(4 * layers * 15 / 16, rel=0.001)
    assert across_slices(lay_out(config_8b(llama), 16)) == 0
    two = lay_out(config_8b(llama, mesh__dcn_data=2, train__batch_size=32), 32, slices=2)
    assert two.sizes["data"] == 2
    assert two.sizes["fsdp"] == 16
    assert across_slices(two) == pytest.approx(2 * 4 * two.trained / 2)


def test_time_follows_the_limits(llama):
    layout, where = lay_out(config_8b(llama), 16), parse_topology("v5e:4x4")
    free = estimate(layout, where, traffic=0.0)
    assert free.compute == pytest.approx(free.hardware_flops / 16 / (197e12 * where.chip.efficiency))
    assert free.bound == "compute"
    slow = estimate(layout, where, traffic=1e15)
    assert slow.bound == "interconnect"
    assert slow.step > free.step
    # 6 N tokens and causal attention; the reference count for a 4,096-token row is 48.25 GFLOP a token
    assert model_flops(layout) / (16 * 4096) == pytest.approx(48.25e9, rel=0.002)
    assert 1.2 < free.hardware_flops / free.model_flops < 1.4


@pytest.mark.parametrize("topology, peak", [
    ("v5e:4x4", 197 / 6), ("v5p:2x2x4", 459 / 6), ("v6e:4x4", 920 / 6), ("gpu:h100:16", 67), ("gpu:h200:16", 67),
    ("gpu:a100:16", 19.5),
])  # fmt: skip
def test_float32_compute_takes_the_time_of_float32(llama, topology, peak):
    where = parse_topology(topology)
    config = config_8b(llama, model__compute_dtype="float32")
    slow, fast = (formula_report(c, where, known(c), {}) for c in (config, config_8b(llama)))
    assert slow.time.hardware_flops == fast.time.hardware_flops
    assert slow.time.compute == pytest.approx(slow.time.hardware_flops / 16 / (peak * 1e12 * where.chip.efficiency))
    assert fast.time.compute == pytest.approx(fast.time.hardware_flops / 16 / (where.chip.peak * where.chip.efficiency))
    said, of_fast = ("\n".join(lines(report)) for report in (slow, fast))
    assert f"of {peak:.3g} TFLOP/s (float32)" in said and "TFLOP/s (bfloat16)" in of_fast
    gain = slow.time.step / fast.time.step
    found = re.search(r"\n  bfloat16 compute would be about (\S+) times as fast: --config.model.compute_dtype=", said)
    assert float(found[1]) == pytest.approx(gain, rel=0.05) and "times as fast" not in of_fast
    numbers = slow.to_dict()
    assert numbers["mfu"] == pytest.approx(fast.to_dict()["mfu"] / gain), "both of the bfloat16 peak, as in a run"
    assert (numbers["flops"]["peak"], numbers["flops"]["compute_peak"]) == (where.chip.peak, pytest.approx(peak * 1e12))


def test_counted_products_take_the_time_of_their_own_precision(llama):
    """A router's in float32 under bfloat16 compute: as much time as it takes, no more."""
    layout, where = lay_out(config_8b(llama), 16), parse_topology("v5e:4x4")
    counted = {"products": 9e15, "attention": 1e15, "exact": 0.0}
    plain, routed = (estimate(layout, where, 0.0, counted=counted | {"exact": exact}) for exact in (0.0, 1e14))
    assert plain.bfloat16_gain == 1 and plain.hardware_flops == routed.hardware_flops == 1e16
    assert routed.compute / plain.compute == pytest.approx(0.99 + 0.01 * 6)


def test_candidates_keep_the_global_batch(llama):
    found = list(candidates(config_8b(llama), parse_topology("v5e:4x4")))
    assert {c.train.batch_size for c in found} == {16}
    assert {c.train.remat for c in found} == {"none", "dots", "full"}
    shapes = {(c.mesh.data, c.mesh.fsdp, c.mesh.tensor) for c in found}
    assert (1, 16, 1) in shapes
    assert (2, 4, 2) in shapes
    assert all(math.prod(shape) == 16 for shape in shapes)


@pytest.mark.parametrize("loss, cuts", [
    ({}, {1, 2, 4, 8, 16, 32}), ({"loss__weighting": "microbatch_mean"}, {2}), ({"loss__router_aux": 0.1}, {2}),
])  # fmt: skip
def test_candidates_keep_micro_batches_where_the_objective_depends_on_them(llama, loss, cuts):
    config = config_8b(llama, train__batch_size=64, train__accumulation=2, **loss)
    assert {c.train.accumulation for c in candidates(config, parse_topology("v5e:4x4"))} == cuts


def test_candidates_keep_what_the_config_says_of_context_and_try_both_uses_of_slices(llama):
    where = parse_topology("2*v5e:4x4")
    found = list(candidates(config_8b(llama, train__batch_size=32, mesh__context=2), where))
    assert {(c.mesh.dcn_data, c.mesh.dcn_fsdp) for c in found} == {(2, 1), (1, 2)}
    assert {c.mesh.context for c in found} == {2}
    assert {c.mesh.data * c.mesh.fsdp * c.mesh.tensor for c in found} == {8}
    shared = next(c for c in found if c.mesh.dcn_fsdp == 2)
    assert "--config.mesh.dcn_fsdp=2" in overrides(shared) and "--config.mesh.context=2" in overrides(shared)
    assert "--config.mesh.dcn_data=1" in overrides(shared)  # the config may say 2
    with pytest.raises(InputError, match=r"mesh\.context=3 does not divide the 16 devices of a slice"):
        list(candidates(config_8b(llama, mesh__context=3), where))


@pytest.fixture
def experts(tmp_path):
    """The config.json of Qwen3-30B-A3B: 128 experts a layer, 8 a token."""
    folder = tmp_path / "experts"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False, "head_dim": 128,
        "hidden_act": "silu", "max_position_embeddings": 40960, "num_attention_heads": 32, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000, "vocab_size": 151936, "decoder_sparse_step": 1,
        "hidden_size": 2048, "intermediate_size": 6144, "mlp_only_layers": [], "moe_intermediate_size": 768,
        "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
        "tie_word_embeddings": False,
    }))  # fmt: skip
    return folder


def test_devices_that_share_experts_repeat_all_else(experts):
    layouts = {n: lay_out(config_8b(experts, mesh__fsdp=16 // n, mesh__expert=n), 16) for n in (1, 4)}
    per_token = 48 * 3 * 2048 * 8 * 768  # what a token's experts hold
    assert flops.expert_parameters(layouts[1].model.config) == per_token
    shared = 2 * per_token * 16 * 4096 * (3 + 1)  # forward, backward and once again: train.remat=full
    one, four = hardware_flops(layouts[1]), hardware_flops(layouts[4])
    assert four == pytest.approx(4 * one - 3 * shared)
    gathered = [formula_traffic(layout)["gather weights"] for layout in layouts.values()]
    assert gathered[1] < 0.4 * gathered[0]


def test_search_divides_the_experts_of_a_model_that_has_them(experts, llama, tmp_path):
    where = parse_topology("v5e:8x8")
    found = [c.mesh for c in candidates(config_8b(experts, train__batch_size=64), where, experts=128)]
    assert {mesh.expert for mesh in found} == {1, 2, 4, 8, 16, 32}
    assert all(mesh.data * mesh.fsdp * mesh.tensor * mesh.expert == 64 for mesh in found)
    assert {c.mesh.expert for c in candidates(config_8b(llama, train__batch_size=64), where)} == {1}
    out = tmp_path / "plan.json"
    assert main(["plan", "--config", "sft", f"--config.model.path={experts}", "--config.model.compute_dtype=bfloat16",
                 "--config.data.max_length=4096", "--config.train.batch_size=64", "--config.train.max_steps=100",
                 "--topology", "v5e:8x8", "--formula", "--search", "--json", str(out)]) == 0  # fmt: skip
    assert json.loads(out.read_text())["candidates"] > 200  # without the expert axis there are fewer


def test_search_leaves_out_what_the_compiler_dies_of(llama, monkeypatch):
    def apart(config, where, facts, table, seconds):
        assert 500 < seconds <= 570
        tried.append(config)
        found = outcome.get(len(tried), outcome[0])
        if isinstance(found, Exception):
            raise found
        return formula_report(config, where, facts, table)

    monkeypatch.setattr("itune.plan.search.compiled_apart", apart)
    config, where = config_8b(llama, train__batch_size=64), parse_topology("v6e:2x4")
    died = RunError("v6e:2x4: the compiler ended its process by SIGABRT, saying: Check failed")
    tried, said, outcome = [], [], {0: died, 3: None, 4: InputError("a width that does not divide")}
    found = search(config, where, known(config), {}, True, said.append)
    assert (len(tried), len(found["tried"]), found["runner_up"]) == (5, 1, None)
    assert found["best"]["settings"]["remat"] == tried[2].train.remat
    assert sum("left out; v6e:2x4: the compiler ended" in line for line in said) == 3
    tried, outcome = [], {0: died}
    with pytest.raises(RunError, match="took none of the best"):
        search(config, where, known(config), {}, True, said.append)
    tried, said, outcome = [], [], {0: OutOfTime("v6e:2x4: not compiled within 570 s"), 1: died}
    found = search(config, where, known(config), {}, True, said.append)
    assert (len(tried), len(found["tried"])) == (2, 4), "those that nobody compiled stay by formula"
    assert any("not compiled in what was left" in line for line in said)


def test_of_equally_fast_plans_the_one_that_exchanges_least_is_first(llama):
    where, reports = parse_topology("v5e:2x4"), []
    for mesh in ({"mesh__tensor": 4}, {}):
        config = config_8b(llama, lora__rank=16, model__param_dtype="bfloat16", mesh__fsdp=-1, **mesh)
        reports.append(formula_report(config, where, known(config), {}))
    exchanging, plain = reports
    assert exchanging.time.step == pytest.approx(plain.time.step, rel=0.02)
    assert exchanging.time.interconnect > 1.3 * plain.time.interconnect
    assert order(plain) < order(exchanging) and "more" in reason(plain, exchanging)


def test_search_by_formula_takes_the_fastest_that_fits(llama, tmp_path, capsys):
    out = tmp_path / "plan.json"
    arguments = ["plan", "--config", "sft", f"--config.model.path={llama}", "--config.model.compute_dtype=bfloat16",
                 "--config.data.max_length=4096", "--config.train.batch_size=64", "--config.train.max_steps=100",
                 "--topology", "v6e:2x4", "--search", "--formula", "--json", str(out)]  # fmt: skip
    assert main(arguments) == 0
    found = json.loads(out.read_text())
    best, second = found["best"], found["runner_up"]
    assert best["fits"]
    assert best["memory"]["total"] <= 31.25 * 2**30
    assert best["seconds"]["step"] <= second["seconds"]["step"]
    said = capsys.readouterr().out
    assert "runner-up: mesh " in said
    assert f"--config.train.remat={best['settings']['remat']}" in said
    # what it says to set gives the same plan
    again = [a for a in arguments if a != "--search"] + found["overrides"]
    assert main(again) == 0
    assert json.loads(out.read_text())["memory"] == best["memory"]


def test_what_does_not_fit_exits_1_and_says_by_how_much(llama, capsys):
    code = main(["plan", "--config", "sft", f"--config.model.path={llama}", "--topology", "v5e:2x2", "--formula",
                 "--config.train.max_steps=10"])  # fmt: skip
    assert code == 1
    assert "too large by" in capsys.readouterr().out


def test_prices_are_the_users(llama, tmp_path, capsys):
    table = tmp_path / "prices.toml"
    table.write_text("[v5e]\non_demand = 10.0\n")
    out = tmp_path / "plan.json"
    arguments = ["plan", "--config", "sft", f"--config.model.path={llama}", "--config.model.compute_dtype=bfloat16",
                 "--config.train.remat=full", "--topology", "v5e:4x4", "--formula", "--config.train.max_steps=360",
                 "--json", str(out)]  # fmt: skip
    assert main([*arguments, "--prices", str(table)]) == 0
    result = json.loads(out.read_text())
    assert result["dollars"] == pytest.approx(result["hours"] * 16 * 10)
    assert result["hours"] == pytest.approx(360 * result["seconds"]["step"] / 3600)
    table.write_text("[v5e]\nprice = 1\n")
    assert main([*arguments, "--prices", str(table)]) == 2
    assert "needs on_demand" in capsys.readouterr().err
    assert set(prices()) == set(CHIPS), "every chip has a price row, and every row a chip"
    assert all(row["noted"] for row in prices().values())


def test_short_steps_and_cheap_runs_are_no_zeros(base_folder, capsys):
    assert main(["plan", "--config", "sft", f"--config.model.path={base_folder}", "--topology", "v5e:2x2", "--formula",
                 "--config.train.max_steps=3"]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert re.search(r"estimated step [\d.e-]+ ms, bound by", said) and "less than $1 at" in said
    assert "0.00 s" not in said and "0.00 hours" not in said
    found = [spell(seconds) for seconds in (0.0, 0.0041, 0.75, 750.0, 11520.0)]
    assert found == ["0", "4.1 ms", "0.75 s", "12.5 minutes", "3.20 hours"]


def test_one_device_receives_nothing_and_that_is_said(base_folder, capsys):
    assert main(["plan", "--config", "sft", f"--config.model.path={base_folder}", "--topology", "gpu:h200:1",
                 "--formula", "--config.train.max_steps=3"]) == 0  # fmt: skip
    assert "bytes that one device receives a step, GB: none" in capsys.readouterr().out


def test_a_machine_of_unknown_speed_is_one_message(base_folder, capsys):
    """A CPU: without --topology there is nothing to estimate for."""
    assert main(["plan", "--config", "sft", f"--config.model.path={base_folder}", "--config.train.max_steps=3"]) == 2
    said = capsys.readouterr().err
    assert "speed of this machine's cpu is not known; expected --topology" in said and said.count("\n") == 1


def test_training_says_what_it_will_use(llama, monkeypatch):
    class Device:
        platform, device_kind = "gpu", "NVIDIA H100"

        def memory_stats(self):
            return {"bytes_limit": 10**10}

    mesh = make_mesh({"fsdp": 4}, jax.devices()[:4])
    config = config_8b(llama)
    model = load_model(llama, mesh, compute_dtype="bfloat16", remat="full")
    state = abstract_state(model, make_optimizer(config.optimizer, 1), mesh)
    monkeypatch.setattr(check, "resident_memory", lambda: 2 * 10**9)
    for memory, said in ((200, ""), (165, ": the run may not fit"), (90, ": the run will not fit")):
        monkeypatch.setattr(check, "machine_memory", lambda memory=memory: memory * 10**9)
        line = one_line(config, model, mesh, state)
        assert line.startswith(f"{'warning: ' if said else ''}plan: about 41.0 GB on each of 4 cpu devices (")
        assert f") beside 2.00 GB that the process holds; the machine has {memory:.1f} GB{said}" in line
        assert line.endswith("; see itune plan --search" if said else " GB")
    elsewhere = types.SimpleNamespace(shape=mesh.shape, size=4, devices=np.array([Device()] * 4))
    line = one_line(config, model, elsewhere, state)
    assert line.startswith("warning: plan: about 49.6 GB")  # 8.6 of them cuDNN's, for 32 segments a row
    assert "on each of 4 NVIDIA H100 devices (parameters 8.03 GB, optimizer 16.1 GB, gradients 8.03 GB" in line
    assert "it has 10.0 GB: the run will not fit" in line


def test_devices_of_a_slice_stay_together():
    class Device:
        def __init__(self, number, slice_index):
            self.id, self.slice_index = number, slice_index

        def __repr__(self):
            return f"{self.slice_index}.{self.id}"

    devices = [Device(n, n % 2) for n in range(8)]  # given in the wrong order
    mesh = make_mesh({"dcn_data": 2, "fsdp": 4}, devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "expert": 1, "context": 1, "tensor": 1}
    grid = mesh.devices.reshape(2, 4)
    assert [{d.slice_index for d in row} for row in grid] == [{0}, {1}]
    spanning = make_mesh({"dcn_fsdp": 2, "data": 2, "fsdp": 2}, devices).devices.reshape(2, 4)
    assert [[d.slice_index for d in row] for row in spanning] == [[0, 0, 1, 1]] * 2
    with pytest.raises(InputError, match="the devices lie in 2 slices; make it 2"):
        make_mesh({"dcn_data": 4, "fsdp": 2}, devices)
