"""Generation against transformers' own, token by token, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itune import decode
from itune.models import load_pretrained
from itune.sharding import make_mesh
from itune.types import InputError

VOCAB, NEW = 96, 18  # the tests share shapes, so that little is compiled


@pytest.fixture(scope="module")
def judge():
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=40, sliding_window=11, initializer_range=0.4,
        attn_implementation="eager", bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )
    return transformers.MistralForCausalLM(config).eval()


@pytest.fixture(scope="module")
def loaded(judge, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    judge.save_pretrained(folder)
    return load_pretrained(folder)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(8, VOCAB, n).astype(np.int32) for n in (5, 1, 19, 9, 30, 2, 3, 16)]


def hf_greedy(judge, prompt, stop=None):
    import torch

    tokens = torch.tensor(prompt[None]).long()
    ids = judge.generate(tokens, max_new_tokens=min(NEW, 40 - len(prompt)), do_sample=False, eos_token_id=stop)
    return ids[0, len(prompt) :].tolist()


def test_greedy_is_transformers(judge, loaded, prompts):
    """Ragged prompts in batches of 4, a sliding window shorter than the rows, a stop token that some rows meet."""
    free = [hf_greedy(judge, prompt) for prompt in prompts]
    stop = next(t for t in range(VOCAB) if 0 < sum(t in row for row in free) < len(free))
    answers = decode.generate_ids(*loaded, prompts, max_new_tokens=NEW, stop_ids=[stop], batch_size=4)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.ids.tolist() + [stop] * answer.stopped == hf_greedy(judge, prompt, stop)
    assert {answer.stopped for answer in answers} == {True, False}


def test_greedy_on_a_mesh_is_the_same(judge, loaded, prompts, tmp_path):
    judge.save_pretrained(tmp_path)
    sharded = load_pretrained(tmp_path, make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    on_one = decode.generate_ids(*loaded, prompts[:3], max_new_tokens=NEW, batch_size=4)
    on_eight = decode.generate_ids(*sharded, prompts[:3], max_new_tokens=NEW, batch_size=3)
    assert [a.ids.tolist() for a in on_eight] == [a.ids.tolist() for a in on_one]
    sampling = decode.make_sampling(0.0, 1.0, [])
    state = decode.prefill(*sharded, prompts[:3], range(3), sampling, NEW, 0, 4)
    state = decode.advance(*sharded, state, sampling, NEW)
    for name in ("out_BT", "stopped_B", "done_B", "count"):  # what several processes read must be whole on each
        assert getattr(state, name).sharding.is_fully_replicated, name


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    """(judge, (model, params)) by kind of rope; the original context of longrope is 16 of 40 tokens."""
    import torch
    import transformers

    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 40,
             "initializer_range": 0.4, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
             "tie_word_embeddings": False}  # fmt: skip
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
    longrope = {"rope_type": "longrope", "type": "longrope", "original_max_position_embeddings": 16, **factors}
    torch.manual_seed(0)
    judges = {
        "longrope": transformers.Phi3ForCausalLM(transformers.Phi3Config(
            **sizes, original_max_position_embeddings=16, rope_scaling=longrope)),
        "dynamic": transformers.LlamaForCausalLM(transformers.LlamaConfig(
            **sizes, rope_scaling={"rope_type": "dynamic", "factor": 2.0})),
    }  # fmt: skip
    found = {}
    for name, judge in judges.items():
        folder = tmp_path_factory.mktemp(name)
        judge.eval().save_pretrained(folder)
        found[name] = judge, load_pretrained(folder)
    return found


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_scaled_rope_is_transformers_for_each_row_alone(scaled, kind, prompts):
    """Rows that stay in the original context of longrope, leave it in the answer, and start beyond it share a batch;
    a prompt's padded slots and a cache longer than the context change nothing."""
    judge, loaded = scaled[kind]
    expected = [hf_greedy(judge, prompt) for prompt in prompts]
    for size in (4, 1):
        answers = decode.generate_ids(*loaded, prompts, max_new_tokens=NEW, batch_size=size)
        assert [answer.ids.tolist() for answer in answers] == expected
    *_, streamed = decode.stream_ids(*loaded, prompts[0], max_new_tokens=NEW)
    assert streamed.ids.tolist() == expected[0]


