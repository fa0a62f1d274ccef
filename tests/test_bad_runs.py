"""What a run refuses before its first step, and what it cannot have: one message each."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_run import command, settings

from itune.cli import main
from itune.loop import train
from itune.runtime.crash import shown_to
from itune.setup_run import make_plan, prepare_data
from itune.types import InputError, RunError
from itune.weights import base_weights

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize(("arguments", "code", "message"), [
    (["--config.train.batch_size=6"], 2, r"train\.batch_size: 6 rows .* multiple of 8; nearest: 8"),
    (["--config.mesh.tensor=3"], 2, "does not fit 8 devices"),
    (["--config.model.path="], 2, "model.path is empty"),
    (["--config.data.train="], 2, "data.train is empty"),
    (["--config.data.held_out_share=0"], 2, "there are no held-out items"),
    (["--config.evaluators=('heldout_los',)"], 2, "did you mean heldout_loss"),
    (["--config.profile.steps=3"], 2, "profile.steps must be first:last such as 10:13, found '3'"),
    (["--config.lora.rank=4", "--config.lora.targets=lm_head"], 2, "lora.targets 'lm_head' matches no projection"),
    (["--config.lora.rank=4", "--config.train.freeze=embed"], 2, "train.freeze and lora.rank exclude each other"),
])
def test_bad_input_is_one_message_with_exit_code_2(tiny_folder, tmp_path, capsys, arguments, code, message):
    assert main(command(tiny_folder, tmp_path / "run", *arguments)) == code
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.startswith("itune: ") and "Traceback" not in error
    assert not (tmp_path / "run" / "crash.json").exists()


def test_tokenizer_larger_than_the_embedding(tiny_folder, tmp_path, capsys):
    model = Path(shutil.copytree(tiny_folder / "model", tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 256}))
    assert main(command(tiny_folder, tmp_path / "run", f"--config.model.path={model}")) == 2
    assert ", the embedding has 256 rows" in capsys.readouterr().err


def test_out_of_disk_is_said_before_weights_are_read(tiny_folder, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert main(command(tiny_folder, tmp_path / "run")) == 1
    assert "out of disk: a checkpoint needs" in capsys.readouterr().err


def test_workdir_that_is_a_file(tiny_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(command(tiny_folder, tmp_path / "file" / "run")) == 2
    assert "cannot be created: Not a directory" in capsys.readouterr().err


def test_template_that_adds_tokens_grows_the_embedding_and_says_so(tiny_folder, tmp_path):
    model = Path(shutil.copytree(tiny_folder / "model", tmp_path / "model"))
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "chat_template": None}))
    with pytest.raises(InputError, match="no chat template"):
        train(settings(tiny_folder, **{"model.path": str(model)}), tmp_path / "run")
    config = settings(tiny_folder, **{"model.path": str(model), "data.chat_template": "zephyr"})
    lines = []
    data = prepare_data(config, lines.append)
    plan = make_plan(config, data, lines.append)
    with shown_to(lines.append):
        embedding = base_weights(plan.config, plan.model, data.tokenizer, lines.append)["embed"]["embedding"]
    assert embedding.shape[0] == plan.model.config.vocab_size == 323
    np.testing.assert_allclose(embedding[320:], np.tile(embedding[:320].mean(0), (3, 1)), atol=1e-7)
    assert any("3 rows added to the 320 of the checkpoint" in line for line in lines)


def test_out_of_device_memory_says_what_helps(tiny_folder, tmp_path, monkeypatch):
    def full(*given, **more):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes")

    monkeypatch.setattr("itune.weights.init_state", full)
    with pytest.raises(RunError, match=r"out of device memory: raise train\.accumulation .*trying to allocate 9 bytes"):
        train(settings(tiny_folder), tmp_path / "run")
