"""Export: what training left alone stays as it was, what it changed is written, and all of it is proven."""

import argparse
import contextlib
import errno
import hashlib
import json
import os
import shutil
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open

import itune
from itune import export
from itune.checkpoint import Store
from itune.config import from_dict
from itune.data.render import as_tokenizer
from itune.data.templates import CHATML, load_tokenizer
from itune.export import check_target, export_pretrained, proof
from itune.export.hashes import verify_folder
from itune.models import load_pretrained, save_pretrained
from itune.targets import check_targets
from itune.types import InputError, RunError


@pytest.fixture(scope="module")
def source(base_folder, tmp_path_factory):
    """A base model as a hub would give it: no chat template, bfloat16 weights, and a stray file."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    shutil.copytree(base_folder, folder)
    (folder / "training_args.bin").write_bytes(b"\x80")
    return folder


@pytest.fixture(scope="module")
def tuned(source):
    """The model after training with a chat template that it did not have."""
    tokenizer = load_tokenizer(str(source), "chatml")
    model, params = load_pretrained(source, vocab_size=tokenizer.vocab_size)
    return model, jax.tree.map(lambda x: x * 1.001, params), tokenizer


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit(path, old, new):
    path.write_text(path.read_text().replace(old, new))


def test_untouched_is_copied_byte_for_byte(source, tmp_path):
    model, params = load_pretrained(source)
    report = itune.export_pretrained(tmp_path / "out", model, params, source=source)
    assert report["max_abs_logit_difference"] == report.rounding_logit_difference == 0
    before, after = bytes_of(source), bytes_of(tmp_path / "out")
    del before["training_args.bin"], after["itune_proof.json"]
    assert after.keys() == before.keys()
    assert [name for name in before if before[name] != after[name]] == []


def test_a_tuned_model_speaks_in_transformers(source, tuned, tmp_path):
    """Template, stop tokens and logits as transformers sees them."""
    import torch
    import transformers

    model, params, tokenizer = tuned
    out = tmp_path / "out"
    report = export_pretrained(out, model, params, source, tokenizer, "float32", info={"step": 7})
    judge, info = transformers.AutoModelForCausalLM.from_pretrained(
        out, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()) and judge.dtype == torch.float32
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    chat = [{"role": "user", "content": "Hi <|im_end|>?"}]
    ids = theirs.apply_chat_template(chat[:1], add_generation_prompt=True)["input_ids"]
    assert theirs.decode(ids).startswith("<|im_start|>user\nHi") and theirs.eos_token == "<|im_end|>"
    stops = judge.generation_config.eos_token_id
    assert {256, theirs.convert_tokens_to_ids("<|im_end|>")} == set(stops)
    assert judge.generation_config.temperature == 0.6 and set(judge.config.eos_token_id) == set(stops)
    with torch.no_grad():
        expected = judge(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(itune.forward(model, params, np.array([ids]))[0], expected, atol=1e-4)
    assert report.max_abs_logit_difference == 0 and report.dtypes == {"float32": len(judge.state_dict())}
    assert report.tokenizer["chat_template"] and set(report.tokenizer["stop_ids"]) <= set(stops)


def test_the_sources_end_of_text_still_ends_an_answer(source, tuned, tmp_path):
    """Every way to the exported folder's tokenizer knows all stop tokens of its generation config."""
    import transformers

    out = tmp_path / "out"
    export_pretrained(out, *tuned[:2], source, tuned[2])
    stops = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert 256 in stops and 256 not in (tuned[2].end_of_turn_id, tuned[2].eos_id)
    assert list(load_tokenizer(str(out)).stop_ids) == stops
    assert list(as_tokenizer(transformers.AutoTokenizer.from_pretrained(out)).stop_ids) == stops
    (out / "generation_config.json").unlink()  # then config.json says it, as in transformers
    assert list(load_tokenizer(str(out)).stop_ids) == stops
    for wrong in ('{"eos_token_id": "x"}', '{"eos_token_id": [1, null]}', '{"eos_token_id": true}'):
        (out / "generation_config.json").write_text(wrong)
        with pytest.raises(InputError, match=r"generation_config.json: eos_token_id is .*; expected an id or a list"):
            load_tokenizer(str(out))


