"""What a later command needs of a run directory: its model, and an evaluation of one of its checkpoints."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from itune import evaluators
from itune.checkpoint import Store
from itune.config import Config
from itune.evaluators import shown
from itune.models import load_model, load_pretrained
from itune.run_source import check_source
from itune.runtime import distributed
from itune.runtime.compilation import use_compilation_cache
from itune.setup_run import make_tuning, model_settings
from itune.sharding import make_mesh
from itune.start_run import run_config, trained_on
from itune.storage.fetch import model_folder as folder_of
from itune.types import InputError
from itune.weights import saved_halves


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A run's model with the parameters of one of its checkpoints."""

    config: Config
    step: int
    tokenizer: Any
    model: Any
    params: Any  # what the model reads: adapters stand beside their base
    tuning: Any = None
    halves: tuple[Any, Any] = ({}, {})  # (trainable, frozen)


def load_run(
    workdir: str | os.PathLike, step: int | None = None, mesh: Mesh | None = None, log: Callable[[str], None] = print
) -> LoadedRun:
    """Model, tokenizer and verified parameters of a run directory, for evaluation and export.

    Without `step` the newest whole checkpoint. Without `mesh` the config's, see `mesh_here`. Raises InputError when
    there is no such checkpoint, or another model where the run began, RunError when it is damaged.
    """
    from itune.data.templates import load_tokenizer

    folder = Path(workdir)
    for name in ("config.json", "checkpoints"):
        if not (folder / name).exists():
            hint = " but a model folder" if name == "checkpoints" and (folder / "tokenizer.json").is_file() else ""
            raise InputError(f"{folder}: not a run directory{hint}: it has no {name}")
    store = Store(folder / "checkpoints", log=log)
    if step is None:
        step = store.newest_good()
    else:
        store.check_named(step)
    if step is None:
        raise InputError(f"{folder}: no checkpoint there yet")
    config = run_config(folder)
    mesh = mesh_here(config) if mesh is None else mesh
    tokenizer = load_tokenizer(config.model.path, config.data.chat_template, config.model.revision or None)
    check_source(config.model, tokenizer, store.read(step).data, log)
    model = load_model(config.model.path, mesh, **model_settings(config, tokenizer))
    tuning = make_tuning(config, model)
    halves = saved_halves(config, model, tokenizer, store, step, log)
    return LoadedRun(config, step, tokenizer, model, tuning.parameters(*halves), tuning, halves)


def mesh_here(config: Config) -> Mesh:
    """The config's mesh where this machine has as many devices; else one that spreads weights over all it has."""
    sizes = dataclasses.asdict(config.mesh)
    fits = math.prod(abs(size) for size in sizes.values()) == jax.device_count() or -1 in sizes.values()
    return make_mesh(sizes if fits else {"fsdp": -1})


@dataclasses.dataclass(frozen=True)
class Judged:
    """A model with what it is asked: the one to judge, or the base that it is compared with."""

    name: str
    tokenizer: Any
    model: Any
    params: Any
    dataset: Any


@distributed.joined()
def evaluate_saved(
    config: Config, *, workdir: str | None = None, step: int | None = None, model_folder: str | None = None,
    out: str | None = None, base: bool = False,
) -> dict[str, Any]:
    """Run `config.evaluators` on a run's checkpoint, or on a model folder or hub id; returns {evaluator: summary}.

    The items go to `out`: by default the run's `eval/<step>`, or `eval-<model>` here. The data are the config's,
    rendered with the tokenizer of what is judged. With `base` the model that `model.path` names is judged too, on the
    same mesh and the same questions (its items go to `out/base`), and the two are compared in pairs: `paired.json`.
    Without it a run's evaluation of step 0, where there is one, is what a later step is compared with.
    """
    use_compilation_cache()
    mesh = mesh_here(config)
    if workdir is None and step is not None:
        raise InputError(f"--step {step}: a model folder has no steps; it goes with --workdir")
    if base and not config.model.path:
        raise InputError("eval --base: model.path is empty; set it to the model that training started from")
    if workdir is not None:
        run = load_run(workdir, step, mesh)
        folder, name = Path(out or Path(workdir) / "eval" / str(run.step)), f"{workdir}, step {run.step}"
        judged = Judged(name, run.tokenizer, run.model, run.params, _questions(config, run.tokenizer))
        base_folder = Path(workdir) / "eval" / "0" if run.step else None
        asks = judged.dataset is not None and config.evaluators != ("data_scores",)  # which is about training data
        if asks and run.step and (count := trained_on(Path(workdir), judged.dataset)):
            print(f"warning: {count} of the {len(judged.dataset.held_out):,} held-out items are of sources that "
                  f"{workdir} trained on, and it did not hold them out; use its config.json")
    elif model_folder is not None:
        if (Path(model_folder) / "checkpoints").is_dir():
            raise InputError(f"--model {model_folder}: is a run directory; give it as --workdir")
        revision = config.model.revision if model_folder == config.model.path else ""
        judged = _load(config, str(model_folder), revision, mesh)
        folder, base_folder = Path(out) if out else _items_folder(None, None, model_folder), None
    else:
        raise InputError("eval: give a run directory or a model folder")
    if base:
        base_folder = folder / "base"
        # of a run: with its tokenizer, so that both are asked the very same tokens and nothing is compiled twice
        origin = _load(config, config.model.path, config.model.revision, mesh, judged if workdir is not None else None)
        print(f"evaluate {origin.name}")
        _evaluate(config, origin, base_folder, None)
    print(f"evaluate {judged.name}")
    results = _evaluate(config, judged, folder, base_folder)
    print(f"items: {folder}")
    return results


