#!/usr/bin/env python3
"""Compare every model family with transformers on random configurations, and write the table of docs/models.md.

    JAX_PLATFORMS=cpu python scripts/check_families.py --cases 5 --out docs/models.md

A case draws a configuration with a seeded generator, lets transformers (eager attention, float32) make a checkpoint
with random weights, loads it here, and compares logits, the gradient of the loss by tensor, and the bytes of the
exported folder. Rows are packed here and run one sequence at a time there. Needs torch and transformers (extra `dev`).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from itune.models import load_pretrained, save_pretrained
from itune.models.families import FAMILIES
from itune.models.families.common import Fields
from itune.objectives.losses import chunked_cross_entropy

LENGTHS = [[9, 1, 15], [22]]  # packed rows of 27 slots, padding after them
SLOTS = 27
QUICK = {"xla_backend_optimization_level": 0}  # compiling takes most of the time here
MARK = "<!-- families -->"

CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3Text",
    "phi3": "Phi3",
    "olmo2": "Olmo2",
    "olmo3": "Olmo3",
    "smollm3": "SmolLM3",
    "granite": "Granite",
    "gpt_oss": "GptOss",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """What one case found. grad: the largest ||a - b|| / ||a|| of a tensor. round_trip: what differs, or ""."""

    family: str
    switches: tuple[str, ...]
    logit: float
    grad: float
    round_trip: str
    size: float  # the largest logit


def draw(family: str, seed: int) -> tuple[dict[str, Any], bool]:
    """Keyword arguments of the transformers config of a case, and whether config.json is in the older spelling.

    Cases 0 and 1 together turn every switch of a family on once where the two choices of a switch alternate.
    """
    rng = np.random.default_rng([zlib.crc32(family.encode()), seed])

    def pick(*choices: Any) -> Any:  # a walk through the choices from a random start: each is met in few cases
        start = np.random.default_rng([zlib.crc32(family.encode()), len(used)]).integers(len(choices))
        used.append(choices)
        return choices[(start + seed) % len(choices)]

    used: list[Any] = []
    heads, group, head_dim = pick(4, 2, 6), pick(2, 1), pick(8, 16)
    fields: dict[str, Any] = {
        "vocab_size": int(rng.choice([53, 61, 67])),
        "hidden_size": heads * (head_dim if family == "phi3" else pick(8, 12, 4)),  # phi3 has no head_dim of its own
        "intermediate_size": int(rng.choice([20, 28])),
        "num_hidden_layers": pick(3, 1, 5),
        "num_attention_heads": heads,
        "num_key_value_heads": heads // group,
        "head_dim": head_dim,
        "max_position_embeddings": 128,
        "tie_word_embeddings": pick(True, False),
        "rms_norm_eps": pick(1e-6, 1e-3),
        "pad_token_id": None,
    }
    layers = fields["num_hidden_layers"]
    default = {"rope_type": "default", "rope_theta": 500.0}
    linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3 |= {"original_max_position_embeddings": 24, "rope_theta": 500.0}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1000.0}
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    window = pick(5, 1, 40)
    two_ropes = {"full_attention": pick(linear, yarn, default), "sliding_attention": default | {"rope_theta": 100.0}}
    types = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"][:layers]
    fields["rope_parameters"] = dict(pick(llama3, linear, yarn, dynamic, default))
    bias = pick(True, False)
    if family in ("llama", "granite", "smollm3"):
        fields |= {"attention_bias": bias, "mlp_bias": pick(True, False), "hidden_act": pick("silu", "gelu")}
    if family in ("gemma", "gemma2", "gemma3_text", "olmo2", "olmo3", "qwen3", "qwen3_moe"):
        fields["attention_bias"] = bias
    if family in ("mistral", "mixtral"):
        fields["sliding_window"] = pick(window, None)
    if family in ("qwen2", "qwen3"):
        fields |= {"use_sliding_window": pick(True, False), "sliding_window": window, "max_window_layers": pick(1, 2)}
    if family == "qwen3_moe":
        fields |= {"use_sliding_window": pick(False, True), "sliding_window": window}
        fields |= {"num_experts": pick(4, 5), "num_experts_per_tok": pick(2, 3, 1), "moe_intermediate_size": 12}
        fields |= {"norm_topk_prob": pick(True, False), "decoder_sparse_step": pick(1, 2)}
        fields |= {"mlp_only_layers": pick([], [1])}
    if family == "mixtral":
        fields |= {"num_local_experts": pick(4, 5), "num_experts_per_tok": pick(2, 3, 1)}
    if family == "gemma":
        fields["hidden_act"] = pick("gelu_pytorch_tanh", "gelu")
    if family in ("gemma2", "gemma3_text"):
        fields |= {"query_pre_attn_scalar": pick(12, head_dim), "sliding_window": window}
        fields |= {"attn_logit_softcapping": pick(2.0, None), "final_logit_softcapping": pick(3.0, None)}
        fields |= {"layer_types": pick(types, None), "hidden_activation": pick("gelu_pytorch_tanh", "gelu")}
    if family == "gemma3_text":
        fields |= {"rope_parameters": two_ropes, "attn_logit_softcapping": None}
        if fields["layer_types"] is None:
            fields["sliding_window_pattern"] = 2
    if family == "olmo3":
        fields |= {"sliding_window": window, "layer_types": pick(types, None)}
        fields["rope_parameters"] = two_ropes | {"sliding_attention": default | {"rope_theta": 1000.0}}
    if family == "phi3":
        share = pick(0.5, 1.0)
        pairs = int(head_dim * share) // 2
        longrope = {"rope_type": "longrope", "rope_theta": 300.0, "original_max_position_embeddings": 12}
        longrope |= {"short_factor": [1.0 + 0.1 * i for i in range(pairs)]}
        longrope |= {"long_factor": [2.0 + 0.5 * i for i in range(pairs)]}
        fields["rope_parameters"] = dict(pick(longrope, default)) | {"partial_rotary_factor": share}
        fields |= {"sliding_window": pick(None, window), "original_max_position_embeddings": 12}
    if family == "smollm3":
        fields |= {"no_rope_layer_interval": pick(2, 3), "use_sliding_window": pick(True, False)}
        fields["sliding_window"] = window
    if family == "gpt_oss":
        fields |= {"attention_bias": bias, "sliding_window": window, "layer_types": pick(types, None)}
        fields |= {"num_local_experts": pick(4, 5), "num_experts_per_tok": pick(2, 3, 1)}
        fields |= {"swiglu_limit": pick(0.7, 7.0), "swiglu_alpha": pick(1.702, 1.2)}
        fields["rope_parameters"] = pick(yarn | {"truncate": False}, None, default, llama3)  # None is a yarn too
    if family == "granite":
        fields |= {"embedding_multiplier": pick(3.0, 1.0), "attention_multiplier": pick(0.2, 0.05)}
        fields |= {"residual_multiplier": pick(0.7, 1.0), "logits_scaling": pick(4.0, 1.5)}
    older = bool(pick(False, True)) and family not in ("gemma3_text", "olmo3")
    return fields, older


def switches(config: Any) -> set[str]:
    """The names of the fields of a ModelConfig and its layers that are not at their defaults."""
    names = {
        field.name
        for field in dataclasses.fields(config)
        if field.default is not dataclasses.MISSING and getattr(config, field.name) != field.default
    } - {"init_std", "norm_eps"}
    kinds = config.kinds
    names |= {"window"} if any(kind.window is not None for kind in kinds) else set()
    names |= {"no rope"} if any(kind.rope is None for kind in kinds) else set()
    names |= {"experts"} if any(kind.experts for kind in kinds) else set()
    names |= {f"{rope.scaling} rope" for rope in config.ropes if rope.scaling != "none"}
    names |= {"partial rope" for rope in config.ropes if rope.share != 1}
    names |= {"two ropes"} if len(config.ropes) > 1 else set()
    return names | ({"head_dim"} if config.head_dim * config.num_heads != config.width else set())


def older_spelling(folder: Path) -> None:
    """rope_theta, rope_scaling and torch_dtype at the top of config.json, as older folders have them."""
    config = json.loads((folder / "config.json").read_text())
    default = {"rope_type": "default"} if config["model_type"] == "gpt_oss" else None  # there null means yarn
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    config["rope_scaling"] = default if rope["rope_type"] == "default" else {"type": rope.pop("rope_type"), **rope}
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))


def judge(family: str, fields: dict[str, Any], seed: int) -> Any:
    """A float32 model of transformers with random weights, every one of them in use."""
    import torch
    import transformers

    torch.set_num_threads(1)  # the models are tiny: a second thread only spins
    torch.manual_seed(seed)
    config = getattr(transformers, f"{CLASSES[family]}Config")(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    middle = 0.0 if family.startswith("gemma") else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(middle if "norm" in name else 0.0, 0.3 if "norm" in name else 0.2)
    return model.eval()


def reload(folder: Path) -> Any:
    """The judge again, as transformers reads the rewritten config.json."""
    import torch
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(folder, attn_implementation="eager", dtype=torch.float32).eval()


def batch(vocab: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, segments and positions of the packed rows."""
    rng = np.random.default_rng(seed)
    tokens_BL, segments_BL, positions_BL = (np.zeros((len(LENGTHS), SLOTS), np.int32) for _ in range(3))
    for part, segment in places():
        length = part[1].stop - part[1].start
        tokens_BL[part], segments_BL[part] = rng.integers(0, vocab, length), segment
        positions_BL[part] = np.arange(length)
    return tokens_BL, segments_BL, positions_BL


