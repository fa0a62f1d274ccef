#!/usr/bin/env python3
"""Tokens a second of greedy generation, itune against transformers, on one model folder.

    python benchmarks/generation.py [--model FOLDER] [--prompts 64] [--new-tokens 64] [--rounds 5] [--threads N]

64 ragged prompts of 16 to 128 tokens in one static batch, float32, no stop token, both engines in one process and in
turn, each round the other one first; compilation is left out. Without --model a 15m qwen3 folder is made by
scripts/make_random_model.py. Prints one JSON line an engine and one with the ratio. Beside the wall clock (best round)
stand CPU-seconds of the process (least round), which a busy machine disturbs less: `tokens_per_cpu_second`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder (default: a new one of 15 million parameters)")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="cores for both (default: all)")
    given = parser.parse_args()
    if given.threads:
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: given.threads]))
    with tempfile.TemporaryDirectory() as folder:
        measure(given, given.model or make_model(Path(folder) / "qwen3-15m"))


def make_model(folder: Path) -> str:
    command = [sys.executable, str(ROOT / "scripts" / "make_random_model.py"), "--family", "qwen3", "--size", "15m"]
    subprocess.run([*command, "--out", str(folder)], check=True, stdout=subprocess.DEVNULL)
    return str(folder)


def measure(given: argparse.Namespace, folder: str) -> None:
    import numpy as np
    import torch
    import transformers

    from itune import decode, load_pretrained

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model, params = load_pretrained(folder)
    judge = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rng = np.random.default_rng(0)
    lengths = rng.integers(16, 129, given.prompts)
    prompts = [rng.integers(0, model.config.vocab_size, n).astype(np.int32) for n in lengths]

    def ours() -> list[list[int]]:
        answers = decode.generate_ids(
            model, params, prompts, max_new_tokens=given.new_tokens, batch_size=given.prompts
        )
        return [answer.ids.tolist() for answer in answers]

    ids, mask = np.zeros((2, given.prompts, max(lengths)), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, len(ids[row]) - len(prompt) :], mask[row, len(ids[row]) - len(prompt) :] = prompt, 1

    @torch.no_grad()
    def theirs() -> list[list[int]]:
        out = judge.generate(
            torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=given.new_tokens, do_sample=False,
            eos_token_id=None, pad_token_id=0, cache_implementation=None,
        )
        return out[:, ids.shape[1] :].tolist()

    engines: dict[str, Callable[[], list[list[int]]]] = {"itune": ours, "transformers": theirs}
    answers = {name: run() for name, run in engines.items()}  # compiles
    wall: dict[str, list[float]] = {name: [] for name in engines}
    cpu: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(given.rounds):
        for name in list(engines)[:: 1 if number % 2 == 0 else -1]:
            begun = time.perf_counter(), time.process_time()
            engines[name]()
            wall[name].append(time.perf_counter() - begun[0])
            cpu[name].append(time.process_time() - begun[1])
    tokens = given.prompts * given.new_tokens
    cores = len(os.sched_getaffinity(0))
    for name in engines:
        print(json.dumps({
            "benchmark": "generation", "engine": name, "prompts": given.prompts, "new_tokens": given.new_tokens,
            "tokens_per_second": tokens / min(wall[name]), "tokens_per_cpu_second": tokens / min(cpu[name]),
            "wall_seconds": wall[name], "cpu_seconds": cpu[name], "cores": cores,
        }))  # fmt: skip
    same = float(np.mean([a == b for a, b in zip(answers["itune"], answers["transformers"], strict=True)]))
    print(json.dumps({
        "benchmark": "generation", "ratio": min(wall["transformers"]) / min(wall["itune"]),
        "cpu_ratio": min(cpu["transformers"]) / min(cpu["itune"]), "same_answers": same, "load": os.getloadavg()[0],
        "cores": cores,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
