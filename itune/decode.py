"""Text from a model: prefill, then one token a step through the KV cache, for batches of prompts of any lengths.

Prompts are padded on the left, so that every row writes the same cache slot in the same step, and grouped by length, so
that few shapes are compiled. The compiled functions take the model as a static argument: later calls reuse them.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from itune.models.model import Model
from itune.models.unrolled import unroll, unroll_cache, unroll_params
from itune.sharding import constrain, replicated, rows_divisor
from itune.types import InputError
from itune.xla import options

COOLEST = 1e-3  # temperature above 0: far below it logits overflow, and no answer changes any more
SHORTEST = 32  # slots: prompts are padded to this or a larger power of two; to compile one shape more costs more


class Generated(NamedTuple):
    """New tokens of one prompt, int32, the stop token left out; `stopped` is False where the limit cut the answer."""

    ids: np.ndarray
    stopped: bool


class Sampling(NamedTuple):
    """How a token is drawn. `greedy` and `nucleus` are static, so that a greedy step neither sorts nor draws."""

    greedy: bool
    nucleus: bool
    temperature: Any
    top_p: Any
    stop_ids: Any


class State(NamedTuple):
    """A batch in the middle of decoding: `last_B` is drawn but not yet in the cache; `out_BT[:, :count]` is drawn.

    `before_B` tokens of the answer stand in the prompt: the row was begun anew, see `grow`.
    """

    cache: Any
    last_B: Any
    positions_B: Any
    done_B: Any
    stopped_B: Any
    out_BT: Any
    count: Any
    keys_B: Any
    before_B: Any


def generate(
    model: Model,
    params: Any,
    tokenizer: Any,
    conversations: Sequence[Any],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
) -> list[str]:
    """The assistant's next turn for each conversation, as text; a final assistant turn is left out of the prompt.

    `conversations`: Conversation, or lists of {"role", "content"}. `tokenizer`: ours, or a transformers one with a chat
    template. Temperature 0 takes the likeliest token. See `generate_ids` for the rest.
    """
    from itune.data.render import as_tokenizer, render_prompt

    tokenizer = as_tokenizer(tokenizer)
    prompts = [render_prompt(conversation, tokenizer) for conversation in conversations]
    answers = generate_ids(
        model, params, prompts, max_new_tokens=max_new_tokens, stop_ids=tokenizer.stop_ids, temperature=temperature,
        top_p=top_p, seed=seed, batch_size=batch_size,
    )
    return [tokenizer.decode(answer.ids) for answer in answers]


def generate_ids(
    model: Model,
    params: Any,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int = 64,
    stop_ids: Sequence[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
) -> list[Generated]:
    """Continue each prompt (token ids) until a stop token, `max_new_tokens`, or the model's longest context.

    Sampling divides logits by `temperature` and draws from the smallest set of tokens whose probability reaches `top_p`
    (nucleus sampling, arXiv 1904.09751). The draw depends on the seed, the prompt's index in the list and the token's
    index in the answer: not on the batch it shares. `batch_size` is raised to what the mesh can divide. Raises
    InputError for an empty prompt, one that leaves no room in the context, or settings out of range.
    """
    _check(model, prompts, max_new_tokens, temperature, top_p, seed)
    rows = _rows(model, min(batch_size, 1 << max(len(prompts) - 1, 0).bit_length()))  # few prompts: few shapes
    sampling = make_sampling(temperature, top_p, stop_ids)
    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    at_once = _at_once(model, rows)
    rows //= at_once  # as many rows in memory as asked for
    batches = [longest_first[start : start + rows] for start in range(0, len(prompts), rows)]

    def answer(chosen: list[int]) -> list[Generated]:
        texts = [prompts[i] for i in chosen]
        shape = model, rows, _slots(texts), _room(model, texts, max_new_tokens), sampling[:2]
        with contextlib.nullcontext() if shape in _COMPILED else _COMPILING:
            *_, answers = grow(model, params, texts, chosen, sampling, max_new_tokens, seed, rows)
            _COMPILED.add(shape)
        return answers

    with ThreadPoolExecutor(at_once) as pool:
        done = list(pool.map(answer, batches)) if at_once > 1 else [answer(chosen) for chosen in batches]
    answers = {i: text for chosen, texts in zip(batches, done) for i, text in zip(chosen, texts)}  # rows may be empty
    return [answers[i] for i in range(len(prompts))]


_COMPILING = threading.Lock()  # without it two threads would compile the same program
_COMPILED: set[Any] = set()


def grow(
    model: Model, params: Any, prompts: Sequence[np.ndarray], indices: Sequence[int], sampling: Sampling,
    limit: int, seed: int, rows: int, every: int | None = None, room: int | None = None,
) -> Iterator[list[Generated]]:
    """All tokens so far of each prompt's answer, about every `every` tokens (None: once), the last time complete.

    `limit`: tokens of an answer. `room`: tokens that the cache has slots for (default: as many as can be needed). Where
    an answer leaves the original context of longrope all keys take other factors, as in transformers: that row begins
    anew with what it has of its answer.
    """
    answers = [Generated(np.zeros(0, np.int32), False)] * len(prompts)
    room, places = room or _room(model, prompts, limit), list(range(len(prompts)))
    every = min(every or room, room)
    while places:
        before = [answers[place].ids for place in places]
        texts = [np.concatenate([prompts[place], ids]) for place, ids in zip(places, before, strict=True)]
        state = prefill(model, params, texts, [indices[place] for place in places], sampling, room, seed, rows,
                        [len(ids) for ids in before])  # fmt: skip
        try:
            for reached in range(every, room + every, every):
                state = advance(model, params, state, sampling, min(reached, room))
                found = read(state)[: len(places)]
                for place, ids, new in zip(places, before, found, strict=True):
                    whole = np.concatenate([ids, new.ids])
                    answers[place] = Generated(whole[:limit], new.stopped and len(whole) <= limit)
                yield list(answers)
                if all(new.stopped or len(new.ids) < min(reached, room) for new in found):
                    break
        except KeyboardInterrupt:
            jax.block_until_ready(state)  # a process that ends while XLA computes dies of it
            raise
        places = [place for place in places if not answers[place].stopped and len(answers[place].ids) < limit
                  and len(prompts[place]) + len(answers[place].ids) < model.config.max_length]  # fmt: skip


def _room(model: Model, prompts: Sequence[np.ndarray], limit: int) -> int:
    """New tokens that a batch's cache needs slots for: `limit`, or what the context has left, in steps of 64."""
    left = model.config.max_length - min(len(prompt) for prompt in prompts)
    return min(limit, -(-left // 64) * 64)


def _slots(prompts: Sequence[np.ndarray]) -> int:
    return max(SHORTEST, 1 << (max(len(prompt) for prompt in prompts) - 1).bit_length())


def _at_once(model: Model, rows: int) -> int:
    """Batches that run side by side: two on one CPU with cores to spare, where a decode step's products are too small
    for XLA to divide among them (1.4 times the tokens a second); else one.
    """
    alone = (model.mesh is None or model.mesh.size == 1) and jax.process_count() == 1
    return 2 if alone and jax.default_backend() == "cpu" and rows >= 32 and (os.cpu_count() or 1) > 1 else 1


def stream_ids(
    model: Model,
    params: Any,
    prompt: np.ndarray,
    *,
    max_new_tokens: int = 256,
    stop_ids: Sequence[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    every: int = 4,
) -> Iterator[Generated]:
    """The answer to one prompt as it grows: all tokens so far, about every `every` tokens, the last time complete."""
    _check(model, [prompt], max_new_tokens, temperature, top_p, seed)
    sampling = make_sampling(temperature, top_p, stop_ids)
    room = _room(model, [prompt], -(-max_new_tokens // 64) * 64)  # few shapes, whatever limit each turn of a chat has
    for [answer] in grow(model, params, [prompt], [0], sampling, max_new_tokens, seed, _rows(model, 1), every, room):
        yield answer
        if len(answer.ids) == max_new_tokens:
            return


def make_sampling(temperature: float, top_p: float, stop_ids: Sequence[int]) -> Sampling:
    ids = sorted({int(i) for i in stop_ids})
    stops = np.full(-(-len(ids) // 8) * 8 or 8, -1, np.int32)  # -1 is no token; few sizes, so that few are compiled
    stops[: len(ids)] = ids
    return Sampling(temperature == 0, top_p < 1, np.float32(temperature), np.float32(top_p), stops)


def prefill(
    model: Model, params: Any, prompts: Sequence[np.ndarray], indices: Sequence[int], sampling: Sampling,
    new_tokens: int, seed: int, rows: int, before: Sequence[int] = (),
) -> State:
    """The state after the prompts and their first new token. `indices` seed the rows; missing rows are done at once.

    `before`: how many tokens at the end of each prompt are of its answer.
    """
    length = _slots(prompts)
    tokens_BL, segments_BL = np.zeros((2, rows, length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BL[row, length - len(prompt) :] = prompt
        segments_BL[row, length - len(prompt) :] = 1
    seeds_B, before_B = np.zeros((2, rows), np.uint32)
    seeds_B[: len(indices)], before_B[: len(before)] = indices, before
    return _jitted_prefill()(
        model, new_tokens, sampling.greedy, sampling.nucleus, params, tokens_BL, segments_BL, np.uint32(seed), seeds_B,
        before_B, sampling[2:],
    )


def advance(model: Model, params: Any, state: State, sampling: Sampling, limit: int) -> State:
    """Decode until `limit` tokens are drawn in all, or every row is done. The given state is used up."""
    return _advance(model, sampling.greedy, sampling.nucleus, params, state, sampling[2:], np.int32(limit))


def read(state: State) -> list[Generated]:
    """What each row has drawn so far."""
    out_BT, stopped_B, count = jax.device_get((state.out_BT, state.stopped_B, state.count))
    lengths_B = (out_BT[:, :count] >= 0).sum(axis=1)
    return [Generated(row[:n], bool(stopped)) for row, n, stopped in zip(out_BT, lengths_B, stopped_B, strict=True)]


@functools.cache
def _jitted_prefill() -> Any:
    return jax.jit(_prefill, static_argnums=(0, 1, 2, 3), compiler_options=options(jax.devices()[0]))


def _prefill(model, new_tokens, greedy, nucleus, params, tokens_BL, segments_BL, seed, seeds_B, before_B, settings):
    rows, length = tokens_BL.shape
    tokens_BL, segments_BL = (constrain(x, model.mesh, ("batch", None)) for x in (tokens_BL, segments_BL))
    positions_BL = jnp.maximum(jnp.cumsum(segments_BL, axis=1) - 1, 0)
    cache = model.init_cache(rows, length + new_tokens)
    hidden_BLD, cache = model.hidden_with_cache(params, tokens_BL, positions_BL, cache, segment_ids_BL=segments_BL)
    empty_B = segments_BL[:, -1] == 0
    state = State(
        cache=unroll_cache(model, cache),
        last_B=jnp.zeros(rows, jnp.int32),
        positions_B=positions_BL[:, -1],
        done_B=empty_B,
        stopped_B=empty_B,
        out_BT=jnp.full((rows, new_tokens), -1, jnp.int32),
        count=jnp.zeros((), jnp.int32),
        keys_B=jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), seeds_B),
        before_B=before_B,
    )
    return _draw(model, greedy, nucleus, params, state, hidden_BLD[:, -1], settings)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _advance(model, greedy, nucleus, params, state, settings, limit):
    model, params = unroll(model), unroll_params(model, params)

    def unfinished(state):
        return (state.count < limit) & ~jnp.all(state.done_B)

    def step(state):
        positions_B1 = state.positions_B[:, None]
        hidden_B1D, cache = model.hidden_with_cache(params, state.last_B[:, None], positions_B1, state.cache)
        return _draw(model, greedy, nucleus, params, state._replace(cache=cache), hidden_B1D[:, 0], settings)

    return _seen_by_all(model, jax.lax.while_loop(unfinished, step, state))


def _draw(model, greedy, nucleus, params, state, hidden_BD, settings):
    """Draw the token after `hidden_BD` and enter it in the state; rows that are done draw -1, which is no token."""
    temperature, top_p, stop_ids = settings
    logits_BV = model.logits(params, hidden_BD)
    if greedy:
        token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    else:
        logits_BV = logits_BV / temperature
        logits_BV = _nucleus(logits_BV, top_p) if nucleus else logits_BV
        keys_B = jax.vmap(jax.random.fold_in, (0, 0))(state.keys_B, state.count + state.before_B)
        token_B = jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
    stop_B = jnp.any(token_B[:, None] == stop_ids[None, :], axis=-1)
    shown_B = jnp.where(state.done_B | stop_B, -1, token_B)
    positions_B = state.positions_B + 1
    full_B = positions_B + 1 >= model.config.max_length
    for rope in model.config.ropes:
        if rope.scaling == "longrope":  # the keys in the cache are of the short context
            full_B |= positions_B == rope.original_length
    out_BT = jax.lax.dynamic_update_slice_in_dim(state.out_BT, shown_B[:, None], state.count, axis=1)
    stopped_B, done_B = state.stopped_B | (~state.done_B & stop_B), state.done_B | stop_B | full_B
    return _seen_by_all(model, state._replace(
        last_B=jnp.maximum(shown_B, 0), positions_B=positions_B, done_B=done_B, stopped_B=stopped_B, out_BT=out_BT,
        count=state.count + 1,
    ))


def _seen_by_all(model: Model, state: State) -> State:
    """The state with what is read of it whole on every device: every process reads it and decides alike when to end.

    XLA is free to cut what a loop carries otherwise, so that this must be said of the loop's result too.
    """
    if model.mesh is None:
        return state
    whole = replicated(model.mesh)
    read = {name: getattr(state, name) for name in ("out_BT", "stopped_B", "done_B", "count")}
    return state._replace(**{name: jax.lax.with_sharding_constraint(x, whole) for name, x in read.items()})


def _nucleus(logits_BV: jax.Array, top_p: jax.Array) -> jax.Array:
    """Logits with -inf outside the smallest set of likeliest tokens whose probability reaches top_p."""
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    share_BV = jax.nn.softmax(sorted_BV, axis=-1)
    kept_BV = jnp.cumsum(share_BV, axis=-1) - share_BV < top_p  # the mass before a token: the likeliest always stays
    lowest_B = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1)
    return jnp.where(logits_BV >= lowest_B[:, None], logits_BV, -jnp.inf)


def _rows(model: Model, wanted: int) -> int:
    """`wanted` rows, or the next number that the mesh divides."""
    divisor = 1 if model.mesh is None else rows_divisor(model.mesh)
    return -(-wanted // divisor) * divisor


def _check(
    model: Model, prompts: Sequence[np.ndarray], max_new_tokens: int, temperature: float, top_p: float, seed: int
) -> None:
    check_settings(max_new_tokens, temperature, top_p, seed)
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) < model.config.max_length:
            raise InputError(
                f"prompt {index} has {len(prompt)} tokens; the model takes 1 to {model.config.max_length - 1}, "
                "and one more for the answer"
            )


def check_settings(max_new_tokens: int, temperature: float, top_p: float = 1.0, seed: int = 0) -> None:
    """Raise InputError for a setting out of range."""
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    if not (temperature == 0 or COOLEST <= temperature < math.inf) or not 0 < top_p <= 1:
        raise InputError(f"temperature must be at least 0, finite, and {COOLEST} or more where it is not 0, top_p in "
                         f"(0, 1], found {temperature} and {top_p}")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed must be from 0 to {2**32 - 1}, found {seed}")
