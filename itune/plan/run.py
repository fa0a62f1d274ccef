"""`itune plan`: what a run will need and take, before anything is paid for."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import time
from typing import Any

import jax

from itune.config import Config
from itune.evaluators.heldout_loss import token_step
from itune.judge import check_patience
from itune.models import load_model
from itune.models.architecture import ModelConfig
from itune.models.attention import KERNELS
from itune.models.layers import ADAPTERS
from itune.optim import make_optimizer
from itune.plan.apart import compiled_apart
from itune.plan.chips import THIS_MACHINE, Slice, here, parse_topology
from itune.plan.compile import Compiled, DoesNotFit, compile_lowered, slice_devices
from itune.plan.count import count_flops
from itune.plan.estimate import estimate, prices
from itune.plan.gpu_target import cudnn_formula, cudnn_memory
from itune.plan.hlo import between_slices, collectives, moved
from itune.plan.inputs import Known, known
from itune.plan.layout import Layout, lay_out, slices_said
from itune.plan.memory import Need, formula_memory
from itune.plan.report import Report, lines
from itune.plan.traffic import across_slices, formula_traffic
from itune.runtime.cuda import compiler_here
from itune.runtime.profiler import traced_steps
from itune.setup_run import Log, make_plan, make_tuning, training_only
from itune.sharding import batch_sharding, rows_divisor
from itune.types import Batch, InputError


def plan(
    config: Config, topology: str | None = None, *, search: bool = False, compiled: bool = True,
    price_file: str | None = None, log: Log = print,
) -> dict[str, Any]:
    """Plan the run on a slice (this machine's devices without one), print it, and return the numbers.

    Compiles where the compiler for its chips is there: libtpu, or JAX's CUDA plugin. Raises InputError for a config
    that cannot run there, and for devices whose speed is not known; RunError where the compiler ends its process.
    """
    if not config.model.path:
        raise InputError("config: model.path is empty; a folder with config.json is enough to plan")
    where = parse_topology(topology) if topology else this_machine()
    table = prices(price_file)
    facts = known(config)
    _check_as_train(config, facts)
    lacks = _no_compiler(where)
    can_compile = compiled and not lacks
    if compiled and lacks:
        log(f"{lacks}: by formula only")
    if search:
        from itune.plan.search import search as run_search

        return run_search(config, where, facts, table, can_compile, log, price_file)
    report = (compiled_apart if can_compile else formula_report)(config, where, facts, table)
    for line in lines(report, price_file):
        log(line)
    return report.to_dict()


def _no_compiler(where: Slice) -> str:
    """Why nothing can be compiled for these chips here, "" where it can."""
    if where.name == THIS_MACHINE:
        return "these chips have no name that a compiler knows"
    if where.is_tpu:
        return "" if importlib.util.find_spec("libtpu") else "libtpu is absent (pip install libtpu)"
    if where.slices > 1:
        return "GPUs of several hosts cannot be compiled for here (those of one can, such as gpu:h200:8)"
    return "" if compiler_here() else "JAX's CUDA plugin is absent (pip install 'itune[cuda-compiler]')"


def _check_as_train(config: Config, facts: Known) -> None:
    """Raise InputError for settings that `itune train` refuses whatever the mesh; `lay_out` checks the others."""
    if config.evaluators:  # without, only training is planned
        check_patience(config)
    traced_steps(config.profile.steps)
    section = config.model
    model = load_model(section.path, None, section.param_dtype, revision=section.revision or None)
    trainable, _ = make_tuning(config, model).abstract()
    make_optimizer(config.optimizer, facts.steps or 1, trainable)


def this_machine() -> Slice:
    """The devices of this machine as a slice. Raises InputError where their speed is not known: a CPU."""
    where = here(jax.devices())
    if where is None:
        raise InputError(
            f"plan: the speed of this machine's {jax.devices()[0].device_kind} is not known; expected --topology with "
            "the chips that the run is for, such as v5e:4x4, v6e:2x4, v5p:2x2x1 or gpu:h200:1"
        )
    return where


def formula_report(config: Config, where: Slice, facts: Known, table: dict[str, Any]) -> Report:
    """Everything by formula: no step is traced or compiled."""
    _check_attention(config, where)
    layout = lay_out(config, where.chips, facts.data.tokenizer.vocab_size, where.slices)
    traffic, across = formula_traffic(layout), across_slices(layout)
    return Report(
        where, _settings(layout), _by_formula(layout, where, facts), where.chip.memory, _shown(traffic, across),
        estimate(layout, where, sum(traffic.values()), across), facts.steps, facts.source, _price(table, where),
    )


def _by_formula(layout: Layout, where: Slice, facts: Known) -> Need:
    return formula_memory(layout, cudnn_formula(layout, where.chip, facts.data.loader.max_segments))


def _check_attention(config: Config, where: Slice) -> None:
    platform, kernel = "tpu" if where.is_tpu else "gpu", config.model.attention
    if kernel not in ("auto", "xla", *KERNELS[platform]):
        raise InputError(f"model.attention={kernel} cannot run on {where.name}; choose auto, xla or one of "
                         f"{', '.join(KERNELS[platform])}")


def compiled_report(config: Config, where: Slice, facts: Known, table: dict[str, Any]) -> Report:
    """Memory, traffic and FLOPs of the very programs that the run would compile."""
    begun, cpu = time.perf_counter(), time.process_time()
    layout = lay_out(config, where.chips, facts.data.tokenizer.vocab_size, where.slices)
    made = make_plan(training_only(config), facts.data, lambda line: None, slice_devices(where))
    turns = math.ceil(layout.tokens / min(config.loss.chunk, layout.tokens))
    with jax.default_matmul_precision("default"):
        traced = made.step.trace(made.state, made.batch)
        flops = count_flops(traced.jaxpr, turns, visible_share(made.model.config, config.data.max_length))
        program: Compiled | None = None
        needed = attention = 0
        try:
            program = compile_lowered(traced.lower(), "the train step")
        except DoesNotFit as error:
            needed = error.needed
        evaluation = _evaluation(config, made) if config.evaluators else 0
    by_formula = _by_formula(layout, where, facts)
    traffic, across = formula_traffic(layout), across_slices(layout)
    shown = _shown(traffic, across)
    if program is not None:
        traffic, attention = moved(collectives(program.text, turns)), cudnn_memory(program.text)
        needed = program.memory.peak + attention
        others = moved(between_slices(program.text, turns))
        across, shown = sum(others.values()), traffic | {f"{kind} of slices": size for kind, size in others.items()}
    report = Report(
        where, _settings(layout), _split(by_formula, needed, attention), where.chip.memory, shown,
        estimate(layout, where, sum(traffic.values()), across, flops),
        facts.steps, facts.source, _price(table, where), evaluation=evaluation,
        compiled={"seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - cpu,
                  "formula_total": by_formula.total, "float32_product_flops": flops["float32"],
                  "fits_compiler": float(program is not None)},
    )  # fmt: skip
    return report


def visible_share(m: ModelConfig, length: int) -> float:
    """Share of the (query, key) square of a row that an average layer's attention computes."""
    seen = [min(kind.window or length, length) for kind in m.kinds]
    return sum(w * (length - (w - 1) / 2) for w in seen) / len(seen) / length**2


def _evaluation(config: Config, made: Any) -> int:
    """Peak bytes of the held-out loss's step; 0 where the compiler found no room (then training has none either)."""
    rows = -(-config.eval.batch_size // rows_divisor(made.mesh)) * rows_divisor(made.mesh)
    shape = (rows, config.data.max_length)
    sharding = batch_sharding(made.mesh)
    batch = Batch(*(jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding) for leaf in made.batch))
    try:
        trainable, frozen = made.state.trainable, made.state.frozen
        # not by Tuning.parameters where there are adapters: it scales them, and shapes cannot be scaled
        params = {**frozen, ADAPTERS: trainable} if made.tuning.lora else made.tuning.parameters(trainable, frozen)
        lowered = token_step(made.model, config.loss.chunk).lower(params, {}, batch)
        return compile_lowered(lowered, "the evaluation step").memory.peak
    except DoesNotFit as error:
        return error.needed


def _split(by_formula: Need, needed: int, attention: int) -> Need:
    """The compiler's total, its temporaries as what the other parts leave."""
    if not needed:
        return by_formula
    left = max(needed - by_formula.parameters - by_formula.optimizer - attention, 0)
    activations = min(by_formula.activations, left)
    gradients = min(by_formula.gradients, left - activations)
    return dataclasses.replace(
        by_formula, activations=activations, gradients=gradients, temporaries=left - activations - gradients,
        attention=attention,
    )  # fmt: skip


def _settings(layout: Layout) -> dict[str, Any]:
    c = layout.config
    return {
        "mesh": dict(layout.sizes), "dcn": slices_said(c),
        "rows": c.train.batch_size, "length": c.data.max_length,
        "accumulation": c.train.accumulation, "remat": c.train.remat, "lora_rank": c.lora.rank,
        "compute_dtype": c.model.compute_dtype, "param_dtype": c.model.param_dtype,
    }  # fmt: skip


def _shown(traffic: dict[str, float], across: float) -> dict[str, float]:
    return {**traffic, **({"of these, from other slices": across} if across else {})}


def _price(table: dict[str, Any], where: Slice) -> float | None:
    row = table.get(where.chip.name)
    return float(row["on_demand"]) if row else None
