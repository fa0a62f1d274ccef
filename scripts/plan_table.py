"""Write docs/plan.md: what full tuning and LoRA of well-known models need on TPU slices from 4 to 256 chips.

    python scripts/plan_table.py                       # the tables, by formula, in a minute
    python scripts/plan_table.py --compile Qwen3-8B@v5e:4x4 "Qwen3-8B@v5e:2x2 LoRA"    # first compile these (libtpu,
                                                                                       # 1 to 4 minutes each)

Compiled rows are kept in docs/plan.json, so that they need not be compiled again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from itune.config import load_config
from itune.plan.apart import compiled_apart
from itune.plan.chips import parse_topology
from itune.plan.inputs import known
from itune.plan.run import formula_report
from itune.runtime.cuda import set_up_jax
from itune.runtime.libtpu import quiet_without_tpu
from itune.types import InputError

ROOT = Path(__file__).parents[1]
STORE, PAGE = ROOT / "docs" / "plan.json", ROOT / "docs" / "plan.md"
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128,
    "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 40960, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000, "torch_dtype": "bfloat16", "vocab_size": 151936,
}  # fmt: skip
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False,
    "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 131072, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "vocab_size": 128256,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
}  # fmt: skip
# the numbers of the published config.json files
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {**QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16,
                   "num_hidden_layers": 28, "tie_word_embeddings": True},
    "Qwen3-8B": {**QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32,
                 "num_hidden_layers": 36, "tie_word_embeddings": False},
    "Llama-3.1-8B": {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
                     "num_hidden_layers": 32},
    "Gemma-2-9B": {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "attention_bias": False, "head_dim": 256,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 3584, "intermediate_size": 14336,
        "initializer_range": 0.02, "max_position_embeddings": 8192, "num_attention_heads": 16, "num_hidden_layers": 42,
        "num_key_value_heads": 8, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "sliding_window": 4096, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 256000,
    },
    "Qwen3-30B-A3B": {
        **QWEN3, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "decoder_sparse_step": 1,
        "hidden_size": 2048, "intermediate_size": 6144, "mlp_only_layers": [], "moe_intermediate_size": 768,
        "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
    "Llama-3.1-70B": {**LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
                      "num_hidden_layers": 80},
}  # fmt: skip
FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}
SHAPES = {"v5e": FLAT, "v6e": FLAT, "v5p": CUBES}
LENGTH = 4096
HEAD = """# What a run needs, before it is paid for

`itune plan --config F --topology v5e:4x4` answers on a laptop: memory of one device, "fits" or by how much not, bytes
that devices exchange, FLOPs done over FLOPs needed, step time, hours and cost. With a compiler for the chips it
compiles the run's own train and evaluation steps: libtpu for TPUs (`pip install libtpu`), JAX's CUDA plugin for the
GPUs of one host such as `gpu:h200:8` (`pip install 'itune[cuda-compiler]'`: 130 MB; no GPU, driver or CUDA library).
Without, or with `--formula`, it computes. `--search` looks for the fastest mesh, micro-batch and rematerialisation that
fits (it compiles train steps only). `itune train` says in one line what it will use. Prices come from
`configs/prices.toml`: list prices on a date, yours to edit.

This page is written by `scripts/plan_table.py`. All rows: {length} tokens a row, one row a chip, `train.remat=full`,
bfloat16 compute, fsdp over all chips, packed rows with segment ids, clipping. Full tuning has float32 weights and
both moments in float32; LoRA has rank 16 on every projection and a bfloat16 base. GiB a chip; **bold** fits into what
programs may use (v5e 15.75, v6e 31.25, v5p 95.74 GiB; 0.9 of a GPU's memory, which is what itune has JAX take unless
`XLA_CLIENT_MEM_FRACTION` says otherwise: H100 71.2, H200 125.8 GiB).

