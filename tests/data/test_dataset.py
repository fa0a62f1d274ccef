"""From a data section to a store: real data, the split and its proof, counts of everything, and the cache."""

from __future__ import annotations

import gc
import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from itune.config import DataSection
from itune.data.dataset import cache_folder, prepare
from itune.data.loader import Loader
from itune.data.render import render
from itune.data.split import normalised, prompt_text
from itune.data.templates import with_template
from itune.types import InputError, RunError


@pytest.fixture(scope="module")
def tokenizer(make_hf):
    return with_template(make_hf(), "chatml")


@pytest.fixture
def run(tmp_path, tokenizer):
    """prepare() with a cache of the test's own; `log` keeps what it said."""

    def go(train, seed=0, **section):
        go.log = []
        # the rows of these tests are one template: what is like a held-out item would be all of them
        settings = {"max_length": 256, "cache_dir": str(tmp_path / "cache"), "overlap_grams": 1.0,
                    "overlap_cosine": 1.0} | section  # fmt: skip
        return prepare(DataSection(train=train, **settings), tokenizer, seed=seed, log=go.log.append)

    return go


def qa(i: int, **more) -> dict:
    return {"prompt": f"How many foxes are {i} and {i}?", "completion": f"{2 * i} foxes.", **more}


def test_examples_are_the_rows_in_order(run, write_rows, tokenizer):
    rows = [qa(i, task=f"t{i % 3}", score=i) for i in range(300)]
    dataset = run(write_rows(rows))
    assert len(dataset.train) == 300 and len(dataset.held_out) == 0 and dataset.report["dropped"] == {}
    for i in (0, 1, 255, 256, 299):
        example = dataset.train[i]
        row = [{"role": "user", "content": rows[i]["prompt"]}, {"role": "assistant", "content": rows[i]["completion"]}]
        expected = render(row, tokenizer)
        assert np.array_equal(example.token_ids, expected.token_ids)
        assert np.array_equal(example.loss_weights, expected.loss_weights)
        assert example.address.line == i + 1 and example.metadata == {"task": f"t{i % 3}", "score": i}
    tokens = sum(len(dataset.train[i].token_ids) for i in range(300))
    assert dataset.report["tokens"] == tokens == dataset.train.lengths.sum()
    assert dataset.report["supervised_tokens"] == dataset.train.supervised.sum()


def test_everything_left_out_is_counted_with_its_reason(run, write_rows):
    odd = [qa(1, completion=" "), qa(2, completion="word " * 300), qa(3, prompt="x " * 400)]
    path = write_rows([qa(i) for i in range(10)] + odd)
    dropped = run(path)
    assert dropped.report["dropped"] == {"empty assistant turn": 1, "longer than data.max_length (256 tokens)": 2}
    assert [(Path(r["address"]).name, r["reason"].split(" ")[0]) for r in dropped.rejects()] == [
        ("rows.jsonl:11", "empty"), ("rows.jsonl:12", "longer"), ("rows.jsonl:13", "longer")]  # fmt: skip
    cut = run(path, overlong="truncate")
    assert cut.report["dropped"] == {"empty assistant turn": 1, "no target within data.max_length (256 tokens)": 1}
    assert cut.report["truncated"] == 1 and cut.report["truncated_tokens"] > 100
    assert cut.train.lengths.max() == 256 and cut.train[10].loss_weights[1:].any()
    for report in (dropped.report, cut.report):
        assert report["rows"] == 13 == report["kept"] + sum(report["dropped"].values())