def test_a_sample_across_the_original_context_does_not_depend_on_its_batch(scaled, prompts):
    options = {"max_new_tokens": NEW, "temperature": 0.9, "seed": 3}
    together, apart = ([answer.ids.tolist() for answer in decode.generate_ids(
        *scaled["longrope"][1], prompts, batch_size=size, **options)] for size in (4, 1))  # fmt: skip
    assert together == apart


def test_any_stop_token_ends_a_row_and_is_left_out(loaded, prompts):
    free = decode.generate_ids(*loaded, prompts, max_new_tokens=NEW, batch_size=4)
    assert not any(answer.stopped for answer in free)
    stops = [int(free[0].ids[6]), int(free[2].ids[3])]
    answers = decode.generate_ids(*loaded, prompts, max_new_tokens=NEW, stop_ids=stops, batch_size=4)
    for answer, unstopped in zip(answers, free, strict=True):
        cut = [i for i, token in enumerate(unstopped.ids) if token in stops]
        assert answer.stopped == bool(cut)
        assert answer.ids.tolist() == unstopped.ids[: cut[0] if cut else None].tolist()


def test_a_sample_does_not_depend_on_its_batch(loaded, prompts):
    prompts = [prompt for prompt in prompts if len(prompt) <= 16]
    options = {"max_new_tokens": NEW, "temperature": 0.9, "top_p": 0.8, "seed": 3, "batch_size": 4}
    together = decode.generate_ids(*loaded, prompts, **options)
    apart = decode.generate_ids(*loaded, prompts, **{**options, "batch_size": 1})
    assert [a.ids.tolist() for a in together] == [a.ids.tolist() for a in apart]
    other = decode.generate_ids(*loaded, prompts, **{**options, "seed": 4})
    assert [a.ids.tolist() for a in together] != [a.ids.tolist() for a in other]
    twice = decode.generate_ids(*loaded, [prompts[0]] * 4, **options)
    assert len({answer.ids.tobytes() for answer in twice}) == 4


def test_samples_have_the_models_distribution(loaded, prompts):
    """First tokens of 600 answers against the softmax of the logits, cut to the nucleus."""
    model, params = loaded
    prompt, temperature, top_p = prompts[0], 2.0, 0.6
    logits_V = model.logits(params, model.hidden(params, prompt[None]))[0, -1] / temperature
    share_V = np.asarray(jax.nn.softmax(logits_V), np.float64)
    order = np.argsort(-share_V)
    kept = order[: int(np.searchsorted(np.cumsum(share_V[order]), top_p)) + 1]
    drawn = decode.generate_ids(
        model, params, [prompt] * 600, max_new_tokens=NEW, temperature=temperature, top_p=top_p, batch_size=4
    )
    counts = np.bincount([a.ids[0] for a in drawn], minlength=VOCAB)
    assert set(np.flatnonzero(counts)) <= set(kept)
    expected = share_V[kept] / share_V[kept].sum() * 600
    chi2 = ((counts[kept] - expected) ** 2 / expected).sum()
    assert chi2 < len(kept) + 4 * np.sqrt(2 * len(kept))


def test_nucleus_keeps_the_smallest_sufficient_set():
    logits_BV = jnp.log(jnp.array([[0.5, 0.1, 0.3, 0.1], [0.05, 0.05, 0.1, 0.8]]))
    for top_p, kept in ((0.5, [[0], [3]]), (0.51, [[0, 2], [3]]), (0.85, [[0, 1, 2, 3], [2, 3]])):
        finite_BV = np.isfinite(decode._nucleus(logits_BV, top_p))
        assert [np.flatnonzero(row).tolist() for row in finite_BV] == kept


