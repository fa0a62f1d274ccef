"""The random model folder: loads in transformers, has the size its name says, and any text survives its tokenizer."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from load_script import load_script
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_random_model.py"
make_random_model = load_script("scripts/make_random_model.py")


@pytest.mark.parametrize("family", list(make_random_model.FAMILIES))
def test_transformers_loads_it(family, tmp_path):
    text = tmp_path / "rows.jsonl.gz"
    with gzip.open(text, "wt") as rows:
        for number in range(200):
            rows.write(json.dumps({"messages": [{"role": "user", "content": f"zebra crossing {number}"}]}) + "\n")
    out = tmp_path / "model"
    untied = ["--untied"] if family == "mistral" else []
    given = ["--family", family, "--size", "1m", "--text", str(text), "--out", str(out), *untied]
    assert make_random_model.main(given) == 0
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.model_type == family
    stored = load_file(out / "model.safetensors")
    assert model.num_parameters() == sum(tensor.size for tensor in stored.values())
    assert abs(model.num_parameters() / 1e6 - 1) < 0.15
    std = stored["model.layers.0.self_attn.o_proj.weight"].std()
    assert abs(std - 0.02) < 0.001
    assert ("lm_head.weight" in stored) == bool(untied)

    tokenizer = AutoTokenizer.from_pretrained(out)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "zebra  crossing, déjà vu\n"}], tokenize=False)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text == "<|im_start|>user\nzebra  crossing, déjà vu\n<|im_end|>\n"
    assert len(tokenizer) <= model.config.vocab_size
    assert len(tokenizer.tokenize("zebra")) == 1, "the text was not read"


@pytest.mark.parametrize("size", ["1m", "5m", "15m", "40m", "135m", "0.5b", "1b", "8b"])
def test_size_is_what_the_name_says(size):
    wanted = make_random_model.parse_size(size)
    for family in make_random_model.FAMILIES:
        for tied in (True, False):
            vocab = make_random_model.default_vocab(wanted)
            width, layers = make_random_model.choose_shape(family, wanted, vocab, tied)
            found = make_random_model.count(make_random_model.shapes(family, width, layers, vocab, tied))
            assert abs(found / wanted - 1) < 0.15, (family, tied, width, layers)


def test_seed_decides_the_weights(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_random_model.make("llama", 1_000_000, tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_large_models_are_sharded_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(make_random_model, "SHARD_BYTES", 1_000_000)
    made = make_random_model.make("qwen3", 1_000_000, tmp_path, vocab=512, dtype="bfloat16")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * made
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.num_parameters() == made
    assert model.config.vocab_size == 512


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--size", "tiny"], "'tiny' is not a size"),
        (["--text", "absent.txt"], "no file absent.txt"),
        (["--text", "broken.jsonl"], "broken.jsonl:2: not a JSON row"),
        (["--vocab", "100"], "259"),
    ],
)
def test_bad_usage_exits_2(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(SystemExit) as raised:
        make_random_model.main(["--out", str(tmp_path / "out"), *arguments])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err