Times are estimates, not measurements: nothing here has run on a TPU. They assume a stated share of peak (v5e 60 %,
v5p 62 %, v6e 50 %), 80 % of the interconnect, and that exchange and computation overlap. `model.compute_dtype=float32`
takes the same share of the chip's float32 rate: six bfloat16 passes on a TPU, 67 of 989 TFLOP/s on an H100 or H200.
MFU is of the bfloat16 peak in either dtype, as in a run.
"""


def write_models(folder: Path) -> None:
    """A folder with config.json for every model: planning reads no weights."""
    for name, fields in MODELS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(fields))


def recipe(folder: Path, name: str, chips: int, lora: bool = False) -> Any:
    """One row a chip of full tuning, or of LoRA."""
    values: dict[str, Any] = {
        "model.path": str(folder / name), "model.compute_dtype": "bfloat16", "train.remat": "full",
        "train.batch_size": chips, "data.max_length": LENGTH, "train.max_steps": 1000, "eval.batch_size": chips,
    }  # fmt: skip
    values |= {"lora.rank": 16, "model.param_dtype": "bfloat16"} if lora else {}
    return load_config("sft", values)


def by_formula(folder: Path, name: str) -> list[str]:
    """A table of one model: slices down, chips across."""
    chips = [f"{chip} {kind}" for chip in SHAPES for kind in ("full", "LoRA")]
    lines = [f"### {name}", "", "| chips | " + " | ".join(chips) + " | full, v5e / v6e / v5p: tokens/s a chip |",
             "|---" * (len(chips) + 2) + "|"]  # fmt: skip
    for count in FLAT:
        cells, speeds = [], []
        for chip, shapes in SHAPES.items():
            where = parse_topology(f"{chip}:{shapes[count]}")
            for lora in (False, True):
                config = recipe(folder, name, count, lora)
                try:
                    report = formula_report(config, where, known(config, read_data=False), {})
                except InputError as error:
                    cells.append(f"({str(error).splitlines()[0][:40]})")
                    continue
                size = f"{report.need.total / 2**30:.1f}"
                cells.append(f"**{size}**" if report.fits else size)
                if not lora:
                    speeds.append(f"{report.time.tokens_per_second / count:,.0f}" if report.fits else "-")
        lines.append(f"| {count} | " + " | ".join(cells) + " | " + " / ".join(speeds) + " |")
    return [*lines, ""]


def report_of(folder: Path, target: str, how: Callable[..., Any]) -> Any:
    """What `how` says of a target: "MODEL@SLICE", full tuning of one model on one slice, or "MODEL@SLICE LoRA"."""
    target, _, kind = target.partition(" ")
    name, _, topology = target.partition("@")
    where = parse_topology(topology)
    config = recipe(folder, name, where.chips, lora=kind == "LoRA")
    return how(config, where, known(config, read_data=False), {})


ON_TPUS = """## Compiled for TPUs

The train and evaluation steps as above, compiled ahead of time (libtpu) without the chips: full tuning on
one slice of each chip that holds it, LoRA on the smallest. Bytes are what one device receives a step, loops
counted; a collective-permute is a gather or a sum that XLA runs as a ring beside the product. On v5e:8x8 and
16x16, v6e:8x8 and v5p:2x2x4 XLA sums gradients by all-reduce, twice the bytes of a reduce-scatter, which the
estimates below take. The formula is within a tenth of every row.
"""
ON_GPUS = """## Compiled for GPUs

The same on NVIDIA GPUs of one host. Memory includes an estimate of what cuDNN takes beside XLA; with it, peaks measured
on an H200 were found again within 5 % ([RESULTS_GPU](../benchmarks/RESULTS_GPU.md)). The formula is within a tenth of
every row. Gemma 2 caps its scores, for which no kernel on GPUs is used here: its attention runs in plain XLA. Experts
are multiplied in tiles, whose padding shows in FLOPs.
"""


def compiled_table(folder: Path, rows: dict[str, Any], head: str) -> list[str]:
    lines = [
        head,
        "| model, slice | train GiB | formula | evaluation GiB | fits | FLOPs / needed | GB received a step | CPU s |",
        "|---" * 8 + "|",
    ]  # fmt: skip
    for target, row in sorted(rows.items()):
        memory, flops = row["memory"], row["flops"]
        compiled, moved = row["compiled"], sorted(row["traffic"].items())
        traffic = ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in moved if size > 5e7)
        lines.append(
            f"| {target.replace(' ', ', ').replace('@', ', ')} | {memory['total'] / 2**30:.2f} | "
            f"{report_of(folder, target, formula_report).need.total / 2**30:.2f} | "
            f"{memory['evaluation'] / 2**30:.2f} | {'yes' if row['fits'] else 'no'} | "
            f"{flops['hardware'] / flops['model']:.2f} | {traffic} | {compiled['cpu_seconds']:.0f} |"
        )
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", nargs="*", default=[], metavar="TARGET",
                        help='compile these first: "MODEL@SLICE" (full tuning) or "MODEL@SLICE LoRA"')
    arguments = parser.parse_args()
    quiet_without_tpu()
    set_up_jax()
    rows = json.loads(STORE.read_text()) if STORE.is_file() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder)
        for target in arguments.compile:
            rows[target] = report_of(folder, target, compiled_apart).to_dict()
            STORE.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
            print(f"{target}: {rows[target]['memory']['total'] / 2**30:.2f} GiB", flush=True)
        gpus = {target: row for target, row in rows.items() if "@gpu:" in target}
        tpus = {target: row for target, row in rows.items() if target not in gpus}
        tables = compiled_table(folder, tpus, ON_TPUS) + compiled_table(folder, gpus, ON_GPUS)
        page = [HEAD.format(length=LENGTH), *tables, "## By formula", ""]
        for model in MODELS:
            page += by_formula(folder, model)
    PAGE.write_text("\n".join(page))
    print(f"{PAGE}: {len(MODELS)} models, {len(rows)} compiled rows")


if __name__ == "__main__":
    main()
