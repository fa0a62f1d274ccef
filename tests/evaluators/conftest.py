"""A model of random weights, a word tokenizer with a ChatML template, and held-out items in two categories."""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest

from itune.data.render import render
from itune.data.store import memory_store
from itune.data.templates import with_template
from itune.models import Model, ModelConfig
from itune.models.architecture import LayerKind
from itune.types import Address, Conversation, Message

WORDS = ["say", "copy", "turn", "red", "green", "blue", "sun", "moon", "star", "one", "two", "three"]


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<pad>", "\n", "user", "assistant", "system", *WORDS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")
    return with_template(hf, "chatml")


@pytest.fixture(scope="session")
def model(tokenizer):
    size = -(-tokenizer.vocab_size // 8) * 8
    kinds = (LayerKind(),) * 2
    config = ModelConfig(size, 16, 2, 2, 1, 8, 24, kinds, max_length=64, init_std=0.5, tie_embeddings=True)
    return Model(config, "llama")


@pytest.fixture(scope="session")
def params(model):
    return model.init(jax.random.key(0))


@pytest.fixture(scope="session")
def dataset(tokenizer):
    rng = np.random.default_rng(0)
    conversations = []
    for number in range(11):
        question, answer = (" ".join(rng.choice(WORDS, rng.integers(1, 5))) for _ in range(2))
        metadata = {"category": "sky" if number % 3 else "sea", "task": f"task {number % 4}"}
        messages = (Message("user", question), Message("assistant", answer))
        conversations.append(Conversation(messages, Address("held", "held.jsonl", number + 1), metadata))
    return make_dataset(conversations, tokenizer)


def make_dataset(conversations, tokenizer):
    examples = [render(conversation, tokenizer) for conversation in conversations]
    return types.SimpleNamespace(held_out=memory_store(examples), held_out_conversations=conversations)
