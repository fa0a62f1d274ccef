"""Config: strict keys, types and ranges; every recipe loads; default.py and the dataclasses agree."""

import json

import pytest

from itune import config as cfg
from itune.types import InputError

RECIPES = sorted(path.stem for path in cfg.configs_dir().glob("*.py"))


def test_default_file_holds_every_key_with_the_dataclass_default():
    tree = cfg.load_config("default").to_dict()
    assert tree == cfg.Config().to_dict()


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_loads_and_round_trips_through_its_json(recipe, tmp_path):
    config = cfg.load_config(recipe)
    saved = tmp_path / "config.json"
    saved.write_text(json.dumps(config.to_dict()))
    assert cfg.load_config(saved) == config


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r != "default"])
def test_recipe_header_says_how_to_run_it(recipe):
    text = (cfg.configs_dir() / f"{recipe}.py").read_text()
    for word in ("command ", "hardware ", "memory ", "expected "):
        assert f"\n{word}" in text, f"{recipe} has no line `{word}` in its header"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("optimizer.learning_rte", 1, "did you mean optimizer.learning_rate?"),
        ("learning_rate", 1, "did you mean optimizer.learning_rate?"),
        ("optimiser.learning_rate", 1, "did you mean optimizer"),
        ("train.epochs", "abc", "train.epochs (passes over the data) must be float, found str 'abc'"),
        ("train.epochs", "0", "must be above 0.0, found 0.0"),
        ("train.batch_size", "2.5", "train.batch_size (rows of the global batch) must be int, found float 2.5"),
        ("train.batch_size", "True", "must be int, found bool True"),
        ("optimizer.schedule", "cosin", "(nearest: cosine)"),
        ("data.held_out_share", "1", "at least 0.0 and at most 0.9, found 1.0"),
        ("optimizer.b1", "1.0", "at least 0.0 and below 1.0, found 1.0"),
        ("optimizer.b2", "1", "at least 0.0 and below 1.0, found 1.0"),
        ("optimizer.learning_rate", "nan", "found"),
        ("optimizer", "3", "is a section"),
        ("model.path.x", "3", "model.path is a key, not a section"),
        ("train.epochs", "1" + "0" * 400, "train.epochs (passes over the data) must be above 0.0, found inf"),
        ("train.batch_size", "1" + "0" * 400, "must be at least 1 and at most 2147483647, found 1000"),
        ("train.max_steps", "1e20", "train.max_steps (optimizer steps) must be at least 0 and at most 2147483647"),
        ("seed", str(2**63), "seed (number) must be at least 0 and at most 9223372036854775807, found 92233720"),
        ("data.draws", "1e20", "data.draws (examples an epoch) must be at least 0 and at most 1000000000, found 1000"),
        ("eval.batch_size", "1e20", "eval.batch_size (rows) must be at least 1 and at most 65536, found 1000"),
        ("evaluators", "(1,)", "evaluators (names) must have texts as items, found int 1"),
        ("data.train", "['a', 1]", "must have texts as items, found int 1"),
        ("data.mixture", "{1: 2}", "data.mixture (source -> weight) must have texts as keys, found int 1"),
        ("optimizer.rates", "{1: 2}", "must have texts as keys, found int 1"),
    ],
)
def test_wrong_override_is_one_clear_error(key, value, said):
    with pytest.raises(InputError) as error:
        cfg.load_config("default", {key: value})
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_overrides_take_the_type_of_their_key():
    config = cfg.load_config("default", {
        "optimizer.learning_rate": "1e-5", "train.epochs": "3", "model.path": "123", "data.train": "('a', 'b')",
        "data.packing": "false", "data.mixture.gsm8k": "0.3", "data.fields": "{'prompt': 'q'}",
        "evaluators": "['heldout_loss']",
    })
    assert config.optimizer.learning_rate == 1e-5
    assert config.train.epochs == 3.0
    assert config.model.path == "123"
    assert config.data.train == ("a", "b")
    assert config.data.packing is False
    assert config.data.mixture == {"gsm8k": 0.3}
    assert config.data.fields == {"prompt": "q"}
    assert config.evaluators == ("heldout_loss",)


def test_a_recipe_sets_files_by_tuple_and_by_name(tmp_path):
    """What `configs/default.py` promises of keys whose default is a text; the types are checked by the Config."""
    recipe = tmp_path / "mine.py"
    head = "from itune.config import default_config\n\ndef get_config():\n    c = default_config()\n"
    recipe.write_text(f"{head}    c.data.train = ('a', 'b')\n    c.data.eval = {{'x': 'y'}}\n"
                      "    c.data.benchmarks = ['c']\n    c.data.held_out_share = 0\n    return c\n")
    data = cfg.load_config(recipe).data
    assert (data.train, data.eval, data.benchmarks, data.held_out_share) == (("a", "b"), {"x": "y"}, ("c",), 0.0)
    wrong = {"c.data.packing = 'no'": "data.packing .* must be bool", "c.data.trian = 'x'": r"mine\.py:5: .*trian"}
    for line, said in wrong.items():
        recipe.write_text(f"{head}    {line}\n    return c\n")
        with pytest.raises(InputError, match=said):
            cfg.load_config(recipe)


def test_missing_recipe_names_the_nearest():
    with pytest.raises(InputError, match=r"nearest: sft"):
        cfg.load_config("sftt")


@pytest.mark.parametrize(("name", "content", "said"), [
    ("a.json", b'{"model":', r"a\.json:1: no JSON: "), ("b.json", b"[1]", r"b\.json: expected an object .*, found li"),
    ("c.json", b"\xff{}", r"c\.json: is not UTF-8"), ("d.py", b"x = 1\ndef y(:\n", r"d\.py:2: SyntaxError: invalid"),
    ("e.py", b"\xff", r"e\.py:\d: SyntaxError: "), ("f.py", b"x = 1\n", r"f\.py: has no get_config\(\)"),
    ("g.py", b"def get_config():\n    pass\n", r"g\.py: get_config\(\) returned NoneType; expected a ConfigDict"),
    ("h.txt", b"x", r"h\.txt: expected a recipe \(\.py\) or a saved config \(\.json\)"),
    ("i.json", b'{"train": {"epochs": Infinity}}', r"train\.epochs .* must be .*, found inf"),
    ("j.py", b"import sys\nsys.exit(3)\n", r"j\.py:2: SystemExit: 3"),
])
def test_what_is_no_config_is_said(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        cfg.load_config(tmp_path / name)


def test_recipe_that_raises_is_named_with_its_line(tmp_path, monkeypatch):
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "from itune.config import default_config\n\ndef get_config():\n    c = default_config()\n"
        "    c.optimizer.learning_rte = 1\n    return c\n"
    )
    monkeypatch.chdir(tmp_path)
    for path in (recipe, "mine.py", "./mine.py", f"../{tmp_path.name}/mine.py"):
        with pytest.raises(InputError, match=r"mine.py:5: .*learning_rte.*Did you mean"):
            cfg.load_config(path)
    recipe.write_text("x = 1\ndef y(:\n")
    with pytest.raises(InputError, match=r"^mine\.py:2: SyntaxError"):
        cfg.load_config("mine.py")
