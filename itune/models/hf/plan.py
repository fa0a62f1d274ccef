"""The plan of a load: which tensor of which file fills which parameter. Checked in full before anything is read."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from itune.models.architecture import layer_plan
from itune.models.families import FAMILIES
from itune.models.families.stored import Part, as_part
from itune.models.hf import mxfp4
from itune.models.hf.files import DTYPES, Tensor, read_header, weight_files
from itune.models.model import Model
from itune.types import InputError

HEAD, EMBEDDING = "lm_head/kernel", "embed/embedding"


@dataclasses.dataclass(frozen=True)
class Plan:
    """leaves: parameter path -> its tensors, one a stacked layer, or one an expert of each layer, and parts: which part
    of them it is.

    tied_head: a copy of the tied embedding that the file holds too. ignored: tensors that the family leaves out; they
    stay in the checkpoint when it is exported.
    """

    leaves: dict[str, tuple[Tensor, ...]]
    parts: dict[str, Part]
    tied_head: Tensor | None
    ignored: tuple[Tensor, ...]


def leaf_paths(tree: Any) -> dict[str, Any]:
    """{"blocks/layer_0/mlp/up_proj/kernel": leaf, ...} of a nested dict of parameters."""
    return {"/".join(entry.key for entry in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def tensor_names(model: Model) -> dict[str, list[str]]:
    """Parameter path -> names of its tensors in a checkpoint: of each stacked layer in order, of each expert in it."""
    weights = {path: as_part(entry).name for path, entry in FAMILIES[model.family].WEIGHTS.items()}
    period, repeats = layer_plan(model.config.kinds)
    names = {}
    for path, leaf in leaf_paths(model.abstract_params()).items():
        first, _, rest = path.partition("/")
        layers = [0]
        if first == "blocks":
            place, _, rest = rest.partition("/")
            layers = [int(place.removeprefix("layer_")) + i * period for i in range(repeats)]
        elif first.startswith("rest_"):
            layers = [period * repeats + int(first.removeprefix("rest_"))]
        else:
            rest = path
        experts = range(leaf.shape[path.startswith("blocks/")] if "{expert}" in weights[rest] else 1)
        names[path] = [weights[rest].format(layer=layer, expert=expert) for layer in layers for expert in experts]
    return names


def stack_shape(model: Model, path: str, leaf: Any) -> tuple[int, ...]:
    """The leading dimensions of a parameter over which its tensors are stacked: layers, experts, both or neither."""
    stacked = path.startswith("blocks/")
    return tuple(leaf.shape[: stacked + ("{expert}" in part_of(model, path).name)])


def part_of(model: Model, path: str) -> Part:
    """Which part of its tensors a parameter is."""
    name = path.split("/", 2)[-1] if path.startswith("blocks/") else path
    name = path.partition("/")[2] if path.startswith("rest_") else name
    return as_part(FAMILIES[model.family].WEIGHTS[name])


def make_plan(folder: Path, model: Model, file_vocab: int) -> Plan:
    """Compare the folder's tensors with what the model needs; `file_vocab` is the vocabulary size of its config.json.

    Raises InputError listing every missing, extra, mis-shaped and mistyped tensor, every disagreement between index and
    files, and a head that differs from the embedding it is said to be tied to.
    """
    files, index = weight_files(folder)
    found: dict[str, Tensor] = {}
    problems: list[str] = []
    for file in files:
        for name, tensor in read_header(file).items():
            if name in found:
                problems.append(f"twice: {name} in {found[name].file.name} and {file.name}")
            found[name] = tensor
    if index is not None:
        problems += _index_problems(index, found)
    found, wrong = mxfp4.join(found)
    problems += wrong
    expected = _expected(model, file_vocab)
    tied_name = FAMILIES[model.family].WEIGHTS[HEAD] if model.config.tie_embeddings else None
    ignored = [
        t for name, t in found.items() if name not in expected and name != tied_name and _is_ignored(name, model.family)
    ]
    all_names = tensor_names(model)
    packable = {name for path, names in all_names.items() if part_of(model, path).transposed for name in names}
    problems += _tensor_problems(expected, found, {t.name for t in ignored} | {tied_name}, packable)
    tied_head = found.get(tied_name) if tied_name else None
    if tied_head and not problems:
        problems += _tied_problems(found[FAMILIES[model.family].WEIGHTS[EMBEDDING]], tied_head)
    if problems:
        lines = "\n  ".join(problems)
        raise InputError(
            f"{folder}: the weights do not fit its config.json ({model.family}), {len(problems)} problems:\n  {lines}"
        )
    leaves = {path: tuple(found[name] for name in names) for path, names in all_names.items()}
    return Plan(leaves, {path: part_of(model, path) for path in leaves}, tied_head, tuple(ignored))


def _expected(model: Model, file_vocab: int) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape in the file."""
    leaves = leaf_paths(model.abstract_params())
    expected: dict[str, tuple[int, ...]] = {}
    for path, names in tensor_names(model).items():
        shape = leaves[path].shape[len(stack_shape(model, path, leaves[path])) :]
        if path in (HEAD, EMBEDDING):
            shape = (file_vocab, *shape[1:])
        expected |= dict.fromkeys(names, part_of(model, path).shape(shape))
    return expected


def _is_ignored(name: str, family: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in FAMILIES[family].IGNORED)


def _index_problems(index: dict[str, str], found: dict[str, Tensor]) -> list[str]:
    problems = []
    for name, file in index.items():
        if name not in found:
            problems.append(f"index: {name} is not in {file}")
        elif found[name].file.name != file:
            problems.append(f"index: {name} is in {found[name].file.name}, not in {file}")
    return problems + [f"index: {name} of {found[name].file.name} is not listed" for name in found if name not in index]


def _tensor_problems(
    expected: dict[str, tuple[int, ...]], found: dict[str, Tensor], spared: set[str | None], packable: set[str]
) -> list[str]:
    problems = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in found]
    for name, tensor in found.items():
        if name in spared:
            continue
        if name not in expected:
            problems.append(f"extra: {name} {list(tensor.shape)} {tensor.dtype}")
            continue
        if tensor.shape != expected[name]:
            problems.append(f"shape: {name} is {list(tensor.shape)}, expected {list(expected[name])}")
        if tensor.dtype not in DTYPES and not (tensor.dtype == mxfp4.MXFP4 and name in packable):
            problems.append(f"dtype: {name} is {tensor.dtype}, expected one of {', '.join(DTYPES)}")
    return problems


def _tied_problems(embedding: Tensor, head: Tensor) -> list[str]:
    """config.json ties head and embedding; a head in the file must then equal the embedding."""
    same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    if same and np.array_equal(_bytes(head), _bytes(embedding)):
        return []
    return [
        f"tied: config.json has tie_word_embeddings true, but {head.name} differs from {embedding.name}; "
        f"remove {head.name}, or set tie_word_embeddings to false"
    ]


def _bytes(tensor: Tensor) -> np.ndarray:
    return np.memmap(tensor.file, np.uint8, "r", tensor.start, (tensor.stop - tensor.start,))
