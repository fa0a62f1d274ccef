"""A user's path: a Gemma 2 folder from transformers -> LoRA run by the command line -> peft and transformers agree."""

from __future__ import annotations

import dataclasses
import json
import random
import resource
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from load_script import load_script

from itune import weights
from itune.chat import load_speaker
from itune.checkpoint import Store
from itune.cli import main
from itune.config import from_dict
from itune.models.peft import write_adapter
from itune.saved_run import load_run
from itune.setup_run import make_tuning
from itune.types import InputError

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A Gemma 2 of two layers that transformers made, a tokenizer with a chat template, and 64 conversations."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("lora")
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        before = jax.config.jax_compilation_cache_dir
        maker = load_script("scripts/make_random_model.py")
        maker.choose_shape = lambda *given: (32, 1)
        maker.make("llama", 1_000_000, folder / "model", vocab=320)
        for name in ("config.json", "model.safetensors"):
            (folder / "model" / name).unlink()
        torch.manual_seed(0)
        config = transformers.Gemma2Config(
            vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=32, max_position_embeddings=128,
        )  # fmt: skip
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
        draw = random.Random(0)
        with (folder / "rows.jsonl").open("w") as rows:
            for number in range(64):
                last = draw.randint(2, 5)
                question, answer = f"Count to {last}, {number}", " ".join(map(str, range(last)))
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                rows.write(json.dumps({"messages": messages}) + "\n")
        yield folder
        jax.config.update("jax_compilation_cache_dir", before)


def arguments(inputs, workdir, steps, **more):
    keys = {
        "model.path": inputs / "model", "data.train": inputs / "rows.jsonl", "data.max_length": 64,
        "data.held_out_share": 0.1, "train.batch_size": 8, "train.max_steps": steps, "train.accumulation": 2,
        "train.remat": "full", "optimizer.learning_rate": 2e-2, "optimizer.schedule": "constant",
        "optimizer.warmup": 0, "lora.rank": 4, "lora.dropout": 0.1, "mesh.fsdp": 2, "mesh.data": 2, "mesh.tensor": 2,
        "log.tensorboard": False, **more,
    }  # fmt: skip
    return ["train", "--config", "sft", "--workdir", str(workdir), *(f"--config.{k}={v}" for k, v in keys.items())]


@pytest.fixture(scope="module")
def run(inputs):
    assert main(arguments(inputs, inputs / "run", 6)) == 0
    return inputs / "run"


def saved(workdir):
    from orbax.checkpoint import v1 as ocp

    store = Store(workdir / "checkpoints")
    return jax.tree_util.tree_leaves_with_path(ocp.load(store.path(store.latest()) / "arrays"))


def test_a_run_saves_adapters_only_and_goes_on_bit_by_bit(inputs, run, tmp_path):
    names = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in saved(run)}
    assert {name.split("/")[0] for name in names} == {"step", "trainable", "opt_state", "rng"}
    assert all(name.endswith(("/a", "/b")) for name in names if name.startswith("trainable"))
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert logged[-1]["loss"] < logged[0]["loss"]
    first, last = (json.loads((run / "eval" / step / "summary.json").read_text()) for step in ("0", "6"))
    assert last["heldout_loss"]["loss"] < first["heldout_loss"]["loss"] - 0.1
    assert main(arguments(inputs, tmp_path / "again", 3)) == 0
    assert main(arguments(inputs, tmp_path / "again", 6)) == 0
    for (path, x), (_, y) in zip(saved(run), saved(tmp_path / "again"), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def test_a_base_that_is_no_longer_the_same_is_refused(inputs, run, tmp_path):
    copy, model = (Path(shutil.copytree(inputs / name, tmp_path / name)) for name in ("run", "model"))
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace(str(inputs / "model"), str(model)))
    assert load_run(copy).step == 6
    held = bytearray((model / "model.safetensors").read_bytes())
    held[-2] ^= 1
    (model / "model.safetensors").write_bytes(held)
    with pytest.raises(InputError, match="model: its weights are not those that this run began with"):
        load_run(copy)


