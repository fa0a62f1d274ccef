#!/usr/bin/env python3
"""Tokens a second of greedy generation, itune against transformers, on one model folder.

    python benchmarks/generation.py --model runs/qwen3-15m [--prompts 64] [--new-tokens 64] [--rounds 3]

64 ragged prompts of 16 to 128 tokens in one static batch, float32, no stop token, both in one process in turn, best of
the rounds; compilation is left out. Prints one JSON line for each and one with the ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import torch
import transformers

from itune import decode, load_pretrained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    model, params = load_pretrained(given.model)
    judge = transformers.AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
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
            eos_token_id=None, pad_token_id=0,
        )
        return out[:, ids.shape[1] :].tolist()

    answers = {name: run() for name, run in (("itune", ours), ("transformers", theirs))}  # compiles
    best = dict.fromkeys(answers, float("inf"))
    for _ in range(given.rounds):
        for name, run in (("itune", ours), ("transformers", theirs)):
            begun = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - begun)
    rates = {name: given.prompts * given.new_tokens / seconds for name, seconds in best.items()}
    for name, rate in rates.items():
        print(json.dumps({"benchmark": "generation", "engine": name, "tokens_per_second": rate}))
    same = float(np.mean([a == b for a, b in zip(answers["itune"], answers["transformers"], strict=True)]))
    ratio = rates["itune"] / rates["transformers"]
    print(json.dumps({"benchmark": "generation", "ratio": ratio, "same_answers": same, "load": os.getloadavg()[0]}))


if __name__ == "__main__":
    main()
