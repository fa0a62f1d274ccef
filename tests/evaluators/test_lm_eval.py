"""The adapter against the harness's own `hf` model on the same exported folder: likelihoods, greedy texts; offline."""

import json
import sys

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install -e '.[dev]'")

import jax

from itune import evaluators
from itune.cli import main
from itune.config import from_dict
from itune.data.templates import load_tokenizer
from itune.evaluators.lm_eval import _items, choose_score, require_lm_eval, task_manager
from itune.export import export_pretrained
from itune.models import load_pretrained
from itune.sharding import make_mesh
from itune.types import InputError

TASKS = {
    "choose": """task: choose
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "roll": """task: roll
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
""",
    "write": """task: write
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["\\n", "zq", "STOP"], max_gen_toks: 40, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}


@pytest.fixture(scope="module")
def folder(base_folder, tmp_path_factory):
    """A model folder with a chat template, as itune exports it."""
    out = tmp_path_factory.mktemp("exported") / "model"
    tokenizer = load_tokenizer(str(base_folder), "chatml")
    model, params = load_pretrained(base_folder, vocab_size=tokenizer.vocab_size)
    export_pretrained(out, model, params, base_folder, tokenizer, dtype="float32")
    return out


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Three tasks over one local file; some texts are longer than the model's context of 128 tokens."""
    place = tmp_path_factory.mktemp("tasks")
    rows = []
    for number in range(9):
        question = f"Question {number}: which word comes after {'very ' * (number * 6)}good? "
        choices = [" one", "two words here", "x" * (number + 1), " " + "long answer " * 3]
        rows.append({"question": question, "choices": choices, "gold": number % 4, "text": question * (1 + number % 5)})
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (place / f"{name}.yaml").write_text(text.replace("FILE", str(place / "rows.jsonl")))
    return place


def harness_model(folder, mesh=None):
    from itune.evaluators.harness import HarnessModel

    tokenizer = load_tokenizer(str(folder))
    model, params = load_pretrained(folder, mesh, vocab_size=tokenizer.vocab_size)
    return HarnessModel(model, params, tokenizer, batch_size=4)


@pytest.fixture(scope="module")
def judge(folder):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)


def results(lm, tasks, names, **options):
    from lm_eval import simple_evaluate

    manager = task_manager(names, str(tasks))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISABLE_MULTIPROC", "1")
        return simple_evaluate(model=lm, tasks=list(names), task_manager=manager, bootstrap_iters=10, **options)


def answers(found, task):
    return [sample["resps"] for sample in sorted(found["samples"][task], key=lambda sample: sample["doc_id"])]


@pytest.mark.parametrize("options", [{}, {"apply_chat_template": True, "num_fewshot": 2}], ids=["plain", "chat"])
def test_equal_to_the_hf_model(folder, tasks, judge, options):
    names = ("choose", "roll", "write") if not options else ("choose", "write")
    ours, theirs = (results(lm, tasks, names, **options) for lm in (harness_model(folder), judge))
    for mine, wanted in zip(answers(ours, "choose"), answers(theirs, "choose"), strict=True):
        for [(value, greedy)], [(expected, expected_greedy)] in zip(mine, wanted, strict=True):
            assert value == pytest.approx(expected, abs=1e-4) and greedy is expected_greedy
    if "roll" in names:
        for mine, wanted in zip(answers(ours, "roll"), answers(theirs, "roll"), strict=True):
            # a sum over hundreds of tokens: the judge adds them in float32, whose steps are 5e-4 at the largest (-4881)
            assert mine[0][0] == pytest.approx(wanted[0][0], rel=1e-6, abs=1e-4)
    assert answers(ours, "write") == answers(theirs, "write")
    assert len({text[0][0] for text in answers(ours, "write")}) > 3
    for task in names:
        for metric, value in theirs["results"][task].items():
            if isinstance(value, float) and "stderr" not in metric:
                assert ours["results"][task][metric] == pytest.approx(value, rel=1e-5), metric


def test_a_sharded_model_gives_the_same(folder, tasks):
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    whole, sharded = (results(harness_model(folder, m), tasks, ("choose", "write")) for m in (None, mesh))
    assert answers(whole, "write") == answers(sharded, "write")
    for mine, wanted in zip(answers(sharded, "choose"), answers(whole, "choose"), strict=True):
        assert [m[0][0] for m in mine] == pytest.approx([w[0][0] for w in wanted], abs=1e-4)