def test_the_proof_names_every_file(source, tuned, tmp_path):
    model, params, tokenizer = tuned
    out = tmp_path / "out"
    report = export_pretrained(out, model, params, source, tokenizer, max_shard_bytes=8000, info={"step": 7})
    record = json.loads((out / "itune_proof.json").read_text())
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.iterdir() if p.name != "itune_proof.json"}
    assert record["sha256"] == files and sum(name.endswith(".safetensors") for name in files) > 2
    assert record["step"] == 7 and record["source"] == str(source)
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, "pt")) for file in out.glob("*.safetensors")]
        theirs = {name: file.get_tensor(name) for file in opened for name in file.keys()}  # noqa: SIM118
    assert record["tensors"] == {
        name: hashlib.sha256(tensor.view(torch.uint8).numpy()).hexdigest() for name, tensor in theirs.items()
    }
    assert verify_folder(out) == []
    assert record["max_abs_logit_difference"] == report.max_abs_logit_difference == 0
    assert report.dtypes == {"bfloat16": 3 * 11 + 3} and report.rounding_logit_difference > 1e-4
    assert report.bytes == 2 * report.parameters == 2 * sum(x.size for x in jax.tree.leaves(params))


def test_bytes_that_changed_on_their_way_to_the_disk(source, tuned, tmp_path, monkeypatch):
    prove = export.prove_weights

    def rot(folder, model, params):
        found = prove(folder, model, params)  # after the values were compared: only the hashes can tell
        with open(folder / "model.safetensors", "r+b") as stream:
            stream.seek(-3, 2)
            last = stream.read(1)
            stream.seek(-3, 2)
            stream.write(bytes([last[0] ^ 16]))
        return found

    monkeypatch.setattr(export, "prove_weights", rot)
    with pytest.raises(RunError, match=r"tensors on disk are not what was written:\n  model\.\S+: other bytes$"):
        export_pretrained(tmp_path / "out", *tuned[:2], source, tuned[2])
    assert list(tmp_path.iterdir()) == []


def test_the_revision_of_a_download_is_its_commit(source, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abcd"
    shutil.copytree(source, snapshot)
    model, params = load_pretrained(snapshot)
    export_pretrained(tmp_path / "out", model, params, snapshot, revision="main")
    assert json.loads((tmp_path / "out" / "itune_proof.json").read_text())["revision"] == "0123abcd"


def test_a_wrong_weight_is_found_and_nothing_is_left(source, tuned, tmp_path, monkeypatch):
    model, params, tokenizer = tuned
    out = tmp_path / "out"
    export_pretrained(out, model, params, source, tokenizer)
    good = bytes_of(out)

    def damaged(folder, model, params, **options):
        params = jax.tree.map(lambda x: x, params)
        params["final_norm"]["scale"] = params["final_norm"]["scale"].at[3].add(0.01)
        save_pretrained(folder, model, params, **options)

    monkeypatch.setattr(export, "save_pretrained", damaged)
    with pytest.raises(RunError, match=r"1 of 14 parameters read back with other values, worst final_norm/scale"):
        export_pretrained(out, model, params, source, tokenizer)
    assert bytes_of(out) == good and [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: edit(f / "tokenizer.json", '"q"', '"ŉ"'), "reads back otherwise: 'The quick"),
        (lambda f: (f / "chat_template.jinja").write_text("{{ messages[0].content }}"), "template reads back other"),
        (lambda f: (f / "generation_config.json").write_text('{"eos_token_id": 256}'), "stops at .256.; expected all"),
        (lambda f: (f / "tokenizer.json").unlink(), "cannot be loaded again"),
    ],
)
def test_a_wrong_tokenizer_is_found(source, tuned, tmp_path, monkeypatch, break_it, message):
    model, params, tokenizer = tuned
    write = export.write_companions

    def damaged(folder, origin, tokenizer):
        write(folder, origin, tokenizer)
        break_it(folder)

    monkeypatch.setattr(export, "write_companions", damaged)
    with pytest.raises(RunError, match=message):
        export_pretrained(tmp_path / "out", model, params, source, tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_no_numbers_do_not_pass(source, tuned, tmp_path):
    model, params, _ = tuned
    bad = jax.tree.map(lambda x: x, params)
    bad["final_norm"]["scale"] = bad["final_norm"]["scale"].at[0].set(jnp.nan)
    with pytest.raises(RunError, match=r"cannot be loaded again: .*NaN or infinity.*\n  model.norm.weight"):
        export_pretrained(tmp_path / "out", model, bad, source)


def test_logits_are_compared_too(source, tmp_path, monkeypatch):
    model, params = load_pretrained(source)
    forward = proof.forward
    monkeypatch.setattr(proof, "forward", lambda m, p, t: forward(m, p, t) + (0.0 if p is params else 1e-3))
    with pytest.raises(RunError, match=r"logits of the reloaded model differ by 0\.001"):
        export_pretrained(tmp_path / "out", model, params, source, dtype="float32")


def test_only_an_export_is_replaced(source, tuned, tmp_path):
    model, params, tokenizer = tuned
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all I have")
    with pytest.raises(InputError, match=r"mine: is not empty and no earlier export \(it has thesis.tex\)"):
        export_pretrained(tmp_path / "mine", model, params, source, tokenizer)
    with pytest.raises(InputError, match="is the model that training started from"):
        export_pretrained(source, model, params, source, tokenizer)
    with pytest.raises(InputError, match="is a file"):
        check_target(tmp_path / "mine" / "thesis.tex", {})
    for dtype, files in (("float32", {"float32"}), ("bfloat16", {"bfloat16"})):
        export_pretrained(tmp_path / "out", model, params, source, tokenizer, dtype)
        assert set(json.loads((tmp_path / "out" / "itune_proof.json").read_text())["dtypes"]) == files
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]


