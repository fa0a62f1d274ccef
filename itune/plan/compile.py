"""The train step compiled ahead of time for chips that are not there: libtpu and JAX's CUDA plugin run on any CPU."""

from __future__ import annotations

import dataclasses
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from itune.plan.chips import Slice
from itune.plan.gpu_target import gpu_devices
from itune.runtime.libtpu import only_compiles
from itune.step import TrainStep
from itune.types import Batch, InputError, TrainState


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device, as the compiler counts them. `peak` is what must fit: arguments live while temporaries do.

    `aliased` bytes of the outputs lie in donated arguments. `temporaries` alone is not what comes on top of the
    arguments: XLA also uses the room of donated ones.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    peak: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One program for one device kind: its memory, its optimised HLO text, and what it took to compile (seconds)."""

    memory: Memory
    text: str
    seconds: float


class DoesNotFit(InputError):
    """The compiler found no room. `needed` bytes, 0 where it did not say."""

    def __init__(self, message: str, needed: int = 0) -> None:
        super().__init__(message)
        self.needed = needed


def slice_devices(where: Slice) -> list[Any]:
    """Stand-ins for the chips of a slice, to build a mesh from. Raises InputError where their compiler refuses."""
    if where.is_tpu:
        return topology_devices(where.name.rpartition("*")[2], where.slices)
    try:
        return gpu_devices(where)
    except Exception as error:  # jax, the plugin and XLA each raise their own
        raise InputError(
            f"topology {where.name!r}: cannot compile for it here ({_first_line(error)}); expected JAX's CUDA plugin "
            f"of the same release as jax, {jax.__version__} (pip install 'itune[cuda-compiler]'), or --formula, which "
            "compiles nothing"
        ) from error


def topology_devices(name: str, slices: int = 1) -> list[Any]:
    """Stand-ins for the devices of TPU slices such as "v5e:2x2", "v6e:2x4" or "v5p:2x2x1", to build a mesh from.

    Raises InputError where libtpu is missing or does not know the slice.
    """
    from jax.experimental import topologies

    only_compiles()
    several = {"num_slices": slices} if slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **several).devices)
    except Exception as error:  # jax, the plugin and libtpu each raise their own
        raise InputError(
            f"topology {name!r}: cannot compile for it here ({_first_line(error)}); expected a slice such as v5e:2x2, "
            "v6e:2x4 or v5p:2x2x1, and libtpu installed (pip install libtpu)"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def compile_step(step: TrainStep, state: TrainState, batch: Batch) -> Compiled:
    """Compile a train step for the devices that its abstract state and batch lie on; nothing is computed.

    `state` and `batch` are ShapeDtypeStructs with shardings (`itune.step.abstract_state`). Raises DoesNotFit, an
    InputError, when the program does not fit the device.
    """
    return compile_lowered(step.lower(state, batch), "the step")


def compile_lowered(lowered: Any, what: str) -> Compiled:
    """The same for any lowered function; `what` names it in the message."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        compiled = _compile(lowered, what, folder)
        try:
            text = compiled.as_text()
        except jax.errors.JaxRuntimeError:  # jaxlib 0.10 cannot read back some asynchronous fusions of v5p and v6e
            text = next(Path(folder).glob("*after_optimizations.txt")).read_text()
    return Compiled(_memory(compiled.memory_analysis()), text, time.perf_counter() - start)


def _compile(lowered: Any, what: str, folder: str) -> Any:
    """The executable, its HLO text left in `folder`."""
    try:
        return lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of", str(error))
        needed = int(float(used[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[used[2]]) if used else 0
        raise DoesNotFit(
            f"{what} does not fit the device's memory: {str(error).splitlines()[0]}", needed
        ) from error


def _memory(analysis: Any) -> Memory:
    return Memory(
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes,
        aliased=analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
        peak=analysis.peak_memory_in_bytes,
    )
