"""The peer of the LoRA rows of benchmarks/gpu.py: peft on transformers with torch, at the same sizes."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import peft
import torch
import transformers

from benchmarks.gpu_rows import SIZES, conversations, whole_batches
from itune.flops import batch_pairs, partial_train_flops, peak_flops
from itune.models import ModelConfig
from itune.models.architecture import LayerKind


def torch_lora_8b(
    tiny: bool, rows: int = 2, length: int = 4096, steps: int = 12, rank: int = 16, checkpointing: bool = False
) -> list[dict[str, Any]]:
    """Whole rows, then packed conversations whose positions keep them apart (transformers reads segments from them).

    bfloat16 weights, float32 adapters under autocast, AdamW (fused), scaled-dot-product attention, rows of equal
    length, no gradient checkpointing where memory allows.
    """
    size = "tiny" if tiny else "8b"
    rows, length = (2, 128) if tiny else (rows, length)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _model(size, rank, device, checkpointing)
    vocab = SIZES[size]["vocab_size"]
    lines = []
    for name, batches in (
        ("whole", whole_batches(2, rows, length, vocab)), ("packed", conversations(2, rows, length, vocab)[0]),
    ):
        versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (peft, transformers, torch))
        line = {"system": versions, "rows_are": name, "rows": rows, "length": length, "checkpointing": checkpointing}
        try:
            line |= _time(model, size, batches, steps, device, rank)
        except torch.cuda.OutOfMemoryError:
            line |= {"did_not_fit": True}
        lines.append(line)
    return lines


def _model(size: str, rank: int, device: Any, checkpointing: bool) -> Any:
    sizes = SIZES[size]
    config = transformers.LlamaConfig(
        vocab_size=sizes["vocab_size"], hidden_size=sizes["width"], num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"], num_key_value_heads=sizes["num_kv_heads"], head_dim=sizes["head_dim"],
        intermediate_size=sizes["mlp_width"], tie_word_embeddings=sizes["tie_embeddings"], max_position_embeddings=8192,
        attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = transformers.LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=32, target_modules="all-linear"))
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _time(model: Any, size: str, batches: Any, steps: int, device: Any, rank: int) -> dict[str, Any]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, fused=device.type == "cuda")
    sizes = SIZES[size]
    config = ModelConfig(kinds=(LayerKind(),) * sizes["num_layers"], max_length=8192, **sizes)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    inputs = []
    for batch in batches:
        labels = np.where(batch.loss_weights_BL > 0, batch.targets_BL, -100)
        inputs.append([torch.tensor(np.asarray(x), device=device).long() for x in
                       (batch.tokens_BL, batch.positions_BL, labels)])  # fmt: skip
    warm_up, losses = steps // 3, []
    for number in range(steps):
        if number == warm_up:
            _wait(device)
            start = time.perf_counter()
        tokens, positions, labels = inputs[number % len(inputs)]
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(input_ids=tokens, position_ids=positions).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    _wait(device)
    seconds = time.perf_counter() - start
    timed = [batches[number % len(batches)] for number in range(warm_up, steps)]
    tokens = [int((batch.segment_ids_BL > 0).sum()) for batch in timed]
    flops = sum(
        partial_train_flops(config, n, batch_pairs(config, batch), trained=trained, added=trained)
        for n, batch in zip(tokens, timed, strict=True)
    )
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    peak = peak_flops(name)
    return {
        "tokens_per_second": sum(tokens) / seconds, "mfu": flops / seconds / peak if peak else None,
        "first_loss": float(losses[0]), "last_loss": float(losses[-1]), "trained": trained,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }  # fmt: skip


def _wait(device: Any) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