@pytest.mark.parametrize("verb", [export.export_run, export.export_adapter])
def test_what_an_export_reads_is_never_replaced(source, tmp_path, monkeypatch, verb):
    """A run of an exported model, whose `model.path` is relative to where it was started."""
    base = shutil.copytree(source, tmp_path / "base")
    (base / "itune_proof.json").write_text("{}")
    tree = {"model": {"path": "base"}, "lora": {"rank": 2}}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for run in (tmp_path / "run", base / "run"):
        (run / "checkpoints").mkdir(parents=True)
        (run / "config.json").write_text(json.dumps(from_dict(tree).to_dict()))
        (run / "environment.json").write_text(json.dumps({"folder": str(tmp_path)}))
    (tmp_path / "link").symlink_to("base")
    for out in ("base", "link"):
        with pytest.raises(InputError, match=rf"{out}: is the model that training started from; choose another"):
            verb(tmp_path / "run", tmp_path / out)
    with pytest.raises(InputError, match="base: holds the run; choose another"):
        verb(base / "run", base)
    assert (base / "model.safetensors").is_file()


def test_a_place_that_cannot_be_replaced_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path / "empty")
    for out in (".", tmp_path / "empty"):
        with pytest.raises(InputError, match=r"is the current folder, or around it; choose a new folder in it"):
            check_target(Path(out), {})
    for out, message in {"n" * 250: "a name of 250 bytes; expected at most 220", "loop": "loop: cannot be written",
                         "a/" * 2500: "cannot be written: File name too long"}.items():
        with pytest.raises(InputError, match=message):
            check_target(tmp_path / out, {})
    check_target(tmp_path / ("n" * 220), {})
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "disk"))
    (tmp_path / "disk").mkdir()
    with pytest.raises(InputError, match="disk: is a mount point, which nothing can take the place of"):
        check_target(tmp_path / "disk", {})


@pytest.mark.parametrize("target", ["nothing", "empty", "export"])
def test_a_link_stays_and_what_it_leads_to_is_written(source, tmp_path, target):
    model, params = load_pretrained(source)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real/out")
    if target != "nothing":
        (tmp_path / "real" / "out").mkdir()
    if target == "export":
        (tmp_path / "real" / "out" / "itune_proof.json").write_text("{}")
    check_targets(argparse.Namespace(verb="export", out=str(tmp_path / "link")))
    report = export_pretrained(tmp_path / "link", model, params, source)
    assert report.folder == str(tmp_path / "link") and (tmp_path / "link").is_symlink()
    assert verify_folder(tmp_path / "real" / "out") == []
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_dir()) == ["link", "out", "real"]


