#!/usr/bin/env python3
"""Load an exported folder with itune and with transformers (torch, eager attention, float32) and compare the two.

    python scripts/check_with_transformers.py models/x [--json found.json]

Compared: every tensor and file with the hashes of itune_proof.json (where there is one); that transformers finds no
tensor missing or left over; logits of probe tokens, and of a chat where the tokenizer has a template; the ids of that
chat; that generation stops at all that itune stops at. One model is in memory at a time. Prints one line for each; exit
code 1 when something differs, 2 when the folder cannot be read or torch is not installed. `itune export
--check=transformers` runs this file.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np

BOUND = 1e-4  # of a logit, times the largest logit where that is above one
CHAT = [
    {"role": "user", "content": "Name three colours of the rainbow."},
    {"role": "assistant", "content": "Red, orange and yellow."},
    {"role": "user", "content": "And « naïve » in capitals? 日本語 😀"},
]


def ours(folder: str) -> tuple[list[np.ndarray], list[np.ndarray], list[int] | None]:
    """(rows of tokens, their logits, stop ids) as itune has them; with a template the last row is a chat."""
    import itune
    from itune.data.render import render_prompt
    from itune.data.templates import load_tokenizer
    from itune.export.proof import probe_tokens

    model, params = itune.load_pretrained(folder)
    rows, stops = list(probe_tokens(model)), None
    if (Path(folder) / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(folder)
        stops = list(tokenizer.stop_ids)
        if tokenizer.template is not None:
            rows.append(np.asarray(render_prompt(CHAT, tokenizer))[: model.config.max_length])
    return rows, [np.asarray(itune.forward(model, params, row[None])[0]) for row in rows], stops


def theirs(folder: str, rows: list[np.ndarray]) -> tuple[list[np.ndarray], list[str], list[int]]:
    """(logits, what loading complained of, stop ids) as transformers has them."""
    import torch
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    complaints = [f"{kind}: {name}" for kind, names in info.items() if kind != "error_msgs" for name in sorted(names)]
    with torch.no_grad():
        logits = [model.eval()(torch.tensor(np.asarray(row, np.int64))[None]).logits[0].numpy() for row in rows]
    stops = model.generation_config.eos_token_id
    return logits, complaints, stops if isinstance(stops, list) else [] if stops is None else [stops]


def compare(folder: str) -> tuple[dict[str, Any], list[str]]:
    """(numbers, what differs)."""
    import transformers

    from itune.export.hashes import PROOF, verify_folder

    wrong = verify_folder(Path(folder)) if (Path(folder) / PROOF).is_file() else []
    rows, mine, stops = ours(folder)
    gc.collect()
    other, complaints, their_stops = theirs(folder, rows)
    wrong += complaints
    difference = max(float(np.abs(a - b).max()) for a, b in zip(mine, other, strict=True))
    size = max(float(np.abs(b).max()) for b in other)
    if not difference <= BOUND * max(1.0, size):
        wrong.append(f"logits differ by {difference:.3g}; expected at most {BOUND * max(1.0, size):.3g}")
    if stops is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        if len(rows) > 4:
            ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"][: len(rows[-1])]
            if list(ids) != rows[-1].tolist():
                wrong.append(f"the chat has other ids: {list(ids)}, by itune {rows[-1].tolist()}")
        if set(stops) - set(their_stops):
            wrong.append(f"generation stops at {their_stops}; expected all of {stops}")
    numbers = {
        "version": transformers.__version__, "max_abs_logit_difference": difference, "largest_logit": size,
        "tokens": sum(len(row) for row in rows), "stop_ids": their_stops, "bound": BOUND,
    }  # fmt: skip
    return numbers, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="an exported model folder")
    parser.add_argument("--json", help="write the numbers there")
    given = parser.parse_args()
    try:
        import torch  # noqa: F401
    except ImportError:
        print("torch is not installed here; pip install torch, or leave the check out", file=sys.stderr)
        return 2
    from itune.types import InputError, RunError

    try:
        numbers, wrong = compare(given.folder)
    except (InputError, RunError) as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(numbers))
    for line in wrong:
        print(line, file=sys.stderr)
    if given.json:
        Path(given.json).write_text(json.dumps(numbers))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