def places() -> list[tuple[tuple[int, slice], int]]:
    """((row, slots), segment) of every sequence."""
    out = []
    for row, lengths in enumerate(LENGTHS):
        stops = np.cumsum(lengths)
        out += [((row, slice(int(b - n), int(b))), i) for i, (n, b) in enumerate(zip(lengths, stops, strict=True), 1)]
    return out


def run_judge(model: Any, tokens_BL: np.ndarray) -> list[np.ndarray]:
    """Logits of every sequence; leaves the gradient of the summed loss in the model."""
    import torch

    logits = []
    for part, _ in places():
        ids = torch.tensor(tokens_BL[part], dtype=torch.long)
        out = model(ids[None], use_cache=False).logits[0]
        logits.append(out.detach().numpy())
        if len(ids) > 1:
            torch.nn.functional.cross_entropy(out[:-1], ids[1:], reduction="sum").backward()
    return logits


def run_ours(model: Any, params: Any, tokens_BL: Any, segments_BL: Any, positions_BL: Any) -> tuple[np.ndarray, Any]:
    """Logits of the packed rows, and the gradient of the summed loss through the chunked loss."""
    last_BL = np.pad(segments_BL[:, 1:], ((0, 0), (0, 1))) != segments_BL
    targets_BL, weights_BL = np.roll(tokens_BL, -1, axis=1), np.where(last_BL | (segments_BL == 0), 0.0, 1.0)

    def loss(params: Any) -> Any:
        hidden_BLD = model.hidden(params, tokens_BL, segments_BL, positions_BL)
        kernel_VD = model.unembed(params)
        result = chunked_cross_entropy(
            model.head_logits, kernel_VD, hidden_BLD, targets_BL, jnp.asarray(weights_BL, jnp.float32), chunk=32
        )
        return result.loss_sum, model.logits(params, hidden_BLD)

    step = jax.jit(jax.grad(loss, has_aux=True)).lower(params).compile(compiler_options=QUICK)
    grads, logits = step(params)
    return np.asarray(logits), grads


