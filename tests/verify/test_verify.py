"""`itune verify`: the loss contract on tiny models of four families; a fault is found, told, and ends with code 1."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from itune import cli
from itune.models.attention import context
from itune.types import InputError, RunError
from itune.verify import CASES, verify
from itune.verify.bench import Bench
from itune.verify.small import STEPS, make_small, one_example_a_row
from itune.verify.table import BOUNDS, Numbers, Row, by_tensor, compare, relative, timed

# which cases a family takes in the default run; each costs a compilation. -m soak runs them all for each
SHARE = {
    "llama": ["resumed", "exported"],
    "qwen3": ["unrolled"],
    "gemma2": ["context"],
    "qwen3_moe": ["expert"],
}


@pytest.mark.parametrize("family", SHARE)
def test_pairs_agree(family_config, tmp_path, family):
    result = verify(family_config(family), tmp_path / "runs", only=SHARE[family])
    assert [row["passed"] for row in result["rows"]] == [True] * len(SHARE[family]), result["rows"]
    assert result["passed"] and result["settings"]["devices"] == 8
    for row in result["rows"]:
        exact = row["name"].startswith(("resumed", "exported"))
        assert row["bounds"] == (dict.fromkeys(BOUNDS, 0.0) if exact else BOUNDS)
        if not exact and row["parameters"] is not None:
            assert row["parameters"] > 0, "two different programs gave the same bits: were both run?"


@pytest.mark.soak
@pytest.mark.parametrize("family", SHARE)
def test_the_whole_matrix(family_config, tmp_path, family):
    print(f"\n{family}")
    result = verify(family_config(family), tmp_path / "runs")
    impossible = [row for row in result["rows"] if row["passed"] is None]
    assert result["passed"], [row for row in result["rows"] if row["passed"] is False]
    assert len(result["rows"]) == len(CASES)
    wanted = [] if family == "qwen3_moe" else ["the model has no experts"]
    assert [row["reason"] for row in impossible] == wanted


def test_attention_across_examples_is_found(family_config, tmp_path, monkeypatch, capsys):
    """With the segments ignored, packed rows lose something else than rows of one example, far beyond the bound."""
    plain = context.xla.attention

    def careless(*arrays, q_segments_BL, kv_segments_BS, **options):
        segments = [jnp.minimum(segments, 1) for segments in (q_segments_BL, kv_segments_BS)]
        return plain(*arrays, q_segments_BL=segments[0], kv_segments_BS=segments[1], **options)

    monkeypatch.setattr(context.xla, "attention", careless)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(family_config("qwen3").to_dict()))
    words = ["verify", "--config", str(config), "--only", "packing", "--json", str(tmp_path / "found.json")]
    assert cli.main(words) == 1
    (row,) = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert row["passed"] is False and row["loss"] > 1e-4
    out = capsys.readouterr().out
    assert "DIFFER" in out and "0 agree, 1 differ, 0 not possible" in out


def test_layer_paths_choose_the_same_of_unrolled_layers(family_config):
    """Patterns over paths are about the stacked layers; unrolled ones have other paths."""
    config = family_config("qwen3", **{
        "optimizer.rates": {"blocks/layer_0/mlp": 0.0, "norm": 2.0}, "train.freeze": "blocks/.*q_proj"})  # fmt: skip
    (row,) = verify(config, only=["unrolled"])["rows"]
    assert row["passed"], row


@pytest.mark.parametrize(("family", "setting"), [
    ("qwen3", {"loss.weighting": "microbatch_mean"}), ("qwen3_moe", {"loss.router_aux": 0.1}),
])  # fmt: skip
def test_an_objective_that_depends_on_micro_batches_is_not_compared(family_config, tmp_path, family, setting):
    small = make_small(family_config(family, **setting))
    with pytest.raises(InputError, match=r"loss\..* depends on train\.accumulation by definition"):
        CASES["micro-batches"].run(Bench(small.config, small.data, tmp_path))


def test_small_keeps_what_decides_and_says_what_it_changed(family_config):
    config = family_config(
        "gemma2", **{"model.compute_dtype": "bfloat16", "data.max_length": 2048, "loss.weighting": "example",
                     "optimizer.clip_norm": 0.5, "train.remat": "full", "data.overlong": "truncate"},
    )  # fmt: skip
    small = make_small(config)
    assert small.config.model.compute_dtype == "float32" and small.config.data.max_length == 256
    assert small.config.loss.weighting == "example" and small.config.optimizer.clip_norm == 0.5
    assert small.config.data.chat_template == "chatml" and small.config.train.max_steps == STEPS
    assert [note.split(";")[0] for note in small.notes] == [
        "model.compute_dtype is bfloat16", "rows of 256 tokens, not 2048: longer examples are left out here",
    ]  # fmt: skip


def test_one_example_a_row_holds_the_same_examples(family_config):
    loader = make_small(family_config("qwen3")).data.loader
    batches = [loader.batch(step) for step in range(2)]
    for packed, alone in zip(batches, one_example_a_row(batches, 8), strict=True):
        assert alone.tokens_BL.shape[0] % 8 == 0 and set(np.unique(alone.segment_ids_BL)) == {0, 1}
        assert (alone.positions_BL[:, 0] == 0).all()
        for name in ("tokens_BL", "targets_BL", "loss_weights_BL", "positions_BL"):
            a, b = getattr(packed, name), getattr(alone, name)
            np.testing.assert_array_equal(a[packed.segment_ids_BL > 0], b[alone.segment_ids_BL > 0])
        assert (packed.segment_ids_BL > 1).any(), "nothing was packed"


def test_what_counts_as_agreement():
    ones = np.ones(3)
    numbers = Numbers(ones, ones, {"a": np.ones(4), "b": np.zeros(2)})
    assert compare(numbers, numbers) == dict.fromkeys(BOUNDS, 0.0)
    assert relative(np.array([1.0, 2.0]), np.array([1.0, 1.0])) == 1
    assert relative(np.array([0.0]), np.array([0.0])) == 0 and relative(np.array([1.0]), np.array([0.0])) == np.inf
    assert by_tensor({"a": np.array([3.0, 4.5])}, {"a": np.array([3.0, 4.0])}) == {"a": 0.1}
    with pytest.raises(ValueError, match="other parameters: \\['b'\\]"):
        compare(Numbers(ones, ones, {"a": ones}), numbers)
    assert Row("", {"loss": 1e-6}).passed and not Row("", {"loss": 1.1e-6}).passed
    assert Row("", {"loss": float("nan")}).passed is False
    assert Row("", reason="why").passed is None and "not possible: why" in Row("", reason="why").line()


@pytest.mark.parametrize(("error", "passed", "said"), [
    (InputError("mesh: no"), None, "not possible: mesh: no"), (RunError("it\n died"), False, "FAILED: it died"),
])  # fmt: skip
def test_a_row_that_cannot_run_says_why(error, passed, said):
    def run():
        raise error

    row = timed("pair", run)
    assert row.passed is passed and said in row.line()


def test_bad_input_is_one_line(family_config, tmp_path, capsys):
    with pytest.raises(InputError, match="verify: no case 'mesh'; cases are micro-batches, packing, data"):
        verify(family_config("qwen3"), only=["mesh"])
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(InputError, match="is not empty; name a new folder"):
        verify(family_config("qwen3"), tmp_path)
    assert cli.main(["verify", "--config", "default"]) == 2
    assert "model.path is empty" in capsys.readouterr().err
