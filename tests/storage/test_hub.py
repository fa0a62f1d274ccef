"""A hub id, over HTTP with the hub's own client: what is read is downloaded, once, and no weights to plan with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from hub_server import COMMIT, hub_server

from itune.storage.hub import is_read

# beside a model: Mistral's and gpt-oss' second copies of the weights, ONNX', pickles, code and pictures
BESIDE = [
    "consolidated.safetensors", "original/model--00001-of-00002.safetensors", "original/config.json", "metal/model.bin",
    "onnx/tokenizer.json", "pytorch_model.bin", "modeling_x.py", "README.md", "a/b.png",
]  # fmt: skip


@pytest.fixture
def hub(base_folder, tmp_path):
    model = tmp_path / "hub" / "org" / "base"
    shutil.copytree(base_folder, model)
    for name in BESIDE:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(b"not to be fetched")
    with hub_server(tmp_path / "hub", tmp_path / "cache") as found:
        yield found


def run(env, code):
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def test_a_model_is_downloaded_without_second_copies_of_its_weights(hub, base_folder):
    env, given, _ = hub
    digest = ("import hashlib, numpy as np, jax, itune.models as m; _, p = m.load_pretrained({!r}); "
              "print(hashlib.sha256(b''.join(np.asarray(x).tobytes() for x in jax.tree.leaves(p))).hexdigest())")
    assert run(env, digest.format("org/base")) == run(env, digest.format(str(base_folder)))
    assert sorted(given) == sorted(path.name for path in base_folder.iterdir() if is_read(path.name))


def test_a_revision_is_resolved_once_for_weights_and_tokenizer(hub):
    env, _, revisions = hub
    code = ("from itune.data.templates import load_tokenizer; import itune.models as m; "
            "load_tokenizer('org/base', 'chatml', 'v2'); m.load_pretrained('org/base', revision='v2'); "
            "m.load_pretrained('org/base', revision='v2')")
    run(env, code)
    assert revisions == ["v2", COMMIT]


def test_to_plan_and_to_prepare_data_no_weights_are_downloaded_and_each_file_once(hub, base_folder):
    env, given, _ = hub
    code = ("from itune.data.templates import load_tokenizer; from itune.models import load_model; "
            "t = load_tokenizer('org/base', 'chatml'); print(load_model('org/base').config.vocab_size, t.stop_ids)")
    there = code.replace("org/base", str(base_folder))
    assert run(env, code) == run(env, there)
    assert sorted(given) == sorted(path.name for path in base_folder.iterdir() if is_read(path.name, weights=False))
    assert not any(name.endswith(".safetensors") for name in given)


def test_the_cache_is_enough_where_the_hub_cannot_be_reached(hub):
    env, given, _ = hub
    code = "from itune.data.templates import load_tokenizer; print(load_tokenizer('org/base', 'chatml').fingerprint)"
    first, downloads = run(env, code), len(given)
    gone = {**env, "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert run(gone, code) == first and len(given) == downloads


def test_an_adapter_is_found_by_its_id(hub, tmp_path):
    env, given, _ = hub
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "optimizer.pt"):
        (tmp_path / "hub" / "org" / "adapter").mkdir(exist_ok=True)
        (tmp_path / "hub" / "org" / "adapter" / name).write_text(name)
    code = ("import os; from itune.storage.fetch import model_folder; from itune.types import InputError\n"
            "print(sorted(os.listdir(model_folder('org/adapter', key='lora.init_from'))))\n"
            "try: model_folder('org/adaptor', key='lora.init_from')\n"
            "except InputError as error: print(str(error)[:55])")  # fmt: skip
    assert run(env, code) == "lora.init_from: no folder org/adaptor here, and org/ada"
    assert sorted(given) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("missing", ["org/not-here", "base"])
def test_an_id_that_the_hub_lacks_is_one_message_of_each_verb(hub, missing, tmp_path):
    env, *_ = hub
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    more = ["--config", "sft", f"--config.model.path={missing}", f"--config.data.train={tmp_path}/rows.jsonl"]
    for verb in (["plan", "--topology", "v5e:2x2"], ["train", "--workdir", str(tmp_path / "run")]):
        command = [sys.executable, "-m", "itune", *verb, *more]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode != 0 and "Traceback" not in done.stderr
        assert f"{missing} is not to be had from the hub" in last, done.stderr