def check(family: str, seed: int, folder: Path) -> Row:
    """One case, in an empty folder."""
    import torch
    from safetensors.numpy import load_file

    fields, older = draw(family, seed)
    theirs = judge(family, fields, seed)
    theirs.save_pretrained(folder / "model")
    if older:
        older_spelling(folder / "model")
        theirs = reload(folder / "model")
    model, params = load_pretrained(folder / "model")
    config = json.loads((folder / "model" / "config.json").read_text())
    save_pretrained(folder / "export", model, params, source=folder / "model")
    a, b = (load_file(folder / name / "model.safetensors") for name in ("model", "export"))
    wrong = [name for name in sorted(set(a) | set(b)) if name not in a or name not in b or not same(a[name], b[name])]
    if json.loads((folder / "export" / "config.json").read_text()) != config:
        wrong.append("config.json")
    module = FAMILIES[family]
    if module.config_from_hf(Fields(module.config_to_hf(model.config), "written")) != model.config:
        wrong.append("config_to_hf")

    rows = batch(model.config.vocab_size, seed)
    ours_BLV, grads = run_ours(model, params, *rows)
    logits = run_judge(theirs, rows[0])
    logit = max(float(np.abs(ours_BLV[part] - out).max()) for (part, _), out in zip(places(), logits, strict=True))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    theirs.save_pretrained(folder / "their_gradient")  # by the names that a checkpoint has on disk
    save_pretrained(folder / "our_gradient", model, grads)
    a, b = (load_file(folder / f"{name}_gradient" / "model.safetensors") for name in ("their", "our"))
    whole = float(np.sqrt(sum(np.square(tensor, dtype=np.float64).sum() for tensor in a.values())))
    grad = max(difference(a[name], b[name], 1e-6 * whole) for name in a)
    size = max(float(np.abs(out).max()) for out in logits)
    return Row(family, tuple(sorted(switches(model.config))), logit, grad, ", ".join(wrong), size)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def difference(a: np.ndarray, b: np.ndarray, nothing: float) -> float:
    """||a - b|| / ||a||; 0 where both norms are below `nothing`.

    Some gradients are zero but for rounding: of a key bias without rope, of a router that gives one expert all weight.
    """
    norm = float(np.linalg.norm(a))
    if max(norm, float(np.linalg.norm(b))) <= nothing:
        return 0.0
    return float(np.linalg.norm(a - b)) / norm if norm else float("inf")


