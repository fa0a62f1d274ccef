"""A hub id, over HTTP with the hub's own client: what is read is downloaded, once, and no weights to plan with."""

from __future__ import annotations

import json
import os
import shutil
import socketserver
import subprocess
import sys
import threading

import pytest
from hub_server import COMMIT, hub_server

from itune.models.hf.files import read_header
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


def test_only_the_weights_that_the_index_names(hub, tmp_path, base_folder):
    env, given, _ = hub
    model = tmp_path / "hub" / "org" / "base"
    (model / "model.safetensors").rename(model / "model-1-of-1.safetensors")
    names = list(read_header(model / "model-1-of-1.safetensors"))
    index = {"weight_map": dict.fromkeys(names, "model-1-of-1.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model.fp16.safetensors").write_bytes(b"x")
    (model / "adapter_model.safetensors").write_bytes(b"y")
    run(env, "import itune.models as m; m.load_pretrained('org/base')")
    assert [name for name in given if name.endswith(".safetensors")] == ["model-1-of-1.safetensors"]


def test_a_snapshot_that_somebody_removed_is_fetched_again(hub, tmp_path):
    env, *_ = hub
    run(env, "import shutil, itune.models as m; m.load_model('org/base'); "
             f"shutil.rmtree({str(tmp_path / 'cache')!r}); m.load_model('org/base')")  # fmt: skip


def test_offline_a_file_that_nobody_reads_is_not_missed(hub, tmp_path):
    """A cache that another program filled, of a repository with more files than it or itune read."""
    env, *_ = hub
    for name in ("LICENSE.txt", "params.json", "extra.json"):
        (tmp_path / "hub" / "org" / "base" / name).write_text(name)
    run(env, "from huggingface_hub import snapshot_download, hf_hub_download as get\n"
             "snapshot_download('org/base', allow_patterns=['*.safetensors'])\n"
             "for n in ('config.json', 'tokenizer.json', 'tokenizer_config.json'): get('org/base', n)")  # fmt: skip
    code = ("from itune.data.templates import load_tokenizer; from itune.models import load_model; "
            "load_tokenizer('org/base', 'chatml'); print(load_model('org/base').config.vocab_size)")  # fmt: skip
    assert run({**env, "HF_HUB_OFFLINE": "1"}, code) == "264"


REPLIES = {
    "closed": b"",
    "another protocol": b"SSH-2.0-x\r\n",
    "a page": b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>",
    "gated": b"HTTP/1.1 403 Forbidden\r\nX-Error-Code: GatedRepo\r\nContent-Length: 0\r\n\r\n",
    "private": b"HTTP/1.1 401 Unauthorized\r\nX-Error-Code: RepoNotFound\r\nContent-Length: 0\r\n\r\n",
}
ADVICE = {"gated": "ask for access on its page, https://huggingface.co/org/base, and log in with `hf auth login`",
          "private": "where it is private, log in with `hf auth login` or set HF_TOKEN"}  # fmt: skip


@pytest.mark.parametrize("reply", REPLIES)
def test_whatever_the_hub_answers_is_one_message(reply, tmp_path):
    with socketserver.TCPServer(("127.0.0.1", 0), None) as server:

        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                self.request.recv(65536)
                self.request.sendall(REPLIES[reply])

        server.RequestHandlerClass = Handler
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "no_proxy": "127.0.0.1",
               "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}  # fmt: skip
        code = ("from itune.storage.hub import hub_folder; from itune.types import InputError\n"
                "try: hub_folder('org/base')\nexcept InputError as error: print(error)")  # fmt: skip
        said = run(env, code)
        server.shutdown()
    assert said.startswith("model.path: no folder org/base here, and org/base is not to be had from the hub (")
    assert ADVICE.get(reply, "or run where the hub is reachable") in said


@pytest.mark.parametrize("given", ["./org/base", "org/base/", "org//base", "./nothing"])
def test_a_path_is_not_asked_of_the_hub(hub, given, tmp_path):
    env, downloaded, _ = hub
    code = ("from itune.data.remembered import recall_tokenizer; from itune.types import InputError\n"
            f"try: recall_tokenizer({given!r}, 'chatml')\nexcept InputError as error: print(error)")  # fmt: skip
    assert run(env, code).startswith(f"model.path: no folder {given}; expected a folder") and not downloaded


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
