"""Nothing listens, no secret is told, no folder of others is trusted silently."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from itune.cli import main
from itune.config import default_config
from itune.runtime.crash import write_crash
from itune.runtime.permissions import shared_with_everyone
from itune.runtime.secrets import redact_tree
from itune.usage import build_parser

CANARY = "hf_" + "canary0" * 4
VARIABLES = ("HF_TOKEN", "WANDB_API_KEY", "MY_SECRET", "DB_PASSWORD")


def verbs():
    actions = next(a for a in build_parser("0")._actions if getattr(a, "choices", None))
    return sorted(actions.choices)


def test_parent_that_everyone_may_write_is_told(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    assert "may be written by every user of this machine" in shared_with_everyone(shared / "run")
    shared.chmod(0o1777)  # as /tmp: others can make files there, but not replace ours
    (shared / "run").mkdir(mode=0o755)
    assert shared_with_everyone(shared / "run") == ""
    (shared / "run").chmod(0o777)
    assert "may be written by every user" in shared_with_everyone(shared / "run")


@pytest.mark.parametrize("verb", verbs())
def test_planted_secrets_stay_hidden_in_what_every_verb_says(verb, tmp_path, monkeypatch, capfd):
    """Wrong inputs that hold a secret, in the words a user may well paste: messages and files hide it."""
    for name in VARIABLES:
        monkeypatch.setenv(name, CANARY)
    monkeypatch.chdir(tmp_path)
    words = {
        "demo": ["--no-such-option"], "data": ["stats", "--config", "sft"], "report": ["absent"],
        "checkpoints": ["absent"], "chat": ["--model", "absent"],
        "generate": ["--model", "absent", "--prompts", "absent.txt"],
        "export": ["--workdir", "absent", "--out", "out"], "eval": ["--config", "sft", "--model", "absent"],
        "train": ["--config", "sft", "--workdir", "run", f"--config.model.path=https://me:{CANARY}@host/x"],
    }
    try:
        code = main([verb, *words.get(verb, [])])
    except SystemExit as error:
        code = error.code
    said = capfd.readouterr()
    assert code == 2, said
    assert CANARY not in said.out + said.err
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path


def test_crash_record_hides_secrets_in_all_it_holds(tmp_path, monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, f"value-of-{name}")
    facts = {"config": {"model": {"path": "https://me:pass-word@host/x"}}, "last_events": [CANARY],
             "environment": {"command": [f"--token={os.environ['MY_SECRET']}"]}}
    try:
        raise ValueError(f"download failed with {os.environ['HF_TOKEN']}")
    except ValueError as error:
        assert write_crash(tmp_path, error, facts) == f"details: {tmp_path}/crash.json"
    text = (tmp_path / "crash.json").read_text()
    for secret in (CANARY, "pass-word", *(f"value-of-{name}" for name in VARIABLES)):
        assert secret not in text


def test_a_config_with_sources_named_like_secrets_stays_one_that_runs(monkeypatch):
    monkeypatch.setenv("TOKENISED_DATA", "/data/some-folder")
    monkeypatch.setenv("TOKENIZER_HOME", "/models/some-model")
    tree = default_config().to_dict() | {"evaluators": ["package.token_counting:Token"]}
    named = {name: f"/data/some-folder/{name}.jsonl" for name in ("token_counting", "secret", "password", "api_key")}
    categories = dict.fromkeys(named, "long category")
    tree["data"] |= {"train": named, "categories": categories, "fields": {"token": "a_token"}}
    tree["model"]["path"] = "/models/some-model"
    tree["optimizer"]["rates"] = {"embed_tokens": "irrelevant text"}
    config = json.loads(json.dumps(tree))
    assert redact_tree(config) == config
    for name in VARIABLES:
        monkeypatch.setenv(name, f"value-of-{name}")
    named["other"] = f"https://me:pass-word@host/{CANARY}/value-of-MY_SECRET"
    keys = ("token", "hf_token", "HF-TOKEN", "api_key", "db_password", "credentials", "secret_access_key", "a.secret")
    config["eval"]["lm_eval_options"] = dict.fromkeys(keys, "a long value")
    hidden = redact_tree(config | {"data": {**config["data"], "train": named}})
    assert hidden["data"]["train"]["other"] == "https://[hidden]@host/[hidden]/[hidden]"
    assert set(hidden["eval"]["lm_eval_options"].values()) == {"[hidden]"}
    assert hidden["model"] == config["model"]


def test_a_run_that_imports_everything_opens_no_port():
    code = ("import jax, itune.loop, itune.export, itune.chat, itune.runtime.profiler, os, subprocess\n"
            "from itune.runtime import distributed\ndistributed.start()\njax.devices()\n"
            "print(os.getpid(), flush=True)\n"
            "print(subprocess.run(['ss', '-ltnp'], capture_output=True, text=True).stdout)")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    for name in ("ITUNE_COORDINATOR", "ITUNE_NUM_PROCESSES", "ITUNE_PROCESS_ID"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    pid, _, sockets = done.stdout.partition("\n")
    assert "LISTEN" not in sockets or f"pid={pid}," not in sockets, sockets


def test_coordinator_listens_on_the_given_address_only():
    code = ("import jax, os, subprocess\nfrom itune.runtime import distributed\ndistributed.start()\n"
            "print(subprocess.run(['ss', '-ltnp'], capture_output=True, text=True).stdout)")
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "ITUNE_COORDINATOR": f"127.0.0.1:{port}",
                   "ITUNE_NUM_PROCESSES": "1", "ITUNE_PROCESS_ID": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    found = [line.split()[3] for line in done.stdout.splitlines() if re.search(rf":{port}\s", line)]
    assert found in ([f"127.0.0.1:{port}"], [f"[::ffff:127.0.0.1]:{port}"]), done.stdout


def test_package_ships_no_pickle_and_no_archive_reader():
    package = Path(__file__).parents[1] / "itune"
    assert not [p for p in package.rglob("*") if p.suffix in (".pkl", ".pt", ".bin", ".pth")]
