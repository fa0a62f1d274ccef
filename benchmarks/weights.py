#!/usr/bin/env python3
"""Weights at scale: memory, bytes read and time of a load, memory of an export, on a random sharded checkpoint.

    python benchmarks/weights.py [--gigabytes 2] [--repeats 5] [--folder DIR]

Writes a Llama folder of that size in bfloat16 (several files and an index) and removes it afterwards. Every row is a
process of its own and prints one JSON line:
  load     one device: peak memory over what the process held before, as a share of the parameters (VmHWM)
  mesh     eight forced devices, fsdp=8: bytes read (rchar) as a share of what the devices hold
  hosts    two processes of four devices: the same for each
  time     wall and CPU seconds against safetensors.numpy.load_file of the same files, taken in turn, warm page cache
  export   peak memory over the resident parameters, in bytes beside those of a shard
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HOME = Path(__file__).parents[1]
sys.path.insert(0, str(HOME / "scripts"))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}


def make(folder: Path, size: float) -> None:
    """A Llama folder of about `size` bytes; values of random sign and mantissa, between 1/128 and 1/64."""
    import make_random_model as random_model
    import ml_dtypes
    from safetensors.numpy import save_file

    width, layers = random_model.choose_shape("llama", int(size / 2), 32768, False)
    tensors = random_model.shapes("llama", width, layers, 32768, False)
    folder.mkdir(parents=True)
    config = random_model.config("llama", width, layers, 32768, False, "bfloat16")
    random_model.write_json(folder / "config.json", config)
    total, groups = random_model.count(tensors), [list[str]()]
    for name in tensors:
        if random_model.count({n: tensors[n] for n in [*groups[-1], name]}) > total / 4 and groups[-1]:
            groups.append([])
        groups[-1].append(name)
    rng, places = np.random.Generator(np.random.SFC64(0)), dict[str, str]()

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        bits = rng.integers(0, 1 << 16, shape, np.uint16)
        bits &= 0x807F
        bits |= 0x3C00
        return bits.view(ml_dtypes.bfloat16)

    for number, names in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        save_file({name: draw(tensors[name]) for name in names}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    random_model.write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": 2 * total}, "weight_map": places}
    )


class Memory:
    """Peak resident bytes since `reset`, over what was resident then, by the kernel's own high-water mark."""

    def reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self.base = self._status("VmRSS")

    def peak(self) -> int:
        return self._status("VmHWM") - self.base

    @staticmethod
    def _status(key: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
        raise KeyError(key)


def bytes_read() -> int:
    """Bytes this process has asked files for (also from the page cache)."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def held(params: Any) -> int:
    """Bytes that this process's devices hold, a replicated shard counted once."""
    import jax

    return sum(
        sum({str(shard.index): shard.data.nbytes for shard in leaf.addressable_shards}.values())
        for leaf in jax.tree.leaves(params)
    )


def load(folder: str, mesh: Any = None, dtype: str = "bfloat16") -> tuple[Any, Any]:
    import jax

    import itune

    model, params = itune.load_pretrained(folder, mesh, dtype)
    return model, jax.block_until_ready(params)


def warm(folder: str) -> None:
    """Imports, devices and code that a first load brings; and the files in the page cache."""
    import jax

    import itune.models  # noqa: F401

    jax.device_put(np.zeros(8)).block_until_ready()
    for file in Path(folder).glob("*.safetensors"):
        with open(file, "rb") as stream:
            while stream.read(1 << 24):
                pass


def part_load(folder: str, dtype: str = "bfloat16") -> dict[str, Any]:
    from itune.models import load_model

    warm(folder)
    load_model(folder)
    memory = Memory()
    memory.reset()
    _, params = load(folder, dtype=dtype)
    size = held(params)
    return {"dtype": dtype, "parameters_bytes": size, "peak_bytes": memory.peak(), "ratio": memory.peak() / size}


def part_mesh(folder: str) -> dict[str, Any]:
    from itune.sharding import make_mesh

    warm(folder)
    mesh, before = make_mesh({"fsdp": -1}), bytes_read()
    _, params = load(folder, mesh)
    read, size = bytes_read() - before, held(params)
    return {"devices": mesh.size, "read_bytes": read, "held_bytes": size, "ratio": read / size}


def part_host(folder: str, address: str, index: str) -> dict[str, Any]:
    import jax

    jax.distributed.initialize(address, 2, int(index))
    return {"host": int(index), **part_mesh(folder)}


def part_export(folder: str, shard: int = 400_000_000) -> dict[str, Any]:
    from itune.models import save_pretrained

    warm(folder)
    model, params = load(folder)
    memory, out = Memory(), Path(folder).parent / "export"
    memory.reset()
    begun, cpu = time.perf_counter(), time.process_time()
    save_pretrained(out, model, params, source=folder, max_shard_bytes=shard)
    took = {"seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - cpu}
    peak, largest = memory.peak(), max(file.stat().st_size for file in out.glob("*.safetensors"))
    shutil.rmtree(out)
    return {"peak_over_parameters": peak, "largest_shard": largest, "ratio": peak / largest, **took}


def part_time(folder: str, repeats: str) -> dict[str, Any]:
    import gc

    from safetensors.numpy import load_file

    def theirs() -> Any:
        return [load_file(file) for file in sorted(Path(folder).glob("*.safetensors"))]

    warm(folder)
    wide = lambda: load(folder, dtype="float32")  # noqa: E731
    ways = {"itune": lambda: load(folder), "itune float32": wide, "safetensors": theirs}
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(int(repeats) + 1):
        for name, way in ways.items():
            begun, used = time.perf_counter(), time.process_time()
            found = way()
            took = time.perf_counter() - begun, time.process_time() - used
            del found
            gc.collect()
            if turn:  # the first compiles and fills caches
                wall[name].append(took[0])
                cpu[name].append(took[1])
    seconds = {name: {"median": statistics.median(all_), "best": min(all_)} for name, all_ in wall.items()}
    cpu_seconds = {name: statistics.median(all_) for name, all_ in cpu.items()}
    return {
        "repeats": int(repeats), "seconds": seconds, "cpu_seconds": cpu_seconds,
        "ratio": seconds["itune"]["median"] / seconds["safetensors"]["median"],
        "ratio_of_best": seconds["itune"]["best"] / seconds["safetensors"]["best"],
        "ratio_of_cpu": cpu_seconds["itune"] / cpu_seconds["safetensors"], "load_average": os.getloadavg()[0],
    }  # fmt: skip


def child(part: str, *arguments: Any, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, __file__, "--part", part, *map(str, arguments)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(HOME)} | environment,
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the checkpoint goes (default: a temporary folder)")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        parts, *arguments = given.part  # one, or several with commas between them
        for part in parts.split(","):
            print(json.dumps({"benchmark": "weights", "row": part} | globals()[f"part_{part}"](*arguments)), flush=True)
        return 0
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=given.folder)))
        folder = root / "model"
        make(folder, given.gigabytes * 1e9)
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        four = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
        code = 0
        for part, arguments, environment in (
            ("load", [folder], {}), ("load", [folder, "float32"], {}), ("mesh", [folder], EIGHT),
            ("time", [folder, given.repeats], {}), ("export", [folder], {}),
        ):  # fmt: skip
            process = child(part, *arguments, **environment)
            print(process.communicate()[0], end="", flush=True)
            code |= process.returncode
        hosts = [child("host", folder, address, i, **four) for i in range(2)]
        for process in hosts:
            print(process.communicate()[0].splitlines()[-1], flush=True)
            code |= process.returncode
    return int(code != 0)


if __name__ == "__main__":
    sys.exit(main())