def test_the_context_is_never_exceeded(loaded, prompts):
    answers = decode.generate_ids(*loaded, prompts, max_new_tokens=NEW, batch_size=4)
    assert [len(answer.ids) for answer in answers] == [min(NEW, 40 - len(prompt)) for prompt in prompts]


def test_a_limit_beyond_the_context_takes_no_more_memory(loaded, prompts):
    answers = decode.generate_ids(*loaded, prompts, max_new_tokens=30_000_000, batch_size=4)
    assert [len(answer.ids) for answer in answers] == [40 - len(prompt) for prompt in prompts]
    assert not any(answer.stopped for answer in answers)


def test_streaming_grows_to_the_same_answer(loaded, prompts):
    whole = decode.generate_ids(*loaded, prompts[:4], max_new_tokens=NEW, batch_size=4)[3]
    parts = list(decode.stream_ids(*loaded, prompts[3], max_new_tokens=NEW, every=4))
    lengths = [len(part.ids) for part in parts]
    assert lengths == sorted(lengths) and len(parts) > 2
    assert parts[-1].ids.tolist() == whole.ids.tolist() and parts[-1].stopped == whole.stopped


def test_batches_side_by_side_answer_as_alone_and_compile_once(loaded, prompts):
    """Two threads on one CPU: the same answers in the same places, sampled ones too, and one program a shape."""
    many = (list(prompts) * 12)[:50]
    assert decode._at_once(loaded[0], 50) == 2 and decode._at_once(loaded[0], 4) == 1
    options = {"max_new_tokens": NEW, "temperature": 0.8, "seed": 3}
    alone = decode.generate_ids(*loaded, many, batch_size=4, **options)
    before = decode._jitted_prefill()._cache_size()
    beside = decode.generate_ids(*loaded, many, batch_size=64, **options)
    assert [a.ids.tolist() for a in beside] == [a.ids.tolist() for a in alone]
    assert len({tuple(a.ids.tolist()) for a in beside}) > 25  # each index draws for itself
    shapes = {decode._slots([prompt]) for prompt in many}
    assert decode._jitted_prefill()._cache_size() - before <= len(shapes)


def test_nothing_is_compiled_twice(loaded, prompts):
    decode.generate_ids(*loaded, prompts, max_new_tokens=NEW, batch_size=4)
    sizes = decode._jitted_prefill()._cache_size(), decode._advance._cache_size()
    decode.generate_ids(*loaded, [p[::-1] for p in prompts], max_new_tokens=NEW, batch_size=4)
    assert (decode._jitted_prefill()._cache_size(), decode._advance._cache_size()) == sizes


@pytest.mark.parametrize(
    ("prompt_length", "options", "message"),
    [
        (0, {}, "prompt 1 has 0 tokens; the model takes 1 to 39"),
        (40, {}, "prompt 1 has 40 tokens"),
        (3, {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        (3, {"temperature": -1.0}, "temperature must be at least 0"),
        (3, {"temperature": float("nan")}, "temperature must be at least 0, finite"),
        (3, {"temperature": float("inf")}, "temperature must be at least 0, finite"),
        (3, {"temperature": 1e-40}, "0.001 or more where it is not 0"),
        (3, {"seed": -1}, "seed must be from 0 to 4294967295, found -1"),
        (3, {"seed": 5_000_000_000}, "seed must be from 0"),
        (3, {"top_p": 0.0}, r"top_p in \(0, 1\]"),
    ],
)
def test_bad_requests_are_refused(loaded, prompt_length, options, message):
    with pytest.raises(InputError, match=message):
        decode.generate_ids(*loaded, [np.ones(3, np.int32), np.ones(prompt_length, np.int32)], **options)


def test_no_prompts_no_answers(loaded):
    assert decode.generate_ids(*loaded, []) == []