def test_a_split_by_field_holds_out_whole_groups_and_what_asks_the_same(run, write_rows):
    rows = [qa(i, task=f"task{i % 20}") for i in range(400)]
    leak = qa(7, task="leak")
    dataset = run(write_rows(rows), held_out_by="task", held_out_share=0.3)
    proof = dataset.report["held_out"]
    held = {c.metadata["task"] for c in dataset.held_out_conversations}
    assert held == set(proof["groups_held_out"]) and 3 <= len(held) <= 9 and proof["groups"] == 20
    assert not held & {dataset.train.metadata(i)["task"] for i in range(len(dataset.train))}
    assert len(dataset.train) + len(dataset.held_out) == 400
    for i in (0, len(dataset.held_out) - 1):
        assert dataset.held_out[i].address == dataset.held_out_conversations[i].address
    asked = next(c for c in dataset.held_out_conversations).messages[0].content
    leak["prompt"] = "  " + asked.upper().replace(" ", "\n") + "?!"
    leaky = run(write_rows([*rows, leak, qa(500, task="task500")]), held_out_by="task", held_out_share=0.3)
    proof = leaky.report["held_out"]
    assert proof["training_rows_removed"] == 1 and proof["removed"][0].endswith("rows.jsonl:401")
    assert proof["training_rows_compared"] == len(leaky.train) + 1
    assert leaky.report["dropped"] == {"asks what a held-out item asks": 1}
    # other groups stay where they were, another seed moves them
    assert set(proof["groups_held_out"]) == held
    other = run(write_rows(rows), seed=1, held_out_by="task", held_out_share=0.3)
    assert set(other.report["held_out"]["groups_held_out"]) != held


def test_what_was_in_memory_is_collectable_again_after_preparing(run, write_rows):
    run(write_rows([qa(i) for i in range(10)], "good.jsonl"))
    assert gc.isenabled() and gc.get_freeze_count() == 0
    with pytest.raises(InputError):
        run(write_rows([{"prompt": 3, "completion": "x"}], "bad.jsonl"))
    assert gc.get_freeze_count() == 0


def test_a_split_by_conversation_keeps_equal_prompts_together(run, write_rows):
    rows = [qa(i // 2) for i in range(200)]
    dataset = run(write_rows(rows), held_out_share=0.2)
    asked = Counter(prompt_text(c) for c in dataset.held_out_conversations)
    assert set(asked.values()) == {2} and 20 <= len(dataset.held_out) <= 60
    assert dataset.report["held_out"]["training_rows_removed"] == 0
    assert run(write_rows([qa(1), qa(2), qa(3)]), held_out_share=0.01).report["held_out"]["items"] == 1


def test_evaluation_files_and_questions_inside_longer_conversations(run, write_rows):
    asks = [{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"},
                          {"role": "user", "content": "how many FOXES are 3 and 3"},
                          {"role": "assistant", "content": "6"}]}]  # fmt: skip
    train = (write_rows([qa(i) for i in range(5)], "a.jsonl"), write_rows(asks, "b.jsonl"))
    dataset = run(train, eval=write_rows([qa(3), qa(9)], "eval.jsonl"))
    assert len(dataset.held_out) == 2 and len(dataset.train) == 4
    assert {Path(a).name for a in dataset.report["held_out"]["removed"]} == {"a.jsonl:4", "b.jsonl:1"}
    assert set(dataset.report["sources"]) == {"a", "b"}
    assert "; held out: 2 rows -> 2 items" in run.log[0]


def test_evaluation_files_beside_a_share_held_out_are_said_to_be_two_kinds(run, write_rows):
    dataset = run(write_rows([qa(i) for i in range(60)]), eval=write_rows([qa(70), qa(71)], "eval.jsonl"),
                  held_out_share=0.1)  # fmt: skip
    items = len(dataset.held_out)
    assert items > 2
    kinds = f"(2 of data.eval + {items - 2} of data.train, data.held_out_share=0.1)"
    assert f"held out: {items} rows {kinds} -> {items} items" in run.log[0]


def test_too_few_novel_items_and_impossible_splits_fail_closed(run, write_rows):
    path = write_rows([qa(i % 30, task=f"t{i % 3}") for i in range(90)])
    with pytest.raises(InputError, match=r"data\.novel_min: 30 different held-out prompts .*at least 31"):
        run(path, eval=path, novel_min=31)
    with pytest.raises(InputError, match=r"rows\.jsonl:1: topic: missing, and data\.held_out_by splits by it"):
        run(path, held_out_by="topic", held_out_share=0.2)
    with pytest.raises(InputError, match="all 1 groups would be held out"):
        run(write_rows([qa(i, task="one") for i in range(3)]), held_out_by="task", held_out_share=0.2)


def test_a_bad_row_stops_with_its_address_and_leaves_no_cache(run, write_rows, tmp_path):
    rows = [qa(i) for i in range(5)]
    path = write_rows([*rows, {"prompt": "q", "completion": 3}])
    with pytest.raises(InputError, match=r"rows\.jsonl:6: completion: found a number"):
        run(path)
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]
    with pytest.raises(InputError, match="no rows"):
        run(write_rows([], "empty.jsonl"))


