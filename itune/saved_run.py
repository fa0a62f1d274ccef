"""What a later command needs of a run directory: its model, and an evaluation of one of its checkpoints."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from itune import evaluators
from itune.checkpoint import Store
from itune.config import Config, load_config
from itune.models import load_model, load_pretrained
from itune.runtime import distributed
from itune.runtime.compilation import use_compilation_cache
from itune.setup_run import check_evaluators, model_settings
from itune.sharding import make_mesh
from itune.types import InputError


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A run's model with the parameters of one of its checkpoints."""

    config: Config
    step: int
    tokenizer: Any
    model: Any
    params: Any


def load_run(
    workdir: str | os.PathLike, step: int | None = None, mesh: Mesh | None = None, log: Callable[[str], None] = print
) -> LoadedRun:
    """Model, tokenizer and verified parameters of a run directory, for evaluation and export.

    Without `step` the newest whole checkpoint. Without `mesh` the config's. Raises InputError when there is no such
    checkpoint, RunError when it is damaged.
    """
    from itune.data.templates import load_tokenizer

    folder = Path(workdir)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: not a run directory: it has no config.json")
    store = Store(folder / "checkpoints", log=log)
    if step is None:
        step = store.newest_good()
    else:
        store.check_named(step)
    if step is None:
        raise InputError(f"{folder}: no checkpoint there yet")
    config = load_config(folder / "config.json")
    mesh = make_mesh(dataclasses.asdict(config.mesh)) if mesh is None else mesh
    tokenizer = load_tokenizer(config.model.path, config.data.chat_template, config.model.revision or None)
    model = load_model(config.model.path, mesh, **model_settings(config, tokenizer))
    shapes = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        model.abstract_params(), model.shardings(),
    )
    return LoadedRun(config, step, tokenizer, model, store.restore_part(step, "trainable", shapes))


def evaluate_saved(
    config: Config, *, workdir: str | None = None, step: int | None = None, model_folder: str | None = None,
    out: str | None = None,
) -> dict[str, Any]:
    """Run `config.evaluators` on a run's checkpoint, or on a model folder or hub id; returns {evaluator: summary}.

    The items go to `out`: by default the run's `eval/<step>`, or `eval-<model>` here. The data are the config's,
    rendered with the tokenizer of what is judged.
    """
    from itune.data.dataset import prepare
    from itune.data.templates import load_tokenizer

    distributed.start()
    use_compilation_cache()
    mesh = make_mesh(dataclasses.asdict(config.mesh))
    if workdir is not None:
        run = load_run(workdir, step, mesh)
        tokenizer, model, params = run.tokenizer, run.model, run.params
        folder, name = Path(out or Path(workdir) / "eval" / str(run.step)), f"{workdir}, step {run.step}"
        dataset = prepare(config.data, tokenizer, seed=config.seed)
        check_evaluators(config, dataset)
    elif model_folder is not None:
        revision = config.model.revision if model_folder == config.model.path else ""
        section = dataclasses.replace(config.model, path=str(model_folder), revision=revision)
        config = dataclasses.replace(config, model=section)
        tokenizer = load_tokenizer(section.path, config.data.chat_template, section.revision or None)
        dataset = prepare(config.data, tokenizer, seed=config.seed)
        check_evaluators(config, dataset)
        model, params = load_pretrained(section.path, mesh, **model_settings(config, tokenizer))
        folder, name = Path(out or f"eval-{Path(section.path).name}"), section.path
    else:
        raise InputError("eval: give a run directory or a model folder")
    print(f"evaluate {name}")
    results = evaluators.evaluate(config, model, params, tokenizer, dataset, folder)
    for evaluator, summary in results.items():
        for metric, value in evaluators.flatten(summary).items():
            print(f"{evaluator}/{metric}  {value:.6g}")
    print(f"items: {folder}")
    return results