def test_peft_and_transformers_say_what_the_run_says(inputs, run, tmp_path):
    import peft

    from itune.decode import generate_ids

    assert main(["export", "--workdir", str(run), "--out", str(tmp_path / "adapter"), "--adapter"]) == 0
    numbers = tmp_path / "merged.json"
    assert main(["export", "--workdir", str(run), "--out", str(tmp_path / "merged"), "--json", str(numbers)]) == 0
    assert json.loads(numbers.read_text())["merge_logit_difference"] <= 1e-5
    base = transformers.AutoModelForCausalLM.from_pretrained(inputs / "model", attn_implementation="eager")
    plain = transformers.AutoModelForCausalLM.from_pretrained(inputs / "model", attn_implementation="eager")
    judges = [peft.PeftModel.from_pretrained(base, tmp_path / "adapter"),
              transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "adapter")
    speaker = load_speaker(str(run))
    changed = 0
    for question in ("Count to 3, 70", "Count to 5, 1", "What?"):
        chat = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        ours = generate_ids(speaker.model, speaker.params, [np.array(ids, np.int32)], max_new_tokens=12)[0].ids
        answers = []
        for judge in [*judges, plain]:
            with torch.no_grad():
                found = judge.generate(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(),
                                       max_new_tokens=12, do_sample=False, eos_token_id=None)  # fmt: skip
            answers.append(found[0, len(ids) :].tolist())
        assert answers[0] == answers[1] == ours.tolist()
        changed += answers[2] != answers[0]
    assert changed, "the adapter changes what the model says"


def test_a_disk_that_takes_no_adapter_is_one_line(run, tmp_path, capsys, monkeypatch):
    def limited(*given):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
        try:
            return write_adapter(*given)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr("itune.export.write_adapter", limited)
    assert main(["export", "--workdir", str(run), "--out", str(tmp_path / "adapter"), "--adapter"]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].endswith(f"{tmp_path / 'adapter'}: could not be written: [Errno 27] File too large"), said
    assert "Traceback" not in "".join(said) and not list(tmp_path.iterdir())


def test_the_adapter_of_peft_goes_on(inputs, run, tmp_path):
    assert main(["export", "--workdir", str(run), "--out", str(tmp_path / "adapter"), "--adapter"]) == 0
    loaded = load_run(run)
    assert loaded.tuning.lora.rank == 4 and set(loaded.params) > {"lora", "embed"}
    section = dataclasses.replace(loaded.config.lora, init_from=str(tmp_path / "adapter"))
    tuning = make_tuning(dataclasses.replace(loaded.config, lora=section), loaded.model)
    begun = tuning.divide(lambda: loaded.halves[1], seed=1)
    jax.tree.map(np.testing.assert_array_equal, begun[0], loaded.halves[0])
    assert begun[1] is loaded.halves[1]


def test_what_adapters_began_with_is_read_once_and_before_the_weights(inputs, run, tmp_path, capsys, monkeypatch):
    assert main(["export", "--workdir", str(run), "--out", str(tmp_path / "adapter"), "--adapter"]) == 0
    begun = {"lora.init_from": tmp_path / "adapter"}
    assert main(arguments(inputs, tmp_path / "run", 2, **begun)) == 0
    shutil.rmtree(tmp_path / "adapter")
    assert main(arguments(inputs, tmp_path / "run", 3, **begun)) == 0  # the checkpoint holds them
    assert main(["export", "--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    monkeypatch.setattr(weights, "load_pretrained", lambda *given, **more: pytest.fail("hours for a large model"))
    capsys.readouterr()
    assert main(arguments(inputs, tmp_path / "other", 2, **begun)) == 2
    assert f"lora.init_from: no folder {tmp_path / 'adapter'}; expected an adapter folder" in capsys.readouterr().err


def test_a_saved_run_is_judged_as_it_was_when_it_ended(inputs, run, tmp_path):
    last = json.loads((run / "eval" / "6" / "summary.json").read_text())["heldout_loss"]["loss"]
    again = ["eval", "--config", str(run / "config.json"), "--workdir", str(run), "--out", str(tmp_path / "e")]
    assert main(again) == 0
    judged = json.loads((tmp_path / "e" / "summary.json").read_text())["heldout_loss"]["loss"]
    assert abs(judged - last) < 1e-6


def test_a_run_without_adapters_has_none_to_export(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(from_dict({}).to_dict()))
    (tmp_path / "checkpoints").mkdir()
    assert main(["export", "--workdir", str(tmp_path), "--out", str(tmp_path / "out"), "--adapter"]) == 2
    assert "tuned without LoRA" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"lora": {"rank": 2}, "train": {"freeze": "embed"}}, "train.freeze and lora.rank exclude each other"),
        ({"lora": {"init_from": "adapter"}}, r"lora.init_from needs lora.rank"),
        ({"optimizer": {"stochastic_rounding": True}}, "stochastic_rounding is for bfloat16 weights"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(tree, message):
    with pytest.raises(InputError, match=message):
        make_tuning(from_dict(tree), None)
