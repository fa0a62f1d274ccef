"""The pairs that must agree. A case returns the differences; what makes it impossible it raises as InputError."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from itune.objectives.sft import by_micro_batch
from itune.types import InputError
from itune.verify import runs
from itune.verify.bench import Bench
from itune.verify.small import one_example_a_row, quiet
from itune.verify.table import BOUNDS, Row, compare, relative
from itune.weights import base_weights

MICRO_BATCHES = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """A title, in which {all} and {half} stand for numbers of devices, and what is run."""

    title: str
    run: Callable[[Bench], Row]


def micro_batches(bench: Bench) -> Row:
    if setting := by_micro_batch(bench.config.loss.weighting, bench.config.loss.router_aux):
        raise InputError(f"{setting} depends on train.accumulation by definition")
    return _against_reference(bench, {"train.accumulation": MICRO_BATCHES})


def packing(bench: Bench) -> Row:
    alone = one_example_a_row(bench.batches, 8)
    examples = max(int((batch.segment_ids_BL[:, 0] > 0).sum()) for batch in alone)
    row = _against_reference(bench, {}, batches=alone)
    return dataclasses.replace(row, reason=f"{examples} examples in {bench.config.train.batch_size} rows")


def meshed(shape: Mapping[str, str], bench: Bench) -> Row:
    """A mesh of all devices; a size may be "all" or "half"."""
    _need(bench, 2)
    sizes = {axis: {"all": bench.devices, "half": bench.devices // 2}.get(size) or int(size)
             for axis, size in shape.items()}  # fmt: skip
    return _against_reference(bench, _mesh(sizes), bench.devices)


def expert(bench: Bench) -> Row:
    """As many devices along the expert axis as divide the experts, at most half of them."""
    _need(bench, 2)
    counts = {kind.experts.count for kind in bench.plan({}).model.config.kinds if kind.experts}
    if not counts:
        raise InputError("the model has no experts")
    ways = math.gcd(max(2, bench.devices // 2), *counts)
    if ways == 1:
        raise InputError(f"no even number of devices divides {max(counts)} experts")
    return _against_reference(bench, _mesh({"expert": ways, "fsdp": bench.devices // ways}), bench.devices)


def cross_entropy(bench: Bench) -> Row:
    tokens = bench.config.train.batch_size * bench.config.data.max_length
    row = _against_reference(bench, {"loss.chunk": tokens, "loss.shorten": False})
    return dataclasses.replace(row, reason=f"{bench.config.loss.chunk} tokens a chunk, of {tokens}")


def evaluation(bench: Bench) -> Row:
    plan = bench.plan({})
    params = base_weights(plan.config, plan.model, bench.data.tokenizer, quiet)
    one, many = (bench.held_out_loss(plan.model, params, rows) for rows in (1, 16))
    return Row("", {"loss": relative(one, many)})


def _against_reference(bench: Bench, changes: Mapping[str, Any], devices: int = 1, **options: Any) -> Row:
    return Row("", compare(bench.measure(changes, devices, **options), bench.reference), dict(BOUNDS))


def _mesh(sizes: Mapping[str, int]) -> dict[str, int]:
    return {"mesh.data": 1, "mesh.fsdp": 1, **{f"mesh.{axis}": size for axis, size in sizes.items()}}


def _need(bench: Bench, devices: int) -> None:
    if bench.devices < devices:
        raise InputError("one device here (JAX_PLATFORMS=cpu in the environment gives eight)")


WHOLE_RUNS = {"processes", "evaluation", "resumed", "exported"}  # not compared with the bench's reference

CASES: dict[str, Case] = {
    "micro-batches": Case(f"{MICRO_BATCHES} micro-batches / 1 batch", micro_batches),
    "packing": Case("one example a row / packed", packing),
    "data": Case("mesh data={all} / one device", functools.partial(meshed, {"data": "all"})),
    "fsdp": Case("mesh fsdp={all} / one device", functools.partial(meshed, {"fsdp": "all"})),
    "tensor": Case("mesh tensor=2 x fsdp={half} / one device",
                   functools.partial(meshed, {"tensor": "2", "fsdp": "half"})),
    "context": Case("mesh context=2 x fsdp={half} / one device",
                    functools.partial(meshed, {"context": "2", "fsdp": "half"})),
    "expert": Case("mesh with an expert axis / one device", expert),
    "processes": Case("two processes / one", runs.two_processes),
    "cross-entropy": Case("cross-entropy at once / in chunks", cross_entropy),
    "remat": Case("rematerialised / all kept", lambda bench: _against_reference(bench, {"train.remat": "full"})),
    "unrolled": Case("layers unrolled / scanned", lambda bench: _against_reference(bench, {}, scan=False)),
    "evaluation": Case("evaluation at batch 1 / batch 16", evaluation),
    "resumed": Case("resumed / uninterrupted", runs.resumed),
    "exported": Case("exported and loaded / trained", runs.exported),
}  # fmt: skip