def score_data(
    config: Config, *, workdir: str | None = None, step: int | None = None, model_folder: str | None = None,
    out: str | None = None, limit: int = 10,
) -> dict[str, Any]:
    """Score the training examples with a tuned model and print the `limit` most suspicious; returns the summary.

    All stand in `data_scores.jsonl` of `out`, the most suspicious first. Says so where the model was never tuned: its
    order is then chance.
    """
    config = dataclasses.replace(config, evaluators=("data_scores",))
    untuned = _untuned(config, workdir, step, model_folder)
    folder = Path(out) if out else _items_folder(workdir, step, model_folder)
    results = evaluate_saved(config, workdir=workdir, step=step, model_folder=model_folder, out=str(folder))
    path = folder / "data_scores.jsonl"
    with open(path, encoding="utf-8") as lines:
        worst = [json.loads(line) for line, _ in zip(lines, range(limit))]
    for item in worst:
        print(f"{item['suspicion']:.3f}  {item['address']}  loss {item['loss']:.2f} (alone {item['alone']:.2f}), "
              f"least likely token {item['min_p']:.2g}")
    print(f"all of them, the most suspicious first: {path}; to read them: itune data show --worst {path}")
    if untuned:
        print(f"warning: {untuned}, so that the order says no more than chance; tune on these data first")
    return {**results["data_scores"], "file": str(path), "warning": untuned}


def _items_folder(workdir: str | None, step: int | None, model_folder: str | None) -> Path:
    if workdir is None:
        return Path(f"eval-{Path(os.path.abspath(str(model_folder))).name}")  # of `.` too
    found = step if step is not None else Store(Path(workdir) / "checkpoints", log=lambda _: None).newest_good()
    return Path(workdir) / "eval" / str(found)


def _untuned(config: Config, workdir: str | None, step: int | None, model_folder: str | None) -> str:
    """Why this model counts as never tuned, or ""."""
    if workdir is not None:
        return f"step {step} of {workdir} is the model before tuning" if step == 0 else ""
    if str(model_folder) == config.model.path:
        return f"{model_folder} is the model that tuning starts from"
    if not (folder_of(str(model_folder), weights=False) / "itune_proof.json").is_file():
        return f"{model_folder} has no itune_proof.json of a tuned model and may be one that was never tuned"
    return ""


def _load(config: Config, path: str, revision: str, mesh: Mesh, like: Judged | None = None) -> Judged:
    """The model of a folder or hub id with its own tokenizer, or with tokenizer and questions of another."""
    from itune.data.templates import load_tokenizer

    config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=path, revision=revision))
    tokenizer = like.tokenizer if like else load_tokenizer(path, config.data.chat_template, revision or None)
    dataset = like.dataset if like else _questions(config, tokenizer)
    return Judged(path, tokenizer, *load_pretrained(path, mesh, **model_settings(config, tokenizer)), dataset)


def _questions(config: Config, tokenizer: Any) -> Any:
    """The data of the config, where any evaluator reads them; None where all bring their own questions."""
    from itune.data.dataset import prepare

    found = [evaluators.find_evaluator(name)(config) for name in config.evaluators]
    if not any(getattr(one, "needs_held_out", True) or getattr(one, "needs_data", False) for one in found):
        return None
    if not config.data.train:
        raise InputError("config: data.train is empty; set it to a file, a folder or a dataset id")
    dataset = prepare(config.data, tokenizer, seed=config.seed)
    evaluators.check_held_out(found, dataset)
    return dataset


def _evaluate(config: Config, judged: Judged, folder: Path, base_folder: Path | None) -> dict[str, Any]:
    """Judge and print: every number with its interval, then the comparison with the base."""
    results = evaluators.evaluate(
        config, judged.model, judged.params, judged.tokenizer, judged.dataset, folder, base_folder=base_folder
    )
    for evaluator, summary in results.items():
        print("\n".join(shown.lines(summary, evaluator)))
    if base_folder is not None:
        pairs = evaluators.read_json(folder / "paired.json")
        for name in [evaluators.short_name(name) for name in results]:
            for line in shown.paired_lines(pairs.get(name, {}), f"paired {name}"):
                print(line)
    return results