def test_the_cache_answers_for_equal_inputs_only(run, write_rows, tokenizer, make_hf):
    path = write_rows([qa(i) for i in range(20)])
    first = run(path)
    again = run(path)
    assert "from the cache" in run.log[0] and again.fingerprint == first.fingerprint
    assert np.array_equal(again.train.tokens, first.train.tokens) and again.report == first.report
    changed = [
        run(path, max_length=128), run(path, train_on="last"), run(path, overlong="truncate"), run(path, limit=19),
        run(path, fields={"prompt": "prompt"}), run(path, held_out_share=0.1), run(path, eval=path),
    ]  # fmt: skip
    llama = with_template(make_hf(bos_token="<|endoftext|>"), "llama3")
    section = DataSection(train=path, max_length=256, cache_dir=str(first.folder.parent))
    changed.append(prepare(section, llama, log=lambda _: None))
    assert "from the cache" not in " ".join(run.log)
    write_rows([qa(i + 1) for i in range(20)])
    changed.append(run(path))
    assert len({first.fingerprint, *(dataset.fingerprint for dataset in changed)}) == 10
    assert run(path, seed=7).fingerprint == changed[-1].fingerprint  # without a split the seed decides nothing


def test_moved_data_have_their_new_addresses(run, write_rows, tmp_path):
    """And are the same data to a run that goes on."""
    path = Path(write_rows([qa(i) for i in range(20)]))
    first = run(str(path), held_out_share=0.2)
    (tmp_path / "elsewhere").mkdir()
    moved = run(str(path.rename(tmp_path / "elsewhere" / path.name)), held_out_share=0.2)
    assert moved.fingerprint == first.fingerprint and np.array_equal(moved.train.tokens, first.train.tokens)
    assert all("/elsewhere/" in item["address"] for item in json.loads(
        (moved.folder / "heldout_proof.json").read_text())["items"])


