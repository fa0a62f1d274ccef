"""The second opinion on an export: it agrees with what is right, and says what is not."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from itune.data.templates import load_tokenizer
from itune.export import check as export_check
from itune.export import export_pretrained
from itune.models import load_pretrained
from itune.types import InputError, RunError


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("check", export_check.script_of("transformers"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tuned(base_folder):
    tokenizer = load_tokenizer(str(base_folder), "chatml")
    return *load_pretrained(base_folder, vocab_size=tokenizer.vocab_size), base_folder, tokenizer


@pytest.fixture(scope="module")
def exported(tuned, tmp_path_factory):
    """An export that a process of its own has checked."""
    out = tmp_path_factory.mktemp("checked") / "out"
    return out, export_pretrained(out, *tuned, check="transformers")


def test_an_export_is_checked_in_a_process_of_its_own(exported):
    out, report = exported
    found = report.checks["transformers"]
    assert found["max_abs_logit_difference"] <= 1e-4 < 0.5 < found["largest_logit"]
    assert found["tokens"] > 4 * 64 and set(found["stop_ids"]) == set(report.tokenizer["stop_ids"])
    record = json.loads((out / "itune_proof.json").read_text())
    assert record["checks"] == report.checks


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit(folder: Path, file: str, **keys) -> None:
    value = json.loads((folder / file).read_text()) | keys
    (folder / file).write_text(json.dumps(value))


def transpose(tensors) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"  # (16, 16): no shape tells
    assert tensors[name].shape[0] == tensors[name].shape[1]
    tensors[name] = tensors[name].T.contiguous()


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda f: rewrite(f, transpose), "model.layers.1.self_attn.k_proj.weight: other bytes"),
        (lambda f: edit(f, "config.json", rms_norm_eps=0.1), "config.json: other bytes"),
        (lambda f: (f / "generation_config.json").write_text('{"eos_token_id": 3}'), "generation_config.json: other"),
    ],
    ids=["transposed square", "config", "generation"],
)
def test_a_folder_that_changed_after_its_proof(script, exported, tmp_path, break_it, words):
    folder = Path(shutil.copytree(exported[0], tmp_path / "changed"))
    break_it(folder)
    _, wrong = script.compare(str(folder))
    assert [line for line in wrong if words in line], wrong


def test_what_the_two_disagree_on(script, exported, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(exported[0], tmp_path / "other"))
    (folder / "itune_proof.json").unlink()
    ours = script.ours

    def otherwise(folder):
        rows, logits, stops = ours(folder)
        return rows, [logits[0] + np.float32(1e-3), *logits[1:]], [*stops, 5]

    rewrite(folder, lambda tensors: tensors.update({"model.layers.9.input_layernorm.weight": torch.ones(16)}))
    monkeypatch.setattr(script, "ours", lambda _: otherwise(str(exported[0])))
    numbers, wrong = script.compare(str(folder))
    assert numbers["max_abs_logit_difference"] == pytest.approx(1e-3, rel=0.1)
    told = "\n".join(wrong)
    assert "unexpected_keys: model.layers.9.input_layernorm.weight" in told and "logits differ by 0.001" in told
    assert "generation stops at" in told and "expected all of" in told


def test_an_export_that_the_check_refuses_is_not_there(tuned, tmp_path, monkeypatch):
    refusing = tmp_path / "check.py"
    refusing.write_text("import sys; print('logits differ by 3', file=sys.stderr); sys.exit(1)")
    monkeypatch.setattr(export_check, "script_of", lambda name: refusing)
    with pytest.raises(RunError, match=r"transformers does not agree \(exit code 1\): logits differ by 3"):
        export_pretrained(tmp_path / "out", *tuned, check="transformers")
    assert [path.name for path in tmp_path.iterdir()] == ["check.py"]


def test_a_script_that_is_not_there():
    with pytest.raises(InputError, match=r"check_with_other\.py is neither in the package nor beside it"):
        export_check.script_of("other")
