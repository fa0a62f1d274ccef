#!/usr/bin/env python3
"""Pretrain the base model of `itune demo` from nothing, and write it as a Hugging Face folder.

    python scripts/make_demo_model.py            # writes itune/demo/assets/base and records its hashes in base.json
    python scripts/make_demo_model.py --check    # makes it again elsewhere and compares the hashes

The text is generated (itune/demo/text.py): facts, lists and verse, and no instruction. Model, packing, objective and
step are itune's own; the optimizer is Muon (optax.contrib). A few minutes on 2 cores, no network. Weights are equal bit
for bit on one machine with one jax; another processor rounds differently.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from optax import contrib
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from itune.data.loader import Loader
from itune.data.store import Writer, read_store
from itune.demo import ASSETS, SEED
from itune.demo.tasks import held_out_triples
from itune.demo.text import documents
from itune.demo.world import WORD, vocabulary
from itune.models import LayerKind, Model, ModelConfig, save_pretrained
from itune.objectives.sft import make_sft
from itune.runtime.allocator import keep_freed_memory
from itune.runtime.compilation import use_compilation_cache
from itune.sharding import make_mesh
from itune.step import init_state, make_train_step
from itune.types import Example

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
UNKNOWN = "<unk>"
STEPS, BATCH, LENGTH, DOCUMENTS = 1000, 32, 64, 20_000
PEAK, WARMUP = 4e-3, 20


def make_tokenizer() -> Tokenizer:
    """One token a word or mark. Text of the demo survives encoding and decoding unchanged."""
    words = [*SPECIAL, UNKNOWN, *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD.pattern), "removed", invert=True)
    tight = [(f" {mark}", mark) for mark in (",", ".", ":", "?", "]", "\n", "<|im_end|>")]
    tight += [(f"{mark} ", mark) for mark in ("[", "\n", "<|im_start|>", "<|im_end|>")]
    spaced = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.decoder = decoders.Sequence([spaced, decoders.Fuse(), *(decoders.Replace(a, b) for a, b in tight)])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def make_model(vocab_size: int, mesh: Mesh) -> Model:
    """A Qwen3 of 0.9 million parameters."""
    config = ModelConfig(
        vocab_size=vocab_size, width=128, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=32, mlp_width=384,
        kinds=(LayerKind(),) * 4, max_length=256, qk_norm=True, tie_embeddings=True,
    )
    return Model(config, "qwen3", mesh=mesh)


def make_optimizer(steps: int) -> tuple[optax.GradientTransformation, Any]:
    """Muon for matrices (stacked over layers: layer, out, in), AdamW for the rest, and their schedule."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, PEAK, WARMUP, steps, PEAK * 0.02)
    matrix = contrib.MuonDimensionNumbers(reduction_axis=2, output_axis=1)
    return contrib.muon(
        schedule, weight_decay=0.1, adam_b2=0.95, consistent_rms=0.2,
        muon_weight_dimension_numbers=lambda params: jax.tree.map(lambda p: matrix if p.ndim == 3 else None, params),
    ), schedule


def batches(tokenizer: Tokenizer, count: int, steps: int) -> Loader:
    """Packed rows of the pretraining text; every token is a target."""
    with tempfile.TemporaryDirectory() as folder:
        writer = Writer(Path(folder))
        end = tokenizer.token_to_id(SPECIAL[0])
        for text in documents(SEED, count, held_out_triples(SEED)):
            ids = np.array([*tokenizer.encode(text).ids, end], np.int32)
            writer.add(Example(ids, np.ones(len(ids), np.float32)))
        writer.close()
        store = read_store(Path(folder))
        return Loader(store, batch_size=BATCH, max_length=LENGTH, seed=SEED, max_steps=steps)


def pretrain(tokenizer: Tokenizer, steps: int) -> tuple[Model, Any, float]:
    """(model, parameters, mean loss of the last steps)."""
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    model = make_model(tokenizer.get_vocab_size(), mesh)
    optimizer, schedule = make_optimizer(steps)
    state = init_state(model, model.init(jax.random.key(SEED)), optimizer, SEED, mesh)
    step_fn = make_train_step(make_sft(model, chunk=BATCH * LENGTH), optimizer, schedule, mesh)
    losses: list[Any] = []
    begun = time.monotonic()
    for step, batch in batches(tokenizer, DOCUMENTS, steps).iterate():
        state, metrics = step_fn(state, batch)
        losses = [*losses[-19:], metrics["loss"]]
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} of {steps}  loss {mean(losses):.4f}  {time.monotonic() - begun:.0f} s", flush=True)
    return model, state.trainable, mean(losses)


def mean(values: list[Any]) -> float:
    return float(np.mean(jax.device_get(values)))


def write(folder: Path, tokenizer: Tokenizer, model: Model, params: Any) -> dict[str, str]:
    """The Hugging Face folder; returns the hash of each file."""
    save_pretrained(folder, model, params)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    end = SPECIAL.index("<|endoftext|>")
    write_json(folder / "config.json", {**config, "bos_token_id": None, "eos_token_id": end, "pad_token_id": end})
    write_json(folder / "generation_config.json", {"eos_token_id": end, "pad_token_id": end, "do_sample": False})
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": UNKNOWN, "eos_token": SPECIAL[0],
        "pad_token": SPECIAL[0], "model_max_length": 256, "clean_up_tokenization_spaces": False,
    })  # fmt: skip
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def compare(hashes: dict[str, str], loss: float, recorded: dict[str, Any]) -> int:
    """0 when the files are those recorded, or the weights differ by rounding and have learnt as much; else 1."""
    differ = [name for name in hashes if hashes[name] != recorded["sha256"].get(name)]
    if not differ:
        print(f"all {len(hashes)} files are those recorded, bit for bit")
        return 0
    print(f"differ: {', '.join(differ)}; loss {loss:.4f}, recorded {recorded['loss']:.4f} with jax {recorded['jax']}")
    rounding = differ == ["model.safetensors"] and abs(loss / recorded["loss"] - 1) < 0.02
    print("the weights are rounded differently here, and the loss is the same" if rounding else "this is another model")
    return 0 if rounding else 1


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS / "base", help="folder to write (default: the package's)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps (default {STEPS})")
    parser.add_argument("--check", action="store_true", help="write nothing; compare with the recorded hashes")
    given = parser.parse_args(arguments)
    begun = time.monotonic()
    keep_freed_memory()
    use_compilation_cache()
    tokenizer = make_tokenizer()
    model, params, loss = pretrain(tokenizer, given.steps)
    with tempfile.TemporaryDirectory() as temporary:
        staging = Path(temporary) / "base"
        hashes = write(staging, tokenizer, model, params)
        if given.check:
            return compare(hashes, loss, json.loads((ASSETS / "base.json").read_text()))
        given.out.mkdir(parents=True, exist_ok=True)
        for path in staging.iterdir():
            (given.out / path.name).write_bytes(path.read_bytes())
    record = {
        "made_by": "scripts/make_demo_model.py", "steps": given.steps, "loss": loss, "jax": jax.__version__,
        "seconds": round(time.monotonic() - begun), "parameters": sum(p.size for p in jax.tree.leaves(params)),
        "sha256": hashes,
    }  # fmt: skip
    write_json(given.out.with_suffix(".json"), record)
    print(f"{given.out}: {record['parameters']:,} parameters, loss {loss:.4f}, {record['seconds']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
