"""A whole training run against a plain torch loop on the same Hugging Face Llama, float32, step by step."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
import transformers

from itune.config import OptimizerSection
from itune.feed import to_device
from itune.models import load_pretrained
from itune.objectives import make_sft
from itune.optim import make_optimizer, make_schedule
from itune.sharding import make_mesh
from itune.step import init_state, make_train_step
from itune.types import Batch

STEPS, ROWS, MICRO, L, V = 8, 12, 4, 16, 40
SECTION = OptimizerSection(learning_rate=1e-3, schedule="cosine", warmup=3, weight_decay=0.1, clip_norm=0.5)


def rows(step):
    """Ragged rows: token ids, and labels that skip the prompt, -100 where there is nothing to learn."""
    rng = np.random.default_rng(step)
    ids, labels, mask = np.zeros((ROWS, L), np.int64), np.full((ROWS, L), -100), np.zeros((ROWS, L), np.int64)
    for row in range(ROWS):
        length, prompt = int(rng.integers(6, L + 1)), int(rng.integers(1, 5))
        ids[row, :length] = rng.integers(1, V, length)  # transformers does not train the embedding of its padding id 0
        labels[row, prompt:length] = ids[row, prompt:length]
        mask[row, :length] = 1
    return ids, labels, mask


def to_batch(ids, labels, mask):
    """The same rows with the shift done: what is predicted at a place stands beside the token of that place."""
    follows = np.roll(labels, -1, axis=1)
    follows[:, -1] = -100
    on = follows != -100
    positions = np.tile(np.arange(L), (ROWS, 1))
    targets = np.where(on, follows, 0)
    arrays = (ids, targets, on.astype(np.float32), mask, positions)
    return Batch(*(a if a.dtype == np.float32 else a.astype(np.int32) for a in arrays))


def torch_run(model):
    """(loss, gradient norm, learning rate) of each step: micro-batches, clipping, decay groups, schedule."""
    decayed = [p for n, p in model.named_parameters() if "norm" not in n]
    kept = [p for n, p in model.named_parameters() if "norm" in n]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    scheduler = transformers.get_scheduler("cosine", optimizer, 3, STEPS)
    history = []
    for step in range(STEPS):
        ids, labels, mask = map(torch.tensor, rows(step))
        count, total = (labels[:, 1:] != -100).sum(), 0.0
        for start in range(0, ROWS, MICRO):
            part = slice(start, start + MICRO)
            logits = model(input_ids=ids[part], attention_mask=mask[part]).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[part, 1:].flatten(), reduction="sum")
            (loss / count).backward()
            total += loss.item() / count.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        history.append((total, norm.item(), scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return np.array(history)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, attn_implementation="eager", pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).float().train()
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return model, folder


def test_eight_steps_equal_torch(llama):
    theirs, folder = llama
    mesh = make_mesh({}, jax.devices()[:1])
    model, params = load_pretrained(folder, mesh)
    optimizer, schedule = make_optimizer(SECTION, STEPS), make_schedule(SECTION, STEPS)
    state = init_state(model, params, optimizer, 0, mesh)
    step = make_train_step(
        make_sft(model, chunk=16), optimizer, schedule, mesh, accumulation=ROWS // MICRO, clip_norm=SECTION.clip_norm
    )
    history = []
    for k in range(STEPS):
        state, metrics = step(state, to_device(to_batch(*rows(k)), mesh))
        history.append([float(metrics[name]) for name in ("loss", "grad_norm", "learning_rate")])
    wanted = torch_run(theirs)
    ours = np.array(history)
    assert wanted[:, 1].max() > 0.5, "clipping is exercised"
    np.testing.assert_allclose(ours[:, 0], wanted[:, 0], atol=2e-6, rtol=0)
    np.testing.assert_allclose(ours[:, 1], wanted[:, 1], atol=5e-6, rtol=0)
    np.testing.assert_array_equal(ours[:, 2].astype(np.float32), wanted[:, 2].astype(np.float32))

    theirs.save_pretrained(folder / "tuned")
    _, tuned = load_pretrained(folder / "tuned", mesh)
    for ours, theirs in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(tuned)):
        np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=0)
