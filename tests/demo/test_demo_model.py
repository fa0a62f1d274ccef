"""The shipped base model is what its script made: hashes, size, a tokenizer that loses nothing, no chat training."""

from __future__ import annotations

import hashlib
import json

import jax
import pytest
from load_script import load_script
from tokenizers import Tokenizer

from itune.demo import ASSETS, SEED, tasks, text

BASE = ASSETS / "base"
RECORD = json.loads((ASSETS / "base.json").read_text())


@pytest.fixture(scope="module")
def script():
    return load_script("scripts/make_demo_model.py")


def test_files_are_those_recorded_and_small():
    files = sorted(BASE.iterdir())
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files} == RECORD["sha256"]
    assert sum(path.stat().st_size for path in files) <= 4_000_000


def test_the_script_makes_this_tokenizer(script):
    assert script.make_tokenizer().to_str(pretty=True) == (BASE / "tokenizer.json").read_text()


def test_tokenizer_loses_nothing():
    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    rows = tasks.held_out_rows(SEED) + tasks.train_rows(SEED, 500, 200, 1)
    texts = [message["content"] for row in rows for message in row["messages"]] + text.documents(SEED, 500)
    texts.append("<|im_start|>user\nTake [river, moon]: list?<|im_end|>\n<|im_start|>assistant\n1 river.<|im_end|>\n")
    for line in texts:
        assert tokenizer.token_to_id("<unk>") not in tokenizer.encode(line).ids
        assert tokenizer.decode(tokenizer.encode(line).ids, skip_special_tokens=False) == line


def test_transformers_loads_it_and_it_is_a_base_model():
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(BASE, output_loading_info=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    assert not any(info.values())
    assert tokenizer.chat_template is None
    assert model.num_parameters() == RECORD["parameters"]
    facts = ["Ada lives in", "Ada keeps a", "the music of Ada is the"]  # it has read, and continues what it has read
    from itune.demo.world import people_facts

    for line, name in zip(facts, ("home", "pet", "music"), strict=True):
        ids = torch.tensor([tokenizer(line)["input_ids"]])
        with torch.no_grad():
            best = int(model(ids).logits[0, -1].argmax())
        assert tokenizer.decode([best]) == people_facts(SEED)["Ada", name]


def test_the_script_writes_these_files(script, tmp_path):
    """All but the weights, which take minutes: see the soak test."""
    tokenizer = script.make_tokenizer()
    model = script.make_model(tokenizer.get_vocab_size(), script.make_mesh({"fsdp": 1}, jax.devices()[:1]))
    hashes = script.write(tmp_path / "base", tokenizer, model, model.init(jax.random.key(0)))
    assert {name for name in RECORD["sha256"] if hashes[name] != RECORD["sha256"][name]} == {"model.safetensors"}


@pytest.mark.parametrize(
    "changed, loss, code, said",
    [
        ([], 0.64, 0, "bit for bit"),
        (["model.safetensors"], 0.645, 0, "rounded differently"),
        (["model.safetensors"], 0.70, 1, "another model"),
        (["tokenizer.json"], 0.64, 1, "another model"),
    ],
)
def test_the_comparison_can_fail(script, capsys, changed, loss, code, said):
    recorded = {"sha256": {"model.safetensors": "a", "tokenizer.json": "b"}, "loss": 0.64, "jax": "0.10.2"}
    assert script.compare(recorded["sha256"] | dict.fromkeys(changed, "c"), loss, recorded) == code
    assert said in capsys.readouterr().out


@pytest.mark.soak
def test_the_script_makes_this_model(script, capsys):
    assert script.main(["--check"]) == 0, capsys.readouterr().out
