#!/usr/bin/env python3
"""Write a Hugging Face folder with random weights and a byte-level BPE tokenizer, for a machine without a hub.

    python scripts/make_random_model.py --family qwen3 --size 15m --text rows.jsonl.gz --out runs/qwen3-15m

The folder holds what a downloaded checkpoint holds: config.json, safetensors, tokenizer files with a ChatML template,
and generation_config.json. Weights have the initial scale of Hugging Face models (normal, deviation 0.02, norms
one, biases zero), so a model tuned from them starts from nothing: use it to test and to measure, not to expect good
answers. The parameter count is within 15 % of `--size`. Needs numpy, safetensors and tokenizers only.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
EXPERTS, CHOSEN = 8, 2  # of a layer, and of them for a token
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BUILT_IN_TEXT = (
    "A model that follows instructions reads a question and writes the answer.\n"
    "List three colours of the rainbow. Red, orange and yellow.\n"
    "What is the capital of France? The capital of France is Paris.\n"
    "Write one line about the sea that ends in light. The waves fold over the shore and carry away the light.\n"
)
SHARD_BYTES = 2_000_000_000


def parse_size(text: str) -> int:
    """'15m' -> 15_000_000, '0.5b' -> 500_000_000."""
    unit = {"k": 1e3, "m": 1e6, "b": 1e9}.get(text[-1:].lower())
    try:
        count = float(text[:-1]) * (unit or math.nan)
    except ValueError:
        count = math.nan
    if not count >= 5e5:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; expected a number from 1m up, such as 15m or 0.5b")
    return int(count)


def texts(path: str) -> Iterator[str]:
    """The lines of a text file, or every string in the rows of a JSONL file (both plain or .gz)."""
    if not path:
        yield from BUILT_IN_TEXT.splitlines(keepends=True)
        return
    opener = gzip.open if path.endswith(".gz") else open
    rows = ".jsonl" in Path(path).name
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not rows:
                yield line
            elif line.strip():
                try:
                    yield from _strings(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}:{number}: not a JSON row: {error}") from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def train_tokenizer(lines: Iterator[str], size: int) -> Tokenizer:
    """A byte-level BPE of at most `size` tokens: any text can be encoded; the ChatML tokens come first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def default_vocab(size: int) -> int:
    """Rows of the embedding that leave most of the parameters to the layers."""
    steps = ((3e6, 1024), (1e7, 4096), (1e8, 8192), (1e9, 32768))
    return next((vocab for bound, vocab in steps if size < bound), 65536)


