"""From a Hugging Face folder or hub id to a Model, and to its parameters on a mesh."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from itune.models.families import FAMILIES, find_family
from itune.models.families.common import Fields, check_longrope
from itune.models.hf.files import DTYPES, find_folder, read_config, read_header, weight_files
from itune.models.hf.plan import make_plan
from itune.models.hf.read import read_params
from itune.models.model import Model
from itune.models.remat import POLICIES
from itune.types import InputError

log = logging.getLogger("itune")


def load_model(
    path_or_repo: str | os.PathLike,
    mesh: Mesh | None = None,
    param_dtype: str = "float32",
    *,
    revision: str | None = None,
    compute_dtype: str = "float32",
    attention: str = "auto",
    remat: str = "none",
    vocab_size: int | None = None,
) -> Model:
    """The Model of a folder or hub id from its config.json alone: no weights are fetched. See `load_pretrained`."""
    folder = find_folder(path_or_repo, revision, weights=False)
    return _model(folder, mesh, param_dtype, compute_dtype, attention, remat, vocab_size)[0]


def load_pretrained(
    path_or_repo: str | os.PathLike,
    mesh: Mesh | None = None,
    param_dtype: str = "float32",
    *,
    revision: str | None = None,
    compute_dtype: str = "float32",
    attention: str = "auto",
    remat: str = "none",
    vocab_size: int | None = None,
) -> tuple[Model, Any]:
    """A Model and its parameters, from a folder with config.json and safetensors or from a hub id.

    With a mesh each device gets its shard and each host reads only its devices' slices. `vocab_size` is the least
    number of embedding rows: rows that the checkpoint lacks are the mean of its own, and this is logged. Raises
    InputError for an unsupported family or name of a dtype, kernel or policy, for weights that do not fit the config
    (all of them listed), and for a mesh that does not divide a parameter.
    """
    folder = find_folder(path_or_repo, revision)
    model, file_vocab = _model(folder, mesh, param_dtype, compute_dtype, attention, remat, vocab_size)
    plan = make_plan(folder, model, file_vocab)
    if plan.ignored:
        log.info(
            "%s: %d tensors that the model does not use are left out: %s",
            folder,
            len(plan.ignored),
            plan.ignored[0].name,
        )
    return model, read_params(model, plan)


def _model(
    folder: Path,
    mesh: Mesh | None,
    param_dtype: str,
    compute_dtype: str,
    attention: str,
    remat: str,
    vocab_size: int | None,
) -> tuple[Model, int]:
    """The model, and the vocabulary size that its file has."""
    _check_names(param_dtype, compute_dtype, remat)
    hf = read_config(folder)
    family = find_family(hf, str(folder / "config.json"), lambda: tensors_of(folder))
    try:
        fields = Fields(hf, str(folder / "config.json"))
        config = FAMILIES[family].config_from_hf(fields)
        check_longrope(fields, config)
        file_vocab = config.vocab_size
        config = dataclasses.replace(config, vocab_size=max(file_vocab, vocab_size or 0))
        model = Model(config, family, compute_dtype, param_dtype, attention, remat, mesh)
        dataclasses.replace(model, mesh=None).abstract_params()
    except (ArithmeticError, MemoryError) as error:
        raise InputError(f"{folder / 'config.json'}: its numbers describe no model ({error}); copy it again") from error
    return model, file_vocab


def _check_names(param_dtype: Any, compute_dtype: Any, remat: Any) -> None:
    for name, value in (("param_dtype", param_dtype), ("compute_dtype", compute_dtype)):
        try:
            known = np.dtype(value) in DTYPES.values()
        except TypeError:
            known = False
        if not known:
            expected = ", ".join(dtype.name for dtype in DTYPES.values())
            raise InputError(f"{name}: found {value!r}; expected one of {expected}")
    if remat not in ("none", *POLICIES):
        raise InputError(f"remat: found {remat!r}; expected one of none, {', '.join(POLICIES)}")


def tensors_of(folder: Path) -> list[str]:
    """The names of the tensors of a checkpoint; none where it has no readable weights: this only words a refusal."""
    try:
        return [name for file in weight_files(folder)[0] for name in read_header(file)]
    except InputError:
        return []
