"""Config files: ConfigDict in a Python file -> overrides -> frozen dataclasses, strict, with suggestions.

A recipe is Python and runs when it is loaded: load only recipes that you trust. `configs/default.py` holds every key
once with its unit and meaning; the dataclasses here and in `data_section.py` hold each key's type and range.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from itune.data_section import DataSection
from itune.data_section import key as _key
from itune.types import InputError

Dtype = Literal["float32", "bfloat16"]
_LARGEST = 2**31 - 1  # of a whole number whose key names no bound


@dataclasses.dataclass(frozen=True)
class ModelSection:
    path: str = _key("", "folder or hub id")
    revision: str = _key("", "commit, tag or branch of the hub id")
    param_dtype: Dtype = _key("float32", "dtype")
    compute_dtype: Dtype = _key("float32", "dtype")
    attention: Literal["auto", "xla", "blocks", "cudnn", "pallas", "splash"] = _key("auto", "backend")


@dataclasses.dataclass(frozen=True)
class LossSection:
    weighting: Literal["token", "example", "microbatch_mean", "sum"] = _key("token", "name")
    chunk: int = _key(1024, "tokens", 1)
    blocks: int = _key(1, "parts of the vocabulary", 1)
    router_aux: float = _key(0.0, "coefficient", 0.0)
    shorten: bool = _key(True, "yes or no")


@dataclasses.dataclass(frozen=True)
class TrainSection:
    epochs: float = _key(1.0, "passes over the data", 0.0, low_open=True)
    max_steps: int = _key(0, "optimizer steps", 0)
    batch_size: int = _key(8, "rows of the global batch", 1)
    accumulation: int = _key(1, "micro-batches a step", 1)
    remat: Literal["none", "full", "dots"] = _key("none", "policy")
    deterministic: bool = _key(False, "yes or no")
    init_from: str = _key("", "run directory")
    freeze: str = _key("", "regular expression over parameter paths")
    max_skipped: int = _key(3, "updates in a row", 1)
    skip_spikes: float = _key(0.0, "standard deviations, 0 is off", 0.0)
    spike_window: int = _key(128, "steps", 4)
    timeout: float = _key(1800.0, "seconds a step, 0 is off", 0.0)


@dataclasses.dataclass(frozen=True)
class OptimizerSection:
    name: str = _key("adamw", "adamw, adafactor, sgd or any optax optimizer")
    learning_rate: float = _key(2e-5, "peak step size", 0.0, low_open=True)
    schedule: Literal["linear", "cosine", "constant", "wsd"] = _key("linear", "name")
    warmup: float = _key(0.0, "steps, or a share of all steps below 1", 0.0)
    weight_decay: float = _key(0.0, "per step and learning rate", 0.0)
    clip_norm: float = _key(1.0, "global gradient norm, 0 is off", 0.0)
    b1: float = _key(0.9, "decay", 0.0, 1.0, high_open=True)
    b2: float = _key(0.999, "decay", 0.0, 1.0, high_open=True)
    eps: float = _key(1e-8, "added to the root", 0.0)
    moment_dtype: Dtype = _key("float32", "dtype")
    second_moment_dtype: Dtype = _key("float32", "dtype")
    stochastic_rounding: bool = _key(False, "yes or no")
    rates: dict = _key({}, "regular expression over parameter paths -> multiplier")
    options: dict = _key({}, "keyword arguments of the optax optimizer")


@dataclasses.dataclass(frozen=True)
class LoraSection:
    rank: int = _key(0, "columns, 0 is off", 0)
    alpha: float = _key(16.0, "scale times rank", 0.0)
    targets: str = _key(r".*_proj", "regular expression over module names")
    dropout: float = _key(0.0, "share of an adapter's input entries", 0.0, 0.9)
    rslora: bool = _key(False, "yes or no")
    init_from: str = _key("", "adapter folder of peft or hub id")


@dataclasses.dataclass(frozen=True)
class MeshSection:
    data: int = _key(1, "devices, -1 infers", -1)
    fsdp: int = _key(-1, "devices, -1 infers", -1)
    expert: int = _key(1, "devices, -1 infers", -1)
    context: int = _key(1, "devices, -1 infers", -1)
    tensor: int = _key(1, "devices, -1 infers", -1)
    dcn_data: int = _key(1, "slices", 1)
    dcn_fsdp: int = _key(1, "slices", 1)


@dataclasses.dataclass(frozen=True)
class CheckpointSection:
    every: int = _key(200, "steps, 0 is only at the end", 0)
    keep: int = _key(2, "newest checkpoints", 1)
    keep_best: str = _key("", "metric whose best checkpoint is kept")
    keep_every: int = _key(0, "steps, 0 is off", 0)
    minutes: float = _key(0.0, "minutes, 0 is off", 0.0)


@dataclasses.dataclass(frozen=True)
class EvalSection:
    every: int = _key(0, "steps, 0 is only before and after", 0)
    batch_size: int = _key(16, "rows", 1, 65536)
    max_new_tokens: int = _key(64, "tokens", 1)
    limit: int = _key(0, "items, 0 is all", 0)
    score: str = _key("exact", "name or package.module:function")
    by: str = _key("category", "field of the metadata")
    groups: tuple = _key((), "fields of the metadata")
    patience: int = _key(0, "evaluations, 0 is off", 0)
    metric: str = _key("heldout_loss/loss", "evaluator/number")
    min_delta: float = _key(0.0, "in the unit of eval.metric", 0.0)
    lm_eval: tuple = _key((), "task names of lm-evaluation-harness")
    lm_eval_path: str = _key("", "folder of task files")
    lm_eval_options: dict = _key({}, "keyword arguments of lm_eval.simple_evaluate")


@dataclasses.dataclass(frozen=True)
class LogSection:
    every: int = _key(10, "steps", 1)
    tensorboard: bool = _key(True, "yes or no")
    wandb: str = _key("", "project name")


@dataclasses.dataclass(frozen=True)
class ProfileSection:
    steps: str = _key("", "first:last step")


@dataclasses.dataclass(frozen=True)
class Config:
    """The resolved config of a run: every key that `configs/default.py` explains."""

    seed: int = _key(0, "number", 0, 2**63 - 1)
    compat: Literal["", "trl"] = _key("", "name")
    evaluators: tuple = _key(("heldout_loss",), "names")
    model: ModelSection = dataclasses.field(default_factory=ModelSection)
    data: DataSection = dataclasses.field(default_factory=DataSection)
    loss: LossSection = dataclasses.field(default_factory=LossSection)
    train: TrainSection = dataclasses.field(default_factory=TrainSection)
    optimizer: OptimizerSection = dataclasses.field(default_factory=OptimizerSection)
    lora: LoraSection = dataclasses.field(default_factory=LoraSection)
    mesh: MeshSection = dataclasses.field(default_factory=MeshSection)
    checkpoint: CheckpointSection = dataclasses.field(default_factory=CheckpointSection)
    eval: EvalSection = dataclasses.field(default_factory=EvalSection)
    log: LogSection = dataclasses.field(default_factory=LogSection)
    profile: ProfileSection = dataclasses.field(default_factory=ProfileSection)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, as `config.json` stores it."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def configs_dir() -> Path:
    """The folder of shipped recipes: inside the wheel, or beside the package in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def default_config() -> Any:
    """A fresh ConfigDict with every key of `configs/default.py`, for a recipe to change."""
    return _run_recipe(configs_dir() / "default.py").lock()


