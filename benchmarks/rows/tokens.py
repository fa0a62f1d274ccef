"""Real conversations of P3 and GSM8K up to 1,024 tokens: tokens that are no padding, a second; and peak memory."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from benchmarks import inputs
from benchmarks.row import Bound, Row

EXAMPLES, LENGTH, CHECKED = 192, 1024, 24


def prepare(folder: Path) -> None:
    inputs.make_model(folder / "model", "15m")
    inputs.make_tokenizer(folder / "model", 8192)
    from itune.data.render import render
    from itune.data.templates import load_tokenizer

    tokenizer = load_tokenizer(str(folder / "model"))
    kept: list[Any] = []
    for row in inputs.rows():
        if len(render(row["prompt"] + row["completion"], tokenizer).token_ids) <= LENGTH:
            kept.append(row)
        if len(kept) == EXAMPLES:
            break
    inputs.write_rows(folder / "rows.jsonl", iter(kept))


def itune(folder: Path) -> dict[str, Any]:
    from benchmarks import ours

    config = ours.config_of(
        folder, data={"train": str(folder / "rows.jsonl"), "max_length": LENGTH},
        train={"batch_size": 4, "accumulation": 2, "remat": "dots"},
    )  # fmt: skip
    data = ours.data_of_rows(config)
    result = ours.timed(config, data)
    result.pop("losses")  # other batches than the peer's: the losses of examples are compared instead
    return result | {"example_losses": example_losses(config, data)}


def example_losses(config: Any, data: Any) -> list[float]:
    """Mean loss of each of the first examples, in packed rows."""
    import numpy as np

    from itune.data.loader import eval_batches
    from itune.models import load_pretrained
    from itune.objectives import make_sft
    from itune.sharding import make_mesh
    from itune.step import make_eval_step

    model, params = load_pretrained(config.model.path)
    step = make_eval_step(make_sft(model), make_mesh({"fsdp": 1}))
    batches = eval_batches(data.dataset.train, 4, LENGTH)
    sums, weights = np.zeros((2, len(data.dataset.train)))
    for number in range(len(batches)):
        batch, index_BL = batches[number], batches.example_index_BL(number)
        if not (index_BL[index_BL >= 0] < CHECKED).any():
            continue
        on = index_BL >= 0
        nll_BL = np.asarray(step(params, {}, batch)[0])
        np.add.at(sums, index_BL[on], nll_BL[on])
        np.add.at(weights, index_BL[on], batch.loss_weights_BL[on])
    return (sums / weights)[:CHECKED].tolist()


def trl(folder: Path, **changes: Any) -> dict[str, Any]:
    import datasets

    from benchmarks import peer

    found = inputs.read_rows(folder / "rows.jsonl")
    dataset = datasets.Dataset.from_list(found)
    made = peer.trainer(folder, dataset, **changes)
    losses = torch_losses(made.model, made.processing_class, found[:CHECKED], changes.get("packing", False))
    result = peer.timed(made)
    result.pop("losses")
    return result | {"example_losses": losses}


def torch_losses(model: Any, tokenizer: Any, found: list[Any], packed: bool) -> list[float]:
    """The same means from the peer's model: each example alone, or all in one row with positions that restart."""
    import torch

    ids, labels, positions = [], [], []
    for row in found:
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
        start = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        ids.append(whole)
        labels.append([-100] * len(start) + whole[len(start) :])
        positions.append(list(range(len(whole))))
    means: list[float] = []
    group = 8 if packed else 1
    with torch.no_grad():
        for first in range(0, len(ids), group):
            part = slice(first, first + group)
            flat_ids, flat_labels, flat_positions = (
                list(itertools.chain.from_iterable(x[part])) for x in (ids, labels, positions)
            )
            logits = model(input_ids=torch.tensor([flat_ids]), position_ids=torch.tensor([flat_positions])).logits[0]
            nll = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(flat_labels[1:]), reduction="none")
            begin = 0
            for row in labels[part]:
                count = sum(label != -100 for label in row)
                means.append(float(nll[begin : begin + len(row) - 1].sum()) / count)
                begin += len(row)
    return means


def packed(folder: Path, **changes: Any) -> dict[str, Any]:
    # one row a micro-batch, so that attention is over 1,024 tokens and not over four rows laid end to end
    return trl(folder, packing=True, packing_strategy="bfd", max_length=LENGTH, per_device_train_batch_size=1,
               gradient_accumulation_steps=4, **changes)  # fmt: skip


ROW = Row(
    title=f"Training on {EXAMPLES} conversations of P3 and GSM8K of at most {LENGTH} tokens, 15M-parameter Llama, "
    "float32: real tokens of the steps after the first.",
    note="itune packs 4 rows a step, in two micro-batches, and keeps the products only (train.remat=dots); trl: "
    "SFTConfig's defaults (8 padded rows), but without gradient checkpointing, its default, which slows it and saves "
    "memory (the row tokens_saving has it on); trl_packed: bfd, 4 rows of 1,024 tokens a step, each a micro-batch. "
    "The losses of the first 24 examples agree within 1e-4.",
    sides={"itune": itune, "trl": trl, "trl_packed": packed},
    prepare=prepare,
    equal=(("example_losses", 1e-4),),
    bounds=(
        Bound("tokens_per_second", at_least=2.0, busy="tokens_per_cpu_second", peer="trl"),
        Bound("tokens_per_second", at_least=1.15, busy="tokens_per_cpu_second", peer="trl_packed"),
        Bound("peak_gb", at_most=0.75, peer="trl"),
        Bound("peak_gb", at_most=0.75, peer="trl_packed"),
    ),
)
