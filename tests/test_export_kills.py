"""A killed export (SIGKILL) leaves no folder that looks complete, and an earlier one as it was or put back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from itune.export.hashes import verify_folder

EXPORTS = """
import json, os, signal, sys
import transformers.tokenization_utils_tokenizers
from itune import export
from itune.export import target
from itune.data.templates import load_tokenizer
from itune.models import load_pretrained
from itune.models.hf import write

modules = {"write": write, "export": export, "target": target, "os": os}

def run(source, out, module, name, count):
    real, calls = getattr(modules[module], name), []

    def wrapped(*arguments, **options):
        calls.append(1)
        if len(calls) == count or isinstance(count, str) and os.fspath(arguments[1]).endswith(count):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    setattr(modules[module], name, wrapped)
    tokenizer = load_tokenizer(source, "chatml")
    model, params = load_pretrained(source, vocab_size=tokenizer.vocab_size)
    export.export_pretrained(out, model, params, source, tokenizer, max_shard_bytes=8000)

source, parent, points = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
for place, module, name, count in points:
    child = os.fork()  # everything is imported, and jax has not started
    if not child:
        run(source, os.path.join(parent, place), module, name, count)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([code, sorted(os.listdir(parent))]), flush=True)
"""
NEVER = 0
POINTS = [
    ("new", "write", "_sync", 2),  # the second shard is written
    ("new", "export", "write_companions", 1),  # weights and config stand, tokenizer and proof do not
    ("new", "export", "write_proof", 1),
    ("new", "target", "_replace", 1),  # all stands, but not under its name
    ("old", "target", "_replace", NEVER),
    ("old", "os", "replace", "/.old.replaced"),  # the earlier export is about to step aside
    ("old", "os", "replace", "/old"),  # it has, and the new one has not come
    ("new", "target", "_replace", NEVER),
]


def test_a_killed_export_leaves_nothing_that_looks_complete(base_folder, tmp_path):
    parent = tmp_path / "models"
    parent.mkdir()
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", EXPORTS, str(base_folder), str(parent), json.dumps(POINTS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = [json.loads(line) for line in done.stdout.splitlines()]
    assert [code for code, _ in seen] == [-9, -9, -9, -9, 0, -9, -9, 0], done.stderr
    for _, names in seen[:4]:
        assert [name for name in names if not name.startswith(".")] == []
    assert seen[4][1] == [".new.exporting", "old"]
    assert "old" in seen[5][1]
    assert "old" not in seen[6][1] and ".old.replaced" in seen[6][1]  # whole, under a name that nobody takes for it
    assert {name for name in seen[7][1] if "new" in name} == {"new"}
    assert verify_folder(parent / "new") == [] == verify_folder(parent / ".old.replaced")


def test_the_next_export_puts_an_interrupted_one_back(base_folder, tmp_path):
    from itune.export.target import staged
    from itune.types import RunError

    for name in (".out.replaced", ".out.exporting"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "itune_proof.json").write_text(name)
    try:
        with staged(tmp_path / "out"):
            raise RunError("the next one fails too")
    except RunError:
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "itune_proof.json").read_text() == ".out.replaced"