def test_a_failure_names_the_folder_that_was_asked_for(source, tuned, tmp_path, monkeypatch):
    def full(file, tensors):
        raise OSError(errno.ENOENT, "gone", str(file))

    for name in ("itune.export.prove_tensors", "itune.models.hf.write._write_shard"):
        with monkeypatch.context() as patch, pytest.raises(RunError, match="gone") as caught:
            patch.setattr(name, full)
            export_pretrained(tmp_path / "out", *tuned[:2], source, tuned[2])
        assert str(tmp_path / "out") in str(caught.value) and "exporting" not in str(caught.value)


def test_chat_templates_with_names_go_along(source, tmp_path):
    import transformers

    folder = shutil.copytree(source, tmp_path / "source")
    each = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(each)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag: {{ messages[0].content }}")
    tokenizer = load_tokenizer(str(folder))
    model, params = load_pretrained(folder, vocab_size=tokenizer.vocab_size)
    export_pretrained(tmp_path / "out", model, params, folder, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": "Hi"}]
    assert theirs.apply_chat_template(chat, tokenize=False, chat_template="rag") == "rag: Hi"
    record = json.loads((tmp_path / "out" / "itune_proof.json").read_text())
    assert "additional_chat_templates/rag.jinja" in record["sha256"] and verify_folder(tmp_path / "out") == []
    (tmp_path / "out" / "additional_chat_templates" / "rag.jinja").write_text("")
    assert verify_folder(tmp_path / "out") == ["additional_chat_templates/rag.jinja: other bytes"]


@pytest.mark.parametrize("size", [0, -5e9, float("nan")])
def test_weight_files_of_no_size_are_refused(source, tmp_path, size):
    message = r"largest weight file \(--shard-gb\): found (0|-5|nan) GB; expected more than 0"
    with pytest.raises(InputError, match=message):
        export.export_run(tmp_path / "no run", tmp_path / "out", max_shard_bytes=size)
    with pytest.raises(InputError, match=message):
        export_pretrained(tmp_path / "out", *load_pretrained(source), source, max_shard_bytes=size)


def test_a_run_is_exported(source, tuned, tmp_path, monkeypatch):
    import itune.saved_run

    model, params, tokenizer = tuned
    config = from_dict({"model": {"path": str(source)}, "mesh": {"fsdp": 2, "tensor": 2}})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(config.to_dict()))
    place = Store(tmp_path / "run" / "checkpoints").path(12)
    place.mkdir(parents=True)
    saved = {"data": {"fingerprint": "ab12", "total_steps": 30}, "config": {}}
    (place / "run.json").write_text(json.dumps(saved))
    report = {"rows": 9, "kept": 8, "truncated": 1, "tokens": 200, "supervised_tokens": 50, "dropped": {"empty": 1}}
    (tmp_path / "run" / "data").mkdir()
    (tmp_path / "run" / "data" / "report.json").write_text(
        json.dumps(report | {"inputs": {"train": {"mine": "cd34"}, "tokenizer": "x"}})
    )
    run = types.SimpleNamespace(config=config, step=12, tokenizer=tokenizer, model=model, params=params)
    asked, lines = [], []
    load_run = lambda workdir, step, log: asked.append(step) or run  # noqa: E731
    monkeypatch.setattr(itune.saved_run, "load_run", load_run)
    result = export.export_run(tmp_path / "run", tmp_path / "out", step=12, log=lines.append)
    assert asked == [12]
    assert itune.saved_run.mesh_here(config).shape["fsdp"] == 8  # four devices are not eight: weights go over all
    assert result["step"] == 12 and result["max_abs_logit_difference"] == 0
    assert "exported step 12" in lines[0] and "largest difference of a logit 0" in lines[1]
    record = json.loads((tmp_path / "out" / "itune_proof.json").read_text())
    assert record["workdir"] == str(tmp_path / "run") and (record["step"], record["total_steps"]) == (12, 30)
    assert record["data"] == {"fingerprint": "ab12", "inputs": {"train": {"mine": "cd34"}, "eval": {}}}
    assert record["masks"] == report | {"supervised_share": 0.25}
    assert record["chat_template_sha256"] == hashlib.sha256(CHATML.encode()).hexdigest()
    assert record["tokenizer_sha256"] == tokenizer.fingerprint and len(record["config_sha256"]) == 64
    assert record["source"] == str(source) and record["revision"] is None
