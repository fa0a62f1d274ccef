"""Mutated model folders: one message, nothing opened outside the folder, no pickle ever loaded."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import sys
import time
import traceback
from pathlib import Path

import jax
import pytest

from itune.models.hf.files import INDEX, SINGLE, read_header
from itune.models.hf.plan import make_plan
from itune.models.load import load_model
from itune.types import InputError

JUNK = [None, True, -1, 0, 1, 7, 2**63, 1e308, "", "x", "../x", "/etc/passwd", "a\0b", [], [1], {}, {"a": 1}, "\ud800",
        "LlamaForCausalLM", "float8", ["../../x"], [[1, 2]], 10**30]


@pytest.fixture(scope="module")
def sharded(base_folder, tmp_path_factory):
    """The tiny model in two files with an index, a canary pickle, and a file outside that nothing may open."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    root = tmp_path_factory.mktemp("fuzz")
    folder = Path(shutil.copytree(base_folder, root / "model"))
    with safe_open(folder / SINGLE, "np") as file:
        names = sorted(file.keys())
        tensors = {name: file.get_tensor(name) for name in names}
    (folder / SINGLE).unlink()
    half, weight_map = len(names) // 2, {}
    for file, part in (("a.safetensors", names[:half]), ("b.safetensors", names[half:])):
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pickle-was-loaded'\ntR.")
    (root / "outside.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    return folder


def paths(tree, prefix=()):
    """Every path into a JSON tree."""
    yield prefix
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from paths(value, (*prefix, key))


def mutate_tree(draw, tree):
    """One value deleted, replaced by junk, or a key renamed or added, somewhere."""
    path = draw.choice([p for p in paths(tree) if p])
    node = tree
    for key in path[:-1]:
        node = node[key]
    kind = draw.randrange(4)
    if kind == 0:
        del node[path[-1]]
    elif kind == 1 and isinstance(node, dict):
        node[draw.choice(["../../outside.safetensors", "lm_head.weight", "x", ""])] = node.pop(path[-1])
    elif kind == 2 and isinstance(node[path[-1]], str):
        node[path[-1]] = draw.choice(["../outside.safetensors", "..\\outside.safetensors", "b.safetensors",
                                      "a.safetensors/", "link.safetensors", "pytorch_model.bin", "I8", "F64", "BF16"])
    else:
        node[path[-1]] = draw.choice(JUNK)
    return tree


def mutate_bytes(draw, raw):
    kind, at = draw.randrange(4), draw.randrange(len(raw))
    if kind == 0:
        return raw[:at]
    if kind == 1:
        return raw[:at] + bytes([raw[at] ^ 1 << draw.randrange(8)]) + raw[at + 1 :]
    if kind == 2:
        return struct.pack("<Q", draw.choice([0, 1, 2, len(raw), 2**40, 2**63, 2**64 - 1])) + raw[8:]
    return raw[:at] + draw.randbytes(draw.randint(1, 9)) + raw[at:]


def mutate(draw, folder):
    """Damage one file of the folder; its name."""
    name = draw.choice(["config.json", INDEX, "a.safetensors", "header", "link"])
    if name == "link":
        name = draw.choice(["a.safetensors", "config.json", INDEX])
        (folder / name).unlink()
        (folder / name).symlink_to(draw.choice(["../outside.safetensors", "nowhere", name, "/etc/passwd"]))
    elif name == "header":
        name, raw = "a.safetensors", (folder / "a.safetensors").read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.dumps(mutate_tree(draw, json.loads(raw[8 : 8 + length]))).encode()
        (folder / name).write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])
    elif name.endswith(".json") and draw.random() < 0.7:
        tree = mutate_tree(draw, json.loads((folder / name).read_text()))
        (folder / name).write_text(json.dumps(tree))
    else:
        (folder / name).write_bytes(mutate_bytes(draw, (folder / name).read_bytes()))
    return name


OPENED: list[str] = []
WATCHING = [False]


def watch(event, arguments):
    if WATCHING[0] and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        OPENED.append(os.fsdecode(arguments[0]))


sys.addaudithook(watch)


def _where(error):
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"


def campaign(sharded, root, count):
    accepted, failed = 0, []
    for seed in range(count):
        if seed % 500 == 499:
            jax.clear_caches()  # of hundreds of configurations
        draw = random.Random(seed)
        folder = root / "m"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sharded, folder)
        shutil.copy(sharded.parent / "outside.safetensors", root)
        name = mutate(draw, folder)
        OPENED.clear()
        WATCHING[0], begun = True, time.process_time()
        try:
            model = load_model(folder)
            make_plan(folder, model, model.config.vocab_size)
            accepted += 1
        except InputError as error:
            assert str(error).strip(), seed
        except Exception as error:  # a traceback for the user: all of them are told at the end
            failed.append(f"seed {seed}, {name}: {_where(error)}")
        finally:
            WATCHING[0] = False
        if (took := time.process_time() - begun) > 5:  # of CPU time: how busy the machine is does not count
            failed.append(f"seed {seed}, {name}: took {took:.0f} s")
        home = folder.resolve()
        strange = [path for path in OPENED if not Path(path).resolve().is_relative_to(home) and ".py" not in path]
        assert not [path for path in strange if "outside" in path or "passwd" in path], (seed, strange)
        if any("pytorch_model.bin" in path for path in OPENED):
            failed.append(f"seed {seed}, {name}: the pickle was opened")
    assert not failed, "\n".join(failed)
    assert not Path("pickle-was-loaded").exists()
    return accepted


def test_three_hundred_mutated_folders(sharded, tmp_path):
    assert load_model(sharded) and len(read_header(sharded / "a.safetensors")) > 3
    assert campaign(sharded, tmp_path, 300) < 200  # most damage is found; some changes nothing that is read


def test_index_that_names_a_pickle_is_refused_before_it_is_opened(sharded, tmp_path):
    folder = Path(shutil.copytree(sharded, tmp_path / "m"))
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= dict.fromkeys(list(index["weight_map"])[:1], "pytorch_model.bin")
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"names pytorch_model\.bin; expected \.safetensors files only"):
        make_plan(folder, load_model(folder), 264)


@pytest.mark.parametrize("key", ["num_attention_heads", "num_hidden_layers", "vocab_size", "hidden_size"])
@pytest.mark.parametrize("value", [2**63, 10**30])
def test_size_of_which_no_model_can_be_is_named(sharded, tmp_path, key, value):
    """Found by the campaign: a traceback from jax, and a program that was traced for half an hour."""
    folder = Path(shutil.copytree(sharded, tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=rf"config\.json: {key} is {value}; expected at most"):
        load_model(folder)


@pytest.mark.parametrize("value", [{"llama": 1}, ["llama"], 3])
def test_model_type_that_is_no_text_is_not_supported(sharded, tmp_path, value):
    folder = Path(shutil.copytree(sharded, tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text()) | {"model_type": value}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"model_type .* is not supported; supported: llama"):
        load_model(folder)


@pytest.mark.soak
def test_ten_thousand_mutated_folders(sharded, tmp_path):
    campaign(sharded, tmp_path, 10_000)
