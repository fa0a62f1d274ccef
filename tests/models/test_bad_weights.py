"""Each tensor of each family missing, extra, reshaped, recast or not a number: one message that lists all of them.

A square tensor that lies transposed has the shape, dtype and statistics of a right one: no loader can tell, and ours
does not claim to. What tells is the proof of an export, which has every tensor's hash and compares logits
(tests/scripts/test_check_with_transformers.py).
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from itune.models import Model, load_pretrained, save_pretrained
from itune.models.families import FAMILIES
from itune.models.families.common import Fields
from itune.models.hf.plan import make_plan
from itune.models.load import load_model
from itune.types import InputError

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def script():
    file = Path(__file__).parents[2] / "scripts" / "check_families.py"
    spec = importlib.util.spec_from_file_location("check_families", file)
    assert spec and spec.loader
    sys.modules["check_families"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["check_families"]


@pytest.fixture(scope="module", params=list(FAMILIES))
def checkpoint(request, script, tmp_path_factory):
    """(folder, its tensors) of an untied model of the family with random weights."""
    family = request.param
    fields, _ = script.draw(family, 1)
    hf = getattr(transformers, f"{script.CLASSES[family]}Config")(**fields | {"tie_word_embeddings": False}).to_dict()
    model = Model(FAMILIES[family].config_from_hf(Fields(hf, "drawn")), family)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), model.abstract_params())
    folder = tmp_path_factory.mktemp(family) / "model"
    save_pretrained(folder, model, params)
    return folder, load_file(folder / "model.safetensors")


@pytest.fixture
def write(checkpoint, tmp_path):
    """write(tensors, config keys ...) -> the folder with these in place of its own."""
    source, _ = checkpoint

    def make(tensors: dict[str, Any], **keys: Any) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | keys))
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path

    return make


def refusal(folder: Path) -> list[str]:
    """The problems that the one message lists."""
    with pytest.raises(InputError) as error:
        model = load_model(folder)
        make_plan(folder, model, model.config.vocab_size)
    head, *lines = str(error.value).splitlines()
    assert str(folder) in head and f" {len(lines)} problems" in head
    return [line.strip() for line in lines]


def mutations(name: str, tensor: np.ndarray) -> dict[str, tuple[dict[str, np.ndarray], str]]:
    """What happens to a tensor -> (what stands in the file instead, the line that says so)."""
    shape, dtype = list(tensor.shape), "F32"
    longer = np.concatenate([tensor, tensor[:1]])
    return {
        "missing": ({}, f"missing: {name} {shape}"),
        "renamed": ({name + "_old": tensor}, f"missing: {name} {shape}"),
        "reshaped": ({name: longer}, f"shape: {name} is {list(longer.shape)}, expected {shape}"),
        "flat": ({name: tensor.reshape(-1, 1)}, f"shape: {name} is {[tensor.size, 1]}, expected {shape}"),
        "recast": ({name: tensor.astype(np.int8)}, f"dtype: {name} is I8, expected one of F32, BF16, F16"),
        "wide": ({name: tensor.astype(np.float64)}, f"dtype: {name} is F64, expected one of {dtype}, BF16, F16"),
    }


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["one kind", "all kinds"])
def test_each_tensor_in_turn(checkpoint, write, every):
    """With one kind of damage each, in turn; in soak with every kind."""
    _, tensors = checkpoint
    for i, (name, tensor) in enumerate(tensors.items()):
        rest = {other: value for other, value in tensors.items() if other != name}
        all_kinds = list(mutations(name, tensor).items())
        for kind, (instead, line) in all_kinds if every else [all_kinds[i % len(all_kinds)]]:
            lines = refusal(write(rest | instead))
            extra = [f"extra: {name}_old {list(tensor.shape)} F32"] if kind == "renamed" else []
            assert lines == [line, *extra], (name, kind)


def test_all_tensors_at_once_are_one_message(checkpoint, write):
    _, tensors = checkpoint
    kinds = ("missing", "reshaped", "recast", "renamed")
    wrong: dict[str, np.ndarray] = {}
    expected: list[str] = []
    for i, (name, tensor) in enumerate(tensors.items()):
        instead, line = mutations(name, tensor)[kinds[i % 4]]
        wrong |= instead
        expected += [line, *(f"extra: {new} {list(tensor.shape)} F32" for new in instead if new != name)]
    assert sorted(refusal(write(wrong))) == sorted(expected)


def test_numbers_that_are_none(checkpoint, write):
    """Every tensor once, in turn NaN and an infinity, in three files: each is named, and no other."""
    _, tensors = checkpoint
    kinds = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]
    for third in range(3):
        bad = {name: tensor.astype(kinds[third]) for name, tensor in tensors.items()}
        chosen = sorted(bad)[third::3]
        for i, name in enumerate(chosen):
            bad[name].reshape(-1)[-1 - i % bad[name].size] = (np.nan, np.inf, -np.inf)[i % 3]
        with pytest.raises(InputError, match=f"{len(chosen)} tensors hold NaN or infinity") as error:
            load_pretrained(write(bad))
        assert str(error.value).splitlines()[1:] == [f"  {name}" for name in chosen]


def test_tied_both_ways_and_vocabulary(checkpoint, write):
    _, tensors = checkpoint
    vocab = len(tensors[EMBED])
    headless = {name: tensor for name, tensor in tensors.items() if name != HEAD}
    shape = list(tensors[HEAD].shape)
    assert refusal(write(headless, tie_word_embeddings=False)) == [f"missing: {HEAD} {shape}"]
    (line,) = refusal(write(tensors, tie_word_embeddings=True))
    assert line.startswith(f"tied: config.json has tie_word_embeddings true, but {HEAD} differs from {EMBED}")
    for tied in (headless, headless | {HEAD: tensors[EMBED].copy()}):
        folder = write(tied, tie_word_embeddings=True)
        make_plan(folder, load_model(folder), vocab)
    for size in (vocab - 1, vocab + 3):
        wanted = [size, shape[1]]
        lines = refusal(write(tensors, vocab_size=size))
        assert sorted(lines) == [f"shape: {name} is {shape}, expected {wanted}" for name in (HEAD, EMBED)]
