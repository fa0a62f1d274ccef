"""Two processes share a mesh: each reads its own slices, the logits agree, and the first writes the whole export."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

import itune.models

HOST = """
import sys
import jax
jax.config.update("jax_default_matmul_precision", "highest")
address, process, source, target = sys.argv[1:]
jax.distributed.initialize(address, 2, int(process))
import numpy as np
import itune.models
from itune.models.hf import plan, read
from itune.sharding import make_mesh

model = itune.models.load_model(source, make_mesh({"fsdp": 4}))
sizes = []
params = read.read_params(model, plan.make_plan(itune.models.load.find_folder(source), model, 48), sizes.append)
itune.models.save_pretrained(target, model, params, source=source, max_shard_bytes=6000)
print("read", sum(sizes))
"""


def test_two_hosts_read_half_each_and_write_one_folder(base_folder, tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(Path(itune.models.__file__).parents[2])
    target = tmp_path / "out"
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, address, str(i), str(base_folder), str(target)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [host.communicate(timeout=240)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(outputs)

    whole = itune.models.load_pretrained(base_folder)[1]
    again = itune.models.load_pretrained(target)[1]
    leaves = [np.asarray(leaf) for leaf in _leaves(whole)]
    assert all(np.array_equal(a, b) for a, b in zip(leaves, _leaves(again), strict=True))
    total = sum(leaf.nbytes for leaf in leaves)
    shared = sum(np.asarray(leaf).nbytes for leaf in _replicated(whole))  # norms and biases: every host reads them
    for output in outputs:
        read = int(output.rsplit("read ", 1)[1].split()[0])
        assert read == (total - shared) // 2 + shared


def _leaves(params):
    import jax

    return jax.tree.leaves(params)


def _replicated(params):
    import jax

    return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "scale"]