def shapes(family: str, width: int, layers: int, vocab: int, tied: bool) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensor name -> shape."""
    c = dimensions(width)
    query, key = c["heads"] * c["head_dim"], c["kv_heads"] * c["head_dim"]
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        tensors[at + "input_layernorm.weight"] = (width,)
        for name, rows in (("q", query), ("k", key), ("v", key)):
            tensors[f"{at}self_attn.{name}_proj.weight"] = (rows, width)
            if family == "qwen2":
                tensors[f"{at}self_attn.{name}_proj.bias"] = (rows,)
            if family in ("qwen3", "qwen3_moe") and name != "v":
                tensors[f"{at}self_attn.{name}_norm.weight"] = (c["head_dim"],)
        tensors[at + "self_attn.o_proj.weight"] = (width, query)
        tensors[at + "post_attention_layernorm.weight"] = (width,)
        parts, rows = ["mlp."], c["mlp"]
        if family == "qwen3_moe":
            parts, rows = [f"mlp.experts.{number}." for number in range(EXPERTS)], c["expert"]
            tensors[at + "mlp.gate.weight"] = (EXPERTS, width)
        for part in parts:
            tensors[at + part + "gate_proj.weight"] = (rows, width)
            tensors[at + part + "up_proj.weight"] = (rows, width)
            tensors[at + part + "down_proj.weight"] = (width, rows)
    tensors["model.norm.weight"] = (width,)
    return tensors if tied else {**tensors, "lm_head.weight": (vocab, width)}


def dimensions(width: int) -> dict[str, int]:
    """Head width, heads (a multiple of four), half as many key/value heads, width of an MLP and of an expert."""
    head_dim = 16 if width < 128 else 32 if width < 512 else 64 if width < 2048 else 128
    heads = width // head_dim
    return {"head_dim": head_dim, "heads": heads, "kv_heads": heads // 2, "mlp": 3 * width, "expert": width}


def choose_shape(family: str, size: int, vocab: int, tied: bool) -> tuple[int, int]:
    """(width, layers) whose parameter count is nearest `size`, among those with a usual ratio of width to depth."""
    best = (math.inf, 0, 0)
    for width in [64, *range(128, 512, 128), *range(512, 2048, 256), *range(2048, 8193, 512)]:
        one, two = (count(shapes(family, width, layers, vocab, tied)) for layers in (1, 2))
        layers = max(2, round((size - one) / (two - one)) + 1)
        error = abs(one + (two - one) * (layers - 1) - size) / size
        lean = abs(math.log(width / layers / min(16 + width / 16, 128)))  # 64 wide: 3 layers, 1024: 13, 4096: 32
        best = min(best, (10 * max(error - 0.05, 0.0) + lean, width, layers))
    return best[1], best[2]


def count(tensors: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in tensors.values())


def config(family: str, width: int, layers: int, vocab: int, tied: bool, dtype: str) -> dict[str, Any]:
    c = dimensions(width)
    values: dict[str, Any] = {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "hidden_size": width,
        "intermediate_size": c["mlp"],
        "num_hidden_layers": layers,
        "num_attention_heads": c["heads"],
        "num_key_value_heads": c["kv_heads"],
        "head_dim": c["head_dim"],
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_dropout": 0.0,
        "tie_word_embeddings": tied,
        "vocab_size": vocab,
        "bos_token_id": None,
        "eos_token_id": SPECIAL.index("<|im_end|>"),
        "pad_token_id": SPECIAL.index("<|endoftext|>"),
        "torch_dtype": dtype,
    }
    extra: dict[str, dict[str, Any]] = {
        "llama": {"attention_bias": False, "mlp_bias": False},
        "mistral": {"sliding_window": 1024},
        "qwen2": {"use_sliding_window": False},
        "qwen3": {"use_sliding_window": False, "attention_bias": False},
        "qwen3_moe": {
            "use_sliding_window": False, "attention_bias": False, "num_experts": EXPERTS, "mlp_only_layers": [],
            "num_experts_per_tok": CHOSEN, "moe_intermediate_size": c["expert"], "norm_topk_prob": True,
            "decoder_sparse_step": 1,
        },
    }  # fmt: skip
    return values | extra[family]


def write_weights(folder: Path, tensors: dict[str, tuple[int, ...]], seed: int, dtype: str) -> None:
    """One file, or numbered files with an index above 2 GB. A tensor depends on the seed and its name only."""
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(np.float32)
    files: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in tensors.items():
        if files[-1] and (count(files[-1]) + math.prod(shape)) * kind.itemsize > SHARD_BYTES:
            files.append({})
        files[-1][name] = shape
    index: dict[str, str] = {}
    for number, part in enumerate(files, 1):
        file = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file({n: draw(n, s, seed).astype(kind) for n, s in part.items()}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    if len(files) > 1:
        total = {"total_size": count(tensors) * kind.itemsize}
        write_json(folder / "model.safetensors.index.json", {"metadata": total, "weight_map": index})


def draw(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    if name.endswith("norm.weight"):
        return np.ones(shape, np.float32)
    if name.endswith(".bias"):
        return np.zeros(shape, np.float32)
    rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    return rng.standard_normal(shape, np.float32) * np.float32(0.02)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def make(family: str, size: int, out: Path, text: str = "", seed: int = 0, vocab: int = 0, tied: bool = True,
         dtype: str = "float32") -> int:
    """Write the folder; returns the number of parameters. `vocab`: rows of the embedding, 0 chooses by size."""
    tokenizer = train_tokenizer(texts(text), vocab or default_vocab(size))
    rows = vocab or -(-tokenizer.get_vocab_size() // 64) * 64
    width, layers = choose_shape(family, size, rows, tied)
    tensors = shapes(family, width, layers, rows, tied)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>"],
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHATML,
    })
    write_json(out / "config.json", config(family, width, layers, rows, tied, dtype))
    stop = [SPECIAL.index("<|im_end|>"), SPECIAL.index("<|endoftext|>")]
    write_json(out / "generation_config.json", {"eos_token_id": stop, "pad_token_id": stop[1], "do_sample": False})
    write_weights(out, tensors, seed, dtype)
    return count(tensors)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="qwen3")
    parser.add_argument("--size", type=parse_size, default="15m", help="parameters, from 1m up: 1m, 15m, 0.5b, 8b")
    parser.add_argument("--text", default="", help="text or JSONL file (plain or .gz) that the tokenizer is trained on")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab", type=int, default=0, help="rows of the embedding; default: chosen by size")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--untied", action="store_true", help="a separate lm_head instead of the tied embedding")
    given = parser.parse_args(arguments)
    if given.text and not Path(given.text).is_file():
        parser.error(f"--text: no file {given.text}")
    if given.vocab and given.vocab < 256 + len(SPECIAL):
        parser.error(f"--vocab: {given.vocab} is too few; 256 bytes and {len(SPECIAL)} special tokens need 259")
    tied = not given.untied
    try:
        made = make(given.family, given.size, given.out, given.text, given.seed, given.vocab, tied, given.dtype)
    except ValueError as error:
        parser.error(str(error))
    print(f"{given.out}: {given.family}, {made:,} parameters, {given.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