def table(rows: list[Row]) -> str:
    """Markdown: a line a family, the largest differences of its cases."""
    lines = ["| model_type | cases | switches met | max abs(dlogit) | max rel(dgrad) | round trip |"]
    lines.append("|---|---|---|---|---|---|")
    for family in dict.fromkeys(row.family for row in rows):
        mine = [row for row in rows if row.family == family]
        met = ", ".join(sorted({name for row in mine for name in row.switches}))
        trip = "; ".join(sorted({row.round_trip for row in mine} - {""})) or "bytes equal"
        worst = max(row.logit for row in mine), max(row.grad for row in mine)
        lines.append(f"| {family} | {len(mine)} | {met} | {worst[0]:.1e} | {worst[1]:.1e} | {trip} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare every model family with transformers.")
    parser.add_argument("--cases", type=int, default=5, help="configurations a family (default 5)")
    parser.add_argument("--family", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--out", type=Path, help=f"a page whose text between two lines {MARK} becomes the table")
    args = parser.parse_args()
    rows, begun = [], time.monotonic()
    for family in args.family:
        for seed in range(args.cases):
            with tempfile.TemporaryDirectory() as folder:
                rows.append(check(family, seed, Path(folder)))
            print(rows[-1], flush=True)
    text = f"{table(rows)}\n\n{origin(args, time.monotonic() - begun)}"
    print(text)
    if args.out:
        before, _, after = args.out.read_text().split(MARK)
        args.out.write_text(f"{before}{MARK}\n{text}\n{MARK}{after}")
    return int(any(row.logit > 1e-4 or row.grad > 1e-4 or row.round_trip for row in rows))


def origin(args: argparse.Namespace, seconds: float) -> str:
    """The line under the table: when, with what, by which command."""
    names = ("transformers", "torch", "jax")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    command = f"python scripts/check_families.py --cases {args.cases}"
    return f"One run: {datetime.date.today()}, {versions}, {seconds / 60:.0f} min, `{command}`."


if __name__ == "__main__":
    sys.exit(main())
