"""TRL's data order, for `compat = "trl"`: torch's permutations without torch, micro-batches of consecutive rows."""

from __future__ import annotations

import numpy as np

MOST = (2**32 - 1) // 20  # torch shuffles larger sets in another way


def torch_permutation(n: int, seed: int) -> np.ndarray:
    """`torch.randperm(n, generator=torch.Generator().manual_seed(seed))` on CPU, int64 (n,).

    Fisher-Yates from the front: place i changes with place i + (draw modulo n - i), the draws being the 32-bit numbers
    of a Mersenne Twister with the low 32 bits of `seed`. (ATen, native/TensorFactories.cpp, `randperm_cpu`.)
    """
    if n > MOST:
        raise ValueError(f"{n} rows; torch's order is known for at most {MOST}")
    twister = np.random.RandomState(seed & 0xFFFFFFFF)
    draws = twister.randint(0, 2**32, size=max(n - 1, 0), dtype=np.uint32).astype(np.int64)
    places = np.arange(n)
    others = (places[:-1] + draws % (n - places[:-1])).tolist() if n else []
    order = places.tolist()
    for i, other in enumerate(others):
        order[i], order[other] = order[other], order[i]
    return np.asarray(order, np.int64)


def consecutive(rows: list[np.ndarray], batch_size: int, accumulation: int) -> list[np.ndarray]:
    """The rows of a global batch, placed so that the step's micro-batch m (rows r with r mod accumulation == m) holds
    the m-th run of batch_size / accumulation consecutive rows, as a torch data loader gives them. Missing rows of the
    last batch of an epoch stay empty."""
    empty = np.zeros(0, np.int64)
    filled = [*rows, *[empty] * (batch_size - len(rows))]
    return [filled[place] for place in np.arange(batch_size).reshape(accumulation, -1).T.ravel().tolist()]