def load_config(path: str | os.PathLike, overrides: Mapping[str, Any] | None = None) -> Config:
    """Load a recipe (a `.py` file, a saved `config.json`, or the name of a shipped recipe) and apply overrides.

    `overrides` maps dotted keys to values, or to text as it comes from the command line. Raises InputError for a
    missing file, an unknown key (with the nearest one), a wrong type or a value out of range (with the key's unit).
    """
    found = find_recipe(path)
    if found.suffix not in (".json", ".py"):
        raise InputError(f"{found}: expected a recipe (.py) or a saved config (.json)")
    tree: dict[str, Any] = _read_json(found) if found.suffix == ".json" else _run_recipe(found).to_dict()
    for key, value in (overrides or {}).items():
        _set(tree, key, value)
    return from_dict(tree)


def from_dict(tree: Mapping[str, Any]) -> Config:
    """The frozen Config of a nested dict; keys that are absent take their default."""
    return _build(Config, tree, "")


def find_recipe(path: str | os.PathLike) -> Path:
    """The file that `--config` names: a path, or a shipped recipe by its name."""
    given = Path(path)
    if given.is_file():
        return given
    shipped = configs_dir() / f"{given.stem if given.suffix == '.py' else given.name}.py"
    if shipped.is_file() and (given.parent == Path(".") or given.parent.name == "configs"):
        return shipped
    names = sorted(p.stem for p in configs_dir().glob("*.py"))
    raise InputError(f"config: no file {given} and no shipped recipe of that name{_nearest(given.stem, names)}; "
                     f"shipped recipes: {', '.join(names)}")