def test_a_prefilled_answer_is_rendered_as_transformers_does(folder, judge):
    chat = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It is "}]
    ours = harness_model(folder)
    assert ours.apply_chat_template(chat, False) == judge.apply_chat_template(chat, False)
    assert ours.apply_chat_template(chat[:1]) == judge.apply_chat_template(chat[:1])
    assert ours.chat_template(True) == judge.chat_template(True)
    assert (ours.eot_token_id, ours.prefix_token_id, ours.max_length) == (
        judge.eot_token_id, judge.prefix_token_id, judge.max_length)  # fmt: skip


def test_by_command_without_any_data_of_ones_own(folder, tasks, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "out"
    code = main([
        "eval", "--config", "default", "--model", str(folder), "--lm-eval", "choose,write", "--lm-eval-path",
        str(tasks), "--out", str(out), "--json", str(tmp_path / "numbers.json"),
        "--config.eval.lm_eval_options.limit=5",
    ])
    assert code == 0, capsys.readouterr().err
    numbers = json.loads((tmp_path / "numbers.json").read_text())["lm_eval"]
    choose = numbers["choose"]
    assert choose["n"] == 5 and choose["acc_low"] <= choose["acc"] <= choose["acc_high"]
    assert numbers["write"]["exact_match_high"] > 0  # none of five right still leaves an upper bound
    assert (choose["score_by"], numbers["write"]["score_by"]) == ("acc", "exact_match")
    items = evaluators.read_items(out / "lm_eval.jsonl")
    assert len(items) == 10 and {item["task"] for item in items} == {"choose", "write"}
    assert "to" in capsys.readouterr().out


def sample(document, filtered, **metrics):
    return {"doc_id": document, "filter": filtered, "metrics": list(metrics), "arguments": [("p", "c")], "target": 0,
            "filtered_resps": [filtered], **metrics}  # fmt: skip


def test_a_document_is_one_item_by_one_metric_of_the_first_filter():
    samples = [sample(at, kind, exact_match=float(kind == "flexible"), other=0.5)
               for kind in ("strict", "flexible") for at in (0, 1)]  # fmt: skip
    scores = choose_score(samples, ["exact_match"], {"exact_match": True})
    items = list(_items("gsm8k", samples, scores))
    assert scores.by == {"score_by": "exact_match, filter strict"}
    assert [(item["address"], item["cluster"], item["score"], item["answer"]) for item in items] == [
        ("gsm8k:0", "gsm8k:0", 0.0, "strict"), ("gsm8k:1", "gsm8k:1", 0.0, "strict")]  # fmt: skip
    assert items[0]["exact_match(strict)"] == 0 and items[0]["exact_match(flexible)"] == 1


def test_a_score_is_one_metric_of_all_documents_and_more_is_better():
    samples = [sample(at, "none", likelihood_diff=diff, pct_stereotype=share)
               for at, (diff, share) in enumerate([(0.1, 1.0), (0.9, 0.0), (5.0, 0.0), (5.0, 1.0)])]  # fmt: skip
    metrics = ["likelihood_diff", "pct_stereotype"]
    scores = choose_score(samples, metrics, dict.fromkeys(metrics, False))
    assert scores.by == {"score_by": "pct_stereotype, 1 - value"}
    assert [item["score"] for item in _items("crows", samples, scores)] == [0.0, 1.0, 1.0, 0.0]
    none = choose_score([sample(0, "none", loss=3.0)], ["loss"], {})
    assert none.by == {} and "score" not in next(_items("x", [sample(0, "none", loss=3.0)], none))


def test_what_is_missing_is_said(tasks, monkeypatch):
    with pytest.raises(InputError, match=r"eval\.lm_eval: names no task"):
        evaluators.find_evaluator("lm_eval")(from_dict({}))
    with pytest.raises(InputError, match=r"'limits' is not known; did you mean limit"):
        evaluators.find_evaluator("lm_eval")(from_dict({"eval": {"lm_eval": ["a"], "lm_eval_options": {"limits": 3}}}))
    with pytest.raises(InputError, match="no folder nowhere"):
        task_manager(("choose",), "nowhere")
    import lm_eval.tasks

    whole = lm_eval.tasks.TaskManager  # without the harness's own tasks, which take long to read
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **given: whole(**{**given, "include_defaults": False}))
    with pytest.raises(InputError, match=r"no task 'chose'.*did you mean choose"):
        task_manager(("chose",), str(tasks))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"not installed; pip install 'itune\[eval\]'"):
        require_lm_eval()