@pytest.mark.parametrize("file", ["train/tokens.int32", "train/weights.float32", "train/names.json", "held_out.jsonl"])
def test_a_damaged_cache_is_built_again(run, write_rows, file):
    path = write_rows([qa(i) for i in range(20)])
    first = run(path, held_out_share=0.2)
    expected = first.train.tokens.copy()
    damaged = first.folder / file
    raw = bytearray(damaged.read_bytes())
    raw[len(raw) // 2] ^= 1
    damaged.write_bytes(raw if file.endswith("32") else raw[: len(raw) // 2])
    again = run(path, held_out_share=0.2)
    assert "damaged and is built again" in run.log[0]
    assert np.array_equal(again.train.tokens, expected) and again.fingerprint == first.fingerprint


def test_processes_share_one_cache(tmp_path, write_rows, tokenizer):
    path, model = write_rows([qa(i) for i in range(200)]), tmp_path / "model"
    tokenizer.hf.save_pretrained(model)
    code = ("from itune.config import DataSection; from itune.data.dataset import prepare; "
            "from itune.data.templates import load_tokenizer; "
            f"section = DataSection(train={path!r}, cache_dir={str(tmp_path / 'c')!r}); "
            f"print(prepare(section, load_tokenizer({str(model)!r})).fingerprint)")  # fmt: skip
    jobs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [job.communicate(timeout=300)[0] for job in jobs]
    assert all(job.returncode == 0 for job in jobs)
    assert sorted("from the cache" in text for text in said) == [False, True]
    assert len({text.splitlines()[-1] for text in said}) == 1
    assert sorted(p.suffix for p in (tmp_path / "c").iterdir()) == ["", ".lock"]


def test_a_folder_that_cannot_be_written_is_named(run, write_rows, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"data\.cache_dir: .*file/x cannot be used"):
        run(write_rows([qa(1)]), cache_dir=str(tmp_path / "file" / "x"))
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/itune/data") and cache_folder("/a") == Path("/a")


def test_sources_have_formats_and_limits_of_their_own(run, write_rows):
    alpaca = [{"instruction": f"Say {i}", "input": "", "output": f"{i}"} for i in range(9)]
    dataset = run({"p": write_rows([qa(i) for i in range(9)], "p.jsonl"), "q": write_rows(alpaca, "q.jsonl")}, limit=4)
    assert dataset.train.source_names == ("p", "q") and np.bincount(dataset.train.sources).tolist() == [4, 4]


@pytest.fixture(scope="module")
def real(shared_data):
    """A tokenizer trained on a part of the real prompts."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=["<|endoftext|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    with gzip.open(shared_data / "p3_sample.jsonl.gz", "rt", encoding="utf-8") as lines:
        backend.train_from_iterator([json.loads(line)["prompt"][:300] for _, line in zip(range(1500), lines)], trainer)
    return with_template(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>"), "chatml")


def test_p3_split_by_task(shared_data, real, tmp_path):
    """At least 500 novel prompts of tasks never trained on; ids as transformers gives them; all rows accounted for."""
    path = str(shared_data / "p3_sample.jsonl.gz")
    section = DataSection(train=path, held_out_by="task", held_out_share=0.2, novel_min=500, limit=4000,
                          cache_dir=str(tmp_path))  # fmt: skip
    dataset = prepare(section, real, log=lambda _: None)
    report, proof = dataset.report, dataset.report["held_out"]
    assert proof["prompts"] >= 500 and 0.12 * proof["groups"] < len(proof["groups_held_out"]) < 0.28 * proof["groups"]
    tasks = {dataset.train.metadata(i)["task"] for i in range(len(dataset.train))}
    assert tasks and not tasks & set(proof["groups_held_out"])
    held_rows = report["sources"]["p3_sample"]["held out"]
    assert report["rows"] == 4000 == report["kept"] + sum(report["dropped"].values()) + held_rows
    assert held_rows == proof["report"]["kept"] + sum(proof["report"]["dropped"].values())
    asked = {prompt_text(c) for c in dataset.held_out_conversations}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    for i in range(0, len(dataset.train), 97):
        example = dataset.train[i]
        row = rows[example.address.line - 1]
        assert normalised(row["prompt"]) not in asked
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        assert example.token_ids.tolist() == list(real.hf.apply_chat_template(messages)["input_ids"])
        learnt = real.decode(example.token_ids[example.loss_weights > 0])
        assert learnt == row["completion"] + "<|im_end|>"
    loader = Loader(dataset.train, batch_size=8, max_length=1024)
    assert loader.efficiency > 0.99


def test_gsm8k_messages(shared_data, real, tmp_path):
    path = str(shared_data / "gsm8k_messages.jsonl.gz")
    section = DataSection(train=path, limit=1000, held_out_share=0.1, max_length=512, cache_dir=str(tmp_path))
    dataset = prepare(section, real, log=lambda _: None)
    assert len(dataset.train) + len(dataset.held_out) == 1000 - sum(dataset.report["dropped"].values())
    for i in range(0, len(dataset.train), 50):
        example = dataset.train[i]
        learnt = real.decode(example.token_ids[example.loss_weights > 0])
        assert learnt.count("<|im_end|>") == 1 and learnt.endswith("<|im_end|>") and "The answer is" in learnt