def parse_overrides(arguments: list[str]) -> dict[str, str]:
    """`--config.a.b=value` arguments -> {"a.b": "value"}."""
    overrides = {}
    for argument in arguments:
        body = argument.removeprefix("--config.")
        if body == argument or "=" not in body:
            raise InputError(f"argument {argument!r} is not understood; overrides look like --config.train.epochs=2")
        key, _, value = body.partition("=")
        overrides[key] = value
    return overrides


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 at byte {error.start}; expected the config.json of a run") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: no JSON: {error.msg}; expected the config.json of a run") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected an object with the sections of a config, found {type(tree).__name__}")
    return tree


def _run_recipe(path: Path) -> Any:
    """The ConfigDict of a recipe's get_config(). Whatever the file raises is an answer about that file."""
    module_spec = importlib.util.spec_from_file_location(f"itune_recipe_{path.stem}", path)
    assert module_spec and module_spec.loader
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise InputError(f"{path}: has no get_config(); see configs/default.py")
        made = module.get_config()
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in _frames(error) if frame.filename == module_spec.origin]
        if isinstance(error, SyntaxError) and error.filename == module_spec.origin:
            lines.append(error.lineno)
        line = lines[-1] if lines else 1
        text = str(error).strip('"').replace("\\n", " ").splitlines()[0] if str(error) else ""
        raise InputError(f"{path}:{line}: {type(error).__name__}: {text}") from error
    if not hasattr(made, "to_dict"):
        raise InputError(f"{path}: get_config() returned {type(made).__name__}; expected a ConfigDict")
    return made


def _frames(error: BaseException) -> Any:
    import traceback

    return traceback.extract_tb(error.__traceback__)


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Write one override into the nested dict, checking the path against the dataclasses."""
    *parents, last = dotted.split(".")
    cls: Any = Config
    node = tree
    for depth, name in enumerate(parents):
        field = _field(cls, name, ".".join(parents[:depth]), dotted)
        annotation = typing.get_type_hints(cls)[field.name]
        if not dataclasses.is_dataclass(annotation) and dict not in (annotation, *typing.get_args(annotation)):
            raise InputError(f"config: {'.'.join(parents[: depth + 1])} is a key, not a section; found {dotted}")
        if not isinstance(node.get(name), dict):
            node[name] = {}
        node = node[name]
        if not dataclasses.is_dataclass(annotation):
            node[".".join([*parents[depth + 1 :], last])] = _literal(value)
            return
        cls = annotation
    annotation = typing.get_type_hints(cls)[_field(cls, last, ".".join(parents)).name]
    if dataclasses.is_dataclass(annotation):
        names = ", ".join(f"{dotted}.{f.name}" for f in dataclasses.fields(annotation))
        raise InputError(f"config: {dotted} is a section; set one of its keys: {names}")
    node[last] = value if annotation is str or not isinstance(value, str) else _literal(value)


def _literal(text: Any) -> Any:
    """Command-line text as a Python value where it reads as one, else as the text."""
    if not isinstance(text, str):
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _build(cls: Any, tree: Mapping[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    for name in tree:
        _field(cls, name, prefix)
    values = {}
    for field in dataclasses.fields(cls):
        if field.name not in tree:
            continue
        key = f"{prefix}.{field.name}" if prefix else field.name
        value, annotation = tree[field.name], hints[field.name]
        if dataclasses.is_dataclass(annotation):
            if not isinstance(value, Mapping):
                raise InputError(f"config: {key} is a section with its own keys, found {value!r}")
            values[field.name] = _build(annotation, value, key)
        else:
            values[field.name] = _checked(key, value, annotation, field.metadata)
    return cls(**values)


def _field(cls: Any, name: str, prefix: str, whole: str = "") -> dataclasses.Field:
    """The field `name` of a section; `whole` is the dotted key that the user wrote, for a better suggestion."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if name in fields:
        return fields[name]
    path = whole or (f"{prefix}.{name}" if prefix else name)
    near = difflib.get_close_matches(path, all_keys(), n=1, cutoff=0.6)
    near = near or difflib.get_close_matches(name, [k.rsplit(".", 1)[-1] for k in all_keys()], n=1, cutoff=0.6)
    near = [k for k in all_keys() if k == near[0] or k.endswith("." + near[0])][:1] if near else near
    hint = f"; did you mean {near[0]}?" if near else f"; keys here: {', '.join(fields)}"
    raise InputError(f"config: unknown key {path}{hint}")


def all_keys(cls: Any = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the config tree."""
    keys: list[str] = []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        path = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            keys += all_keys(hints[field.name], path + ".")
        else:
            keys.append(path)
    return keys


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f" (nearest: {near[0]})" if near else ""


def _checked(key: str, value: Any, annotation: Any, meta: Mapping[str, Any]) -> Any:
    """`value` as its declared type, or an InputError that names key, unit, finding and expectation."""
    unit = f" ({meta['unit']})" if meta.get("unit") else ""
    origin, options = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        if value not in options:
            shown = ", ".join(repr(o) for o in options)
            near = _nearest(str(value), [str(o) for o in options])
            raise InputError(f"config: {key}{unit} must be one of {shown}, found {value!r}{near}")
        return value
    kinds = options if origin in (typing.Union, types.UnionType) else (annotation,)
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds:
        value = float(value) if abs(value) < 1e308 else math.inf
    if isinstance(value, float) and int in kinds and value.is_integer():
        value = int(value)
    if not isinstance(value, tuple(kinds)) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise InputError(f"config: {key}{unit} must be {expected}, found {type(value).__name__} {value!r}")
    if isinstance(value, tuple | dict) and (strange := [item for item in value if not isinstance(item, str)]):
        what, found = "keys" if isinstance(value, dict) else "items", strange[0]
        raise InputError(f"config: {key}{unit} must have texts as {what}, found {type(found).__name__} {found!r}")
    low, high = meta.get("low"), meta.get("high")
    if int in kinds and high is None:
        high = _LARGEST
    if isinstance(value, int | float) and not isinstance(value, bool):
        too_low = low is not None and (value < low or (meta["low_open"] and value == low))
        too_high = high is not None and (value > high or (meta["high_open"] and value == high))
        if too_low or too_high or not math.isfinite(value):
            bound = f"{'above' if meta['low_open'] else 'at least'} {low}" if low is not None else ""
            most = "below" if meta["high_open"] else "at most"
            bound += f"{' and ' if bound else ''}{most} {high}" if high is not None else ""
            bound = bound or "a finite number"
            raise InputError(f"config: {key}{unit} must be {bound}, found {str(value)[:40]}")
    return value
